//! HD-PiSSA in Burn's own training loop: the weights of a plain loop, resumption, and the end of a
//! training.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use burn::data::dataloader::batcher::Batcher;
use burn::data::dataloader::{DataLoader, DataLoaderBuilder};
use burn::data::dataset::InMemDataset;
use burn::lr_scheduler::linear::LinearLrSchedulerConfig;
use burn::lr_scheduler::module_lr_scheduler::ModuleLrScheduler;
use burn::lr_scheduler::{LrScheduler, LrSchedulerRecord};
use burn::module::{Module, ParamGroup};
use burn::optim::{AdamConfig, SgdConfig};
use burn::tensor::{DType, Device, Tensor, TensorData};
use burn::train::checkpoint::KeepLastNCheckpoints;
use burn::train::metric::store::{Aggregate, Direction, Split};
use burn::train::metric::{LearningRateMetric, LossMetric};
use burn::train::renderer::CliMetricsRenderer;
use burn::train::{
    InferenceStep, Interrupter, Learner, LearningResult, MetricEarlyStoppingStrategy,
    RegressionOutput, StoppingCondition, SupervisedTraining, TrainOutput, TrainStep, TrainingError,
    TrainingStrategy,
};
use hd_pissa::comm::Solo;
use hd_pissa::learner::{HdPissaStrategy, LearnerError};
use hd_pissa::{
    GradientMode, HdPissaConfig, HdPissaModule, HdPissaOptimizerConfig, MergePrecision,
    OptimizerError, ShardGradients, SharedGradients, Windows,
};
use hd_pissa_tests::training::adam;
use hd_pissa_tests::{Lean, base, bits};

const SHARDS: usize = 4;
const BATCH: usize = 3;

#[derive(Module, Debug)]
struct Net {
    layers: Lean,
}

impl Net {
    fn output(&self, batch: Batch) -> RegressionOutput {
        let dtype = self.layers.first.weight.base().dtype();
        let output = self.layers.forward(batch.x.cast(dtype));
        let output = output.cast(DType::F32);
        let loss = (output.clone() - batch.y.clone()).square().mean();
        RegressionOutput::new(loss, output, batch.y)
    }
}

impl TrainStep for Net {
    type Input = Batch;
    type Output = RegressionOutput;

    fn step(&self, batch: Batch) -> TrainOutput<RegressionOutput> {
        let output = self.output(batch);
        TrainOutput::new(self, output.loss.backward(), output)
    }
}

impl InferenceStep for Net {
    type Input = Batch;
    type Output = RegressionOutput;

    fn step(&self, batch: Batch) -> RegressionOutput {
        self.output(batch)
    }
}

#[derive(Clone, Debug)]
struct Item {
    x: [f32; 13],
    y: [f32; 11],
}

