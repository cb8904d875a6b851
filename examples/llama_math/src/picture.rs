//! Pictures of losses over the steps of trainings.

use std::path::Path;

use crate::Error;
use crate::chart::{self, Curve, Panel, Scale, Stroke};

/// Draws the losses per step of a training as an SVG, each averaged over its last steps.
///
/// # Errors
///
/// [`Error::Io`].
pub fn losses(path: &Path, title: &str, losses: &[f64]) -> Result<(), Error> {
    let window = window(losses.len());
    let panel = Panel {
        title: String::new(),
        labels: ["step".into(), averaged("training loss", window)],
        scales: [Scale::Count, Scale::Logarithmic],
        curves: vec![Curve {
            name: String::new(),
            color: 0,
            stroke: Stroke::Line,
            points: smooth(losses, window),
            band: Vec::new(),
        }],
    };
    std::fs::write(path, chart::svg(title, &[panel])).map_err(Error::io(path))
}

/// The number of steps over which losses are averaged in a training of this length.
pub(crate) fn window(steps: usize) -> usize {
    (steps / 30).max(1)
}

/// The label of averaged losses.
pub(crate) fn averaged(label: &str, window: usize) -> String {
    match window {
        1 => label.into(),
        _ => format!("{label}, mean of {window} steps"),
    }
}

/// Step and mean loss of up to `window` steps that end there.
pub(crate) fn smooth(losses: &[f64], window: usize) -> Vec<(f64, f64)> {
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
    fn a_picture_holds_title_and_curve() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("loss.svg");
        losses(&path, "a title", &[3.0, 2.0, 1.5]).unwrap();
        let svg = std::fs::read_to_string(&path).unwrap();
        for text in ["a title", "training loss", "class=\"curve"] {
            assert!(svg.contains(text), "{text}");
        }
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
            losses(&path, "a title", &curve).unwrap();
            let svg = std::fs::read_to_string(&path).unwrap();
            assert!(!svg.contains("NaN") && !svg.contains("inf"));
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
