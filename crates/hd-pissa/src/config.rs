use burn::config::Config;
use burn::module::ParamGroup;

/// Floating-point precision of the singular value decomposition.
#[derive(Config, Debug, Copy, PartialEq, Eq)]
pub enum SvdPrecision {
    /// Single precision: about 1.6 times as fast as double.
    F32,
    /// Double precision, rounded to `f32` factors at the end.
    F64,
}

/// How the principal components of a weight are computed.
#[derive(Config, Debug, Copy, PartialEq, Eq)]
pub enum SvdMethod {
    /// A full decomposition on the host, of which the leading triples are kept. Exact up to
    /// rounding, for every spectrum.
    Exact(SvdPrecision),
}

/// A rank for some of the targets.
#[derive(Config, Debug)]
pub struct TargetRank {
    /// The weights it holds for.
    pub targets: ParamGroup,
    /// Their rank, for each shard.
    pub rank: usize,
}

/// Which weights get an HD-PiSSA adapter, and of what size.
///
/// ```
/// use burn::module::ParamGroup;
/// use hd_pissa::HdPissaConfig;
///
/// let config = HdPissaConfig::new()
///     .with_rank(16)
///     .with_shards(8)
///     .with_targets(Some(ParamGroup::from_regex(r"(q|k|v|o)_proj\.weight$").unwrap()));
/// assert_eq!(config.rank * config.shards, 128);
/// ```
#[derive(Config, Debug)]
pub struct HdPissaConfig {
    /// Rank `r` of each shard's factors.
    #[config(default = 16)]
    pub rank: usize,
    /// Number of shards `K`, over all workers.
    #[config(default = 8)]
    pub shards: usize,
    /// Numerator of the gradient scale `alpha / rank`. `None` takes each weight's own rank, for a
    /// scale of 1. Under Adam the scale matters only through epsilon.
    #[config(default = "None")]
    pub alpha: Option<f64>,
    /// The weights to adapt, by path or id; every rank-2 parameter it matches.
    ///
    /// `None` takes the `weight` of every `Linear` and [`HdPissaLinear`](crate::HdPissaLinear)
    /// whose path does not match `(lm_head|head|output)`.
    #[config(default = "None")]
    pub targets: Option<ParamGroup>,
    /// Ranks that differ from `rank`; of several that match a weight the last one counts.
    #[config(default = "Vec::new()")]
    pub target_ranks: Vec<TargetRank>,
    /// How principal components are computed.
    #[config(default = "SvdMethod::Exact(SvdPrecision::F32)")]
    pub svd: SvdMethod,
}
