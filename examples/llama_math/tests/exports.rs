//! A trained model in its other forms: what is written is what was trained, within the error that is stated.

mod common {
    pub mod case;
}

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use burn::tensor::Device;
use common::case::{Case, SHARED, prepare, text, this_binary};
use half::f16;
use llama_math::Pretrained;
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;

#[test]
#[ignore = "the program that the other tests start"]
fn program() {
    common::case::program();
}

fn tiny() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/tiny")
}

/// The tiny model itself is in `f16`.
const F32: [&str; 2] = ["--output-dtype", "f32"];

/// A run with its output in `f32`.
struct Trained {
    case: Case,
}

impl Trained {
    fn new(further: &[&str]) -> Self {
        let case = Case::new();
        case.succeeds(&[&F32[..], &["--steps", "6", "--lr", "3e-4"], further].concat());
        Self { case }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.case.root.path().join(name)
    }

    fn run(&self, arguments: &[&str]) -> Output {
        let mut command: Command = this_binary();
        let mut all = vec!["llama_math".to_string()];
        all.extend(arguments.iter().map(|&argument| argument.into()));
        all.extend(["--device".into(), "flex".into()]);
        prepare(&mut command, &all);
        command.current_dir(self.case.root.path());
        let output = command.output().unwrap();
        println!("{}", text(&output));
        output
    }

    fn export_of(&self, source: &str, format: &str, output: &str, further: &[&str]) -> Output {
        let tiny = tiny();
        let own = [
            "export",
            source,
            "--format",
            format,
            "--model",
            tiny.to_str().unwrap(),
            "--output",
            output,
        ];
        self.run(&[&own[..], further].concat())
    }

    #[track_caller]
    fn export(&self, source: &str, format: &str, output: &str, further: &[&str]) -> String {
        let output = self.export_of(source, format, output, further);
        assert!(output.status.success());
        text(&output)
    }

    #[track_caller]
    fn verify(&self, folder: &str) -> String {
        let output = self.run(&["verify", folder, "--model", tiny().to_str().unwrap()]);
        assert!(output.status.success());
        text(&output)
    }

    /// Fails with one line that holds `parts`, and leaves no output.
    #[track_caller]
    fn fails(&self, result: &Output, parts: &[&str]) {
        let errors = String::from_utf8(result.stderr.clone()).unwrap();
        assert_eq!(result.status.code(), Some(1), "{}", text(result));
        assert_eq!(errors.lines().count(), 1, "{errors}");
        for part in parts {
            assert!(errors.contains(part), "`{part}` is not in: {errors}");
        }
        assert!(!self.path("export").exists());
        let mut names = self.case.root.path().read_dir().unwrap();
        let is_hidden = |name: &std::ffi::OsStr| name.to_string_lossy().contains("partial");
        assert!(!names.any(|entry| is_hidden(&entry.unwrap().file_name())));
    }
}

type Tensors = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

/// The tensors of all weight files of a folder.
fn tensors(folder: &Path) -> Tensors {
    let mut tensors = BTreeMap::new();
    for entry in folder.read_dir().unwrap() {
        let path = entry.unwrap().path();
        if path
            .extension()
            .is_some_and(|ending| ending == "safetensors")
        {
            let bytes = std::fs::read(path).unwrap();
            for (name, view) in SafeTensors::deserialize(&bytes).unwrap().iter() {
                let entry = (view.dtype(), view.shape().to_vec(), view.data().to_vec());
                assert!(tensors.insert(name.to_string(), entry).is_none(), "{name}");
            }
        }
    }
    tensors
}

fn floats(tensors: &Tensors, name: &str) -> Vec<f64> {
    let (dtype, _, bytes) = &tensors[name];
    match dtype {
        Dtype::F32 => {
            let values = bytes.as_chunks().0.iter();
            values.map(|&b| f32::from_le_bytes(b).into()).collect()
        }
        Dtype::F16 => {
            let values = bytes.as_chunks().0.iter();
            values.map(|&b| f16::from_le_bytes(b).into()).collect()
        }
        other => panic!("{name}: {other:?}"),
    }
}

