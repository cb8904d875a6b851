//! The command line.

mod options;
mod parse;
mod pretrain;
mod reproduce;
mod scaling;
mod sweep;
mod trial;
mod watching;

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

use crate::export::{ExportOptions, VerifyOptions};
use crate::recipe::Recipe;
use crate::{Error, console, device, memory};

use options::Options;
use parse::{cores, positive};
use pretrain::PretrainOptions;
use reproduce::ReproduceOptions;
use scaling::ScalingOptions;
use sweep::SweepOptions;
use trial::TrialOptions;

/// Fine-tunes Llama-family models on word problems with HD-PiSSA and its baselines.
///
/// Without arguments it compares LoRA, PiSSA, HD-PiSSA and full fine-tuning on a tiny model and
/// generated data, each at the learning rate that a sweep has found. With --model and --data it
/// fine-tunes a Hugging Face checkpoint, by default with HD-PiSSA whose shards share gradients and
/// hold random directions; --published has everything as in the paper.
#[derive(Parser, Debug)]
#[command(name = "llama_math", version, args_conflicts_with_subcommands = true)]
pub struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    /// Print only errors and results. RUST_LOG adds what is to be printed, such as hd_pissa=debug
    #[arg(long, global = true)]
    quiet: bool,
    #[command(flatten)]
    options: Options,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// Pre-trains the tiny model whose weights are part of this example.
    Pretrain(PretrainOptions),
    /// Shows what more shards do to loss, rank and time, and predicts a run on many devices.
    ///
    /// Trains the tiny model and a synthetic layer with ever more virtual shards on this device,
    /// fits the constants of a cost model to the times, and predicts the time of a step on many
    /// such devices.
    Scaling(ScalingOptions),
    /// Searches the learning rate of every method on the tiny model's tasks, and repeats the best.
    ///
    /// Every training is a process of its own with one compute thread, and leaves a file in the
    /// output: a sweep that is started again goes on where it stopped.
    Sweep(SweepOptions),
    /// Writes the model of an earlier run in another form: merged in another dtype or in several files, as a
    /// LoRA adapter, or as a delta.
    Export(ExportOptions),
    /// Says whether an output is what was written, and which program loads it.
    ///
    /// Compares the files with their digests, and logits with those of the trained model.
    Verify(VerifyOptions),
    /// Runs every experiment of a settings file, and writes tables and pictures of the results.
    ///
    /// Each training leaves a file in the output: a run that is started again goes on where it stopped.
    Reproduce(ReproduceOptions),
    /// Fine-tunes as a file says, or shows what that would take.
    ///
    /// A recipe for several processes is started by an MPI launcher, as in `mpirun -np 8 llama_math
    /// recipe FILE`; paths in it are seen from the working directory.
    Recipe(RecipeOptions),
    /// One training of a sweep or of the comparison, in a process of its own.
    #[command(hide = true)]
    Trial(TrialOptions),
}

#[derive(Args, Debug)]
struct RecipeOptions {
    /// The recipe
    file: PathBuf,
    /// Print shapes, memory, bytes and hours, and train nothing. Needs neither model nor data
    #[arg(long)]
    dry_run: bool,
    /// Tokens per second of one GPU, for the hours of a dry run; the default is a guess
    #[arg(long, value_name = "T", requires = "dry_run", default_value_t = 2000.0, value_parser = positive)]
    tokens_per_second: f64,
}

impl RecipeOptions {
    fn run(self) -> Result<(), Error> {
        let recipe = Recipe::read(&self.file)?;
        let program = ["llama_math".to_string()].into_iter();
        let cli = Cli::parse_from(program.chain(recipe.arguments()));
        let options = &cli.options;
        match (&options.model, &options.output) {
            (Some(model), Some(output)) if self.dry_run => {
                let fine_tuning = options.fine_tuning(model, output)?;
                recipe.dry_run(&fine_tuning, self.tokens_per_second)
            }
            (Some(_), _) => cli.run(),
            _ => Err(Error::field(&self.file, "options / model", "is missing")),
        }
    }
}

impl Cli {
    /// Does what the command line says.
    ///
    /// # Errors
    ///
    /// Whatever goes wrong; [`Error::exit_code`] tells usage errors from others.
    pub fn run(self) -> Result<(), Error> {
        console::start(self.quiet)?;
        let threads = self.options.threads;
        let limit = |reason| Error::Environment {
            variable: "memory",
            reason,
        };
        memory::check_limit(threads.unwrap_or_else(cores)).map_err(limit)?;
        if let Some(threads) = threads {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
            pool.build_global().map_err(|error| Error::Option {
                option: "threads",
                reason: error.to_string(),
            })?;
        }
        device::check_variable()?;
        match self.command {
            Some(Command::Pretrain(options)) => options.run(),
            Some(Command::Scaling(options)) => options.run(),
            Some(Command::Sweep(options)) => options.run(),
            Some(Command::Export(options)) => options.run(),
            Some(Command::Verify(options)) => options.run(),
            Some(Command::Reproduce(options)) => options.run(),
            Some(Command::Recipe(options)) => options.run(),
            Some(Command::Trial(options)) => options.run(),
            None => self.options.run(),
        }
    }
}
