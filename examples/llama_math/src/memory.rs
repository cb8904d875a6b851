//! Memory of this process and this machine, if the system reports it.

/// Address space that this program takes before it reads anything, and that of each compute thread.
const BASE: u64 = 512 << 20;
const PER_THREAD: u64 = 256 << 20;

/// Largest resident memory so far, in bytes.
pub fn peak() -> Option<u64> {
    kibibytes("/proc/self/status", "VmHWM:")
}

/// Memory of this machine, in bytes.
pub fn total() -> Option<u64> {
    kibibytes("/proc/meminfo", "MemTotal:")
}

/// Resident memory now, in bytes.
pub fn current() -> Option<u64> {
    kibibytes("/proc/self/status", "VmRSS:")
}

/// Whether this process can hold `bytes` more.
///
/// # Errors
///
/// The reason why it cannot.
pub(crate) fn check(bytes: u64) -> Result<(), String> {
    let says = |room: u64, what: &str| {
        let mebibytes = |bytes: u64| bytes >> 20;
        format!(
            "takes {} MiB of memory, and {what} leaves {} MiB",
            mebibytes(bytes),
            mebibytes(room)
        )
    };
    match (kibibytes("/proc/meminfo", "MemAvailable:"), address_space()) {
        (Some(room), _) if bytes > room => Err(says(room, "this machine")),
        (_, Some(room)) if bytes > room => Err(says(room, "the limit of `ulimit -v`")),
        _ => Ok(()),
    }
}

/// Whether a limit on the address space leaves enough for the reservations of `threads` compute
/// threads.
///
/// # Errors
///
/// The limit, and a sufficient one.
pub(crate) fn check_limit(threads: usize) -> Result<(), String> {
    let least = BASE + PER_THREAD * threads as u64;
    match address_space() {
        Some(room) if room < least => Err(format!(
            "the limit of `ulimit -v` leaves {} MiB of address space, and {threads} compute threads \
             take {} MiB; raise it, or choose fewer with --threads",
            room >> 20,
            least >> 20
        )),
        _ => Ok(()),
    }
}

/// The rest of the limit on the address space, if there is one.
#[cfg(unix)]
fn address_space() -> Option<u64> {
    let limit = rustix::process::getrlimit(rustix::process::Resource::As).current?;
    let used = kibibytes("/proc/self/status", "VmSize:").unwrap_or(0);
    Some(limit.saturating_sub(used))
}

#[cfg(not(unix))]
fn address_space() -> Option<u64> {
    None
}

/// A line of one of Linux's files about memory, in bytes.
fn kibibytes(file: &str, key: &str) -> Option<u64> {
    let status = std::fs::read_to_string(file).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix(key))?;
    let kibibytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kibibytes * 1024)
}
