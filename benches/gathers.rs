//! Times whole optimizer steps with the deltas gathered at once and in groups. One group travels
//! while the inner optimizer steps the next.
//!
//! ```text
//! cargo bench --bench gathers -- --threads 4
//! cargo bench --features mpi --bench gathers --no-run    # prints the path of the program
//! mpirun -np 4 target/release/deps/gathers-… --mpi
//! ```
//!
//! `tests/workers.rs` proves that the weights are the same; this only measures.

use std::num::NonZeroUsize;
use std::time::{Duration, Instant};

use burn::module::Module;
use burn::optim::{AdamConfig, GradientsParams};
use burn::tensor::Device;
use clap::Parser;
use hd_pissa::comm::{Communicator, thread_group};
use hd_pissa::{
    CommunicationDtype, HdPissaAdapter, HdPissaConfig, HdPissaLinear, HdPissaLinearConfig,
    HdPissaModule, HdPissaOptimizerConfig, ShardGradients,
};
use hd_pissa_check::measure::median;

const SHARDS: usize = 8;
const TIMEOUT: Duration = Duration::from_secs(60);

/// Steps of 12 layers of 576 × 1536 and 1536 × 576, 8 shards of rank 16.
#[derive(Parser)]
struct Arguments {
    /// Numbers of gathers that alternate; ratios are to the first.
    #[arg(long, value_delimiter = ',', default_value = "1,2,4,8")]
    gathers: Vec<NonZeroUsize>,
    /// Steps with each.
    #[arg(long, default_value_t = 21)]
    steps: usize,
    /// Send deltas as bf16.
    #[arg(long)]
    bf16: bool,
    /// Workers as threads of this process.
    #[arg(long, default_value_t = 2)]
    threads: usize,
    /// Workers as MPI processes.
    #[cfg(feature = "mpi")]
    #[arg(long)]
    mpi: bool,
    /// Given by cargo.
    #[arg(long, hide = true)]
    bench: bool,
}

#[derive(Module, Debug)]
struct Layers {
    up: Vec<HdPissaLinear>,
    down: Vec<HdPissaLinear>,
}

impl Layers {
    fn new(device: &Device) -> Self {
        let layers = |d_input, d_output| {
            let config = HdPissaLinearConfig::new(d_input, d_output).with_bias(false);
            (0..12).map(|_| config.init(device)).collect()
        };
        // The same on every worker.
        device.seed(1);
        Self {
            up: layers(576, 1536),
            down: layers(1536, 576),
        }
    }

    /// Gradients of the hosted shards; the factors themselves serve as values.
    fn gradients(&self) -> ShardGradients {
        let mut gradients = ShardGradients::new(self);
        let layers = || self.up.iter().chain(&self.down);
        let adapter = |layer: &HdPissaLinear| {
            let adapter = layer.weight.reparameterization::<HdPissaAdapter>();
            adapter.expect("every layer is a target").shards.clone()
        };
        let hosted: Vec<usize> = layers()
            .take(1)
            .flat_map(adapter)
            .map(|s| s.index)
            .collect();
        for shard in hosted {
            let mut of_shard = GradientsParams::new();
            for factors in layers().flat_map(adapter).filter(|s| s.index == shard) {
                of_shard.register(factors.a.id, factors.a.val().inner());
                of_shard.register(factors.b.id, factors.b.val().inner());
            }
            gradients.push(shard, of_shard);
        }
        gradients
    }
}

fn work(
    model: Layers,
    communicator: impl Communicator + 'static,
    arguments: &Arguments,
) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let (worker, workers) = (communicator.worker_index(), communicator.num_workers());
    if !SHARDS.is_multiple_of(workers) {
        return Err(format!("{workers} workers do not divide {SHARDS} shards").into());
    }
    let share = SHARDS / workers;
    let config = HdPissaConfig::new().with_rank(16).with_shards(SHARDS);
    let start = Instant::now();
    let hosted = worker * share..(worker + 1) * share;
    let mut model = model.apply_hd_pissa_shared(&config, hosted, &communicator)?;
    let preparation = start.elapsed();

    let adam = AdamConfig::new().with_epsilon(1e-8).init();
    let wire = match arguments.bf16 {
        true => CommunicationDtype::Bf16,
        false => CommunicationDtype::F32,
    };
    let mut optimizer = HdPissaOptimizerConfig::new()
        .with_fingerprint_every(None)
        .with_communication_dtype(wire)
        .init(adam, communicator)?;
    let mut times = vec![Vec::with_capacity(arguments.steps); arguments.gathers.len()];
    let mut sent = 0;
    for round in 0..arguments.steps + 2 {
        for turn in 0..times.len() {
            // The order rotates, so none always follows the same one.
            let which = match round % 2 {
                0 => turn,
                _ => times.len() - 1 - turn,
            };
            optimizer.set_buckets(match round {
                // Workers agree on the number at the first step.
                0 => NonZeroUsize::MIN,
                _ => arguments.gathers[which],
            });
            let gradients = model.gradients();
            let before = optimizer.traffic().sent;
            optimizer.communicator().barrier()?;
            let start = Instant::now();
            model = optimizer.step(2e-5, model, gradients)?;
            // Two rounds of warm-up.
            if round > 1 {
                times[which].push(start.elapsed().as_secs_f64() * 1e3);
                sent = optimizer.traffic().sent - before;
            }
        }
    }
    if worker == 0 {
        println!(
            "{workers} workers, {wire}, {sent} bytes sent per step and worker; preparation {:.1} s",
            preparation.as_secs_f64()
        );
        for (gathers, own) in arguments.gathers.iter().zip(&times) {
            let ratios = own.iter().zip(&times[0]).map(|(own, first)| own / first);
            println!(
                "{gathers:>3} gathers: {:>7.1} ms per step, × {:.3}",
                median(own.iter().copied()),
                median(ratios)
            );
        }
    }
    Ok(())
}

fn main() -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let arguments = Arguments::parse();
    let model = Layers::new(&Device::flex().autodiff());
    #[cfg(feature = "mpi")]
    if arguments.mpi {
        let communicator = hd_pissa::comm::MpiCommunicator::new(TIMEOUT)?;
        return work(model, communicator, &arguments);
    }
    std::thread::scope(|scope| {
        let threads: Vec<_> = thread_group(arguments.threads, TIMEOUT)
            .into_iter()
            .map(|communicator| {
                let (model, arguments) = (model.clone(), &arguments);
                scope.spawn(move || work(model, communicator, arguments))
            })
            .collect();
        let join = |thread: std::thread::ScopedJoinHandle<_>| thread.join().expect("no panic");
        threads.into_iter().try_for_each(join)
    })
}