/// For each weight that was trained, the distance of `other` from `trained` in terms of the update.
fn errors(base: &Tensors, trained: &Tensors, other: &Tensors) -> BTreeMap<String, f64> {
    let mut errors = BTreeMap::new();
    for name in base.keys() {
        let [base, trained, other] = [base, trained, other].map(|from| floats(from, name));
        let distance = |x: &[f64], y: &[f64]| {
            let squares = x.iter().zip(y).map(|(x, y)| (x - y).powi(2));
            squares.sum::<f64>().sqrt()
        };
        let update = distance(&base, &trained);
        match name.contains("_proj.weight") {
            true => {
                assert!(update > 0.0, "{name}");
                errors.insert(name.clone(), distance(&trained, &other) / update);
            }
            false => assert_eq!((update, distance(&trained, &other)), (0.0, 0.0), "{name}"),
        }
    }
    errors
}

/// The number behind `before` in the line that starts with `start`.
fn number(said: &str, start: &str, before: &str) -> f64 {
    let line = said.lines().find(|line| line.starts_with(start));
    let line = line.unwrap_or_else(|| panic!("no `{start}`"));
    let rest = line.split(before).nth(1).unwrap();
    let end = rest.find([' ', ',', ';']).unwrap_or(rest.len());
    rest[..end].parse().unwrap()
}

/// The largest difference of two models' logits, over a text of its own.
fn difference(x: &Path, y: &Path) -> f32 {
    let device = Device::flex();
    let logits = |folder: &Path| {
        let model = Pretrained::open(folder).unwrap().load(&device).unwrap();
        let ids: Vec<i64> = (0..24).map(|i| (5 * i) % 60).collect();
        let ids = burn::tensor::TensorData::new(ids, [1, 24]);
        model.forward(burn::tensor::Tensor::from_data(ids, &device))
    };
    (logits(x) - logits(y)).abs().max().into_scalar()
}

#[test]
fn adapters_and_deltas_rebuild_what_was_trained_within_the_error_that_they_state() {
    let random = ["--windows", "random", "--frame-scale", "unit"];
    let random = [&random[..], &SHARED].concat();
    for further in [&[][..], &["--windows", "spread"], &random] {
        let trained = Trained::new(further);
        let output = trained.case.output();
        let said = trained.export("out", "lora", "lora", &[]);
        assert!(
            trained
                .export("out", "delta", "delta", &[])
                .contains("rank 32")
        );
        trained.export("delta", "merged", "rebuilt", &F32);
        trained.export("lora", "merged", "rebuilt-from-lora", &F32);
        let [base, exact] = [&tiny(), &output].map(|folder| tensors(folder));
        let mut stated = Vec::new();
        for name in ["rebuilt", "rebuilt-from-lora"] {
            let folder = trained.path(name);
            for (weight, error) in errors(&base, &exact, &tensors(&folder)) {
                // 2·K·r for 8 shards of rank 2.
                assert_eq!(number(&said, &weight, "rank "), 32.0);
                let says = number(&said, &weight, "relative error ");
                // Three digits are printed, and the sum is rounded to f32.
                assert!(
                    (error - says).abs() < 0.01 * says + 1e-4,
                    "{weight}: {error} {says}"
                );
                assert!(says < 0.02, "{weight}: {says}");
                stated.push(says);
            }
            // That of the export is at 16 positions; both are small beside what the training did.
            let (far, near) = (difference(&tiny(), &output), difference(&output, &folder));
            assert!(near < 0.02 * far, "{near} {far}");
            let probed = number(&said, "logits", "trained model ");
            assert!(probed < 0.02 * f64::from(far), "{probed} {far}");
        }
        assert!(stated.iter().any(|&error| error > 0.0));
        for name in ["out", "lora", "delta", "rebuilt"] {
            let said = trained.verify(name);
            assert!(said.contains("all as they were written"), "{said}");
            let far = f64::from(difference(&tiny(), &output));
            let probed = number(&said, "logits", "trained model ");
            assert!(probed < 0.02 * far, "{probed} {far}");
            // The files of a run are its model, bit for bit.
            assert!(name != "out" || probed == 0.0);
        }
        let said = trained.verify("lora");
        for part in ["PeftModel", "--max-lora-rank 32", "convert_lora_to_gguf.py"] {
            assert!(said.contains(part), "{said}");
        }
    }
}

