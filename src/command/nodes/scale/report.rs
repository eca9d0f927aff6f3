//! What docs/scale.md shows.

use std::time::Duration;

use plotters::prelude::*;

use super::job::Cost;
use super::{cycle_of, depth};

const SIZES: [u32; 10] = [1, 2, 5, 10, 20, 50, 100, 250, 500, 1250];
const PLOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/scale.svg");

#[derive(Clone, Copy)]
struct Sum {
    nodes: u32,
    took: Duration,
    slowest: Duration,
    first: (u64, u64),
    all: (u64, u64),
}

fn sum(nodes: u32, costs: &[Cost]) -> Sum {
    let add = |one: (u64, u64), other: (u64, u64)| (one.0 + other.0, one.1 + other.1);
    let none = Sum {
        nodes,
        took: Duration::ZERO,
        slowest: Duration::ZERO,
        first: (0, 0),
        all: (0, 0),
    };
    costs.iter().fold(none, |sum, cost| Sum {
        nodes,
        took: sum.took + cost.took,
        slowest: sum.slowest + cost.slowest,
        first: add(sum.first, add(cost.sent, cost.received)),
        all: add(sum.all, cost.all),
    })
}

/// Prints the tables, and draws the plot.
#[test]
#[ignore = "writes docs/scale.svg"]
fn draw_for_the_documentation() {
    let mut sums = Vec::new();
    for nodes in SIZES {
        let (_, job) = cycle_of(nodes, |_| {});
        let (open, costs) = job.costs.split_first().unwrap();
        let sum = sum(nodes, costs);
        eprintln!(
            "| {nodes} | {} | {} | {:.3} | {:.2} | {:.2} | {:.4} | {} | {:.2} | {} | {:.1} |",
            nodes * 8,
            depth(nodes as usize),
            open.took.as_secs_f64(),
            sum.took.as_secs_f64(),
            sum.slowest.as_secs_f64(),
            (sum.took - sum.slowest).as_secs_f64(),
            sum.first.0,
            mega(sum.first.1),
            sum.all.0,
            mega(sum.all.1),
        );
        sums.push(sum);
        if nodes == 1250 {
            for cost in &job.costs {
                eprintln!(
                    "| {} | {:.3} | {:.1} | {} / {} | {:.2} / {:.2} | {:.1} |",
                    cost.name,
                    cost.slowest.as_secs_f64(),
                    (cost.took - cost.slowest).as_secs_f64() * 1e3,
                    cost.sent.0,
                    cost.received.0,
                    mega(cost.sent.1),
                    mega(cost.received.1),
                    mega(cost.all.1),
                );
            }
        }
    }
    draw(&sums).unwrap();
}

#[expect(clippy::cast_precision_loss)]
fn mega(bytes: u64) -> f64 {
    bytes as f64 / 1e6
}

type Line<'a> = (&'a str, RGBColor, fn(&Sum) -> f64);

fn draw(sums: &[Sum]) -> Result<(), Box<dyn std::error::Error>> {
    let area = SVGBackend::new(PLOT, (900, 400)).into_drawing_area();
    area.fill(&WHITE)?;
    let (left, right) = area.split_horizontally(450);
    let times: [Line<'_>; 3] = [
        ("the whole cycle", BLUE, |sum| sum.took.as_secs_f64()),
        ("the slowest node of each step", GREEN, |sum| {
            sum.slowest.as_secs_f64()
        }),
        ("the tree", RED, |sum| {
            (sum.took - sum.slowest).as_secs_f64()
        }),
    ];
    let bytes: [Line<'_>; 2] = [
        ("the first node, both ways", BLUE, |sum| mega(sum.first.1)),
        ("all nodes", RED, |sum| mega(sum.all.1)),
    ];
    panel(&left, "Seconds of a cycle", 1e-4..10.0, sums, &times)?;
    panel(&right, "Megabytes of a cycle", 1e-3..1e5, sums, &bytes)?;
    area.present()?;
    Ok(())
}

fn panel(
    area: &DrawingArea<SVGBackend<'_>, plotters::coord::Shift>,
    caption: &str,
    range: std::ops::Range<f64>,
    sums: &[Sum],
    lines: &[Line<'_>],
) -> Result<(), Box<dyn std::error::Error>> {
    let mut chart = ChartBuilder::on(area)
        .caption(caption, ("sans-serif", 16))
        .margin(10)
        .x_label_area_size(40)
        .y_label_area_size(60)
        .build_cartesian_2d((1.0..1500.0).log_scale(), range.log_scale())?;
    chart
        .configure_mesh()
        .x_desc("nodes of 8 processes")
        .draw()?;
    for (name, colour, of) in lines.iter().copied() {
        let points = sums.iter().filter(|sum| of(sum) > 0.0);
        let points = points.map(|sum| (f64::from(sum.nodes), of(sum)));
        chart
            .draw_series(LineSeries::new(points, colour).point_size(3))?
            .label(name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 15, y)], colour));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::LowerRight)
        .background_style(WHITE.mix(0.8))
        .draw()?;
    Ok(())
}
