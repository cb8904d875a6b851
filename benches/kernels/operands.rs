//! The operands of a case on the host, and a variant of computing its result.

use hd_pissa_check::measure::sample::Host;

/// The operands of a merge. Factors have the form of the operations, a row per shard.
pub struct Merge {
    pub size: [usize; 2],
    pub rank: usize,
    pub shards: usize,
    pub weight: Host,
    pub frames: Host,
    pub deltas: Host,
}

/// The operands of `y = x·W` and `p = x·a`. The factor is always `f32`.
pub struct Product {
    pub x: Host,
    pub w: Host,
    pub a: Host,
}

#[cfg(feature = "cubecl-kernels")]
/// The operands of `x · f`, or `xᵀ · f`. The factor is always `f32`.
#[cfg(feature = "cubecl-kernels")]
pub struct Factor {
    pub x: Host,
    pub f: Host,
    pub is_gradient: bool,
}

/// One way of computing a result `R`.
pub struct Variant<'a, R> {
    pub name: &'static str,
    pub work: Box<dyn FnMut() + 'a>,
    /// The current result.
    pub result: Box<dyn Fn() -> R + 'a>,
    /// Bound on the error of an element, as a share of the sum of the absolute values of its terms.
    pub error: f64,
}

/// A merged weight, and its number of merges.
pub type Merged = (Host, usize);

/// `y` and `p`; the last run may have kept only one of them.
pub type Products = [Option<Host>; 2];
