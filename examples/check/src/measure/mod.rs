//! Tools for `check` and the benchmarks: devices, sample values, timing, rates, and files of
//! results.

mod device;
mod launches;
mod rates;
mod results;
pub mod sample;
mod timing;

pub use device::{BACKENDS, DeviceError, backends, device, hardware, open, panic_message};
pub use launches::count_launches;
pub use rates::{Timed, copy, large_product};
pub use results::{size, write_rows};
pub use timing::{PAIRS, alternate, alternate_within, median, median_ratio};
