//! Checkpoints: restored values on any workers, and refusals.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use burn::module::{Module, ModuleVisitor, Param, ParamGroup};
use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use hd_pissa::checkpoint::{Checkpoint, CheckpointError, Checkpoints, Snapshot};
use hd_pissa::comm::{Communicator, Solo, ThreadCommunicator, thread_group};
use hd_pissa::{HdPissaConfig, HdPissaModule, HdPissaOptimizerConfig};
use hd_pissa_tests::training::{adam, data, step};
use hd_pissa_tests::{Lean, bits, resumed, state};

const SHARDS: usize = 4;

fn config() -> HdPissaConfig {
    HdPissaConfig::new().with_rank(2).with_shards(SHARDS)
}

/// A worker's part of `start`. One bias trains too.
fn adapted(start: &Lean, hosted: &[usize]) -> Lean {
    start
        .clone()
        .apply_hd_pissa(&config(), hosted.iter().copied())
        .unwrap()
        .set_require_grad_group(ParamGroup::from_path("first.bias"), true)
}

/// Path and bits of every float parameter.
fn parameters<M: Module>(model: &M) -> Vec<(String, TensorData)> {
    #[derive(Default)]
    struct Collect {
        path: Vec<String>,
        all: Vec<(String, TensorData)>,
    }

    impl ModuleVisitor for Collect {
        fn enter_module(&mut self, name: &str, _: &str) {
            self.path.push(name.into());
        }

        fn exit_module(&mut self, _: &str, _: &str) {
            self.path.pop();
        }

        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            self.all.push((self.path.join("."), bits(&param.base())));
        }

        fn visit_int<const D: usize>(&mut self, param: &Param<Tensor<D, Int>>) {
            self.all
                .push((self.path.join("."), param.val().into_data()));
        }
    }

    let mut collect = Collect::default();
    model.visit(&mut collect);
    collect.all
}

/// Runs `work` on a thread for each set of shards.
fn on_workers<T: Send>(
    layout: &[Vec<usize>],
    work: impl Fn(ThreadCommunicator, &[usize]) -> T + Sync,
) -> Vec<T> {
    let group = thread_group(layout.len(), Duration::from_secs(60));
    std::thread::scope(|scope| {
        let threads: Vec<_> = layout
            .iter()
            .zip(group)
            .map(|(hosted, communicator)| {
                let work = &work;
                scope.spawn(move || work(communicator, hosted))
            })
            .collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    })
}

fn solo() -> Vec<Vec<usize>> {
    vec![(0..SHARDS).collect()]
}

/// Takes three steps in one layout, saves, and takes three more in another. The models of the
/// second layout have adapters already, or get those of the checkpoint. Returns the final weights.
fn across(
    start: &Lean,
    data: &[Vec<Tensor<2>>],
    first: &[Vec<usize>],
    second: &[Vec<usize>],
    has_adapters: bool,
) -> Vec<Vec<(String, TensorData)>> {
    let folder = tempfile::tempdir().unwrap();
    let checkpoints = Checkpoints::new(folder.path().join("run"));
    on_workers(first, |communicator, hosted| {
        let mut model = adapted(start, hosted);
        let mut optim = HdPissaOptimizerConfig::new()
            .init(adam(), communicator)
            .unwrap();
        for batches in &data[..3] {
            model = step(model, &mut optim, hosted.iter().copied(), batches);
        }
        let snapshot = Snapshot::new(3, &model, state(&optim));
        checkpoints.save(&snapshot, optim.communicator()).unwrap();
    });
    let checkpoint = checkpoints.latest().unwrap().checkpoint.unwrap();
    assert_eq!((checkpoint.step(), checkpoint.shards()), (3, SHARDS));
    on_workers(second, |communicator, hosted| {
        // Other values and ids than those saved.
        let other = Lean::new(&Device::flex().autodiff());
        let mut model = match has_adapters {
            true => checkpoint.restore(adapted(&other, hosted)).unwrap(),
            false => {
                let hosted = hosted.iter().copied();
                let model = checkpoint.apply_hd_pissa(other, &config(), hosted).unwrap();
                model.set_require_grad_group(ParamGroup::from_path("first.bias"), true)
            }
        };
        let state = checkpoint.optimizer(&model, &Solo).unwrap();
        let optim = HdPissaOptimizerConfig::new()
            .init(adam(), communicator)
            .unwrap();
        let mut optim = resumed(optim, state).unwrap();
        for batches in &data[3..] {
            model = step(model, &mut optim, hosted.iter().copied(), batches);
        }
        parameters(&model.valid().materialize())
    })
}

