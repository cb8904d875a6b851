//! The public API of the libraries, compared with its list in `tests/public_api/`.
//!
//! `.ci/public_api` runs it: rustdoc's JSON must be there first. `HD_PISSA_WRITE_API=1` writes the lists anew.

use std::path::Path;
use std::{env, fs};

const LIBRARIES: [&str; 4] = [
    "hd_pissa",
    "hd_pissa_bits",
    "hd_pissa_comm",
    "hd_pissa_kernels",
];

#[test]
fn the_public_api_is_as_listed() {
    let json =
        env::var_os("HD_PISSA_API_JSON").expect("the folder of rustdoc's JSON; run .ci/public_api");
    let lists = Path::new(env!("CARGO_MANIFEST_DIR")).join("public_api");
    let mut differing = Vec::new();
    for library in LIBRARIES {
        let source = Path::new(&json).join(library).with_extension("json");
        let api = public_api::Builder::from_rustdoc_json(&source)
            .omit_blanket_impls(true)
            .omit_auto_trait_impls(true)
            .omit_auto_derived_impls(true)
            .build()
            .unwrap_or_else(|error| panic!("{}: {error}", source.display()));
        let text: String = api.items().map(|item| format!("{item}\n")).collect();
        assert!(text.lines().count() > 10, "{library}:\n{text}");
        let list = lists.join(library).with_extension("txt");
        if env::var_os("HD_PISSA_WRITE_API").is_some() {
            fs::create_dir_all(&lists).unwrap();
            fs::write(&list, &text).unwrap();
        }
        let listed = fs::read_to_string(&list).unwrap_or_default();
        let news = text
            .lines()
            .filter(|line| !listed.lines().any(|l| l == *line));
        let gone = listed
            .lines()
            .filter(|line| !text.lines().any(|l| l == *line));
        differing.extend(news.map(|line| format!("+ {line}")));
        differing.extend(gone.map(|line| format!("- {line}")));
    }
    assert!(
        differing.is_empty(),
        "the public API has changed; if you meant it, run HD_PISSA_WRITE_API=1 .ci/public_api\n{}",
        differing.join("\n")
    );
}
