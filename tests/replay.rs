//! Recorded reference runs, replayed through the public API.

use std::path::{Path, PathBuf};

use burn::tensor::Device;
use hd_pissa::{SvdMethod, SvdPrecision};
use hd_pissa_check::recorded::{RecordedRun, ReplayError};
use hd_pissa_tests::shared;

fn data(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("data")
        .join(name)
}

const F32: SvdMethod = SvdMethod::Exact(SvdPrecision::F32);
const F64: SvdMethod = SvdMethod::Exact(SvdPrecision::F64);

#[track_caller]
fn assert_replays(path: &Path, svd: SvdMethod, tolerance: f64) {
    let run = RecordedRun::read(path).unwrap();
    let errors = run.replay(&Device::flex(), svd).unwrap();
    let worst = errors.iter().copied().fold(0.0, f64::max);
    assert!(
        worst <= tolerance,
        "{} ({}): {errors:?}",
        run.name(),
        run.describe()
    );
}

#[test]
fn committed_runs() {
    for name in ["k1_r4_32x24.safetensors", "k2_r4_32x24.safetensors"] {
        assert_replays(&data(name), F64, 2e-5);
        assert_replays(&data(name), F32, 1e-4);
        // 4 and 8 components of 24.
        assert_replays(&data(name), SvdMethod::Krylov, 1e-4);
    }
    let name = "k4_r8_64x96.safetensors";
    assert_replays(&data(name), F64, 1e-4);
    // Adam's first step is close to a sign function. It makes whole steps of the rounding errors that
    // an f32 decomposition leaves in gradients near zero; they depend on the processor (3.2e-4
    // without AVX-512).
    assert_replays(&data(name), F32, 1e-3);
}

/// The README gives the whole folder to the example, so it holds nothing else.
#[test]
fn the_folder_of_recorded_runs_holds_runs_of_one_layer_only() {
    for entry in std::fs::read_dir(data("")).unwrap() {
        let path = entry.unwrap().path();
        RecordedRun::read(&path).unwrap_or_else(|error| panic!("{error}"));
    }
}

/// Runs outside the repository, if there are any. CI does not need them.
#[test]
fn shared_runs() {
    let Some(shared) = shared() else {
        println!("skipped: no folder with shared recorded runs");
        return;
    };
    let mut runs: Vec<PathBuf> = std::fs::read_dir(shared.join("golden"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| {
            let name = path.file_name().unwrap().to_string_lossy();
            name.starts_with('k') && name.ends_with(".safetensors")
        })
        .collect();
    runs.sort();
    assert!(!runs.is_empty());
    for run in runs {
        assert_replays(&run, F64, 1e-4);
        assert_replays(&run, F32, 1e-3);
    }
}

/// A copy of a committed run with its header changed by `edit`, as bytes.
fn edited(edit: impl FnOnce(&mut serde_json::Value)) -> Vec<u8> {
    let bytes = std::fs::read(data("k1_r4_32x24.safetensors")).unwrap();
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let mut header: serde_json::Value = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
    edit(&mut header);
    let header = serde_json::to_vec(&header).unwrap();
    let mut edited = (header.len() as u64).to_le_bytes().to_vec();
    edited.extend(header);
    edited.extend(&bytes[8 + length..]);
    edited
}

fn edited_case(key: &str, value: serde_json::Value) -> Vec<u8> {
    edited(|header| {
        let text = header["__metadata__"]["case"].as_str().unwrap();
        let mut case: serde_json::Value = serde_json::from_str(text).unwrap();
        case[key] = value;
        header["__metadata__"]["case"] = case.to_string().into();
    })
}

#[test]
fn malformed_files_are_typed_errors() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("run.safetensors");
    let error = |bytes: Vec<u8>| -> ReplayError {
        std::fs::write(&path, bytes).unwrap();
        match RecordedRun::read(&path) {
            Err(error) => error,
            Ok(run) => run.replay(&Device::flex(), F32).unwrap_err(),
        }
    };
    let whole = std::fs::read(data("k1_r4_32x24.safetensors")).unwrap();

    assert!(matches!(
        RecordedRun::read(Path::new("no/such/file")),
        Err(ReplayError::Read { .. })
    ));
    for bytes in [
        vec![],
        whole[..100].to_vec(),
        whole[..whole.len() - 1].to_vec(),
        vec![0x5a; 4096],
    ] {
        assert!(matches!(error(bytes), ReplayError::Format { .. }));
    }
    let fields: Vec<(&str, Vec<u8>)> = vec![
        (
            "case",
            edited(|header| {
                header["__metadata__"] = serde_json::json!({});
            }),
        ),
        (
            "case",
            edited(|header| {
                header["__metadata__"]["case"] = "{".into();
            }),
        ),
        ("case", edited_case("T", serde_json::json!("six"))),
        ("case.K", edited_case("K", serde_json::json!(0))),
        ("case.lrs", edited_case("lrs", serde_json::json!([0.1]))),
        ("W", edited_case("n_in", serde_json::json!(33))),
        (
            "X",
            edited(|header| {
                let entry = header.as_object_mut().unwrap().remove("X").unwrap();
                header["Z"] = entry;
            }),
        ),
        (
            "Y",
            edited(|header| {
                header["Y"]["dtype"] = "I32".into();
            }),
        ),
    ];
    for (expected, bytes) in fields {
        match error(bytes) {
            ReplayError::Field { field, .. } => assert_eq!(field, expected),
            other => panic!("{expected}: {other}"),
        }
    }
    // The first value of the tensor `W` becomes NaN.
    let mut bytes = whole.clone();
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: serde_json::Value = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
    let start = 8 + length + header["W"]["data_offsets"][0].as_u64().unwrap() as usize;
    bytes[start..start + 4].copy_from_slice(&f32::NAN.to_le_bytes());
    let message = error(bytes).to_string();
    assert!(
        message.ends_with("W: value 0 is NaN or infinite"),
        "{message}"
    );

    // Well-formed, but of a rank that the layer cannot have.
    let error = error(edited_case("r", serde_json::json!(25)));
    assert!(matches!(error, ReplayError::Model { .. }), "{error}");
    assert!(error.to_string().contains("run.safetensors"), "{error}");
}
