//! The time of a piece of work, and its share of the device's own rates.

use std::fmt;

use crate::measure::median;
use serde::Serialize;

use crate::case::Case;

/// One piece of work.
#[derive(Clone, Debug, Serialize)]
pub struct Speed {
    #[serde(flatten)]
    pub case: Case,
    /// Median.
    pub ms: f64,
    pub rounds: usize,
    /// Kernels launched; `None` if the backend is not CubeCL's.
    pub launches: Option<usize>,
    /// The least bytes that the work reads and writes, and its arithmetic.
    pub bytes: f64,
    pub flops: f64,
    /// Share of the rate of a copy.
    pub share_of_bandwidth: f64,
    /// Share of the rate of Burn's large product of the same dtype.
    pub share_of_products: f64,
}

/// The highest rates of a device.
pub struct Rates {
    pub bytes_per_second: f64,
    pub flops_per_second: f64,
}

impl Speed {
    pub fn new(
        case: Case,
        (times, launches): (Vec<f64>, Option<usize>),
        [bytes, flops]: [f64; 2],
        rates: &Rates,
    ) -> Self {
        let ms = median(times.iter().copied());
        Self {
            case,
            ms,
            rounds: times.len(),
            launches,
            bytes,
            flops,
            share_of_bandwidth: 1e3 * bytes / ms / rates.bytes_per_second,
            share_of_products: 1e3 * flops / ms / rates.flops_per_second,
        }
    }
}

impl fmt::Display for Speed {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let Case {
            operation,
            dtype,
            sizes,
        } = &self.case;
        write!(
            f,
            "{operation:<26}{dtype:<5}{sizes:<25}{:>10.3} ms {:>8.1} GB/s {:>3.0} % {:>9.1} Gflop/s {:>3.0} %",
            self.ms,
            self.bytes / self.ms / 1e6,
            100.0 * self.share_of_bandwidth,
            self.flops / self.ms / 1e6,
            100.0 * self.share_of_products,
        )?;
        match self.launches {
            Some(launches) => write!(f, " {launches:>5} launches"),
            None => Ok(()),
        }
    }
}
