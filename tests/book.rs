//! The listings of the book, as tests. Anchors mark what a chapter shows.

#[path = "quick_start.rs"]
mod program;

use std::collections::BTreeMap;
use std::time::Duration;

use burn::nn::attention::{MhaInput, MultiHeadAttention, MultiHeadAttentionConfig};
use burn::nn::{LinearConfig, Relu};
use burn::optim::{AdamConfig, GradientsParams};
use burn::prelude::*;
use burn::tensor::activation::softmax;
use hd_pissa::checkpoint::{Checkpoints, Snapshot};
use hd_pissa::comm::{Communicator, Solo, thread_group};
use hd_pissa::export::{Peft, RankLimit, WeightChange, read_delta, write_delta, write_peft};
use hd_pissa::ops::adapter_linear;
use hd_pissa::{
    GradientMode, HdPissaAdapter, HdPissaConfig, HdPissaLinear, HdPissaModule,
    HdPissaOptimizerConfig, HdPissaOptimizerRecord, ShardGradients, SharedGradients, SvdCache,
    SvdMethod,
};
use hd_pissa_tests::{assert_close, base, bits, normal};
use program::Mlp;

type Result<T = ()> = std::result::Result<T, Box<dyn std::error::Error>>;

fn batch(device: &Device) -> Tensor<2> {
    normal([8, 32], device)
}

#[test]
fn quick_start() -> Result {
    let device = Device::flex().autodiff();
    let model = Mlp::new(&device);
    let before = bits(&base(&model.up.weight));
    let plan = program::config().plan(&model)?.to_string();
    let written = include_str!("../book/src/quick_start_plan.txt");
    assert_eq!(shape_of(&plan), shape_of(written), "{plan}");

    let (trained, losses) = program::fine_tune(model, 100, &device)?;
    assert!(losses[99] < 0.5 * losses[0], "{losses:?}");
    let adapter = trained.up.weight.reparameterization::<HdPissaAdapter>();
    assert!(adapter.is_none());
    assert_ne!(bits(&base(&trained.up.weight)), before);

    let folder = tempfile::tempdir()?;
    let file = folder.path().join("model.bpk");
    trained.clone().save_file(&file)?;
    let x = normal([3, 32], &Device::flex());
    assert_close(program::serve(&file, x.clone())?, trained.forward(x), 1e-6);
    program::main()
}

#[test]
fn readme() -> Result {
    let device = Device::flex().autodiff();
    let model = Mlp::new(&device);
    let before = bits(&base(&model.up.weight));
    let steps = [[(); 8].map(|()| batch(&device))];
    let loss_of = |model: &Mlp, x: Tensor<2>| model.forward(x).square().mean();
    // ANCHOR: readme
    use hd_pissa::{HdPissaConfig, HdPissaModule, HdPissaOptimizerConfig, ShardGradients, comm};

    let config = HdPissaConfig::new().with_rank(4).with_shards(8);
    println!("{}", config.plan(&model)?); // what gets an adapter, and what that costs
    let mut model = model.apply_hd_pissa(&config, 0..8)?; // this worker hosts all 8 shards
    let adam = AdamConfig::new().with_epsilon(1e-8).init(); // as in PyTorch; Burn's default is 1e-5
    let mut optimizer = HdPissaOptimizerConfig::new().init(adam, comm::Solo)?;
    for batches in steps {
        let mut gradients = ShardGradients::new(&model);
        for (shard, batch) in batches.into_iter().enumerate() {
            model = model.select_shard(shard)?; // whose data the next forward pass sees
            let loss = loss_of(&model, batch);
            gradients.push(shard, GradientsParams::from_grads(loss.backward(), &model));
        }
        model = optimizer.step(2e-5, model, gradients)?; // one update of rank up to 2·8·4
    }
    let trained = model.valid().materialize(); // a plain model again
    // ANCHOR_END: readme
    assert_ne!(bits(&base(&trained.up.weight)), before);

    let source = include_str!("book.rs");
    let listing = source.split("// ANCHOR: readme\n").nth(1).unwrap();
    let listing = listing.split("    // ANCHOR_END").next().unwrap();
    let dedented: String = listing
        .lines()
        .map(|line| format!("{}\n", line.strip_prefix("    ").unwrap_or(line)))
        .collect();
    let readme = include_str!("../README.md");
    assert!(
        readme.contains(&format!("```rust\n{dedented}```\n")),
        "{dedented}"
    );
    Ok(())
}

