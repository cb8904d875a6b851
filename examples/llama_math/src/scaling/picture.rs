//! Loss and rank against the number of shards, of both simulations.

use std::path::Path;

use super::Report;
use super::layer::LayerRow;
use super::llama::LlamaRow;
use crate::Error;
use crate::chart::{self, Curve, Panel, Scale, Stroke};

pub fn draw(path: &Path, report: &Report) -> Result<(), Error> {
    let svg = chart::svg("More shards", &panels(report));
    std::fs::write(path, svg).map_err(Error::io(path))
}

fn panels(report: &Report) -> [Panel; 4] {
    let (llama, layer) = (&report.llama, &report.layer);
    let size = layer.settings.size;
    let of_llama = |name: &str, color, of: fn(&LlamaRow) -> f64| {
        let points = llama.rows.iter().map(|row| (row.shards as f64, of(row)));
        curve(name, color, Stroke::Dotted, points.collect())
    };
    let of_layer = |name: &str, color, stroke, of: fn(&LayerRow) -> f64| {
        let points = layer.rows.iter().map(|row| (row.shards as f64, of(row)));
        curve(name, color, stroke, points.collect())
    };
    let dotted = Stroke::Dotted;
    [
        panel(
            format!("Tiny Llama, r = {}", llama.settings.rank),
            "held-out loss",
            vec![of_llama("", 0, |row| row.test_loss)],
        ),
        panel(
            format!("{size} × {size} layer, r = {}", layer.settings.rank),
            "share missing; grey: out of reach",
            vec![
                of_layer("", 0, Stroke::Reference, |row| row.out_of_reach),
                of_layer("", 0, dotted, |row| row.loss),
            ],
        ),
        panel(
            "Tiny Llama: rank of the update".into(),
            "mean over projections",
            vec![
                of_llama("numeric", 0, |row| row.numeric_rank),
                of_llama("effective", 1, |row| row.effective_rank),
            ],
        ),
        panel(
            "Layer: rank of the update".into(),
            "of the weight",
            vec![
                of_layer("numeric", 0, dotted, |row| row.numeric_rank as f64),
                of_layer("effective", 1, dotted, |row| row.effective_rank),
            ],
        ),
    ]
}

fn curve(name: &str, color: usize, stroke: Stroke, points: Vec<(f64, f64)>) -> Curve {
    Curve {
        name: name.into(),
        color,
        stroke,
        points,
        band: Vec::new(),
    }
}

fn panel(title: String, vertical: &str, curves: Vec<Curve>) -> Panel {
    Panel {
        title,
        labels: ["shards K".into(), vertical.into()],
        scales: [Scale::PowersOfTwo, Scale::FromZero],
        curves,
    }
}