#[test]
fn a_checkpoint_of_one_layout_resumes_on_another() {
    let device = Device::flex().autodiff();
    let start = Lean::new(&device);
    let data = data(6, SHARDS, &device);
    let whole = {
        let hosted = &solo()[0];
        let mut model = adapted(&start, hosted);
        let mut optim = HdPissaOptimizerConfig::new().init(adam(), Solo).unwrap();
        for batches in &data {
            model = step(model, &mut optim, hosted.iter().copied(), batches);
        }
        parameters(&model.valid().materialize())
    };
    assert_eq!(whole.len(), 3);
    let layouts = [
        solo(),
        vec![vec![0, 1], vec![2, 3]],
        vec![vec![3], vec![1], vec![0], vec![2]],
    ];
    for first in &layouts {
        for second in &layouts {
            for has_adapters in [true, false] {
                for worker in across(&start, &data, first, second, has_adapters) {
                    assert_eq!(worker, whole, "{first:?} to {second:?}");
                }
            }
        }
    }
}

#[test]
fn every_parameter_comes_back_in_its_dtype() {
    let folder = tempfile::tempdir().unwrap();
    let device = Device::flex().autodiff();
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        let cast = |model: Lean| model.cast(dtype);
        let hosted = &solo()[0];
        let model = cast(Lean::new(&device))
            .apply_hd_pissa(&config(), hosted.iter().copied())
            .unwrap();
        let checkpoints = Checkpoints::new(folder.path().join(format!("{dtype:?}")));
        let snapshot = Snapshot::new(0, &model, adam().into_bytes().unwrap());
        let path = checkpoints.save(&snapshot, &Solo).unwrap();

        let other = cast(Lean::new(&device))
            .apply_hd_pissa(&config(), hosted.iter().copied())
            .unwrap();
        assert_ne!(parameters(&other), parameters(&model));
        let loaded = Checkpoint::open(&path).unwrap().restore(other).unwrap();
        let loaded = parameters(&loaded);
        assert_eq!(loaded, parameters(&model));
        let dtypes = loaded.iter().filter(|(_, data)| data.dtype() == dtype);
        // Both weights and a bias; the factors of four shards are always f32.
        // A half-precision weight has residual bits.
        let (factors, residuals) = if dtype == DType::F32 { (16, 0) } else { (0, 2) };
        let expected = (3 + factors, 19 + residuals);
        assert_eq!((dtypes.count(), loaded.len()), expected);
    }
}

/// A folder with checkpoints of the steps 1, 2 and 3.
struct Three {
    _folder: tempfile::TempDir,
    checkpoints: Checkpoints,
    model: Lean,
}

impl Three {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let checkpoints = Checkpoints::new(folder.path().join("run"));
        let device = Device::flex().autodiff();
        let mut optim = HdPissaOptimizerConfig::new().init(adam(), Solo).unwrap();
        let hosted = &solo()[0];
        let mut model = adapted(&Lean::new(&device), hosted);
        for (index, batches) in data(6, SHARDS, &device)[..3].iter().enumerate() {
            model = step(model, &mut optim, hosted.iter().copied(), batches);
            let state = state(&optim);
            let mut snapshot = Snapshot::new(index as u64 + 1, &model, state);
            snapshot.settings.insert("rank".into(), "2".into());
            snapshot.progress = serde_json::json!({"epoch": 7});
            snapshot
                .attachments
                .insert("losses.txt".into(), b"1.5".to_vec());
            checkpoints.save(&snapshot, &Solo).unwrap();
        }
        Self {
            _folder: folder,
            checkpoints,
            model,
        }
    }

    fn folder(&self, step: u64) -> PathBuf {
        self.checkpoints.folder().join(format!("step-{step:09}"))
    }

    fn snapshot(&self, step: u64) -> Snapshot<'_, Lean> {
        Snapshot::new(step, &self.model, adam().into_bytes().unwrap())
    }
}

fn names(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).unwrap();
    let name = |entry: std::io::Result<std::fs::DirEntry>| {
        entry.unwrap().file_name().into_string().unwrap()
    };
    let mut names: Vec<String> = entries.map(name).collect();
    names.sort();
    names
}