#[test]
fn export() -> Result {
    let device = Device::flex().autodiff();
    let start = Mlp::new(&device);
    let (trained, _) = program::fine_tune(start.clone(), 4, &device)?;
    let (start, config) = (start.valid(), program::config());
    let folder = tempfile::tempdir()?;
    let folder = folder.path();

    // ANCHOR: export
    let mut changes = Vec::new();
    for (path, before, after) in [
        ("up.weight", &start.up, &trained.up),
        ("down.weight", &start.down, &trained.down),
    ] {
        let (before, after) = (before.weight.val(), after.weight.val());
        let frames = config.frames(path, &before)?;
        let change = WeightChange::new(path, &before, &after, &frames, &RankLimit::default())?;
        println!("{path}: relative error {:.1e}", change.relative_error());
        changes.push(change);
    }
    write_peft(folder, &changes, &Peft::default())?;
    write_delta(&folder.join("delta.safetensors"), &changes)?;

    // Later, from the pretrained weights:
    let changes = read_delta(&folder.join("delta.safetensors"))?;
    let rebuilt = changes[0].added_to(&start.down.weight.val())?; // changes are in the order of paths
    // ANCHOR_END: export
    let [before, after] = [&start, &trained].map(|model| model.down.weight.val());
    let norm = |x: Tensor<2>| x.square().sum().sqrt().into_scalar::<f32>();
    let error = norm(rebuilt - after.clone()) / norm(after - before);
    let stated = changes[0].relative_error();
    assert!((f64::from(error) - stated).abs() < 1e-4, "{error} {stated}");
    for change in &changes {
        assert_eq!(change.rank(), 2 * 4 * 2);
    }
    Ok(())
}

/// A table without its shares of the variance, which depend on random weights.
fn shape_of(table: &str) -> String {
    let is_share = |word: &str| word.contains('.') && !word.contains(char::is_alphabetic);
    let line = |line: &str| {
        let words = line.split_whitespace().filter(|word| !is_share(word));
        words.collect::<Vec<_>>().join(" ")
    };
    table.lines().map(line).collect::<Vec<_>>().join("\n")
}

#[test]
fn shared_gradients() -> Result {
    let device = Device::flex().autodiff();
    let model = Mlp::new(&device);
    let adam = AdamConfig::new().with_epsilon(1e-8).init();
    let mut optim = HdPissaOptimizerConfig::new().init(adam, Solo)?;

    // ANCHOR: shared
    let config = HdPissaConfig::new()
        .with_rank(2)
        .with_shards(4)
        .with_gradients(GradientMode::Shared);
    let mut model = model.apply_hd_pissa(&config, 0..4)?;

    // One step of two micro-batches.
    let mut gradients = SharedGradients::new(&model, 2);
    for _micro_batch in 0..2 {
        let x = batch(&device);
        let loss = (model.forward(x.clone()) - x).square().mean();
        gradients.push(GradientsParams::from_grads(loss.backward(), &model));
    }
    model = optim.step(1e-4, model, gradients)?;
    // ANCHOR_END: shared
    assert_eq!(optim.steps(), 1);
    drop(model);
    Ok(())
}

#[test]
fn two_ways_in() -> Result {
    let device = Device::flex().autodiff();
    let model = Mlp::new(&device);

    // ANCHOR: lean
    #[derive(Module, Debug)]
    struct LeanMlp {
        up: HdPissaLinear, // instead of Linear
        down: HdPissaLinear,
    }
    // ANCHOR_END: lean

    let config = HdPissaConfig::new().with_rank(2).with_shards(1);
    let model = model.apply_hd_pissa(&config, 0..1)?;
    let lean = LeanMlp {
        up: model.up.clone().into(),
        down: model.down.clone().into(),
    };
    let x = batch(&device);
    let y = lean
        .down
        .forward(Relu::new().forward(lean.up.forward(x.clone())));
    assert_close(y, model.forward(x), 1e-6);
    Ok(())
}

/// The one-layer model of the mathematics chapter.
fn layer(device: &Device, shards: usize) -> Result<HdPissaLinear> {
    let linear = LinearConfig::new(12, 9).with_bias(false).init(device);
    let config = HdPissaConfig::new().with_rank(2).with_shards(shards);
    Ok(HdPissaLinear::from_linear(linear).apply_hd_pissa(&config, 0..shards)?)
}

