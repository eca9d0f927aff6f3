//! Posts and polls a number of requests and ends: for instruction counts, taken as the difference of two runs.
//!
//!     count-operations direct|before|after SHAPE OPERATIONS

use reverbs_benches::application::Application;
use reverbs_benches::restart::Machine;
use reverbs_benches::shape::{Route, Shape};

fn main() -> Result<(), String> {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    let [route, shape, operations] = arguments.as_slice() else {
        return Err("usage: count-operations direct|before|after SHAPE OPERATIONS".into());
    };
    let (route, shape): (Route, Shape) = (route.parse()?, shape.parse()?);
    let operations: u64 = operations
        .parse()
        .map_err(|error| format!("{operations}: {error}"))?;
    let machine = Machine::new();
    let mut application = Application::new(&machine, route, shape);
    if route == Route::After {
        machine.replace_hardware();
    }
    application.run(operations);
    Ok(())
}