#[test]
fn what_is_noted_beside_comes_back() {
    let three = Three::new();
    let found = three.checkpoints.latest().unwrap();
    assert_eq!(found.damaged, []);
    let checkpoint = found.checkpoint.unwrap();
    assert_eq!(checkpoint.path(), three.folder(3));
    assert_eq!(checkpoint.progress()["epoch"], 7);
    assert_eq!(checkpoint.attachment("losses.txt").unwrap(), b"1.5");
    assert!(checkpoint.attachment("none.txt").is_err());

    let mut settings = checkpoint.settings().clone();
    checkpoint.check_settings(&settings).unwrap();
    settings.insert("rank".into(), "4".into());
    let error = checkpoint.check_settings(&settings).unwrap_err();
    let expected = "made with rank 2, this run has 4";
    assert!(error.to_string().contains(expected), "{error}");
    settings.insert("rank".into(), "2".into());
    settings.insert("seed".into(), "1".into());
    let error = checkpoint.check_settings(&settings).unwrap_err();
    let expected = "made with seed none, this run has 1";
    assert!(error.to_string().contains(expected), "{error}");
}

#[test]
fn whatever_is_damaged_is_noticed_and_the_one_before_used() {
    let three = Three::new();
    let files = names(&three.folder(3));
    // Two files of each shard, model, optimizer, an attachment, the manifest, the digests.
    assert_eq!(files.len(), 2 * SHARDS + 5, "{files:?}");
    for file in &files {
        let path = three.folder(3).join(file);
        let good = std::fs::read(&path).unwrap();
        let flipped = |at: usize| {
            let mut bytes = good.clone();
            bytes[at] ^= 0x10;
            bytes
        };
        let bad = [
            flipped(0),
            flipped(good.len() / 2),
            flipped(good.len() - 1),
            good[..good.len() - 1].to_vec(),
            good[..good.len() / 2].to_vec(),
            Vec::new(),
        ];
        for bytes in bad.iter().map(Some).chain([None]) {
            match bytes {
                Some(bytes) => std::fs::write(&path, bytes).unwrap(),
                None => std::fs::remove_file(&path).unwrap(),
            }
            let found = three.checkpoints.latest().unwrap();
            let step = found.checkpoint.map(|checkpoint| checkpoint.step());
            // The digests' last byte ends a line. The end of the file ends it as well.
            let harmless = file == "SHA256SUMS" && bytes.is_some_and(|b| b == &bad[3]);
            assert_eq!(step, Some(if harmless { 3 } else { 2 }), "{file}");
            if !harmless {
                let [error @ CheckpointError::Damaged { .. }] = &found.damaged[..] else {
                    panic!("{:?}", found.damaged);
                };
                assert!(error.to_string().contains("step-000000003"), "{error}");
            }
        }
        std::fs::write(&path, &good).unwrap();
    }
    let found = three.checkpoints.latest().unwrap();
    assert_eq!(found.checkpoint.unwrap().step(), 3);
}

#[test]
fn a_damaged_checkpoint_does_not_count_among_those_kept() {
    let three = Three::new();
    std::fs::remove_file(three.folder(3).join("model.bpk")).unwrap();
    let checkpoints = three.checkpoints.clone().with_keep_last(1);
    let found = checkpoints.latest().unwrap();
    assert_eq!(found.checkpoint.as_ref().unwrap().step(), 2);
    checkpoints.set_aside(&found).unwrap();
    // Steps before the damaged one.
    let mut snapshot = three.snapshot(2);
    checkpoints.save(&snapshot, &Solo).unwrap();
    assert_eq!(
        names(checkpoints.folder()),
        ["damaged-step-000000003", "step-000000002"]
    );
    snapshot.step = 4;
    checkpoints.save(&snapshot, &Solo).unwrap();
    assert_eq!(checkpoints.steps().unwrap(), [4]);
    checkpoints.discard_all().unwrap();
    assert_eq!(names(checkpoints.folder()), ["damaged-step-000000003"]);
}

#[test]
fn what_a_killed_run_leaves_is_no_checkpoint_and_goes_away() {
    let three = Three::new();
    let folder = three.checkpoints.folder();
    for name in [
        ".step-000000009.partial-00beef",
        ".step-000000001.discarded",
        ".step-discarded-00beef",
    ] {
        std::fs::create_dir(folder.join(name)).unwrap();
        std::fs::write(folder.join(name).join("model.bpk"), "half").unwrap();
    }
    assert_eq!(three.checkpoints.steps().unwrap(), [1, 2, 3]);
    let found = three.checkpoints.latest().unwrap();
    assert_eq!(found.checkpoint.unwrap().step(), 3);
    three.checkpoints.save(&three.snapshot(4), &Solo).unwrap();
    assert_eq!(names(folder).len(), 4);
    three.checkpoints.discard_all().unwrap();
    assert!(!folder.exists());
    assert!(three.checkpoints.latest().unwrap().checkpoint.is_none());
}

