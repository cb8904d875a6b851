//! The curves of runs: what every step did, the held-out loss, and singular values.

use crate::chart::{Curve, Panel, Scale, Stroke};
use crate::history::{Measures, Record, Spectrum, StepMetrics};
use crate::picture::{averaged, smooth, window};

/// Most points of a curve; of more steps each point is a mean.
const POINTS: usize = 400;

/// Title, label and scale of a number of every step.
type OfSteps = (&'static str, &'static str, Scale, fn(&StepMetrics) -> f64);

/// A run in a picture of several.
pub struct Line<'a> {
    /// Its name; not shown where it is alone.
    pub name: String,
    /// Number of its colour.
    pub color: usize,
    /// Whether its line is dashed.
    pub dashed: bool,
    /// What it did.
    pub record: &'a Record,
}

/// Loss, held-out loss, rate, norms, speed and memory over the steps. A run that is alone has both losses
/// in one panel.
pub fn curves(lines: &[Line<'_>]) -> Vec<Panel> {
    let mut panels = Vec::new();
    let steps = lines.iter().map(|line| line.record.metrics.len()).max();
    let window = window(steps.unwrap_or(0));
    let training = |line: &Line<'_>| {
        let losses = line.record.metrics.iter().map(|metrics| metrics.loss);
        thinned(&smooth(&losses.collect::<Vec<_>>(), window))
    };
    let is_measured = lines.iter().any(|line| !held_out(line.record).is_empty());
    let label = averaged("loss", window);
    match lines {
        [line] if is_measured => {
            let curve = |name: &str, color, stroke, points| Curve {
                name: name.into(),
                color,
                stroke,
                points,
                band: Vec::new(),
            };
            panels.push(panel(
                "Loss",
                &label,
                Scale::Logarithmic,
                vec![
                    curve("training", 0, Stroke::Line, training(line)),
                    curve("held-out", 1, Stroke::Dotted, held_out(line.record)),
                ],
            ));
        }
        _ => {
            let curves = several(lines, Stroke::Line, training);
            panels.push(panel("Training loss", &label, Scale::Logarithmic, curves));
            if is_measured {
                let curves = several(lines, Stroke::Dotted, |line| held_out(line.record));
                panels.push(panel("Held-out loss", "loss", Scale::Logarithmic, curves));
            }
        }
    }
    let rate = match lines {
        [_] => Scale::FromZero,
        // Rates differ by method by a factor of ten and more.
        _ => Scale::Logarithmic,
    };
    let rest: [OfSteps; 5] = [
        ("Learning rate", "rate", rate, |step| step.lr),
        (
            "Gradient norm",
            "norm before clipping",
            Scale::Logarithmic,
            |step| step.gradient_norm,
        ),
        (
            "Update norm",
            "norm of the change of all weights in a step",
            Scale::Logarithmic,
            |step| step.update_norm,
        ),
        ("Speed", "tokens per second", Scale::FromZero, |step| {
            step.tokens_per_second
        }),
        ("Memory", "resident, MiB", Scale::FromZero, |step| {
            let memory = step.memory.map(|bytes| bytes as f64 / f64::from(1 << 20));
            memory.unwrap_or(f64::NAN)
        }),
    ];
    for (title, label, scale, of) in rest {
        let points = |line: &Line<'_>| {
            let metrics = line.record.metrics.iter();
            thinned(
                &metrics
                    .map(|step| (step.step as f64, of(step)))
                    .collect::<Vec<_>>(),
            )
        };
        let curves = several(lines, Stroke::Line, points);
        if curves.iter().any(|curve| !curve.points.is_empty()) {
            panels.push(panel(title, label, scale, curves));
        }
    }
    panels
}

/// Mean effective rank of the changed weights over the steps, if any run measured it.
pub fn ranks(lines: &[Line<'_>]) -> Option<Panel> {
    let points = |line: &Line<'_>| {
        let found = line.record.measurements.iter();
        let found = found.filter_map(|measurement| match &measurement.measures {
            Measures::Changes { weights, .. } if !weights.is_empty() => {
                let sum: f64 = weights.iter().map(|change| change.effective_rank).sum();
                Some((measurement.step as f64, sum / weights.len() as f64))
            }
            _ => None,
        });
        found.collect()
    };
    let curves = several(lines, Stroke::Dotted, points);
    let is_measured = curves.iter().any(|curve| !curve.points.is_empty());
    let title = "Effective rank of the change";
    is_measured.then(|| panel(title, "mean over weights", Scale::FromZero, curves))
}

/// The singular values that are recorded: first, in the middle and last.
pub fn spectra(record: &Record) -> Option<Panel> {
    let all: Vec<(usize, &Spectrum)> = record
        .measurements
        .iter()
        .filter_map(|measurement| match &measurement.measures {
            Measures::Changes { spectrum, .. } => Some((measurement.step, spectrum.as_ref()?)),
            _ => None,
        })
        .collect();
    let (_, last) = all.last()?;
    let name = last.path.strip_prefix("model.").unwrap_or(&last.path);
    let name = name.strip_suffix(".weight").unwrap_or(name);
    let mut shown = vec![0, (all.len() - 1) / 2, all.len() - 1];
    shown.dedup();
    let curve = |(color, index): (usize, &usize)| {
        let (step, spectrum) = all[*index];
        let values = spectrum.values.iter().copied().enumerate();
        Curve {
            name: format!("step {step}"),
            color,
            stroke: Stroke::Line,
            points: values
                .map(|(index, value)| ((index + 1) as f64, f64::from(value)))
                .collect(),
            band: Vec::new(),
        }
    };
    Some(Panel {
        title: "Singular values of the change".into(),
        labels: ["number".into(), format!("of {name}")],
        scales: [Scale::Count, Scale::Logarithmic],
        curves: shown.iter().enumerate().map(curve).collect(),
    })
}