#[test]
fn frames() -> Result {
    let device = Device::flex();
    let layer = layer(&device, 3)?;

    // ANCHOR: frames
    let adapter = layer.weight.reparameterization::<HdPissaAdapter>().unwrap();
    let [first, second] = [&adapter.shards[0], &adapter.shards[1]];
    // aᵀ·a = √Σ Uᵀ·U √Σ: zero between shards, the singular values within one.
    let between = first.a.val().transpose().matmul(second.a.val());
    let left = first.a.val().transpose().matmul(first.a.val());
    let right = first.b.val().matmul(first.b.val().transpose());
    // ANCHOR_END: frames
    assert!(between.abs().max().into_scalar::<f32>() < 1e-6);
    assert_close(left, right, 1e-5);
    Ok(())
}

#[test]
fn backward() -> Result {
    let device = Device::flex().autodiff();
    let layer = layer(&device, 1)?;
    let shard = &layer
        .weight
        .reparameterization::<HdPissaAdapter>()
        .unwrap()
        .shards[0];
    let (w, a, b) = (layer.weight.base(), shard.a.val(), shard.b.val());
    let x = normal([5, 12], &device).require_grad();
    let s = 1.5;

    // ANCHOR: backward
    let y = adapter_linear(x.clone(), w.clone(), a.clone(), b.clone(), s);
    let grads = y.square().sum().backward(); // G = 2·y
    let g = x.clone().matmul(w.clone()).inner() * 2.0;
    let grad_x = g.clone().matmul(w.inner().transpose());
    let q = g.clone().matmul(b.clone().inner().transpose()); // [tokens, r]
    let grad_a = x.clone().inner().transpose().matmul(q) * s;
    let p = x.clone().inner().matmul(a.clone().inner()); // [tokens, r]
    let grad_b = p.transpose().matmul(g) * s;
    // ANCHOR_END: backward
    assert_close(x.grad(&grads).unwrap(), grad_x, 1e-5);
    assert_close(a.grad(&grads).unwrap(), grad_a, 1e-5);
    assert_close(b.grad(&grads).unwrap(), grad_b, 1e-5);
    Ok(())
}

#[test]
fn step() -> Result {
    let device = Device::flex().autodiff();
    let layer = layer(&device, 1)?;
    let shard = layer
        .weight
        .reparameterization::<HdPissaAdapter>()
        .unwrap()
        .shards[0]
        .clone();
    let (a, b) = (shard.a.val().inner(), shard.b.val().inner());
    let w = base(&layer.weight);
    let lr = 1e-3;
    let loss = layer.forward(normal([5, 12], &device)).square().mean();
    let grads = GradientsParams::from_grads(loss.backward(), &layer);
    let grad_a = grads.get::<2>(shard.a.id).unwrap();
    let grad_b = grads.get::<2>(shard.b.id).unwrap();
    let adam = AdamConfig::new().with_epsilon(1e-8).init();
    let updated = HdPissaOptimizerConfig::new()
        .init(adam, Solo)?
        .step(lr, layer, grads)?;

    // ANCHOR: step
    // Adam's first step: the bias-corrected moments are the gradient and its square.
    let delta = |grad: Tensor<2>| grad.clone() / (grad.square().sqrt() + 1e-8) * -lr;
    let (delta_a, delta_b) = (delta(grad_a), delta(grad_b));
    let left = Tensor::cat(vec![a + delta_a.clone(), delta_a], 1); // [d_input, 2·r]
    let right = Tensor::cat(vec![delta_b, b], 0); // [2·r, d_output]
    let expected = w.clone() + left.matmul(right);
    // ANCHOR_END: step
    assert_close(base(&updated.weight) - w.clone(), expected - w, 1e-4);
    Ok(())
}

#[test]
fn workers() -> Result {
    fn device_of(_worker: usize) -> Device {
        Device::flex()
    }
    let start = Mlp::new(&Device::flex());

    // ANCHOR: workers
    let config = HdPissaConfig::new().with_rank(2).with_shards(4);
    let workers: Vec<_> = thread_group(2, Duration::from_secs(60))
        .into_iter()
        .map(|communicator| {
            let (model, config) = (start.clone(), config.clone());
            std::thread::spawn(move || {
                let worker = communicator.worker_index();
                let hosted = [2 * worker, 2 * worker + 1];
                let device = device_of(worker).autodiff();
                let mut model = model
                    .fork(&device)
                    .train()
                    .apply_hd_pissa_shared(&config, hosted, &communicator)
                    .unwrap();
                let adam = AdamConfig::new().with_epsilon(1e-8).init();
                let mut optim = HdPissaOptimizerConfig::new()
                    .init(adam, communicator)
                    .unwrap();
                let mut gradients = ShardGradients::new(&model);
                for shard in hosted {
                    model = model.select_shard(shard).unwrap();
                    let loss = model.forward(batch(&device)).square().mean();
                    gradients.push(shard, GradientsParams::from_grads(loss.backward(), &model));
                }
                optim.step(1e-3, model, gradients).unwrap()
            })
        })
        .collect();
    // ANCHOR_END: workers
    let weights: Vec<_> = workers
        .into_iter()
        .map(|worker| bits(&base(&worker.join().unwrap().up.weight)))
        .collect();
    assert_eq!(weights[0], weights[1]);
    assert_ne!(weights[0], bits(&base(&start.up.weight)));
    Ok(())
}

