//! The machine and the build, for bug reports.

use std::fmt;
use std::path::Path;
use std::process::Command;

use crate::measure::{backends, hardware};
use burn::tensor::Device;
use serde::Serialize;

/// Device, versions and features.
#[derive(Clone, Debug, Serialize)]
pub struct Environment {
    /// The value of `--device`.
    pub device: String,
    pub hardware: String,
    pub system: String,
    pub version: &'static str,
    /// `None` outside a git checkout.
    pub commit: Option<String>,
    pub burn: String,
    pub cubecl: String,
    pub features: Vec<&'static str>,
}

impl Environment {
    pub fn of(name: &str, device: &Device) -> Self {
        let mut features = backends();
        let others = [
            ("fusion", cfg!(feature = "fusion")),
            ("autotune", cfg!(feature = "autotune")),
            ("x86-v4", cfg!(feature = "x86-v4")),
        ];
        features.extend(
            others
                .into_iter()
                .filter_map(|(name, on)| on.then_some(name)),
        );
        Self {
            device: name.into(),
            hardware: hardware(device),
            system: format!("{} on {}", std::env::consts::OS, std::env::consts::ARCH),
            version: env!("CARGO_PKG_VERSION"),
            commit: commit(),
            burn: locked("burn"),
            cubecl: locked("cubecl"),
            features,
        }
    }
}

/// The version of a package in the workspace's lock file. "unknown" without the sources.
fn locked(package: &str) -> String {
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/../../Cargo.lock");
    let lock = std::fs::read_to_string(file).unwrap_or_default();
    let start = format!("name = \"{package}\"\nversion = \"");
    let version = lock
        .split(&start)
        .nth(1)
        .and_then(|rest| rest.split('"').next());
    version.unwrap_or("unknown").into()
}

/// The commit of the sources, with `+` after it if they were changed.
fn commit() -> Option<String> {
    let git = |arguments: &[&str]| {
        let mut command = Command::new("git");
        command.args(arguments);
        let output = command
            .current_dir(Path::new(env!("CARGO_MANIFEST_DIR")))
            .output()
            .ok()?;
        output.status.success().then_some(())?;
        Some(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    let commit = git(&["rev-parse", "--short=12", "HEAD"])?;
    let is_clean = git(&["status", "--porcelain", "--untracked-files=no"])?.is_empty();
    Some(if is_clean { commit } else { commit + "+" })
}

impl fmt::Display for Environment {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        writeln!(f, "device    {}: {}", self.device, self.hardware)?;
        writeln!(f, "system    {}", self.system)?;
        let commit = self.commit.as_deref().unwrap_or("an unknown commit");
        writeln!(
            f,
            "versions  hd-pissa {} ({commit}), burn {}, cubecl {}",
            self.version, self.burn, self.cubecl
        )?;
        writeln!(f, "features  {}", self.features.join(", "))
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn versions_are_in_the_lock_file() {
        for package in ["burn", "cubecl"] {
            let version = super::locked(package);
            assert!(version.starts_with("0."), "{package} {version}");
        }
        assert_eq!(super::locked("no such package"), "unknown");
    }
}