/// Items of pseudo-random values, the same in every call.
fn items(count: usize) -> Vec<Item> {
    let value = |index: usize| {
        let hash = (index as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        ((hash ^ (hash >> 29)) % 2001) as f32 / 1000.0 - 1.0
    };
    (0..count)
        .map(|item| Item {
            x: std::array::from_fn(|i| value(24 * item + i)),
            y: std::array::from_fn(|i| value(24 * item + 13 + i)),
        })
        .collect()
}

#[derive(Clone, Debug)]
struct Batch {
    x: Tensor<2>,
    y: Tensor<2>,
}

fn batch(items: &[Item], device: &Device) -> Batch {
    let rows = items.len();
    let x = items.iter().flat_map(|item| item.x).collect();
    let y = items.iter().flat_map(|item| item.y).collect();
    Batch {
        x: Tensor::from_data(TensorData::new::<f32, _>(x, [rows, 13]), device),
        y: Tensor::from_data(TensorData::new::<f32, _>(y, [rows, 11]), device),
    }
}

struct Batches;

impl Batcher<Item, Batch> for Batches {
    fn batch(&self, items: Vec<Item>, device: &Device) -> Batch {
        batch(&items, device)
    }
}

fn loader(items: Vec<Item>, shuffled: bool) -> Arc<dyn DataLoader<Batch>> {
    let builder = DataLoaderBuilder::new(Batches).batch_size(BATCH);
    let builder = match shuffled {
        true => builder.shuffle(7),
        false => builder,
    };
    builder.build(InMemDataset::new(items))
}

fn device() -> Device {
    Device::flex().autodiff()
}

/// The same model in every test and process. Tests run on threads that share the random numbers, so
/// one at a time seeds them and draws all values, which Burn does on first use.
fn start() -> Lean {
    static DRAWING: Mutex<()> = Mutex::new(());
    let _one_at_a_time = DRAWING.lock().unwrap();
    let device = device();
    device.seed(5);
    let model = Lean::new(&device);
    for layer in [&model.first, &model.second] {
        layer.weight.val();
        layer.bias.as_ref().map(|bias| bias.val());
    }
    model
}

fn adapted(start: &Lean, config: HdPissaConfig) -> Net {
    let layers = start.clone().apply_hd_pissa(&config, 0..SHARDS).unwrap();
    // A dense parameter trains besides the adapters. Burn loads its moments as f32 from every
    // dtype.
    let is_f32 = layers.first.weight.base().dtype() == DType::F32;
    let bias = ParamGroup::from_path("first.bias");
    Net {
        layers: layers.set_require_grad_group(bias, is_f32),
    }
}

fn config(mode: GradientMode) -> HdPissaConfig {
    let config = HdPissaConfig::new().with_rank(2).with_shards(SHARDS);
    config.with_gradients(mode)
}

fn linear() -> ModuleLrScheduler {
    LinearLrSchedulerConfig::new(1e-2, 1e-4, 12).init().unwrap()
}

fn trained(model: &Net) -> Vec<TensorData> {
    let Lean { first, second } = &model.layers;
    let bias = first.bias.as_ref().unwrap().val();
    vec![
        bits(&base(&first.weight)),
        bits(&base(&second.weight)),
        bits(&bias),
    ]
}

fn devices(workers: usize) -> Vec<Device> {
    vec![device(); workers]
}

fn training(folder: &Path, items: Vec<Item>, shuffled: bool) -> SupervisedTraining<Net> {
    SupervisedTraining::new(
        folder,
        loader(items, shuffled),
        loader(self::items(5), false),
    )
    .renderer(Box::new(CliMetricsRenderer::new()))
    .with_application_logger(None)
    .metric_train_numeric(LossMetric::new())
    .metric_valid_numeric(LossMetric::new())
    .metric_train_numeric(LearningRateMetric::new())
}

fn launch(
    training: SupervisedTraining<Net>,
    strategy: &Arc<HdPissaStrategy>,
    model: Net,
) -> LearningResult<Net> {
    let learner = strategy.learner(model);
    training
        .with_training_strategy(TrainingStrategy::Custom(strategy.clone()))
        .launch(learner)
}

/// The code of a plain loop. The data of each part is given as its batches.
fn plain(
    mut model: Net,
    mode: GradientMode,
    epochs: usize,
    per_part: usize,
    parts: &[Vec<Batch>],
) -> Vec<TensorData> {
    let mut optimizer = HdPissaOptimizerConfig::new().init(adam(), Solo).unwrap();
    let mut scheduler = linear();
    for _ in 0..epochs {
        let mut parts: Vec<_> = parts.iter().map(|part| part.iter().cloned()).collect();
        loop {
            let step: Vec<Vec<Batch>> = parts
                .iter_mut()
                .map(|part| part.by_ref().take(per_part).collect())
                .collect();
            if step.iter().any(Vec::is_empty) {
                break;
            }
            let lr = scheduler.step();
            let result = match mode {
                GradientMode::PerShard => {
                    let mut gradients = ShardGradients::new(&model);
                    for (shard, batches) in step.into_iter().enumerate() {
                        model = model.select_shard(shard).unwrap();
                        for batch in batches {
                            gradients.push(shard, TrainStep::step(&model, batch).grads);
                        }
                    }
                    optimizer.step(lr, model, gradients.into_mean())
                }
                GradientMode::Shared => {
                    let step: Vec<Batch> = step.into_iter().flatten().collect();
                    let mut gradients = SharedGradients::new(&model, step.len());
                    for batch in step {
                        gradients.push(TrainStep::step(&model, batch).grads);
                    }
                    optimizer.step(lr, model, gradients)
                }
            };
            model = result.unwrap();
        }
    }
    trained(&model)
}

fn parts(items: &[Item], parts: usize) -> Vec<Vec<Batch>> {
    let bound = |part| items.len() * part / parts;
    (0..parts)
        .map(|part| {
            let part = &items[bound(part)..bound(part + 1)];
            part.chunks(BATCH)
                .map(|items| batch(items, &device()))
                .collect()
        })
        .collect()
}

#[test]
fn weights_are_those_of_a_plain_loop() {
    let start = start();
    // Parts of 6 or 7 and of 7 or 8 items: two or three batches each, or three each.
    for (count, accumulation) in [(26, None), (26, Some(2)), (29, None), (29, Some(2))] {
        let items = items(count);
        let model = adapted(&start, config(GradientMode::PerShard));
        let per_part = accumulation.unwrap_or(1);
        let parts = parts(&items, SHARDS);
        let expected = plain(model, GradientMode::PerShard, 2, per_part, &parts);
        for workers in [1, 2] {
            let folder = tempfile::tempdir().unwrap();
            let model = adapted(&start, config(GradientMode::PerShard));
            let strategy = HdPissaStrategy::new(adam(), linear()).with_devices(devices(workers));
            let mut training = training(folder.path(), items.clone(), false).num_epochs(2);
            if let Some(accumulation) = accumulation {
                training = training.grads_accumulation(accumulation);
            }
            let result = launch(training, &Arc::new(strategy), model);
            assert!(result.error.is_none(), "{:?}", result.error);
            assert_eq!(trained(&result.model), expected, "{count} {workers}");
        }
    }
}

#[test]
fn weights_are_those_of_a_plain_loop_with_shared_gradients() {
    let start = start();
    let items = items(29);
    for (micro_batches, workers) in [(None, 1), (None, 2), (Some(4), 1), (Some(4), 2)] {
        let model = adapted(&start, config(GradientMode::Shared));
        let parts = parts(&items, micro_batches.unwrap_or(workers));
        let expected = plain(model, GradientMode::Shared, 2, 1, &parts);

        let folder = tempfile::tempdir().unwrap();
        let model = adapted(&start, config(GradientMode::Shared));
        let strategy = HdPissaStrategy::new(adam(), linear()).with_devices(devices(workers));
        let mut training = training(folder.path(), items.clone(), false).num_epochs(2);
        if let Some(micro_batches) = micro_batches {
            training = training.grads_accumulation(micro_batches);
        }
        let result = launch(training, &Arc::new(strategy), model);
        assert!(result.error.is_none(), "{:?}", result.error);
        let message = format!("{micro_batches:?} on {workers}");
        assert_eq!(trained(&result.model), expected, "{message}");
    }
}

/// Each micro-batch is an item to the metrics, with the learning rate of its step.
#[test]
fn metrics_see_every_micro_batch() {
    let folder = tempfile::tempdir().unwrap();
    let model = adapted(&start(), config(GradientMode::PerShard));
    let strategy = HdPissaStrategy::new(adam(), linear());
    // Three batches in each of four parts: two steps, of two micro-batches and one for each shard.
    let training = training(folder.path(), items(29), false).grads_accumulation(2);
    launch(training, &Arc::new(strategy), model);

    let log = |metric: &str| {
        let path = folder.path().join(format!("train/epoch-1/{metric}.log"));
        let log = std::fs::read_to_string(path).unwrap();
        let lines = log.lines().filter(|line| !line.ends_with(",final"));
        lines.map(String::from).collect::<Vec<_>>()
    };
    assert_eq!(log("Loss").len(), 12);
    let rates: Vec<f64> = log("Learning_Rate")
        .iter()
        .map(|line| line.split(',').next().unwrap().parse().unwrap())
        .collect();
    let mut scheduler = linear();
    let [first, second] = [(); 2].map(|()| scheduler.step().base());
    assert_eq!(rates, [[first; 8].to_vec(), [second; 4].to_vec()].concat());
}

/// Interrupts a training at batch number `at`.
struct Interrupting {
    made: AtomicUsize,
    at: usize,
    interrupter: Interrupter,
}

impl Batcher<Item, Batch> for Interrupting {
    fn batch(&self, items: Vec<Item>, device: &Device) -> Batch {
        if self.made.fetch_add(1, Ordering::Relaxed) == self.at {
            self.interrupter.stop(Some("as wanted"));
        }
        batch(&items, device)
    }
}

/// Three epochs, or one and two thirds and then the rest from the checkpoint after the first, on other
/// numbers of workers.
fn resumes(config: HdPissaConfig, dtype: DType, scheduler: impl Into<ModuleLrScheduler>) {
    let start = start().cast(dtype);
    let scheduler = scheduler.into();
    let strategy = |workers| {
        let strategy = HdPissaStrategy::new(adam(), scheduler.clone());
        Arc::new(strategy.with_devices(devices(workers)))
    };
    let saving = |training: SupervisedTraining<Net>| {
        let training = training.with_default_checkpointers().grads_accumulation(4);
        training.with_checkpointing_strategy(KeepLastNCheckpoints::new(3))
    };
    let model = || adapted(&start, config.clone());

    let folder = tempfile::tempdir().unwrap();
    let whole = saving(training(folder.path(), items(60), true)).num_epochs(3);
    let whole = launch(whole, &strategy(1), model());
    let expected = trained(&whole.model);

    for (before, after) in [(1, 1), (1, 2), (2, 1), (2, 2)] {
        let folder = tempfile::tempdir().unwrap();
        let interrupter = Interrupter::new();
        let batcher = Interrupting {
            made: AtomicUsize::new(0),
            // Four parts give 5 batches each to an epoch.
            at: 20 + 12,
            interrupter: interrupter.clone(),
        };
        let train = DataLoaderBuilder::new(batcher).batch_size(BATCH).shuffle(7);
        let train = train.build(InMemDataset::new(items(60)));
        let first = SupervisedTraining::new(folder.path(), train, loader(items(5), false))
            .renderer(Box::new(CliMetricsRenderer::new()))
            .with_application_logger(None)
            .with_interrupter(interrupter);
        let first = launch(saving(first).num_epochs(3), &strategy(before), model());
        assert!(first.interrupted.is_some() && first.error.is_none());
        let saved = |epoch: usize| {
            let file = format!("checkpoint/model-{epoch}.bpk");
            folder.path().join(file).exists()
        };
        assert!(saved(1) && !saved(2), "{before}");
        assert_ne!(trained(&first.model), expected);

        let second = saving(training(folder.path(), items(60), true));
        let second = second.num_epochs(3).checkpoint(1);
        let second = launch(second, &strategy(after), model());
        assert!(second.error.is_none(), "{:?}", second.error);
        assert_eq!(trained(&second.model), expected, "{before} then {after}");
    }
}

#[test]
fn a_resumed_training_equals_an_uninterrupted_one() {
    resumes(config(GradientMode::PerShard), DType::F32, linear());
    resumes(config(GradientMode::Shared), DType::F32, linear());
}

#[test]
fn residual_bits_and_rounding_resume_too() {
    // At this rate most updates are below a rounding step of the weights.
    let compensated = config(GradientMode::PerShard).with_precision(MergePrecision::Compensated);
    resumes(compensated, DType::BF16, 1e-4);
    let stochastic = MergePrecision::Stochastic { seed: 3 };
    let stochastic = config(GradientMode::PerShard).with_precision(stochastic);
    resumes(stochastic, DType::BF16, 1e-4);
}

/// Four epochs, with a checkpoint after each.
fn saving(folder: &Path, train: Arc<dyn DataLoader<Batch>>) -> SupervisedTraining<Net> {
    SupervisedTraining::new(folder, train, loader(items(5), false))
        .renderer(Box::new(CliMetricsRenderer::new()))
        .with_application_logger(None)
        .with_default_checkpointers()
        .with_checkpointing_strategy(KeepLastNCheckpoints::new(3))
        .num_epochs(4)
}

/// Stands still at its batch number `at`, and says so.
struct Blocking {
    made: AtomicUsize,
    at: usize,
    marker: PathBuf,
}

impl Batcher<Item, Batch> for Blocking {
    fn batch(&self, items: Vec<Item>, device: &Device) -> Batch {
        if self.made.fetch_add(1, Ordering::Relaxed) == self.at {
            std::fs::write(&self.marker, "").unwrap();
            std::thread::sleep(Duration::from_secs(600));
        }
        batch(&items, device)
    }
}

/// Environment variable with the folder of [`process`].
const FOLDER: &str = "HD_PISSA_LEARNER_FOLDER";
const MARKER: &str = "standing";

#[test]
#[ignore = "the process that another test starts and kills"]
fn process() {
    let Some(folder) = std::env::var_os(FOLDER).map(PathBuf::from) else {
        return;
    };
    let batcher = Blocking {
        made: AtomicUsize::new(0),
        // 20 batches to an epoch: in the third.
        at: 40 + 7,
        marker: folder.join(MARKER),
    };
    let train = DataLoaderBuilder::new(batcher).batch_size(BATCH).shuffle(7);
    let train = train.build(InMemDataset::new(items(60)));
    let strategy = Arc::new(HdPissaStrategy::new(adam(), linear()));
    let model = adapted(&start(), config(GradientMode::PerShard));
    launch(saving(&folder, train), &strategy, model);
}

/// A process that is killed while it trains, and perhaps while it saves, and another that goes on from the
/// newest checkpoint that it left.
#[test]
fn a_killed_and_resumed_training_equals_an_uninterrupted_one() {
    let model = || adapted(&start(), config(GradientMode::PerShard));
    let strategy = |workers| {
        let strategy = HdPissaStrategy::new(adam(), linear());
        Arc::new(strategy.with_devices(devices(workers)))
    };
    let folder = tempfile::tempdir().unwrap();
    let whole = saving(folder.path(), loader(items(60), true));
    let whole = launch(whole, &strategy(1), model());
    let expected = trained(&whole.model);

    for (workers, damages) in [(1, false), (2, true)] {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path();
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["process", "--exact", "--ignored", "--nocapture"])
            .env(FOLDER, folder)
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let start = Instant::now();
        while !folder.join(MARKER).exists() {
            assert_eq!(child.try_wait().unwrap(), None, "ended early");
            assert!(start.elapsed() < Duration::from_secs(120));
            std::thread::sleep(Duration::from_millis(1));
        }
        let strategy = strategy(workers);
        // Burn saves on threads of its own.
        while damages && strategy.newest_checkpoint(folder, &model()) != Ok(Some(2)) {
            assert!(start.elapsed() < Duration::from_secs(120));
            std::thread::sleep(Duration::from_millis(1));
        }
        // On Unix that is SIGKILL.
        child.kill().unwrap();
        assert!(!child.wait().unwrap().success());

        let mut epoch = strategy.newest_checkpoint(folder, &model()).unwrap();
        if damages {
            // As a kill leaves a file that was being written.
            let file = format!("checkpoint/model-{}.bpk", epoch.unwrap());
            let file = std::fs::File::options().write(true).open(folder.join(file));
            let file = file.unwrap();
            file.set_len(file.metadata().unwrap().len() / 2).unwrap();
            let before = epoch;
            epoch = strategy.newest_checkpoint(folder, &model()).unwrap();
            assert!(epoch < before);
        }
        // None: before the first was saved.
        println!("resumed after epoch {epoch:?}");
        let rest = saving(folder, loader(items(60), true));
        let rest = match epoch {
            Some(epoch) => rest.checkpoint(epoch),
            None => rest,
        };
        let rest = launch(rest, &strategy, model());
        assert!(rest.error.is_none(), "{:?}", rest.error);
        assert_eq!(trained(&rest.model), expected, "{workers}");
    }
}

