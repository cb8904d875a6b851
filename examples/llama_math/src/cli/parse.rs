//! Values of options: numbers within their bounds, names, and times.

use std::time::Duration;

use clap::builder::{PossibleValuesParser, RangedU64ValueParser, TypedValueParser};
use hd_pissa::{CommunicationDtype, FrameScale, GradientMode};

use crate::method::gradients_name;

/// A number that an option does not take.
#[derive(Debug, thiserror::Error)]
#[error("must be a number {0}")]
pub(super) struct OutOfRange(&'static str);

pub(super) fn at_least(least: u64) -> RangedU64ValueParser<usize> {
    // Larger counts are mistakes, and products of a few must not overflow.
    RangedU64ValueParser::new().range(least..=1 << 20)
}

fn number(
    text: &str,
    is_valid: impl Fn(f64) -> bool,
    range: &'static str,
) -> Result<f64, OutOfRange> {
    text.parse()
        .ok()
        .filter(|&value| is_valid(value))
        .ok_or(OutOfRange(range))
}

pub(super) fn positive(text: &str) -> Result<f64, OutOfRange> {
    number(text, |value| value > 0.0 && value.is_finite(), "above 0")
}

pub(super) fn not_negative(text: &str) -> Result<f64, OutOfRange> {
    number(
        text,
        |value| value >= 0.0 && value.is_finite(),
        "of at least 0",
    )
}

pub(super) fn share(text: &str) -> Result<f64, OutOfRange> {
    number(text, |value| (0.0..=1.0).contains(&value), "from 0 to 1")
}

pub(super) fn gradients() -> impl TypedValueParser<Value = GradientMode> {
    let all = [GradientMode::PerShard, GradientMode::Shared];
    PossibleValuesParser::new(all.map(gradients_name)).map(move |name| {
        let named = all.into_iter().find(|&mode| gradients_name(mode) == name);
        named.expect("one of the possible values")
    })
}

pub(super) fn frame_scale() -> impl TypedValueParser<Value = FrameScale> {
    PossibleValuesParser::new(["balanced", "unit"]).map(|name| match name.as_str() {
        "unit" => FrameScale::Unit,
        _ => FrameScale::Balanced,
    })
}

pub(super) fn wire() -> impl TypedValueParser<Value = CommunicationDtype> {
    let all = [CommunicationDtype::F32, CommunicationDtype::Bf16];
    PossibleValuesParser::new(["f32", "bf16"]).map(move |name| {
        let named = all.into_iter().find(|wire| wire.to_string() == name);
        named.expect("one of the possible values")
    })
}

/// Number of cores.
pub(super) fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// A time from the command line. Thirty years are as good as never, and a clock can add them.
pub(super) fn seconds(seconds: f64) -> Duration {
    Duration::from_secs_f64(seconds.min(1e9))
}

pub(super) fn minutes(minutes: f64) -> Duration {
    seconds(60.0 * minutes)
}
