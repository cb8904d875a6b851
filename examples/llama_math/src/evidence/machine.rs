//! The machine that measured.

/// The processor, as far as the system tells.
pub fn machine() -> String {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let names = text.lines().filter_map(|line| line.split_once(':'));
    let mut names = names.filter(|(key, _)| key.trim() == "model name");
    match names.next() {
        Some((_, name)) => format!("Processor: {}.", name.trim()),
        None => String::new(),
    }
}
