//! The machine and the program that measured.

use burn::tensor::Device;

use crate::memory;

/// The version of Burn in the workspace's lock file.
pub(crate) const BURN: &str = "0.22.1";

/// The processor, as far as the system tells.
fn processor() -> Option<String> {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let names = text.lines().filter_map(|line| line.split_once(':'));
    let mut names = names.filter(|(key, _)| key.trim() == "model name");
    names.next().map(|(_, name)| name.trim().into())
}

/// The processor as a sentence, or nothing.
pub fn machine() -> String {
    processor().map_or_else(String::new, |name| format!("Processor: {name}."))
}

/// Names and values of what a result depends on besides its settings.
pub fn facts(device: &Device) -> Vec<(String, String)> {
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let unknown = || "unknown".to_string();
    let memory =
        memory::total().map(|bytes| format!("{:.1} GiB", bytes as f64 / f64::from(1 << 30)));
    [
        ("processor", processor().unwrap_or_else(unknown)),
        ("cores", cores.to_string()),
        ("compute threads", rayon::current_num_threads().to_string()),
        ("memory", memory.unwrap_or_else(unknown)),
        ("device", format!("{device:?}")),
        (
            "system",
            format!("{} on {}", std::env::consts::OS, std::env::consts::ARCH),
        ),
        (
            "program",
            format!("llama_math {} with Burn {BURN}", env!("CARGO_PKG_VERSION")),
        ),
    ]
    .map(|(name, value)| (name.to_string(), value))
    .into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_version_of_burn_is_that_of_the_lock_file() {
        let lock = include_str!("../../../Cargo.lock");
        assert!(lock.contains(&format!("name = \"burn\"\nversion = \"{BURN}\"\n")));
    }
}