fn panel(title: &str, label: &str, scale: Scale, curves: Vec<Curve>) -> Panel {
    Panel {
        title: title.into(),
        labels: ["step".into(), label.into()],
        scales: [Scale::Count, scale],
        curves,
    }
}

/// A curve of each run.
fn several(
    lines: &[Line<'_>],
    stroke: Stroke,
    points: impl Fn(&Line<'_>) -> Vec<(f64, f64)>,
) -> Vec<Curve> {
    let curve = |line: &Line<'_>| Curve {
        name: match lines.len() {
            1 => String::new(),
            _ => line.name.clone(),
        },
        color: line.color,
        stroke: if line.dashed { Stroke::Dashed } else { stroke },
        points: points(line),
        band: Vec::new(),
    };
    lines.iter().map(curve).collect()
}

/// Step and held-out loss of the model in memory; what the output's rounding does is no part of a curve.
fn held_out(record: &Record) -> Vec<(f64, f64)> {
    let loss = |measurement: &crate::history::Measurement| match measurement.measures {
        Measures::HeldOut {
            loss,
            of_output: false,
            ..
        } => Some((measurement.step as f64, loss)),
        _ => None,
    };
    record.measurements.iter().filter_map(loss).collect()
}

/// At most [`POINTS`] points. Each is the mean of a group of neighbours. NaN and infinite values are left out.
fn thinned(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let points = points
        .iter()
        .copied()
        .filter(|(_, value)| value.is_finite());
    let points: Vec<(f64, f64)> = points.collect();
    let size = points.len().div_ceil(POINTS).max(1);
    let mean = |chunk: &[(f64, f64)]| {
        let sum: f64 = chunk.iter().map(|(_, value)| value).sum();
        (chunk[chunk.len() - 1].0, sum / chunk.len() as f64)
    };
    points.chunks(size).map(mean).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::history::Measurement;

    fn record(steps: usize) -> Record {
        let step = |step: usize| StepMetrics {
            step,
            loss: 3.0 / step as f64,
            lr: 1e-3,
            gradient_norm: 2.0,
            update_norm: 0.1,
            tokens_per_second: 50.0,
            memory: None,
        };
        let held_out = |(step, of_output)| Measurement {
            step,
            measures: Measures::HeldOut {
                loss: 2.5,
                records: 3,
                of_output,
            },
        };
        Record {
            metrics: (1..=steps).map(step).collect(),
            measurements: vec![held_out((0, false)), held_out((steps, true))],
        }
    }

    fn line(record: &Record) -> Line<'_> {
        Line {
            name: "a".into(),
            color: 0,
            dashed: false,
            record,
        }
    }

    #[test]
    fn one_run_has_both_losses_in_one_panel_and_several_have_a_panel_for_each() {
        let record = record(3);
        let titles = |lines: &[Line<'_>]| -> Vec<String> {
            curves(lines).into_iter().map(|panel| panel.title).collect()
        };
        // Nobody has measured the memory.
        let rest = ["Learning rate", "Gradient norm", "Update norm", "Speed"];
        let alone = titles(&[line(&record)]);
        assert_eq!(alone, [&["Loss"][..], &rest].concat());
        let both = titles(&[line(&record), line(&record)]);
        assert_eq!(
            both,
            [&["Training loss", "Held-out loss"][..], &rest].concat()
        );
        let panels = curves(&[line(&record)]);
        assert_eq!(panels[0].curves[0].points[2], (3.0, 1.0));
        // The rounded weights of the output are no point of the curve.
        assert_eq!(panels[0].curves[1].points, [(0.0, 2.5)]);
    }

    #[test]
    fn long_runs_have_few_points_with_the_means_of_all() {
        let points: Vec<(f64, f64)> = (1..=4000).map(|step| (step as f64, step as f64)).collect();
        let thin = thinned(&points);
        assert_eq!(thin.len(), POINTS);
        assert_eq!((thin[0], thin[POINTS - 1].0), ((10.0, 5.5), 4000.0));
        assert_eq!(thinned(&[(1.0, f64::NAN), (2.0, 3.0)]), [(2.0, 3.0)]);
    }

    #[test]
    fn spectra_are_shown_at_first_middle_and_last() {
        let mut record = record(1);
        assert!(spectra(&record).is_none());
        for step in [1, 2, 3, 4, 5] {
            record.measurements.push(Measurement {
                step,
                measures: Measures::Changes {
                    weights: Vec::new(),
                    spectrum: Some(Spectrum {
                        path: "a".into(),
                        values: vec![step as f32, 1.0],
                    }),
                },
            });
        }
        let panel = spectra(&record).unwrap();
        let names: Vec<&str> = panel.curves.iter().map(|curve| &*curve.name).collect();
        assert_eq!(names, ["step 1", "step 3", "step 5"]);
        assert_eq!(panel.curves[2].points, [(1.0, 5.0), (2.0, 1.0)]);
    }
}