#[test]
fn refused_and_records() -> Result {
    let device = Device::flex().autodiff();
    let config = HdPissaConfig::new().with_rank(2).with_shards(1);
    let mut model = Mlp::new(&device).apply_hd_pissa(&config, 0..1)?;
    let adam = || AdamConfig::new().with_epsilon(1e-8).init();
    let mut optim = HdPissaOptimizerConfig::new().init(adam(), Solo)?;
    let loss = (model.forward(batch(&device)) * f32::NAN).sum();
    let gradients = GradientsParams::from_grads(loss.backward(), &model);

    // ANCHOR: refused
    model = match optim.step(1e-3, model, gradients) {
        Ok(model) => model,
        Err(error) => {
            eprintln!("{error}"); // step refused: `up.weight.hd_pissa.shard_0_of_1`: …
            error.model // as it was; go on with the next batch
        }
    };
    // ANCHOR_END: refused
    assert!(
        base(&model.up.weight)
            .is_finite()
            .all()
            .into_scalar::<bool>()
    );

    let folder = tempfile::tempdir()?;
    let [model_file, optimizer_file] =
        ["model.bpk", "optimizer.bpk"].map(|f| folder.path().join(f));
    // ANCHOR: records
    model.clone().save_file(&model_file)?;
    optim.to_record()?.save(&optimizer_file)?;

    let restored = Mlp::new(&device)
        .apply_hd_pissa(&config, 0..1)?
        .try_load_file(&model_file)?;
    let mut optim = HdPissaOptimizerConfig::new().init(adam(), Solo)?;
    optim.load_record(HdPissaOptimizerRecord::load(&optimizer_file)?)?;
    // ANCHOR_END: records
    assert_eq!(
        bits(&base(&restored.up.weight)),
        bits(&base(&model.up.weight))
    );
    drop(optim);
    Ok(())
}

#[test]
fn checkpoints() -> Result {
    let device = Device::flex().autodiff();
    let folder = tempfile::tempdir()?;
    let folder = folder.path().join("run.checkpoints");
    let config = HdPissaConfig::new().with_rank(2).with_shards(4);
    let settings = BTreeMap::from([("rank".to_string(), "2".to_string())]);
    let adam = AdamConfig::new().with_epsilon(1e-8).init();
    let mut optim = HdPissaOptimizerConfig::new().init(adam, Solo)?;
    let model = Mlp::new(&device).apply_hd_pissa(&config, 0..4)?;
    let saved = bits(&base(&model.up.weight));
    let step = 40;

    // ANCHOR: save
    let checkpoints = Checkpoints::new(folder).with_keep_last(2);
    let mut snapshot = Snapshot::new(step, &model, optim.to_record()?.into_bytes()?);
    snapshot.settings = settings.clone();
    checkpoints.save(&snapshot, optim.communicator())?;
    // ANCHOR_END: save

    let (mut model, hosted_shards) = (Mlp::new(&device), 0..4);
    assert_ne!(bits(&base(&model.up.weight)), saved);
    // ANCHOR: resume
    // Instead of the model's own `apply_hd_pissa`:
    let found = checkpoints.latest()?;
    if let Some(checkpoint) = found.checkpoint {
        checkpoint.check_settings(&settings)?;
        model = checkpoint.apply_hd_pissa(model, &config, hosted_shards)?;
        let state = checkpoint.optimizer(&model, optim.communicator())?;
        optim.load_record(HdPissaOptimizerRecord::from_bytes(state)?)?;
    }
    // ANCHOR_END: resume
    assert_eq!(bits(&base(&model.up.weight)), saved);
    Ok(())
}

