//! Loops with the best instructions that the processor has.

use pulp::{Arch, Simd, WithSimd};

/// Calls `work`, compiled once for each set of instructions. The closure and all that it calls must be
/// `#[inline(always)]`, or they are compiled for the oldest processor only.
#[inline(always)]
pub(super) fn vectorized<R>(work: impl FnMut() -> R) -> R {
    Arch::new().dispatch(Work(work))
}

/// pulp calls closures through a function that is not inlined.
struct Work<F>(F);

impl<R, F: FnMut() -> R> WithSimd for Work<F> {
    type Output = R;

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, _: S) -> R {
        (self.0)()
    }
}
