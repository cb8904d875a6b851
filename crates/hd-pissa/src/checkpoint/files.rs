//! Writing files that are on disk when a call returns, and their digests.

use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;

use sha2::{Digest, Sha256};

use super::CheckpointError;
use crate::digits::hexadecimal;

/// Writes `bytes` to a new file and waits for the disk.
pub(super) fn write(path: &Path, bytes: &[u8]) -> Result<(), CheckpointError> {
    let write = || {
        let mut file = File::create_new(path)?;
        file.write_all(bytes)?;
        file.sync_all()
    };
    write().map_err(|error| CheckpointError::io(path, error))
}

/// Waits until a file written through another handle is on disk.
pub(super) fn sync(path: &Path) -> Result<(), CheckpointError> {
    let sync = || File::options().write(true).open(path)?.sync_all();
    sync().map_err(|error| CheckpointError::io(path, error))
}

/// Waits until the entries of a folder are on disk, if the system supports that.
pub(super) fn sync_folder(path: &Path) -> Result<(), CheckpointError> {
    if cfg!(unix) {
        let sync = || File::open(path)?.sync_all();
        sync().map_err(|error| CheckpointError::io(path, error))?;
    }
    Ok(())
}

/// SHA-256 of bytes, in hexadecimal digits.
pub(super) fn sha256_of(bytes: &[u8]) -> String {
    hexadecimal(&Sha256::digest(bytes))
}

/// SHA-256 of a file, in hexadecimal digits.
pub(super) fn sha256(path: &Path) -> std::io::Result<String> {
    let mut file = File::open(path)?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 16];
    loop {
        match file.read(&mut buffer)? {
            0 => break,
            len => hash.update(&buffer[..len]),
        }
    }
    Ok(hexadecimal(&hash.finalize()))
}
