//! What the virtual device adds to a request, in instructions: counted by valgrind over two runs of different length, whose
//! difference has nothing of start and end in it. The counts repeat to the hundredth, so a figure that grew is a change of
//! the code, or of the compiler: then docs/performance.md and the figures here are to be looked at again.

use std::process::Command;

use reverbs_benches::shape::{Route, Shape};

/// Added instructions as recorded in docs/performance.md: before and after the hardware was replaced.
const RECORDED: &[(Shape, f64, f64)] = &[
    (Shape::Send, 59.91, 109.38),
    (Shape::Write, 59.91, 114.50),
    (Shape::Unsignaled, 54.72, 95.40),
    (Shape::ChainOf4, 127.78, 253.38),
    (Shape::ChainOf16, 107.78, 235.22),
    (Shape::FourElements, 219.74, 466.42),
    (Shape::Inline32, 264.77, 321.22),
    (Shape::Pairs64, 59.92, 109.47),
    (Shape::Pairs1024, 59.50, 108.94),
    (Shape::Builders, 152.21, 324.78),
    (Shape::BuildersOf16, 128.08, 309.28),
    (Shape::Readers, 77.65, 143.64),
    (Shape::OneAtATime, 75.41, 138.57),
    (Shape::Receive, 59.77, 144.43),
    (Shape::SharedReceive, 59.77, 203.40),
];

/// How much more is let pass: one instruction, or 2 %. What goes the general way copies with the C library's `memcpy`, whose count
/// depends on where things lie in memory: 6 %.
fn limit(shape: Shape, recorded: f64) -> f64 {
    let general = [
        Shape::ChainOf4,
        Shape::ChainOf16,
        Shape::FourElements,
        Shape::Inline32,
        Shape::Builders,
        Shape::BuildersOf16,
    ];
    let share = if general.contains(&shape) { 0.06 } else { 0.02 };
    recorded + f64::max(1.0, recorded * share)
}

/// The budget of one request of one element, whatever was recorded.
const BUDGET: (f64, f64) = (60.0, 115.0);

#[test]
#[cfg_attr(debug_assertions, ignore = "counts optimized code: use --release")]
#[expect(clippy::print_stdout, reason = "the counts, for --nocapture")]
fn no_shape_adds_more_instructions_than_recorded() {
    let mut grown = Vec::new();
    for (shape, before, after) in RECORDED {
        let direct = count(Route::Direct, *shape);
        for (route, recorded) in [(Route::Before, before), (Route::After, after)] {
            let added = count(route, *shape) - direct;
            println!(
                "{shape} {}: {added:.2} added, {recorded:.2} recorded",
                route.name()
            );
            if added > limit(*shape, *recorded) {
                grown.push(format!(
                    "{shape} {}: {added:.2} for {recorded:.2}",
                    route.name()
                ));
            }
            let budget = match route {
                Route::After => BUDGET.1,
                _ => BUDGET.0,
            };
            if [Shape::Send, Shape::Write].contains(shape) && added > budget {
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
        .expect("valgrind must be installed");
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{} {shape}: {text}", route.name());
    let line = text.lines().find_map(|line| line.split_once("refs:"));
    let number = line.map(|(_, number)| number.trim().replace(',', ""));
    number
        .and_then(|number| number.parse().ok())
        .unwrap_or_else(|| panic!("no count in {text}"))
}