#[test]
fn checkpoints_that_do_not_fit_are_refused_before_burn_reads_them() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let strategy = Arc::new(HdPissaStrategy::new(adam(), linear()));
    let own = config(GradientMode::PerShard);
    let model = || adapted(&start(), own.clone());
    assert_eq!(strategy.newest_checkpoint(folder, &model()), Ok(None));
    let training = saving(folder, loader(items(24), false)).num_epochs(2);
    launch(training, &strategy, model());
    assert_eq!(strategy.check_checkpoint(folder, 1, &model()), Ok(()));
    assert_eq!(strategy.newest_checkpoint(folder, &model()), Ok(Some(2)));

    let file = |name: &str| folder.join("checkpoint").join(name);
    for other in [
        own.clone().with_rank(1),
        own.clone().with_windows(Windows::Spread),
        config(GradientMode::Shared),
    ] {
        let other = adapted(&start(), other);
        for result in [
            strategy.check_checkpoint(folder, 2, &other),
            strategy.newest_checkpoint(folder, &other).map(drop),
        ] {
            let error = result.unwrap_err();
            assert!(
                matches!(&error, LearnerError::Mismatch { file: at, .. } if *at == file("model-2.bpk")),
                "{error}"
            );
            assert!(error.to_string().contains("model-2.bpk"), "{error}");
        }
    }
    let unreadable = |result: Result<(), LearnerError>, name: &str| {
        let error = result.unwrap_err();
        assert!(
            matches!(&error, LearnerError::Unreadable { file: at, .. } if *at == file(name)),
            "{error}"
        );
    };
    let missing = strategy.check_checkpoint(folder, 9, &model());
    unreadable(missing, "model-9.bpk");
    std::fs::write(file("optim-2.bpk"), "no record").unwrap();
    let broken = strategy.check_checkpoint(folder, 2, &model());
    unreadable(broken, "optim-2.bpk");
    assert_eq!(strategy.newest_checkpoint(folder, &model()), Ok(Some(1)));

    // As a strategy of Burn's own saves it.
    LrSchedulerRecord::new()
        .save(file("scheduler-1.bpk"))
        .unwrap();
    let error = strategy.newest_checkpoint(folder, &model()).unwrap_err();
    assert!(
        matches!(&error, LearnerError::Mismatch { file: at, .. } if *at == file("scheduler-1.bpk")),
        "{error}"
    );
    std::fs::remove_file(file("model-1.bpk")).unwrap();
    let nothing = strategy.newest_checkpoint(folder, &model()).map(drop);
    unreadable(nothing, "optim-2.bpk");
}

