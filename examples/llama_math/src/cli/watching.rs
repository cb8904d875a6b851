//! The options about what a run measures between its steps.

use clap::Args;

use super::parse::at_least;
use crate::finetune::WatchOptions;

#[derive(Args, Debug)]
pub(super) struct WatchingOptions {
    /// Measure the loss on --eval every so many steps, and after the last
    #[arg(long, value_name = "STEPS", requires = "eval", value_parser = at_least(1))]
    eval_every: Option<usize>,
    /// Measure the rank of each adapted weight's change every so many steps, and after the last; 0 never
    /// [default: after the last step]
    #[arg(long, value_name = "STEPS", requires = "model", value_parser = at_least(0))]
    rank_every: Option<usize>,
    /// Answers to so many records of --eval are kept from before, every evaluation and after
    #[arg(long, value_name = "N", requires = "eval", default_value_t = 2, value_parser = at_least(0))]
    log_samples: usize,
    /// The weight whose singular values of the change are in the report [default: the last adapted one
    /// of the middle layer]
    #[arg(long, value_name = "NAME", requires = "model")]
    report_layer: Option<String>,
}

impl WatchingOptions {
    pub(super) fn options(&self) -> WatchOptions {
        WatchOptions {
            eval_every: self.eval_every,
            rank_every: match self.rank_every {
                Some(0) => None,
                // The last step is always one of them.
                every => Some(every.unwrap_or(usize::MAX)),
            },
            samples: self.log_samples,
            layer: self.report_layer.clone(),
        }
    }
}