#[test]
fn what_somebody_else_puts_into_the_folder_ends_no_run() {
    let three = Three::new();
    let folder = three.checkpoints.folder();
    std::fs::create_dir(folder.join("step-1")).unwrap();
    std::fs::create_dir(folder.join("step-999")).unwrap();
    std::fs::write(folder.join("step-000000777"), "a file").unwrap();
    std::fs::create_dir(folder.join(".step-notes")).unwrap();
    std::fs::write(folder.join(".step-000000777.old"), "a file").unwrap();
    assert_eq!(three.checkpoints.steps().unwrap(), [1, 2, 3]);
    let found = three.checkpoints.latest().unwrap();
    assert_eq!(
        (found.checkpoint.unwrap().step(), found.damaged.len()),
        (3, 0)
    );
    let few = three.checkpoints.clone().with_keep_last(1);
    few.save(&three.snapshot(4), &Solo).unwrap();
    assert_eq!(few.steps().unwrap(), [4]);
    few.discard_all().unwrap();
    let others = [
        ".step-000000777.old",
        ".step-notes",
        "step-000000777",
        "step-1",
        "step-999",
    ];
    assert_eq!(names(folder), others);
}

/// Two independent programs save into the same folder, the second at every moment of the first
/// one's save. A folder with the name of a checkpoint is a complete one of theirs.
#[test]
fn two_runs_in_one_folder_never_mix() {
    const ROUNDS: u32 = 24;
    let root = tempfile::tempdir().unwrap();
    let device = Device::flex();
    let models = [Lean::new(&device), Lean::new(&device)];
    let save = |own: usize, step, folder: &Path| {
        let mut snapshot = Snapshot::new(step, &models[own], adam().into_bytes().unwrap());
        // Files enough for the first to be writing while the second deletes.
        for file in 0..[30, 1][own] {
            let name = format!("file-{file:02}");
            snapshot.attachments.insert(name, vec![own as u8; 1 << 12]);
        }
        Checkpoints::new(folder).save(&snapshot, &Solo)
    };
    let content = |path: &Path| -> Vec<(String, Vec<u8>)> {
        let read = |name: String| {
            let content = std::fs::read(path.join(&name)).unwrap();
            (name, content)
        };
        names(path).into_iter().map(read).collect()
    };
    let start = Instant::now();
    let alone = [0, 1].map(|own| {
        let path = save(own, 7, &root.path().join(own.to_string())).unwrap();
        content(&path)
    });
    let duration = start.elapsed();
    assert_eq!(alone.each_ref().map(Vec::len), [34, 5]);
    // Both save the same step, or each a step of its own.
    for second_step in [7, 8] {
        let mut saved = [0; 2];
        for round in 0..ROUNDS {
            let folder = root.path().join(format!("{second_step}-{round}"));
            let results = std::thread::scope(|scope| {
                let first = scope.spawn(|| save(0, 7, &folder));
                let second = scope.spawn(|| {
                    std::thread::sleep(duration * round / ROUNDS);
                    save(1, second_step, &folder)
                });
                [first, second].map(|thread| thread.join().unwrap())
            });
            let place = format!("{second_step}, {round}");
            for (saved, result) in saved.iter_mut().zip(&results) {
                *saved += u32::from(result.is_ok());
            }
            let checkpoints = Checkpoints::new(&folder);
            let steps = checkpoints.steps().unwrap();
            assert!(!steps.is_empty(), "{place}: {results:?}");
            for step in steps {
                let found = Checkpoint::open(folder.join(format!("step-{step:09}")));
                let found = content(found.unwrap_or_else(|e| panic!("{place}: {e}")).path());
                let names: Vec<&String> = found.iter().map(|(name, _)| name).collect();
                let is_first = found == alone[0];
                let is_second = found.len() == alone[1].len() && step == second_step;
                assert!(is_first || is_second, "{place}: {names:?}");
            }
        }
        // Neither removes the other's draft. Both may be about to replace the same checkpoint.
        let enough = |&saved: &u32| saved > ROUNDS / 2;
        assert!(saved.iter().all(enough), "{second_step}: {saved:?}");
    }
}

