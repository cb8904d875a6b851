//! Models and data by name, from a local server that speaks the paths of the Hugging Face Hub, with the
//! feature `hub`.
#![cfg(feature = "hub")]

#[path = "common/case.rs"]
mod case;

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::{Arc, Mutex};

use case::Case;
use serde_json::json;

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

#[test]
#[ignore = "what the other tests run"]
fn program() {
    case::program();
}

/// Files by repository (`models/owner/name`, `datasets/owner/name`) and name.
type Files = BTreeMap<String, BTreeMap<String, Vec<u8>>>;

/// A server, and the paths that were asked for.
struct Server {
    address: String,
    asked: Arc<Mutex<Vec<String>>>,
}

impl Server {
    fn new(files: Files) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let asked = Arc::new(Mutex::new(Vec::new()));
        let seen = asked.clone();
        // It ends with the process.
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let (files, seen) = (files.clone(), seen.clone());
                std::thread::spawn(move || serve(stream.unwrap(), &files, &seen));
            }
        });
        Self { address, asked }
    }

    fn asked(&self, part: &str) -> usize {
        let asked = self.asked.lock().unwrap();
        asked.iter().filter(|path| path.contains(part)).count()
    }
}

/// Answers one request after the other.
fn serve(stream: TcpStream, files: &Files, seen: &Mutex<Vec<String>>) {
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    let mut stream = stream;
    loop {
        let mut first = String::new();
        if reader.read_line(&mut first).unwrap_or(0) == 0 {
            return;
        }
        let path = first.split(' ').nth(1).unwrap().to_string();
        let mut range = None;
        loop {
            let mut header = String::new();
            reader.read_line(&mut header).unwrap();
            let header = header.trim().to_ascii_lowercase();
            if let Some(value) = header.strip_prefix("range: bytes=") {
                let (start, end) = value.split_once('-').unwrap();
                range = Some((start.parse::<usize>().unwrap(), end.parse::<usize>().ok()));
            }
            if header.is_empty() {
                break;
            }
        }
        seen.lock().unwrap().push(path.clone());
        let response = answer(&path, range, files);
        if stream.write_all(&response).is_err() {
            return;
        }
    }
}

fn answer(path: &str, range: Option<(usize, Option<usize>)>, files: &Files) -> Vec<u8> {
    let response = |status: &str, headers: &str, body: &[u8]| {
        let length = body.len();
        let head = format!("HTTP/1.1 {status}\r\ncontent-length: {length}\r\n{headers}\r\n");
        [head.as_bytes(), body].concat()
    };
    let missing = || response("404 Not Found", "", b"Repository not found");
    if let Some(rest) = path.strip_prefix("/api/") {
        let Some((repository, _)) = rest.split_once("/revision/") else {
            return missing();
        };
        let Some(files) = files.get(repository) else {
            return missing();
        };
        let siblings: Vec<_> = files
            .keys()
            .map(|name| json!({"rfilename": name}))
            .collect();
        let info = json!({"sha": COMMIT, "siblings": siblings}).to_string();
        return response(
            "200 OK",
            "content-type: application/json\r\n",
            info.as_bytes(),
        );
    }
    let Some((repository, rest)) = path[1..].split_once("/resolve/") else {
        return missing();
    };
    let repository = match repository.starts_with("datasets/") {
        true => repository.to_string(),
        false => format!("models/{repository}"),
    };
    let name = rest.split_once('/').map_or("", |(_, name)| name);
    let Some(content) = files.get(&repository).and_then(|files| files.get(name)) else {
        return missing();
    };
    let (start, end) = range.unwrap_or((0, None));
    let end = end.map_or(content.len(), |end| (end + 1).min(content.len()));
    let etag = format!("{repository}/{name}").replace('/', "-");
    let headers = format!(
        "etag: \"{etag}\"\r\nx-repo-commit: {COMMIT}\r\ncontent-range: bytes {start}-{}/{}\r\n",
        end.max(1) - 1,
        content.len()
    );
    response("206 Partial Content", &headers, &content[start..end])
}

/// The tiny model, and problems as a data set of two configurations.
fn files(case: &Case) -> Files {
    let tiny = Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/tiny");
    let mut model = BTreeMap::new();
    for entry in std::fs::read_dir(tiny).unwrap() {
        let entry = entry.unwrap();
        let name = entry.file_name().into_string().unwrap();
        model.insert(name, std::fs::read(entry.path()).unwrap());
    }
    // What nobody needs here, and what nobody may write.
    model.insert("pytorch_model.bin".into(), b"weights".to_vec());
    model.insert("onnx/model.onnx".into(), b"weights".to_vec());
    model.insert("../../outside.json".into(), b"{}".to_vec());
    let problems = std::fs::read(case.root.path().join("data.jsonl")).unwrap();
    let mut data = BTreeMap::new();
    data.insert("README.md".to_string(), b"problems".to_vec());
    for folder in ["main", "other"] {
        data.insert(format!("{folder}/train.jsonl"), problems.clone());
        data.insert(
            format!("{folder}/test.jsonl"),
            problems[..600]
                .rsplitn(2, |&b| b == b'\n')
                .last()
                .unwrap()
                .to_vec(),
        );
    }
    [
        ("models/someone/tiny".to_string(), model),
        ("datasets/someone/problems".to_string(), data),
    ]
    .into()
}

