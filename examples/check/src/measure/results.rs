//! Arguments of the benchmarks' command lines, and the files of their results.

use std::path::Path;

use serde::Serialize;

/// Rows and columns, written as `576x1536`, for a command line.
pub fn size(text: &str) -> Result<[usize; 2], String> {
    let parts = text
        .split_once('x')
        .map(|(rows, columns)| (rows.parse(), columns.parse()));
    match parts {
        Some((Ok(rows), Ok(columns))) => Ok([rows, columns]),
        _ => Err("a size is written as 576x1536".into()),
    }
}

/// Writes `{"rows": rows}` to `bench/{name}.json` in the target directory, the parent of
/// `target_tmpdir`. Pass `env!("CARGO_TARGET_TMPDIR")`, which cargo sets only for benchmarks.
///
/// # Panics
///
/// If the file cannot be written.
pub fn write_rows(name: &str, rows: &[impl Serialize], target_tmpdir: &str) {
    let target = Path::new(target_tmpdir)
        .parent()
        .expect("a folder in the target directory");
    let folder = target.join("bench");
    std::fs::create_dir_all(&folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
    let file = folder.join(format!("{name}.json"));
    let json = serde_json::to_string_pretty(&serde_json::json!({ "rows": rows }))
        .expect("rows are plain data");
    std::fs::write(&file, json).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
    println!("\nwritten to {}", file.display());
}
