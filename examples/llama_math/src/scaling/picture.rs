//! Loss and rank against the number of shards, of both simulations.

use std::path::Path;

use plotters::coord::Shift;
use plotters::prelude::*;

use super::Report;
use crate::Error;
use crate::picture::COLORS;

/// Label of the share of the change that the shards cannot learn.
const OUT_OF_REACH: &str = "out of reach, (1 − K·r/d)²";

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Failure = Box<dyn std::error::Error>;

/// A line with its label, by number of shards.
struct Curve {
    label: &'static str,
    /// What others are compared with: a broad line behind them.
    is_reference: bool,
    points: Vec<(usize, f64)>,
}

struct Panel {
    title: String,
    vertical: &'static str,
    curves: Vec<Curve>,
}

pub fn draw(path: &Path, report: &Report) -> Result<(), Error> {
    draw_panels(path, &panels(report)).map_err(|error| Error::Picture {
        path: path.into(),
        reason: error.to_string(),
    })
}

fn panels(report: &Report) -> [Panel; 4] {
    let (llama, layer) = (&report.llama, &report.layer);
    let size = layer.settings.size;
    let of_llama = |label, of: fn(&super::llama::LlamaRow) -> f64| Curve {
        label,
        is_reference: false,
        points: llama.rows.iter().map(|row| (row.shards, of(row))).collect(),
    };
    let of_layer = |label, of: fn(&super::layer::LayerRow) -> f64| Curve {
        label,
        is_reference: label == OUT_OF_REACH,
        points: layer.rows.iter().map(|row| (row.shards, of(row))).collect(),
    };
    [
        Panel {
            title: format!("Tiny Llama, r = {}", llama.settings.rank),
            vertical: "held-out loss",
            curves: vec![of_llama("after training", |row| row.test_loss)],
        },
        Panel {
            title: format!("{size} × {size} layer, r = {}", layer.settings.rank),
            vertical: "share of the change missing",
            curves: vec![
                of_layer(OUT_OF_REACH, |row| row.out_of_reach),
                of_layer("after training", |row| row.loss),
            ],
        },
        Panel {
            title: "Rank of the update".into(),
            vertical: "mean over projections",
            curves: vec![
                of_llama("numeric", |row| row.numeric_rank),
                of_llama("effective", |row| row.effective_rank),
            ],
        },
        Panel {
            title: "Rank of the update".into(),
            vertical: "of the weight",
            curves: vec![
                of_layer("numeric", |row| row.numeric_rank as f64),
                of_layer("effective", |row| row.effective_rank),
            ],
        },
    ]
}

fn draw_panels(path: &Path, panels: &[Panel]) -> Result<(), Failure> {
    let root = SVGBackend::new(path, (900, 640)).into_drawing_area();
    root.fill(&WHITE)?;
    for (area, panel) in root.split_evenly((2, 2)).iter().zip(panels) {
        draw_panel(area, panel)?;
    }
    root.present()?;
    Ok(())
}

fn draw_panel(area: &Area<'_>, panel: &Panel) -> Result<(), Failure> {
    let points = || panel.curves.iter().flat_map(|curve| &curve.points);
    let most = points().map(|point| point.0).max().unwrap_or(2).max(2);
    let high = points().map(|point| point.1).fold(0.0, f64::max) * 1.08;
    let place = |shards: usize| (shards as f64).log2();
    let mut chart = ChartBuilder::on(area)
        .caption(&panel.title, ("sans-serif", 17))
        .margin(12)
        .x_label_area_size(38)
        .y_label_area_size(62)
        .build_cartesian_2d(0.0..place(most), 0.0..high)?;
    chart
        .configure_mesh()
        .x_desc("shards K")
        // One label for each power of two.
        .x_labels(place(most) as usize + 1)
        .x_label_formatter(&|exponent| format!("{:.0}", exponent.exp2()))
        .y_desc(panel.vertical)
        .y_labels(6)
        .y_label_formatter(&|value| match high {
            high if high < 20.0 => format!("{value:.1}"),
            _ => format!("{value:.0}"),
        })
        .light_line_style(TRANSPARENT)
        .draw()?;
    let mut colors = COLORS.iter();
    for curve in &panel.curves {
        let points = || curve.points.iter().map(|&(x, y)| (place(x), y));
        let style = match curve.is_reference {
            true => RGBColor(0xd0, 0xd0, 0xd0).stroke_width(9),
            false => colors.next().unwrap_or(&BLACK).stroke_width(2),
        };
        chart
            .draw_series(LineSeries::new(points(), style))?
            .label(curve.label)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], style));
        if !curve.is_reference {
            let dots = points().map(|point| Circle::new(point, 3, style.filled()));
            chart.draw_series(dots)?;
        }
    }
    if panel.curves.len() > 1 {
        // Where the curves are not.
        let place = match panel.curves.iter().any(|curve| curve.is_reference) {
            true => SeriesLabelPosition::LowerLeft,
            false => SeriesLabelPosition::UpperLeft,
        };
        chart
            .configure_series_labels()
            .position(place)
            .background_style(WHITE)
            .border_style(BLACK)
            .label_font(("sans-serif", 13))
            .draw()?;
    }
    Ok(())
}