/// The names of both checkpoints if a program ends while it replaces one.
#[test]
fn a_checkpoint_that_is_being_replaced_is_not_lost() {
    let three = Three::new();
    let folder = three.checkpoints.folder();
    let (path, old) = (three.folder(3), folder.join(".step-000000003.old"));
    std::fs::rename(&path, &old).unwrap();
    std::fs::create_dir(folder.join(".step-000000003.partial-00beef")).unwrap();
    assert_eq!(three.checkpoints.steps().unwrap(), [1, 2, 3]);
    let found = three.checkpoints.latest().unwrap();
    assert_eq!(found.checkpoint.unwrap().step(), 3);
    // The next save gives it its name back.
    three.checkpoints.save(&three.snapshot(4), &Solo).unwrap();
    assert_eq!(names(folder).len(), 4);
    Checkpoint::open(&path).unwrap();
    // Next to its replacement it is a left-over.
    std::fs::create_dir(&old).unwrap();
    assert_eq!(three.checkpoints.steps().unwrap(), [1, 2, 3, 4]);
    three.checkpoints.save(&three.snapshot(5), &Solo).unwrap();
    assert!(!old.exists() && path.exists());
    std::fs::create_dir(&old).unwrap();
    three.checkpoints.discard_all().unwrap();
    assert!(!folder.exists());
}

/// Variable that makes [`saves_until_it_is_killed`] save into a folder.
const KILLED_IN: &str = "HD_PISSA_TEST_KILLED_IN";

/// Not a separate test: the program that [`every_moment_of_a_replacement`] kills.
#[test]
fn saves_until_it_is_killed() {
    let Some(folder) = std::env::var_os(KILLED_IN) else {
        return;
    };
    let model = Lean::new(&Device::flex());
    let snapshot = Snapshot::new(4, &model, adam().into_bytes().unwrap());
    for _ in 0..2 {
        Checkpoints::new(&folder).save(&snapshot, &Solo).unwrap();
    }
}

/// A program that replaces a checkpoint is killed before each call that renames or deletes.
/// Afterwards there is always a complete checkpoint.
#[cfg(target_os = "linux")]
#[test]
fn every_moment_of_a_replacement() {
    use std::process::{Command, Stdio};

    // Each kind of call has its own count.
    let calls = [
        "rename",
        "renameat",
        "renameat2",
        "unlink",
        "unlinkat",
        "rmdir",
    ];
    let run = |folder: &Path, call: &str, kill: usize| {
        let trace = tempfile::NamedTempFile::new().unwrap();
        let status = Command::new("strace")
            .args(["-f", "-o"])
            .arg(trace.path())
            .args(["-e", &format!("trace={call}")])
            .args(["-e", &format!("inject={call}:signal=SIGKILL:when={kill}")])
            .arg(std::env::current_exe().unwrap())
            .args(["--exact", "saves_until_it_is_killed"])
            .env(KILLED_IN, folder)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status();
        status.map(|status| status.success())
    };
    if let Err(error) = Command::new("strace")
        .arg("-V")
        .stdout(Stdio::null())
        .status()
    {
        let required = std::env::var_os("HD_PISSA_REQUIRE_STRACE").is_some_and(|v| v == "1");
        assert!(!required, "HD_PISSA_REQUIRE_STRACE=1, but strace: {error}");
        return eprintln!("skipped: strace does not start: {error}");
    }
    let (mut kills, mut replacing) = (0, 0);
    for call in calls {
        for kill in 1.. {
            let root = tempfile::tempdir().unwrap();
            let folder = root.path().join("run");
            if run(&folder, call, kill).unwrap() {
                break;
            }
            kills += 1;
            let checkpoints = Checkpoints::new(&folder);
            let found = checkpoints.latest().unwrap();
            let place = format!("{call} number {kill}");
            assert!(found.damaged.is_empty(), "{place}: {:?}", found.damaged);
            // Only the first save may end without a checkpoint.
            let is_there = found.checkpoint.is_some();
            let is_first = (call, kill) == ("rename", 1);
            assert!(is_there || is_first, "{place}: no checkpoint is left");
            let is_old = |name: &String| name.ends_with(".old") || name.contains("discarded");
            replacing += usize::from(names(&folder).iter().any(is_old));
            // The left-overs do not prevent the next run from saving.
            let model = Lean::new(&Device::flex());
            let snapshot = Snapshot::new(4, &model, adam().into_bytes().unwrap());
            checkpoints.save(&snapshot, &Solo).unwrap();
            assert_eq!(names(&folder), ["step-000000004"], "{place}");
        }
    }
    assert!(kills > 5 && replacing > 3, "{kills} {replacing}");
}