#[test]
fn a_merged_export_is_what_the_run_would_have_written() {
    let trained = Trained::new(&[]);
    trained.export("out", "merged", "bf16", &["--output-dtype", "bf16"]);
    let direct = Case::new();
    direct.succeeds(&["--steps", "6", "--lr", "3e-4", "--output-dtype", "bf16"]);
    assert!(tensors(&trained.path("bf16")) == tensors(&direct.output()));
    let said = trained.verify("bf16");
    let probed = number(&said, "logits", "trained model ");
    assert!(probed > 0.0, "the rounding shows");

    let single = tensors(&trained.case.output());
    let size = |(_, _, bytes): &(Dtype, Vec<usize>, Vec<u8>)| bytes.len() as u64;
    let total: u64 = single.values().map(size).sum();
    trained.export(
        "out",
        "merged",
        "split",
        &[&F32[..], &["--max-shard-size", "400KB"]].concat(),
    );
    let folder = trained.path("split");
    assert!(tensors(&folder) == single);
    assert!(!folder.join("model.safetensors").exists());
    let index = std::fs::read(folder.join("model.safetensors.index.json")).unwrap();
    let index: Value = serde_json::from_slice(&index).unwrap();
    assert_eq!(index["metadata"]["total_size"], total);
    assert_eq!(index["metadata"]["total_parameters"], total / 4);
    let map = index["weight_map"].as_object().unwrap();
    assert_eq!(map.len(), single.len());
    let mut files: Vec<&str> = map.values().map(|file| file.as_str().unwrap()).collect();
    files.sort();
    files.dedup();
    let count = files.len();
    assert!(count as u64 >= total.div_ceil(400_000) && count > 2);
    for (i, file) in files.iter().enumerate() {
        assert_eq!(
            *file,
            format!("model-{:05}-of-{count:05}.safetensors", i + 1)
        );
        let bytes = std::fs::read(folder.join(file)).unwrap();
        let own = SafeTensors::deserialize(&bytes).unwrap();
        assert!(own.names().iter().all(|name| map[*name] == *file));
        let size: usize = own.iter().map(|(_, view)| view.data().len()).sum();
        assert!(size <= 400_000 || own.len() == 1);
    }
    assert_eq!(difference(&folder, &trained.case.output()), 0.0);
    trained.verify("split");
}

#[test]
fn ranks_are_limited_as_asked() {
    let trained = Trained::new(&[]);
    let weight = "model.layers.0.self_attn.q_proj.weight";
    let all = trained.export("out", "lora", "all", &[]);
    let few = trained.export("out", "lora", "few", &["--rank", "5"]);
    assert_eq!(number(&few, weight, "rank "), 5.0);
    let error = |said: &str| number(said, weight, "relative error ");
    assert!(error(&few) > 2.0 * error(&all));
    let energy = trained.export("out", "lora", "energy", &["--energy", "0.75"]);
    assert!(
        (0.25..0.5).contains(&error(&energy)),
        "the root of 1 - 0.75"
    );
    let config = std::fs::read(trained.path("energy/adapter_config.json")).unwrap();
    let config: Value = serde_json::from_slice(&config).unwrap();
    assert!(!config["rank_pattern"].as_object().unwrap().is_empty());
    assert!(trained.verify("energy").contains("llama.cpp: not this one"));
    let output = trained.export_of("out", "lora", "export", &["--energy", "0"]);
    trained.fails(&output, &["energy is 0; it must be above 0"]);
}

#[test]
fn the_page_of_an_output_says_how_it_was_made() {
    let trained = Trained::new(&[
        "--eval",
        "data.jsonl",
        "--eval-samples",
        "3",
        "--max-new-tokens",
        "4",
    ]);
    trained.export("out", "delta", "delta", &[]);
    let page = |name: &str| std::fs::read_to_string(trained.path(name).join("README.md")).unwrap();
    let run = page("out");
    for part in [
        "library_name: transformers",
        "fine-tuned on `data.jsonl` with [HD-PiSSA]",
        "AutoModelForCausalLM.from_pretrained(",
        "| --rank | 2 |",
        "| --shards | 8 |",
        "6 steps in ",
        "training loss: ",
        "held-out loss after: ",
        "exact match: ",
        "--ignored --nocapture",
        "Burn 0.22",
    ] {
        assert!(run.contains(part), "`{part}` is not in:\n{run}");
    }
    let delta = page("delta");
    for part in [
        "| `model.layers.0.mlp.up_proj.weight` | 32 |",
        "--format merged",
        "28 weights: relative error ",
        "logits: largest difference",
        "README-run.md",
    ] {
        assert!(delta.contains(part), "`{part}` is not in:\n{delta}");
    }
    assert_eq!(
        std::fs::read(trained.path("delta/README-run.md")).unwrap(),
        run.as_bytes()
    );
    // Digests as the usual tool reads them; people may edit the page.
    for name in ["out", "delta"] {
        let mut check = Command::new("sha256sum");
        check.args(["--check", "--strict", "SHA256SUMS"]);
        let output = check.current_dir(trained.path(name)).output().unwrap();
        assert!(output.status.success(), "{}", text(&output));
        std::fs::write(trained.path(name).join("README.md"), "mine").unwrap();
        trained.verify(name);
    }
}

