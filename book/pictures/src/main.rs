//! Draws the diagrams of the book and of README into `book/src/pictures`, and writes the book's formulas as
//! MathML into `book/src/formulas`.
//!
//! `cargo run --bin pictures` from the workspace's root.

mod draw;
mod formulas;
mod svg;

use std::path::PathBuf;
use std::{fs, io};

fn main() -> io::Result<()> {
    for (path, text) in files() {
        fs::create_dir_all(path.parent().expect("it lies in a folder"))?;
        fs::write(path, text)?;
    }
    Ok(())
}

/// Every file, and what belongs into it.
fn files() -> impl Iterator<Item = (PathBuf, String)> {
    let book = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../src");
    let pictures = book.join("pictures");
    let formulas = book.join("formulas");
    let pictures = draw::all()
        .into_iter()
        .map(move |(name, text)| (pictures.join(name).with_extension("svg"), text));
    let formulas =
        formulas::all().map(move |(name, text)| (formulas.join(name).with_extension("html"), text));
    pictures.chain(formulas)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_files_are_what_the_program_writes() {
        for (path, text) in files() {
            let file = fs::read_to_string(&path)
                .unwrap_or_else(|error| panic!("{}: {error}", path.display()));
            assert_eq!(
                file,
                text,
                "{}: run `cargo run --bin pictures`",
                path.display()
            );
        }
    }
}
