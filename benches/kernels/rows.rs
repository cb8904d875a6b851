//! Measurements, and their file.

use std::path::Path;

use hd_pissa_check::measure::median;
use serde::Serialize;
use serde_json::{Value, json};

/// The highest rates of a device.
pub struct Roofline {
    pub bytes_per_second: f64,
    pub flops_per_second: f64,
}

/// One variant of one job.
#[derive(Clone, Serialize)]
pub struct Row {
    pub operation: &'static str,
    pub variant: &'static str,
    pub dtype: &'static str,
    pub d_input: usize,
    pub d_output: usize,
    /// Of a product.
    pub tokens: Option<usize>,
    pub rank: Option<usize>,
    /// Of a merge.
    pub shards: Option<usize>,
    /// The least bytes that the job reads and writes.
    pub bytes: f64,
    pub flops: f64,
    pub ms: f64,
    pub rounds: usize,
    /// Time of the bytes or of the flops at the device's rates, whichever is longer.
    pub roofline_ms: f64,
    /// `roofline_ms / ms`.
    pub share_of_roofline: f64,
}

impl Row {
    /// A row without a job's tokens, rank and shards.
    pub fn new(
        [operation, variant, dtype]: [&'static str; 3],
        [d_input, d_output]: [usize; 2],
        [bytes, flops]: [f64; 2],
        times: &[f64],
        roofline: &Roofline,
    ) -> Self {
        let ms = median(times.iter().copied());
        let roofline_ms =
            1e3 * (bytes / roofline.bytes_per_second).max(flops / roofline.flops_per_second);
        Self {
            operation,
            variant,
            dtype,
            d_input,
            d_output,
            tokens: None,
            rank: None,
            shards: None,
            bytes,
            flops,
            ms,
            rounds: times.len(),
            roofline_ms,
            share_of_roofline: roofline_ms / ms,
        }
    }

    fn print(&self) {
        let optional = |name: &str, value: Option<usize>| {
            value.map_or(String::new(), |value| format!("{name} {value}"))
        };
        println!(
            "{:<8}{:<5}{:>11} {:>11} {:>5} {:>4}  {:<22}{:>9.1} MB{:>9.2} Gflop{:>10.3} ms{:>9.1} \
             GB/s{:>9.1} Gflop/s{:>6.0} % of the roofline",
            self.operation,
            self.dtype,
            format!("{}x{}", self.d_input, self.d_output),
            optional("tokens", self.tokens),
            optional("r", self.rank),
            optional("K", self.shards),
            self.variant,
            self.bytes / 1e6,
            self.flops / 1e9,
            self.ms,
            self.bytes / self.ms / 1e6,
            self.flops / self.ms / 1e6,
            100.0 * self.share_of_roofline,
        );
    }
}

/// The rows of one device.
pub struct Rows {
    device: String,
    rows: Vec<Value>,
}

impl Rows {
    pub fn new(device: String) -> Self {
        println!("{device}");
        let rows = Vec::new();
        Self { device, rows }
    }

    pub fn push(&mut self, row: Row) {
        row.print();
        let mut row = serde_json::to_value(row).expect("rows are plain data");
        row["device"] = json!(self.device);
        self.rows.push(row);
    }

    /// Adds the rows to `{"rows": [..]}` in a file. They replace those of the same device and case.
    ///
    /// # Panics
    ///
    /// If the file cannot be read or written, or holds something else.
    pub fn write(self, file: &Path) {
        let name = file.display();
        let mut all = match std::fs::read(file) {
            Ok(bytes) => {
                let mut old: Value =
                    serde_json::from_slice(&bytes).unwrap_or_else(|e| panic!("{name}: {e}"));
                match old["rows"].take() {
                    Value::Array(rows) => rows,
                    _ => panic!("{name}: no list of rows"),
                }
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Vec::new(),
            Err(error) => panic!("{name}: {error}"),
        };
        all.retain(|old| !self.rows.iter().any(|new| case(old) == case(new)));
        all.extend(self.rows);
        if let Some(folder) = file.parent() {
            std::fs::create_dir_all(folder).unwrap_or_else(|e| panic!("{name}: {e}"));
        }
        // One row per line, for readable differences.
        let rows: Vec<String> = all.iter().map(Value::to_string).collect();
        let text = format!("{{\"rows\": [\n{}\n]}}\n", rows.join(",\n"));
        std::fs::write(file, text).unwrap_or_else(|e| panic!("{name}: {e}"));
        println!("\nwritten to {name}");
    }
}

/// The key of a row.
fn case(row: &Value) -> [&Value; 9] {
    [
        "device",
        "operation",
        "variant",
        "dtype",
        "d_input",
        "d_output",
        "tokens",
        "rank",
        "shards",
    ]
    .map(|field| &row[field])
}