#[test]
fn what_cannot_be_exported_is_refused() {
    let trained = Trained::new(&[]);
    // Another base: by both digests.
    let other = trained.path("other");
    std::fs::create_dir(&other).unwrap();
    for entry in tiny().read_dir().unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, other.join(path.file_name().unwrap())).unwrap();
    }
    let mut bytes = std::fs::read(other.join("model.safetensors")).unwrap();
    let last = bytes.len() - 3;
    bytes[last] ^= 1;
    std::fs::write(other.join("model.safetensors"), bytes).unwrap();
    let [expected, found] = [tiny(), other.clone()].map(|folder| {
        let opened = Pretrained::open(&folder).unwrap();
        opened.digest().unwrap()
    });
    for format in ["merged", "lora", "delta"] {
        let output = trained.run(&[
            "export", "out", "--format", format, "--model", "other", "--output", "export",
        ]);
        trained.fails(&output, &["other: ", &expected, &found]);
    }
    let output = trained.run(&["verify", "out", "--model", "other"]);
    trained.fails(&output, &["other: ", &expected, &found]);

    // Folders that are no output, or one of another kind.
    let output = trained.export_of("other", "delta", "export", &[]);
    // The tiny model has the record of its pre-training.
    trained.fails(&output, &["llama_math.json"]);
    std::fs::remove_file(other.join("llama_math.json")).unwrap();
    for output in [
        trained.export_of("other", "delta", "export", &[]),
        trained.run(&["verify", "other"]),
    ] {
        trained.fails(&output, &["other: llama_math.json: is missing"]);
    }
    trained.export("out", "delta", "delta", &[]);
    let output = trained.export_of("delta", "lora", "export", &[]);
    trained.fails(&output, &["--format", "delta is a delta already"]);
    let output = trained.run(&["verify", "delta"]);
    trained.fails(&output, &["--model", "needs the pretrained model"]);
    // Neither the source nor an existing folder is replaced.
    let output = trained.export_of("out", "merged", "out", &["--overwrite"]);
    trained.fails(&output, &["--output", "contains"]);
    let output = trained.export_of("out", "merged", "delta", &[]);
    trained.fails(&output, &["--output", "--overwrite replaces it"]);

    // Files that have changed since.
    for (folder, file) in [("delta", "delta.safetensors"), ("out", "model.safetensors")] {
        let path = trained.path(folder).join(file);
        let whole = std::fs::read(&path).unwrap();
        let mut bytes = whole.clone();
        let last = bytes.len() - 3;
        bytes[last] ^= 1;
        std::fs::write(&path, bytes).unwrap();
        let tiny = tiny();
        let output = trained.run(&["verify", folder, "--model", tiny.to_str().unwrap()]);
        trained.fails(&output, &[file, "SHA-256", "it has changed since"]);
        let output = trained.export_of(folder, "merged", "export", &[]);
        trained.fails(&output, &[file, "SHA-256"]);
        std::fs::remove_file(&path).unwrap();
        let output = trained.export_of(folder, "merged", "export", &[]);
        trained.fails(&output, &[file, "No such file"]);
        std::fs::write(&path, whole).unwrap();
    }

    // A method whose change has no frames.
    let lora = Case::new();
    lora.succeeds(&["--steps", "2", "--method", "lora"]);
    let output = trained.export_of(lora.output().to_str().unwrap(), "lora", "export", &[]);
    trained.fails(&output, &["--method: is lora"]);
}
