//! The command lines of `export` and `verify`.

use std::path::PathBuf;

use clap::Args;
use hd_pissa::export::RankLimit;

use super::command::Export;
use super::format::Format;
use super::merged::{ExportConfig, OutputDtype, Rounding};
use super::verify::Verify;
use crate::{Error, device, hub};

/// Options of `export`.
#[derive(Args, Debug)]
pub struct ExportOptions {
    /// Folder that a run has written, or an earlier export
    #[arg(value_name = "DIR")]
    source: PathBuf,
    /// The form
    #[arg(long)]
    format: Format,
    /// Folder of the pretrained model that was trained, or its name on the Hub
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// Folder of the export
    #[arg(long, value_name = "DIR")]
    output: PathBuf,
    /// Dtype of the weights of a merged model; `same` is that of the pretrained one
    #[arg(long, value_name = "DTYPE", default_value = "same")]
    output_dtype: OutputDtype,
    /// How 16-bit weights are rounded
    #[arg(long, default_value = "nearest")]
    rounding: Rounding,
    /// Seed of the stochastic rounding
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Most bytes of a weight file of a merged model, such as 500MB or 2GiB
    #[arg(long, value_name = "SIZE", default_value = "5GB", value_parser = size)]
    max_shard_size: u64,
    /// Components of a LoRA adapter or delta for each weight [default: all, 2 x shards x rank]
    #[arg(long, value_name = "R")]
    rank: Option<usize>,
    /// Keep the fewest components with this share of the squared norm of a change, above 0 and at most
    /// 1; ranks then differ between weights
    #[arg(long, value_name = "SHARE", conflicts_with = "rank")]
    energy: Option<f64>,
    /// Most components of each weight
    #[arg(long, value_name = "R", default_value_t = RankLimit::default().max_rank)]
    max_rank: usize,
    /// Backend
    #[arg(long)]
    device: Option<String>,
    /// Replace the folder of an earlier export
    #[arg(long)]
    overwrite: bool,
}

impl ExportOptions {
    /// Does what they say.
    ///
    /// # Errors
    ///
    /// Those of [`Export::run`].
    pub fn run(self) -> Result<(), Error> {
        let device = device::parse(self.device.as_deref())?;
        let export = Export {
            source: self.source,
            base: hub::model(&self.model)?,
            output: self.output,
            overwrite: self.overwrite,
            format: self.format,
            config: ExportConfig {
                dtype: self.output_dtype,
                rounding: self.rounding,
                seed: self.seed,
                max_shard_size: self.max_shard_size,
            },
            limit: RankLimit {
                rank: self.rank,
                energy: self.energy,
                max_rank: self.max_rank,
            },
            device,
        };
        export.run()
    }
}

/// Options of `verify`.
#[derive(Args, Debug)]
pub struct VerifyOptions {
    /// Folder that a run or an export has written
    #[arg(value_name = "DIR")]
    folder: PathBuf,
    /// Folder of the pretrained model that was trained, or its name on the Hub; a LoRA adapter or a
    /// delta needs it
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// Backend
    #[arg(long)]
    device: Option<String>,
}

impl VerifyOptions {
    /// Does what they say.
    ///
    /// # Errors
    ///
    /// Those of [`Verify::run`].
    pub fn run(self) -> Result<(), Error> {
        let device = device::parse(self.device.as_deref())?;
        let verify = Verify {
            folder: self.folder,
            base: self.model.as_deref().map(hub::model).transpose()?,
            device,
        };
        verify.run()
    }
}

/// A size that cannot be read.
#[derive(Debug, thiserror::Error)]
#[error("must be a number above 0 with KB, MB, GB, KiB, MiB or GiB")]
struct NoSize;

fn size(text: &str) -> Result<u64, NoSize> {
    let units = [
        ("KiB", 1 << 10),
        ("MiB", 1 << 20),
        ("GiB", 1 << 30),
        ("KB", 1_000),
        ("MB", 1_000_000),
        ("GB", 1_000_000_000),
    ];
    let parse = |(unit, bytes): (&str, u64)| {
        let number: u64 = text.strip_suffix(unit)?.trim().parse().ok()?;
        number.checked_mul(bytes).filter(|&bytes| bytes > 0)
    };
    units.into_iter().find_map(parse).ok_or(NoSize)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_units() {
        for (text, bytes) in [
            ("5GB", 5_000_000_000),
            ("500 MB", 500_000_000),
            ("2GiB", 2 << 30),
            ("1KiB", 1024),
        ] {
            assert_eq!(size(text).unwrap(), bytes, "{text}");
        }
        for text in ["", "5", "GB", "0MB", "-1GB", "1.5GB", "99999999999999GB"] {
            assert!(size(text).is_err(), "{text}");
        }
    }
}
