//! Compares the libraries' public API, as rustdoc's JSON has it, with the lists.
//!
//! `.ci/public_api/run` calls it; `--write` writes the lists anew.

use std::path::Path;
use std::process::ExitCode;
use std::{env, fs};

const LIBRARIES: [&str; 4] = [
    "hd_pissa",
    "hd_pissa_bits",
    "hd_pissa_comm",
    "hd_pissa_kernels",
];

fn main() -> ExitCode {
    let mut arguments = env::args().skip(1);
    let json = arguments.next().expect("the folder of rustdoc's JSON");
    let lists = arguments.next().expect("the folder of the lists");
    let writes = arguments
        .next()
        .is_some_and(|argument| argument == "--write");
    let mut differs = false;
    for library in LIBRARIES {
        let source = Path::new(&json).join(library).with_extension("json");
        let api = public_api::Builder::from_rustdoc_json(&source)
            .omit_blanket_impls(true)
            .omit_auto_trait_impls(true)
            .omit_auto_derived_impls(true)
            .build()
            .unwrap_or_else(|error| panic!("{}: {error}", source.display()));
        let text: String = api.items().map(|item| format!("{item}\n")).collect();
        let list = Path::new(&lists).join(library).with_extension("txt");
        if writes {
            fs::write(&list, &text).unwrap_or_else(|error| panic!("{}: {error}", list.display()));
        }
        let listed = fs::read_to_string(&list).unwrap_or_default();
        for line in text
            .lines()
            .filter(|line| !listed.lines().any(|l| l == *line))
        {
            println!("+ {line}");
            differs = true;
        }
        for line in listed
            .lines()
            .filter(|line| !text.lines().any(|l| l == *line))
        {
            println!("- {line}");
            differs = true;
        }
    }
    if differs {
        println!("the public API has changed; if you meant it, run .ci/public_api/run --write");
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}
