//! Progress bars.

use std::time::Instant;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// A bar of steps with loss, tokens per second and the time left.
pub struct Progress {
    bar: ProgressBar,
    start: Instant,
    tokens: std::cell::Cell<usize>,
}

impl Progress {
    /// A bar on standard error; none where that is no terminal.
    pub fn new(label: &str, steps: usize) -> Self {
        let style = ProgressStyle::with_template(
            "{prefix:12} {bar:30} {pos}/{len}  {msg}  {elapsed} elapsed, {eta} left",
        );
        let bar = ProgressBar::new(steps as u64)
            .with_style(style.expect("the template is valid"))
            .with_prefix(label.to_string());
        Self {
            bar,
            start: Instant::now(),
            tokens: 0.into(),
        }
    }

    /// As [`new`](Self::new), with `done` steps taken already; `hidden` on workers that print
    /// nothing.
    pub fn resumed(label: &str, steps: usize, done: usize, hidden: bool) -> Self {
        let progress = Self::new(label, steps);
        if hidden {
            progress.bar.set_draw_target(ProgressDrawTarget::hidden());
        }
        progress.bar.set_position(done as u64);
        progress.bar.reset_eta();
        progress
    }

    /// One step with its loss and number of tokens.
    pub fn step(&self, loss: f64, tokens: usize) {
        self.tokens.set(self.tokens.get() + tokens);
        self.bar.set_message(format!(
            "loss {loss:.4}  {:.0} tokens/s",
            self.tokens_per_second()
        ));
        self.bar.inc(1);
    }

    /// One piece of work without a loss.
    pub fn tick(&self) {
        self.bar.inc(1);
    }

    /// Tokens since the start.
    pub fn tokens(&self) -> usize {
        self.tokens.get()
    }

    /// Tokens per second since the start.
    pub fn tokens_per_second(&self) -> f64 {
        self.tokens.get() as f64 / self.start.elapsed().as_secs_f64().max(1e-9)
    }

    /// Removes the bar.
    pub fn finish(self) {
        self.bar.finish_and_clear();
    }
}
