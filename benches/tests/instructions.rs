//! What the virtual device adds to a request, in instructions: counted by valgrind over two runs of different length, whose
//! difference has nothing of start and end in it. The counts repeat to the hundredth, so a figure that grew is a change of
//! the code, or of the compiler: then docs/performance.md and the figures here are to be looked at again.

use std::process::Command;

use reverbs_benches::shape::{Route, Shape};

/// Added instructions as recorded in docs/performance.md: before and after the hardware was replaced.
const RECORDED: &[(Shape, f64, f64)] = &[
    (Shape::Send, 59.91, 104.54),
    (Shape::Write, 59.91, 117.40),
    (Shape::Unsignaled, 54.72, 90.29),
    (Shape::ChainOf4, 136.18, 240.78),
    (Shape::ChainOf16, 122.00, 228.14),
    (Shape::FourElements, 209.86, 424.32),
    (Shape::Inline32, 254.90, 306.20),
    (Shape::Pairs64, 59.92, 104.41),
    (Shape::Pairs1024, 59.50, 103.86),
    (Shape::OneAtATime, 89.41, 133.58),
    (Shape::Receive, 104.58, 215.97),
    (Shape::SharedReceive, 104.58, 265.00),
];

/// How much more is let pass: one instruction, or 2 %.
fn limit(recorded: f64) -> f64 {
    recorded + f64::max(1.0, recorded * 0.02)
}

/// The budget of one request of one element, whatever was recorded.
const BUDGET: (f64, f64) = (60.0, 115.0);

#[test]
fn no_shape_adds_more_instructions_than_recorded() {
    if cfg!(debug_assertions) {
        println!("skipped: not an optimized build (use --release)");
        return;
    }
    if Command::new("valgrind").arg("--version").output().is_err() {
        println!("skipped: no valgrind");
        return;
    }
    let mut grown = Vec::new();
    for (shape, before, after) in RECORDED {
        let direct = count(Route::Direct, *shape);
        for (route, recorded) in [(Route::Before, before), (Route::After, after)] {
            let added = count(route, *shape) - direct;
            println!(
                "{shape} {}: {added:.2} added, {recorded:.2} recorded",
                route.name()
            );
            if added > limit(*recorded) {
                grown.push(format!(
                    "{shape} {}: {added:.2} for {recorded:.2}",
                    route.name()
                ));
            }
            let budget = match route {
                Route::After => BUDGET.1,
                _ => BUDGET.0,
            };
            if *shape == Shape::Send && added > budget {
                grown.push(format!(
                    "{shape} {}: {added:.2}, over {budget}",
                    route.name()
                ));
            }
        }
    }
    assert!(grown.is_empty(), "more instructions: {}", grown.join("; "));
}

/// Instructions for one request.
fn count(route: Route, shape: Shape) -> f64 {
    let (few, many) = (16_384, 49_152);
    let difference = instructions(route, shape, many) - instructions(route, shape, few);
    difference as f64 / f64::from(many - few)
}

fn instructions(route: Route, shape: Shape, operations: u32) -> u64 {
    let output = Command::new("valgrind")
        .args([
            "--tool=cachegrind",
            "--cache-sim=no",
            "--cachegrind-out-file=/dev/null",
        ])
        .arg(env!("CARGO_BIN_EXE_count-operations"))
        .args([route.name(), shape.name(), &operations.to_string()])
        .output()
        .expect("valgrind runs");
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{} {shape}: {text}", route.name());
    let line = text.lines().find_map(|line| line.split_once("refs:"));
    let number = line.map(|(_, number)| number.trim().replace(',', ""));
    number
        .and_then(|number| number.parse().ok())
        .unwrap_or_else(|| panic!("no count in {text}"))
}
