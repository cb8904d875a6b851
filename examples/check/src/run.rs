//! All parts of `check`, in order.

use std::fs::File;
use std::io::Write;

use crate::measure::open;

use crate::bounds::Arithmetic;
use crate::environment::Environment;
use crate::report::{Report, Spoil};
use crate::{CheckError, Options, operations, replays, steps, times};

/// Compares and times according to `options`, prints the results, and writes them to a file if
/// asked.
///
/// # Errors
///
/// [`CheckError`] if the device cannot be used or a file cannot be read or written.
pub fn run(options: &Options) -> Result<Report, CheckError> {
    run_with(options, None)
}

/// [`run`], but `spoil` changes results before they are compared, for tests of this program.
///
/// # Errors
///
/// Those of [`run`].
pub fn run_with(options: &Options, spoil: Option<Spoil>) -> Result<Report, CheckError> {
    let device = open(&options.device)?;
    let runs = replays::read(&options.data)?;
    let backend = options.device.split(':').next().expect("one part at least");
    let arithmetic = Arithmetic::of(backend);
    // Fail now, not after some minutes of work.
    let json = |source| CheckError::Json {
        file: options.json.clone().unwrap_or_default(),
        source,
    };
    let file = options
        .json
        .as_ref()
        .map(File::create)
        .transpose()
        .map_err(json)?;
    let mut report = Report::new(Environment::of(&options.device, &device), spoil);

    let dtypes = operations::dtypes(&device, &mut report);
    operations::check(&device, &dtypes, arithmetic, &mut report);
    steps::check(&device, &dtypes, arithmetic, &mut report);
    replays::check(&device, &runs, arithmetic, &mut report);
    if options.seconds > 0.0 {
        times::measure(&device, &dtypes, arithmetic, options.seconds, &mut report);
    }

    println!("\n{}", report.verdict());
    let passed = report.passed();
    if let Some(mut file) = file {
        let mut report = serde_json::to_value(&report).expect("plain data");
        report["passed"] = passed.into();
        let text = serde_json::to_string_pretty(&report).expect("plain data");
        file.write_all((text + "\n").as_bytes()).map_err(json)?;
    }
    Ok(report)
}
