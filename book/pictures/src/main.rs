//! Draws the diagrams of the book and of README into `book/src/pictures`.
//!
//! `cargo run --bin pictures` from the workspace's root.

mod draw;
mod svg;

use std::path::PathBuf;
use std::{fs, io};

fn main() -> io::Result<()> {
    fs::create_dir_all(folder())?;
    for (name, picture) in draw::all() {
        fs::write(folder().join(name).with_extension("svg"), picture)?;
    }
    Ok(())
}

fn folder() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../src/pictures")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_files_are_what_the_program_draws() {
        for (name, picture) in draw::all() {
            let path = folder().join(name).with_extension("svg");
            let file = fs::read_to_string(&path)
                .unwrap_or_else(|error| panic!("{}: {error}", path.display()));
            assert_eq!(
                file,
                picture,
                "{}: run `cargo run --bin pictures`",
                path.display()
            );
        }
    }
}
