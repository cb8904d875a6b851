//! Memory of this process, where the system tells it.

/// Largest resident memory so far, in bytes.
pub fn peak() -> Option<u64> {
    status("VmHWM:")
}

/// Resident memory now, in bytes.
pub fn current() -> Option<u64> {
    status("VmRSS:")
}

/// A line of Linux's `/proc/self/status`, in bytes.
fn status(key: &str) -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix(key))?;
    let kibibytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kibibytes * 1024)
}