#[test]
fn training_stops_early() {
    /// A rate of 0, and the number of times it was read.
    #[derive(Clone)]
    struct Counting(Arc<AtomicUsize>);

    impl LrScheduler for Counting {
        fn step(&mut self) -> f64 {
            self.0.fetch_add(1, Ordering::Relaxed);
            0.0
        }

        fn to_record(&self) -> LrSchedulerRecord {
            LrSchedulerRecord::new()
        }

        fn load_record(&mut self, _record: LrSchedulerRecord) {}
    }

    let folder = tempfile::tempdir().unwrap();
    let steps = Arc::new(AtomicUsize::new(0));
    let strategy = HdPissaStrategy::new(adam(), Counting(steps.clone()));
    // If weights do not move, the loss never improves after the first epoch.
    let stopping = MetricEarlyStoppingStrategy::new(
        &LossMetric::new(),
        Aggregate::Mean,
        Direction::Lowest,
        Split::Valid,
        StoppingCondition::NoImprovementSince { n_epochs: 2 },
    );
    let training = training(folder.path(), items(24), false)
        .num_epochs(10)
        .early_stopping(stopping);
    let model = adapted(&start(), config(GradientMode::PerShard));
    let before = trained(&model);
    let result = launch(training, &Arc::new(strategy), model);
    assert!(result.error.is_none());
    assert_eq!(trained(&result.model), before);
    // Two steps in each of three epochs. Reading the learner's scheduler adds one.
    assert_eq!(steps.load(Ordering::Relaxed), 3 * 2 + 1);
}