// ANCHOR: lean_attention
/// Burn's `MultiHeadAttention`, without masks and dropout, with lean projections.
#[derive(Module, Debug)]
struct LeanAttention {
    query: HdPissaLinear,
    key: HdPissaLinear,
    value: HdPissaLinear,
    output: HdPissaLinear,
    n_heads: usize,
}

impl From<MultiHeadAttention> for LeanAttention {
    fn from(burns: MultiHeadAttention) -> Self {
        Self {
            query: burns.query.into(),
            key: burns.key.into(),
            value: burns.value.into(),
            output: burns.output.into(),
            n_heads: burns.n_heads,
        }
    }
}

impl LeanAttention {
    fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        let [batch, length, d_model] = x.dims();
        let d_head = d_model / self.n_heads;
        let heads = |projection: &HdPissaLinear| {
            let all = projection.forward(x.clone());
            let all = all.reshape([batch, length, self.n_heads, d_head]);
            all.swap_dims(1, 2)
        };
        let scores = heads(&self.query).matmul(heads(&self.key).transpose());
        let weights = softmax(scores / (d_head as f64).sqrt(), 3);
        let context = weights.matmul(heads(&self.value)).swap_dims(1, 2);
        self.output
            .forward(context.reshape([batch, length, d_model]))
    }
}
// ANCHOR_END: lean_attention

#[test]
fn decompositions() -> Result {
    let device = Device::flex().autodiff();
    let model = Mlp::new(&device);
    let folder = tempfile::tempdir()?;
    let folder = folder.path().join("decompositions");

    // ANCHOR: decomposition
    let config = HdPissaConfig::new()
        .with_rank(2)
        .with_shards(4)
        .with_svd(SvdMethod::Krylov)
        .with_svd_cache(Some(SvdCache::new(folder.clone())));
    let model = model.apply_hd_pissa(&config, 0..4)?;
    // ANCHOR_END: decomposition
    assert!(
        model
            .up
            .weight
            .reparameterization::<HdPissaAdapter>()
            .is_some()
    );
    assert_eq!(std::fs::read_dir(folder)?.count(), 2);
    Ok(())
}

#[test]
fn lean_attention_is_burns() -> Result {
    let device = Device::flex().autodiff();
    let config = HdPissaConfig::new().with_rank(2).with_shards(2);
    let burns = MultiHeadAttentionConfig::new(12, 3)
        .with_dropout(0.0)
        .init(&device);
    let burns = burns.apply_hd_pissa(&config, 0..2)?;
    let lean = LeanAttention::from(burns.clone());
    let record = lean.clone().into_record();
    // The paths are the same: the record of one loads into the other.
    let burns = burns.load_record(record);

    let x = normal([2, 5, 12], &device);
    let dense = burns.forward(MhaInput::self_attn(x.clone())).context;
    let output = lean.forward(x);
    assert_close(output.clone(), dense.clone(), 1e-6);
    let gradients = GradientsParams::from_grads(output.square().sum().backward(), &lean);
    let expected = GradientsParams::from_grads(dense.square().sum().backward(), &burns);
    let adapter = burns.value.weight.reparameterization::<HdPissaAdapter>();
    let shard = &adapter.unwrap().shards[0];
    for id in [shard.a.id, shard.b.id] {
        let [gradient, expected] = [&gradients, &expected].map(|all| all.get::<2>(id).unwrap());
        assert_close(gradient, expected, 1e-5);
    }
    Ok(())
}

/// The troubleshooting page quotes the library's real messages.
#[test]
fn quoted_messages_are_real() {
    let sources = [
        include_str!("../crates/hd-pissa/src/error.rs"),
        include_str!("../crates/hd-pissa/src/optim/error.rs"),
        include_str!("../crates/hd-pissa-comm/src/error.rs"),
    ];
    let source = sources.concat();
    // Removes line breaks inside strings, and quotes around paths.
    let continued = source.replace("\\\n", "");
    let plain = continued.replace('`', "");
    let source: Vec<&str> = plain.split_whitespace().collect();
    let source = source.join(" ");
    let page = include_str!("../book/src/troubleshooting.md");
    let quotes = page.lines().filter_map(|line| {
        let cell = line.strip_prefix("| `")?;
        Some(cell.split('`').next().unwrap())
    });
    let mut count = 0;
    for quote in quotes {
        count += 1;
        for part in quote.split('…').map(str::trim) {
            assert!(
                source.contains(part),
                "no error says {part:?}, of {quote:?}"
            );
        }
    }
    assert!(count > 20, "{count}");
}
