//! Pictures of loss curves.

use std::path::Path;

use plotters::prelude::*;

use crate::{Error, panics};

/// Colors of curves, in order.
pub(crate) const COLORS: [RGBColor; 4] = [
    RGBColor(0x1f, 0x77, 0xb4),
    RGBColor(0x2c, 0xa0, 0x2c),
    RGBColor(0xd6, 0x27, 0x28),
    RGBColor(0x7f, 0x7f, 0x7f),
];

/// Draws labelled losses per step as an SVG, each averaged over its last steps.
///
/// # Errors
///
/// [`Error::Picture`].
pub fn losses(path: &Path, title: &str, curves: &[(String, Vec<f64>)]) -> Result<(), Error> {
    let failed = |reason| Error::Picture {
        path: path.into(),
        reason,
    };
    // A picture is not worth a run: neither an error of the library's nor a panic ends one.
    let drawn = panics::caught(|| draw(path, title, curves).map_err(|error| error.to_string()));
    drawn.flatten().map_err(failed)
}

fn draw(
    path: &Path,
    title: &str,
    curves: &[(String, Vec<f64>)],
) -> Result<(), Box<dyn std::error::Error>> {
    let steps = curves
        .iter()
        .map(|(_, losses)| losses.len())
        .max()
        .unwrap_or(0)
        .max(2);
    let window = (steps / 30).max(1);
    let curves: Vec<(&str, Vec<(f64, f64)>)> = curves
        .iter()
        .map(|(label, losses)| (label.as_str(), finite(smooth(losses, window))))
        .collect();
    let values = || {
        curves
            .iter()
            .flat_map(|(_, points)| points.iter().map(|point| point.1))
    };
    let (low, high) = match values().next() {
        Some(first) => (
            values().fold(first, f64::min),
            values().fold(first, f64::max),
        ),
        None => (0.0, 1.0),
    };
    let margin = ((high - low) * 0.05).max(1e-3);

    let area = SVGBackend::new(path, (800, 480)).into_drawing_area();
    area.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&area)
        .caption(title, ("sans-serif", 20))
        .margin(15)
        .x_label_area_size(45)
        .y_label_area_size(60)
        .build_cartesian_2d(1.0..steps as f64, low - margin..high + margin)?;
    let averaged = match window {
        1 => "training loss".to_string(),
        _ => format!("training loss, mean of {window} steps"),
    };
    chart
        .configure_mesh()
        .x_desc("step")
        .x_label_formatter(&|step| format!("{step:.0}"))
        .y_desc(averaged)
        .y_label_formatter(&|loss| format!("{loss:.2}"))
        .light_line_style(TRANSPARENT)
        .draw()?;
    for ((label, points), color) in curves.iter().zip(COLORS.iter().cycle()) {
        let style = color.stroke_width(2);
        chart
            .draw_series(LineSeries::new(points.iter().copied(), style))?
            .label(*label)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], style));
    }
    if curves.len() > 1 {
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::UpperRight)
            .background_style(WHITE)
            .border_style(BLACK)
            .label_font(("sans-serif", 14))
            .draw()?;
    }
    area.present()?;
    Ok(())
}

/// The points that a picture can show.
fn finite(mut points: Vec<(f64, f64)>) -> Vec<(f64, f64)> {
    // Larger ones overflow where axes are computed.
    points.retain(|(_, loss)| loss.abs() < 1e12);
    points
}

/// Step and mean loss of up to `window` steps that end there.
fn smooth(losses: &[f64], window: usize) -> Vec<(f64, f64)> {
    (1..=losses.len())
        .map(|end| {
            let recent = &losses[end.saturating_sub(window)..end];
            (end as f64, recent.iter().sum::<f64>() / recent.len() as f64)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_picture_holds_title_labels_and_curves() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("loss.svg");
        let curves = [
            ("first".to_string(), vec![3.0, 2.0, 1.5]),
            ("second".into(), vec![3.0, 2.5]),
        ];
        losses(&path, "a title", &curves).unwrap();
        let svg = std::fs::read_to_string(&path).unwrap();
        for text in ["a title", "first", "second", "training loss"] {
            assert!(svg.contains(text), "{text}");
        }
        assert!(svg.matches("<polyline").count() >= 2);
    }

    #[test]
    fn losses_that_are_no_numbers_are_left_out() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("loss.svg");
        for curve in [
            vec![],
            vec![f64::NAN; 3],
            vec![1.0, f64::INFINITY, f64::MAX, f64::MIN, 2.0],
        ] {
            losses(&path, "a title", &[("a".to_string(), curve)]).unwrap();
            assert!(path.metadata().unwrap().len() > 100);
        }
    }

    #[test]
    fn smoothing_averages_backwards() {
        assert_eq!(
            smooth(&[4.0, 2.0, 6.0], 2),
            [(1.0, 4.0), (2.0, 3.0), (3.0, 4.0)]
        );
    }
}