/// The errors of a training from Burn and from the strategy, and the final weights.
fn failure(
    strategy: HdPissaStrategy,
    items: Vec<Item>,
    model: Net,
    accumulation: Option<usize>,
) -> (String, LearnerError, Vec<TensorData>) {
    let folder = tempfile::tempdir().unwrap();
    let mut training = training(folder.path(), items, false).num_epochs(2);
    if let Some(accumulation) = accumulation {
        training = training.grads_accumulation(accumulation);
    }
    let strategy = Arc::new(strategy);
    let result = launch(training, &strategy, model);
    let error = result.error.expect("the training fails");
    assert!(matches!(*error, TrainingError::Workers(_)), "{error}");
    let cause = strategy.error().expect("the strategy knows why");
    assert!(error.to_string().contains(&cause.to_string()), "{error}");
    (error.to_string(), cause, trained(&result.model))
}

#[test]
fn a_refused_step_ends_the_training_with_the_weights_of_the_step_before() {
    let start = start();
    let mut items = items(24);
    // In the second batch of shard 2.
    items[12 + 4].x[0] = f32::NAN;
    for workers in [1, 2] {
        let model = adapted(&start, config(GradientMode::PerShard));
        let first: Vec<_> = parts(&items, SHARDS)
            .iter()
            .map(|part| vec![part[0].clone()])
            .collect();
        let expected = plain(model.clone(), GradientMode::PerShard, 1, 1, &first);
        let strategy = HdPissaStrategy::new(adam(), linear()).with_devices(devices(workers));
        let (message, error, left) = failure(strategy, items.clone(), model, None);
        match error {
            LearnerError::Optimizer {
                cause: OptimizerError::NonFiniteGradient { path, .. },
                ..
            } => assert!(
                path.contains("shard_2_of_4") || path.contains("bias"),
                "{path}"
            ),
            other => panic!("{other:?}"),
        }
        assert!(message.contains("NaN"), "{message}");
        assert_eq!(left, expected);
    }
}

