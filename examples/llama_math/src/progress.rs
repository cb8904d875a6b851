//! The progress of a run: a bar on a terminal, otherwise a line per minute.

use std::cell::Cell;
use std::fmt::Display;
use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::console::{progress, say, shows_progress};
use crate::heartbeat::Heartbeat;

/// Time between two lines without a terminal.
const INTERVAL: Duration = Duration::from_secs(60);

/// A number of pieces of work, with loss, tokens per second and the time left.
pub struct Progress {
    label: String,
    steps: usize,
    done: Cell<usize>,
    bar: ProgressBar,
    /// `None` on a terminal, and if nothing is printed.
    lines: Option<Heartbeat>,
    start: Instant,
    tokens: Cell<usize>,
}

impl Progress {
    /// Shown on standard error.
    pub fn new(label: &str, steps: usize) -> Self {
        Self::resumed(label, steps, 0, false)
    }

    /// As [`new`](Self::new), with `done` steps already taken; `hidden` on workers that print
    /// nothing.
    pub fn resumed(label: &str, steps: usize, done: usize, hidden: bool) -> Self {
        let hidden = hidden || !shows_progress();
        let style = ProgressStyle::with_template(
            "{prefix:12} {bar:30} {pos}/{len}  {msg}  {elapsed} elapsed, {eta} left",
        );
        let bar = ProgressBar::new(steps as u64)
            .with_style(style.expect("the template is valid"))
            .with_prefix(label.to_string());
        if hidden {
            bar.set_draw_target(ProgressDrawTarget::hidden());
        }
        bar.set_position(done as u64);
        bar.reset_eta();
        let lines = (!hidden && !std::io::stderr().is_terminal())
            .then(|| Heartbeat::start(INTERVAL, |line| progress!("{line}")));
        let progress = Self {
            label: label.into(),
            steps,
            done: done.into(),
            bar,
            lines,
            start: Instant::now(),
            tokens: 0.into(),
        };
        progress.show("");
        progress
    }

    /// One step with its loss and number of tokens.
    pub fn step(&self, loss: f64, tokens: usize) {
        self.tokens.set(self.tokens.get() + tokens);
        let text = format!("loss {loss:.4}  {:.0} tokens/s", self.tokens_per_second());
        self.bar.set_message(text.clone());
        self.advance(&text);
    }

    /// One piece of work without a loss.
    pub fn tick(&self) {
        self.advance("");
    }

    /// Prints a line, above the bar if there is one. Nothing if the progress is hidden.
    pub fn say(&self, line: impl Display) {
        if !self.bar.is_hidden() || self.lines.is_some() {
            self.bar.suspend(|| say!("{line}"));
        }
    }

    fn advance(&self, text: &str) {
        self.done.set(self.done.get() + 1);
        self.bar.inc(1);
        self.show(text);
    }

    fn show(&self, text: &str) {
        if let Some(lines) = &self.lines {
            let (label, done, steps) = (&self.label, self.done.get(), self.steps);
            let line = format!("{label}: {done} of {steps}  {text}");
            lines.set(line.trim_end().into());
        }
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
