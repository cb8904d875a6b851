//! Learning rates.

use std::fmt::{self, Display, Formatter};

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

/// How the learning rate falls after the warm-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Decay {
    /// Half a cosine, down to 0 after the last step.
    Cosine,
    /// A straight line, down to 0 after the last step.
    Linear,
    /// No decay.
    Constant,
}

impl Display for Decay {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Cosine => "cosine",
            Self::Linear => "linear",
            Self::Constant => "constant",
        })
    }
}

/// Linear warm-up, then a decay.
#[derive(Clone, Copy, Debug)]
pub struct Schedule {
    /// The largest learning rate.
    pub peak: f64,
    /// The decay after the warm-up.
    pub decay: Decay,
    /// Steps of the warm-up; the first has a learning rate of 0.
    pub warmup: usize,
    /// All steps.
    pub total: usize,
}

impl Schedule {
    /// A schedule whose warm-up is `ratio` of all steps, rounded down.
    pub fn new(peak: f64, decay: Decay, ratio: f64, total: usize) -> Self {
        let warmup = (ratio * total as f64).floor() as usize;
        Self {
            peak,
            decay,
            warmup,
            total,
        }
    }

    /// The learning rate of `step`, counted from 0.
    pub fn at(&self, step: usize) -> f64 {
        if step < self.warmup {
            return self.peak * step as f64 / self.warmup as f64;
        }
        let progress = (step - self.warmup) as f64 / (self.total - self.warmup).max(1) as f64;
        self.peak
            * match self.decay {
                Decay::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * progress).cos()),
                Decay::Linear => 1.0 - progress,
                Decay::Constant => 1.0,
            }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn recorded_learning_rates() {
        // Those of the published script: 4 steps, of which one warms up.
        let schedule = Schedule::new(0.005, Decay::Cosine, 0.25, 4);
        let recorded = [0.0, 0.005, 0.00375, 0.00125];
        for (step, expected) in recorded.into_iter().enumerate() {
            assert!((schedule.at(step) - expected).abs() < 1e-12, "step {step}");
        }
    }

    #[test]
    fn warm_up_is_rounded_down_and_the_decay_ends_after_the_last_step() {
        let schedule = Schedule::new(1.0, Decay::Linear, 0.19, 10);
        assert_eq!(schedule.warmup, 1);
        assert_eq!(schedule.at(0), 0.0);
        assert_eq!(schedule.at(1), 1.0);
        assert!((schedule.at(9) - 1.0 / 9.0).abs() < 1e-12);
        assert_eq!(Schedule::new(2.0, Decay::Constant, 0.0, 3).at(2), 2.0);
    }
}