#[test]
fn a_panic_of_the_model_is_an_error() {
    /// Fails on the item whose first value is infinite.
    #[derive(Module, Debug)]
    struct Fragile {
        net: Net,
    }

    impl TrainStep for Fragile {
        type Input = Batch;
        type Output = RegressionOutput;

        fn step(&self, batch: Batch) -> TrainOutput<RegressionOutput> {
            let largest: f32 = batch.x.clone().max().into_scalar();
            assert!(largest.is_finite(), "an infinite value");
            let output = self.net.output(batch);
            TrainOutput::new(self, output.loss.backward(), output)
        }
    }

    impl InferenceStep for Fragile {
        type Input = Batch;
        type Output = RegressionOutput;

        fn step(&self, batch: Batch) -> RegressionOutput {
            self.net.output(batch)
        }
    }

    let mut items = items(24);
    items[20].x[0] = f32::INFINITY;
    for workers in [1, 2] {
        let folder = tempfile::tempdir().unwrap();
        let net = adapted(&start(), config(GradientMode::PerShard));
        let strategy = HdPissaStrategy::new(adam(), linear()).with_devices(devices(workers));
        let strategy = Arc::new(strategy);
        let learner = strategy.learner(Fragile { net });
        let (train, valid) = (loader(items.clone(), false), loader(self::items(5), false));
        let result = SupervisedTraining::new(folder.path(), train, valid)
            .renderer(Box::new(CliMetricsRenderer::new()))
            .with_application_logger(None)
            .with_training_strategy(TrainingStrategy::Custom(strategy.clone()))
            .launch(learner);
        let message = result.error.expect("an error").to_string();
        assert!(message.contains("an infinite value"), "{message}");
        assert_eq!(
            strategy.error(),
            Some(LearnerError::Model {
                worker: workers - 1,
                message: "an infinite value".into(),
            })
        );
    }
}