#[test]
fn a_model_that_does_not_fit_is_refused_with_the_parameter() {
    let three = Three::new();
    let checkpoint = Checkpoint::open(three.folder(3)).unwrap();
    let device = Device::flex().autodiff();
    let start = Lean::new(&device);
    let all = 0..SHARDS;
    let refuse = |model: Lean| {
        let refused = checkpoint.restore(model.clone()).unwrap_err();
        let kept = refused.model.as_ref().expect("nothing was replaced");
        assert!(parameters(kept) == parameters(&model));
        refused.to_string()
    };

    let other_rank = config().with_rank(1);
    let error = refuse(
        start
            .clone()
            .apply_hd_pissa(&other_rank, all.clone())
            .unwrap(),
    );
    let name = "`first.weight.hd_pissa.shard_0_of_4.a`";
    for part in ["frames-0-of-4.bpk", name, "[13, 2]", "[13, 1]"] {
        assert!(error.contains(part), "{error}");
    }
    let other_shards = config().with_shards(2);
    let error = refuse(start.clone().apply_hd_pissa(&other_shards, 0..2).unwrap());
    assert!(
        error.contains("made with shards 4, this run has 2"),
        "{error}"
    );
    let error = refuse(start.clone());
    assert!(
        error.contains("made with shards 4, this run has 0"),
        "{error}"
    );
    let bias = Lean {
        first: start.first.clone(),
        second: start.first.clone(),
    };
    let error = refuse(bias.apply_hd_pissa(&config(), all.clone()).unwrap());
    assert!(
        error.contains("model.bpk") && error.contains("`second."),
        "{error}"
    );
    let half = start.cast(DType::BF16);
    let error = refuse(half.apply_hd_pissa(&config(), all).unwrap());
    for part in ["`first.weight`", "F32", "BF16"] {
        assert!(error.contains(part), "{error}");
    }
}

#[test]
fn another_version_is_told_from_damage() {
    let three = Three::new();
    let path = three.folder(3).join("manifest.json");
    let text = std::fs::read_to_string(&path).unwrap();
    let other = text.replace("\"format_version\": 1", "\"format_version\": 99");
    assert_ne!(other, text);
    std::fs::write(&path, &other).unwrap();
    update_digests(&three.folder(3));
    let found = three.checkpoints.latest().unwrap();
    match &found.damaged[..] {
        [CheckpointError::UnsupportedVersion { found: 99, .. }] => {}
        other => panic!("{other:?}"),
    }
}

/// Updates the digests to fit the files, as a forger would.
fn update_digests(folder: &Path) {
    use sha2::{Digest, Sha256};
    let mut sums = String::new();
    for name in names(folder) {
        if name != "SHA256SUMS" {
            let digest = Sha256::digest(std::fs::read(folder.join(&name)).unwrap());
            let digits: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
            sums += &format!("{digits}  {name}\n");
        }
    }
    std::fs::write(folder.join("SHA256SUMS"), sums).unwrap();
}

#[test]
fn a_worker_that_cannot_write_leaves_no_checkpoint() {
    let three = Three::new();
    let layout = [vec![0, 1], vec![2, 3]];
    let start = Lean::new(&Device::flex().autodiff());
    let errors = on_workers(&layout, |communicator, hosted| {
        let model = adapted(&start, hosted);
        let mut snapshot = Snapshot::new(4, &model, adam().into_bytes().unwrap());
        if communicator.worker_index() == 1 {
            snapshot.optimizer = burn::tensor::Bytes::from_bytes_vec(vec![1, 2, 3]);
        }
        three.checkpoints.save(&snapshot, &communicator)
    });
    assert!(matches!(
        errors[0],
        Err(CheckpointError::OtherWorker { worker: 1, .. })
    ));
    assert!(matches!(
        errors[1],
        Err(CheckpointError::InvalidState { .. })
    ));
    assert_eq!(names(three.checkpoints.folder()).len(), 3);

    // A file where the folder should be.
    let file = three.folder(1).join("model.bpk");
    let error = Checkpoints::new(&file).save(&three.snapshot(5), &Solo);
    match error {
        Err(CheckpointError::Io { path, .. }) => assert_eq!(path, file),
        other => panic!("{other:?}"),
    }
}