fn run(case: &Case, server: &str, home: &Path, arguments: &[&str]) -> Output {
    let mut command: Command = case.command(arguments);
    command.env("HF_ENDPOINT", server).env("HF_HOME", home);
    command.env_remove("HF_TOKEN").output().unwrap()
}

#[test]
fn a_model_and_a_data_set_are_fetched_by_name() {
    let case = Case::new();
    let server = Server::new(files(&case));
    let home = case.root.path().join("hf");
    let arguments = [
        "--model",
        "someone/tiny",
        "--data",
        "someone/problems/main",
        "--eval",
        "someone/problems/main",
        "--eval-samples",
        "2",
        "--max-new-tokens",
        "0",
        "--steps",
        "1",
        "--overwrite",
    ];
    let named = run(&case, &server.address, &home, &arguments);
    let said = String::from_utf8_lossy(&named.stdout).into_owned();
    let errors = String::from_utf8_lossy(&named.stderr).into_owned();
    assert!(named.status.success(), "{errors}");
    assert!(said.contains("40 records, 40 usable"), "{said}");
    assert!(said.contains("held-out loss before: "), "{said}");
    let by_name = std::fs::read(case.output().join("model.safetensors")).unwrap();

    // Where Python looks for them: links into a snapshot.
    let snapshot = |kind: &str| home.join("hub").join(kind).join("snapshots").join(COMMIT);
    let model = snapshot("models--someone--tiny");
    assert!(model.join("model.safetensors").is_file() && model.join("config.json").is_file());
    let reference = home.join("hub/models--someone--tiny/refs/main");
    assert_eq!(std::fs::read_to_string(reference).unwrap(), COMMIT);
    let data = snapshot("datasets--someone--problems");
    assert!(data.join("main/train.jsonl").is_file() && data.join("main/test.jsonl").is_file());
    for left in ["pytorch_model.bin", "onnx/model.onnx"] {
        assert!(!model.join(left).exists(), "{left}");
    }
    assert!(!data.join("other").exists());
    let outside: PathBuf = home.join("hub/models--someone--tiny/outside.json");
    assert!(!outside.exists(), "a name leads out of its folder");

    // The same as from folders, bit for bit.
    let tiny = Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/tiny");
    let local = [
        "--model",
        tiny.to_str().unwrap(),
        "--steps",
        "1",
        "--overwrite",
    ];
    let local = run(&case, &server.address, &home, &local);
    assert!(local.status.success());
    assert_eq!(
        std::fs::read(case.output().join("model.safetensors")).unwrap(),
        by_name
    );

    // What is there is not fetched again, and without the server it does.
    let fetched = server.asked("/resolve/");
    assert!(
        run(&case, &server.address, &home, &arguments)
            .status
            .success()
    );
    assert_eq!(server.asked("/resolve/"), fetched);
    let alone = run(&case, "http://127.0.0.1:9", &home, &arguments);
    let errors = String::from_utf8_lossy(&alone.stderr).into_owned();
    assert!(alone.status.success(), "{errors}");
    assert!(errors.contains("the copy in the cache is used"), "{errors}");
}

#[test]
fn what_cannot_be_fetched_is_named() {
    let case = Case::new();
    let server = Server::new(files(&case));
    let home = case.root.path().join("hf");
    for (arguments, parts) in [
        (
            &["--model", "someone/else"][..],
            &["--model: someone/else: ", "no such name"][..],
        ),
        (
            &["--data", "someone/problems"],
            &["--data: someone/problems: has several data sets (main/, other/)"],
        ),
        (
            &["--data", "someone/problems/none"],
            &["--data: someone/problems/none: has no file to train on"],
        ),
        (
            &["--data", "someone/tiny"],
            &["--data: someone/tiny: ", "no such name"],
        ),
    ] {
        let run = run(&case, &server.address, &home, arguments);
        let errors = String::from_utf8_lossy(&run.stderr).into_owned();
        assert_eq!(run.status.code(), Some(1), "{errors}");
        assert_eq!(errors.lines().count(), 1, "{errors}");
        assert!(parts.iter().all(|part| errors.contains(part)), "{errors}");
        assert!(!case.output().exists());
    }
}
