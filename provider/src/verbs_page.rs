//! docs/verbs.md against the code.

use std::collections::BTreeMap;

use crate::release::LAYOUTS;
use crate::verbs::OPS;

const PAGE: &str = include_str!("../../docs/verbs.md");

/// What the table says of each operation.
fn rows() -> BTreeMap<String, String> {
    let mut rows = BTreeMap::new();
    let table = PAGE
        .lines()
        .skip_while(|line| !line.starts_with("| operation |"))
        .skip(2)
        .take_while(|line| line.starts_with('|'));
    for line in table {
        let cells: Vec<_> = line.split('|').map(str::trim).collect();
        let [_, operations, answer, ..] = cells[..] else {
            panic!("a row of the table is {line:?}");
        };
        // What is in brackets is about the names before it.
        let names = operations
            .split(['(', ')'])
            .step_by(2)
            .flat_map(|text| text.split('`').skip(1).step_by(2));
        for name in names {
            let twice = rows.insert(name.to_owned(), answer.to_owned());
            assert!(twice.is_none(), "{name} is there twice");
        }
    }
    rows
}

#[test]
fn the_page_has_every_operation_of_every_release_and_no_other() {
    let rows = rows();
    let newest = &LAYOUTS[LAYOUTS.len() - 1];
    for layout in &LAYOUTS {
        for slot in layout.slots {
            assert!(rows.contains_key(*slot), "{slot} is not on the page");
        }
    }
    for name in rows.keys() {
        assert!(newest.slot(name).is_some(), "{name} is no operation");
    }
}

#[test]
fn the_page_says_yes_of_what_is_filled_in() {
    for (name, answer) in rows() {
        let filled = OPS.iter().any(|(operation, _)| *operation == name);
        assert_eq!(answer == "yes", filled, "{name}: {answer}");
        assert!(
            ["yes", "no", "not needed"].contains(&answer.as_str()),
            "{name}: {answer}"
        );
    }
}
