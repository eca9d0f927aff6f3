//! Time of a request posted and polled over a device that does nothing: direct, and through the virtual device before and
//! after its hardware was replaced. `cargo bench --bench verb_overhead -- send` takes one shape only.

use std::hint::black_box;
use std::time::{Duration, Instant};

use criterion::{Criterion, Throughput};
use reverbs_benches::application::Application;
use reverbs_benches::restart::Machine;
use reverbs_benches::shape::{Route, Shape};

fn main() {
    let mut criterion = Criterion::default()
        .sample_size(50)
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_secs(1))
        .without_plots()
        .configure_from_args();
    let machine = Machine::new();
    let through: Vec<_> = Shape::ALL
        .iter()
        .map(|shape| (*shape, Application::new(&machine, Route::Before, *shape)))
        .collect();
    for shape in Shape::ALL {
        let direct = Application::new(&machine, Route::Direct, *shape);
        measure(&mut criterion, Route::Direct, *shape, direct);
    }
    let mut through = through;
    for (shape, application) in &mut through {
        measure(&mut criterion, Route::Before, *shape, application);
    }
    machine.replace_hardware();
    for (shape, application) in &mut through {
        measure(&mut criterion, Route::After, *shape, application);
    }
    criterion.final_summary();
}

fn measure(
    criterion: &mut Criterion,
    route: Route,
    shape: Shape,
    mut application: impl std::borrow::BorrowMut<Application>,
) {
    let mut group = criterion.benchmark_group(shape.name());
    group.throughput(Throughput::Elements(1));
    group.bench_function(route.name(), |bencher| {
        bencher.iter_custom(|operations| {
            let start = Instant::now();
            let done = black_box(application.borrow_mut()).run(operations);
            // Whole batches are run; the time of one operation is what counts.
            start.elapsed().mul_f64(operations as f64 / done as f64)
        });
    });
    group.finish();
}
