//! What in the record of a run may be wrong.

use crate::history::{Measures, Record};

/// A held-out loss this much above the lowest one has risen again.
const RISEN: f64 = 1.02;
/// A gradient norm this many times the median is a spike.
const SPIKE: f64 = 10.0;
/// A sketch that misses more of a change's squared norm says too little about its rank.
const MISSED: f64 = 0.01;
/// Steps before which nothing is said of the course.
const SHORT: usize = 10;

/// What a reader should look at, a sentence each.
pub fn warnings(record: &Record) -> Vec<String> {
    let mut found = Vec::new();
    let steps = &record.metrics;
    if steps.len() >= SHORT {
        let part = steps.len().div_ceil(10);
        let mean = |steps: &[crate::history::StepMetrics]| {
            steps.iter().map(|step| step.loss).sum::<f64>() / steps.len() as f64
        };
        let (first, last) = (mean(&steps[..part]), mean(&steps[steps.len() - part..]));
        if last >= first {
            found.push(format!(
                "The training loss has not fallen: {first:.4} in the first tenth of the steps, {last:.4} in \
                 the last. The learning rate may be too high or too low."
            ));
        }
        let mut norms: Vec<f64> = steps.iter().map(|step| step.gradient_norm).collect();
        norms.sort_by(f64::total_cmp);
        let median = norms[norms.len() / 2];
        // At the start gradients are often large.
        let largest = steps[part..]
            .iter()
            .max_by(|a, b| a.gradient_norm.total_cmp(&b.gradient_norm));
        if let Some(largest) = largest.filter(|step| step.gradient_norm > SPIKE * median) {
            found.push(format!(
                "The gradient norm was {:.1} times its median in step {}. --clip bounds it, and a lower \
                 --lr or a longer warm-up may help.",
                largest.gradient_norm / median,
                largest.step
            ));
        }
    }
    let held_out = |measurement: &crate::history::Measurement| match measurement.measures {
        Measures::HeldOut {
            loss,
            of_output: false,
            ..
        } => Some((measurement.step, loss)),
        _ => None,
    };
    let losses: Vec<(usize, f64)> = record.measurements.iter().filter_map(held_out).collect();
    let lowest = losses.iter().min_by(|a, b| a.1.total_cmp(&b.1));
    if let (Some(&(best, lowest)), Some(&(end, last))) = (lowest, losses.last())
        && last > RISEN * lowest
    {
        let reason = match best {
            0 => "The model got worse on the held-out data",
            _ => "The held-out loss rose again, a sign of learning the training data by heart",
        };
        found.push(format!(
            "{reason}: {lowest:.4} at step {best}, {last:.4} at step {end}."
        ));
    }
    let mut missed = record.measurements.iter().filter_map(|measurement| {
        let Measures::Changes { weights, .. } = &measurement.measures else {
            return None;
        };
        let missed = weights.iter().map(|change| change.missed);
        Some((measurement.step, missed.fold(0.0, f64::max)))
    });
    if let Some((step, missed)) = missed.next_back().filter(|(_, missed)| *missed > MISSED) {
        found.push(format!(
            "The sketches of the changes miss up to {:.2} % of their squared norm at step {step}: ranks are \
             lower bounds.",
            100.0 * missed
        ));
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::history::{Change, Measurement, StepMetrics};

    fn steps(losses: &[f64], norms: &[f64]) -> Record {
        let step = |(index, (&loss, &gradient_norm)): (usize, (&f64, &f64))| StepMetrics {
            step: index + 1,
            loss,
            lr: 1e-3,
            gradient_norm,
            update_norm: 0.1,
            tokens_per_second: 50.0,
            memory: None,
        };
        Record {
            metrics: losses.iter().zip(norms).enumerate().map(step).collect(),
            measurements: Vec::new(),
        }
    }

    fn held_out(step: usize, loss: f64) -> Measurement {
        Measurement {
            step,
            measures: Measures::HeldOut {
                loss,
                records: 1,
                of_output: false,
            },
        }
    }

    #[test]
    fn a_run_that_went_well_has_none() {
        let falling: Vec<f64> = (0..20).map(|step| 3.0 - 0.1 * f64::from(step)).collect();
        let mut record = steps(&falling, &[1.0; 20]);
        record.measurements = vec![held_out(0, 3.0), held_out(20, 2.0)];
        assert!(warnings(&record).is_empty());
        assert!(warnings(&Record::default()).is_empty());
        // Two steps say nothing.
        assert!(warnings(&steps(&[1.0, 2.0], &[1.0, 99.0])).is_empty());
    }

    #[test]
    fn each_sign_is_named_with_its_numbers() {
        let mut norms = [1.0; 20];
        norms[6] = 50.0;
        let mut record = steps(&[2.0; 20], &norms);
        record.measurements = vec![held_out(0, 3.0), held_out(10, 2.0), held_out(20, 2.5)];
        let change = Change {
            path: "a".into(),
            relative: 1.0,
            rank: 1,
            effective_rank: 1.0,
            missed: 0.125,
        };
        record.measurements.push(Measurement {
            step: 20,
            measures: Measures::Changes {
                weights: vec![change],
                spectrum: None,
            },
        });
        let found = warnings(&record);
        for (sentence, part) in found.iter().zip([
            "has not fallen",
            "50.0 times its median in step 7",
            "2.0000 at step 10, 2.5000 at step 20",
            "12.50 %",
        ]) {
            assert!(sentence.contains(part), "{sentence}");
        }
        assert_eq!(found.len(), 4);
        record.measurements = vec![held_out(0, 2.0), held_out(20, 2.5)];
        assert!(warnings(&record)[2].starts_with("The model got worse"));
    }
}
