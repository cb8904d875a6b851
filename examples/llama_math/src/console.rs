//! Lines for people, as events of `tracing`: what is said at which level, and how it is printed.
//!
//! A closed terminal or a full disk behind it does not end a run.

use std::fmt::{Debug, Write as _};
use std::io::Write;

use tracing::field::{Field, Visit};
use tracing::level_filters::LevelFilter;
use tracing::{Event, Level, Metadata, Subscriber};
use tracing_log::{AsLog, LogTracer, NormalizeEvent};
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::{Context, Layer, SubscriberExt};
use tracing_subscriber::registry::Registry;

use crate::Error;

/// The variable with further targets and levels, such as `hd_pissa=debug`.
const VARIABLE: &str = "RUST_LOG";
/// The targets of this program's events: lines, results, and the progress of long work.
pub(crate) const LINES: &str = "llama_math";
pub(crate) const RESULTS: &str = "llama_math::result";
pub(crate) const PROGRESS: &str = "llama_math::progress";
/// What is printed by default, and with `--quiet`.
const DEFAULT: &str = "off,llama_math=info";
const QUIET: &str = "off,llama_math=error,llama_math::result=info";

/// A line on standard output: what a run is doing.
macro_rules! say {
    ($($argument:tt)*) => {
        tracing::info!(target: $crate::console::LINES, $($argument)*)
    };
}

/// A line on standard output: what a run has come to. `--quiet` keeps it.
macro_rules! conclude {
    ($($argument:tt)*) => {
        tracing::info!(target: $crate::console::RESULTS, $($argument)*)
    };
}

/// A line on standard error: how far long work is, where no bar shows it.
macro_rules! progress {
    ($($argument:tt)*) => {
        tracing::info!(target: $crate::console::PROGRESS, $($argument)*)
    };
}

/// A line on standard error: what a user should know, though the run goes on.
macro_rules! complain {
    ($($argument:tt)*) => {
        tracing::warn!(target: $crate::console::LINES, $($argument)*)
    };
}

pub(crate) use {complain, conclude, progress, say};

/// Prints events from now on: those of this program, and of other libraries as the variable `RUST_LOG`
/// says. If something prints already, nothing changes.
///
/// # Errors
///
/// [`Error::Environment`] if `RUST_LOG` is no list of targets and levels.
pub(crate) fn start(is_quiet: bool) -> Result<(), Error> {
    let further = std::env::var(VARIABLE).unwrap_or_default();
    let filter = filter(is_quiet, &further).map_err(|reason| Error::Environment {
        variable: VARIABLE,
        reason,
    })?;
    let subscriber = Registry::default().with(filter).with(Lines);
    if tracing::subscriber::set_global_default(subscriber).is_ok() {
        // Libraries that use `log`. Somebody else's logger stays.
        let level = LevelFilter::current().as_log();
        let _ = LogTracer::builder().with_max_level(level).init();
    }
    Ok(())
}

fn filter(is_quiet: bool, further: &str) -> Result<Targets, String> {
    let own = if is_quiet { QUIET } else { DEFAULT };
    // What is said last counts.
    let all = [own, further]
        .into_iter()
        .filter(|part| !part.trim().is_empty());
    let all = all.collect::<Vec<_>>().join(",");
    all.parse()
        .map_err(|error| format!("`{further}` is no list of targets and levels: {error}"))
}

/// Whether lines about the progress are printed. Programs that print no events show it themselves.
pub(crate) fn shows_progress() -> bool {
    tracing::enabled!(target: PROGRESS, Level::INFO)
}

/// Prints each event in a line: those of this program as they are, others with level and target.
struct Lines;

impl<S: Subscriber> Layer<S> for Lines {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let mut message = Message::default();
        event.record(&mut message);
        let normalized = event.normalized_metadata();
        let metadata = normalized.as_ref().unwrap_or_else(|| event.metadata());
        match is_for_people(metadata) {
            true if is_of_output(metadata) => line(&mut std::io::stdout(), &message.0),
            true => line(&mut std::io::stderr(), &message.0),
            false => {
                let (level, target) = (metadata.level(), metadata.target());
                line(
                    &mut std::io::stderr(),
                    &format!("{level} {target}: {}", message.0),
                );
            }
        }
    }
}

fn is_for_people(metadata: &Metadata<'_>) -> bool {
    [LINES, RESULTS, PROGRESS].contains(&metadata.target()) && *metadata.level() <= Level::INFO
}

fn is_of_output(metadata: &Metadata<'_>) -> bool {
    *metadata.level() == Level::INFO && metadata.target() != PROGRESS
}

/// The text of an event.
#[derive(Default)]
struct Message(String);

impl Visit for Message {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        match field.name() {
            "message" => {
                let _ = write!(self.0, "{value:?}");
            }
            // Where a record of `log` comes from.
            name if name.starts_with("log.") => {}
            name => {
                let _ = write!(self.0, " {name}={value:?}");
            }
        }
    }
}

fn line(to: &mut impl Write, text: &str) {
    // Written in one piece, so the lines of several processes do not mix.
    let _ = to.write_all(format!("{text}\n").as_bytes());
    let _ = to.flush();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quiet_leaves_results_and_errors_and_the_variable_has_the_last_word() {
        let shown = |is_quiet, further: &str, target: &str, level| {
            filter(is_quiet, further)
                .unwrap()
                .would_enable(target, &level)
        };
        for target in [LINES, RESULTS, PROGRESS] {
            assert!(shown(false, "", target, Level::INFO));
            assert!(!shown(false, "", target, Level::DEBUG));
            assert!(shown(true, "", target, Level::ERROR));
        }
        assert!(!shown(true, "", LINES, Level::WARN) && !shown(true, "", PROGRESS, Level::INFO));
        assert!(shown(true, "", RESULTS, Level::INFO));
        // Other libraries say nothing unless they are asked.
        assert!(!shown(false, "", "hd_pissa::svd", Level::ERROR));
        assert!(shown(false, "hd_pissa=warn", "hd_pissa::svd", Level::WARN));
        assert!(shown(true, "llama_math=info", LINES, Level::INFO));
        let error = filter(false, "hd_pissa=loud").unwrap_err();
        assert!(error.contains("hd_pissa=loud"), "{error}");
    }
}