#[test]
fn what_cannot_be_trained_is_refused_with_the_weights_as_they_were() {
    let start = start();
    let per_shard = || adapted(&start, config(GradientMode::PerShard));
    let shared = || adapted(&start, config(GradientMode::Shared));
    let strategy = |workers| HdPissaStrategy::new(adam(), 1e-3).with_devices(devices(workers));
    let optimizer = |cause| LearnerError::Optimizer { worker: 0, cause };
    let part = Net {
        layers: start
            .clone()
            .apply_hd_pissa(&config(GradientMode::PerShard), 0..2)
            .unwrap(),
    };
    let plain = Net {
        layers: start.clone(),
    };
    let decay =
        AdamConfig::new().with_weight_decay(Some(burn::optim::decay::WeightDecayConfig::new(1e-2)));
    for (strategy, model, count, accumulation, expected) in [
        (
            strategy(1),
            plain,
            24,
            None,
            optimizer(OptimizerError::NoAdapter),
        ),
        (
            strategy(1),
            part,
            24,
            None,
            optimizer(OptimizerError::IncompleteShards {
                hosted: vec![0, 1],
                shards: SHARDS,
            }),
        ),
        (
            strategy(3),
            per_shard(),
            24,
            None,
            optimizer(OptimizerError::UnevenWorkers {
                shards: SHARDS,
                workers: 3,
            }),
        ),
        (
            strategy(2),
            shared(),
            24,
            Some(3),
            LearnerError::UnevenMicroBatches {
                micro_batches: 3,
                workers: 2,
            },
        ),
        (
            strategy(1),
            per_shard(),
            3,
            None,
            LearnerError::TooFewItems {
                items: 3,
                parts: SHARDS,
            },
        ),
        (
            HdPissaStrategy::new(decay.init(), 1e-3),
            per_shard(),
            24,
            None,
            optimizer(OptimizerError::ReadsParameter { path: None }),
        ),
        (
            strategy(1).with_optimizer_config(
                HdPissaOptimizerConfig::new().with_max_grad_norm(Some(-1.0)),
            ),
            per_shard(),
            24,
            None,
            optimizer(OptimizerError::InvalidMaxGradNorm { value: -1.0 }),
        ),
    ] {
        let before = trained(&model);
        let (message, error, left) = failure(strategy, items(count), model, accumulation);
        assert_eq!(error, expected, "{message}");
        assert_eq!(left, before, "{message}");
    }
}

#[test]
fn a_learner_that_the_strategy_did_not_make_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let model = adapted(&start(), config(GradientMode::PerShard));
    let before = trained(&model);
    let strategy = Arc::new(HdPissaStrategy::new(adam(), 1e-3));
    let learner = Learner::new(model, SgdConfig::new().init(), 1e-3);
    let result = training(folder.path(), items(24), false)
        .with_training_strategy(TrainingStrategy::Custom(strategy.clone()))
        .launch(learner);
    let error = result.error.expect("an error").to_string();
    assert!(error.contains("HdPissaStrategy::learner"), "{error}");
    assert_eq!(strategy.error(), Some(LearnerError::ForeignLearner));
    assert_eq!(trained(&result.model), before);
}
