//! The layout of the workspace: the table in CONTRIBUTING against the sources, and no circular
//! imports.
//!
//! `HD_PISSA_WRITE_LAYOUT=1 cargo test --release --workspace --test layout` writes the table.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

use syn::visit::Visit;

/// A path of modules from the root of a crate.
type ModulePath = Vec<String>;

/// The names in one module's code.
#[derive(Default)]
struct Module {
    /// The first sentence of its documentation.
    about: String,
    /// Every path in its code.
    paths: Vec<Vec<String>>,
    /// The imports of its `use` declarations by name, and whether they are public.
    names: BTreeMap<String, (Vec<String>, bool)>,
}

/// All modules of a library or program.
struct Tree {
    modules: BTreeMap<ModulePath, Module>,
    /// Libraries of the workspace, by the names that code uses.
    libraries: BTreeMap<String, String>,
}

#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Target {
    Module(ModulePath),
    Library(String),
}

impl Tree {
    fn read(root: &Path, libraries: BTreeMap<String, String>) -> Self {
        let mut tree = Self {
            modules: BTreeMap::new(),
            libraries,
        };
        let folder = root.parent().expect("a file");
        tree.read_file(root, folder, Vec::new());
        tree
    }

    /// Reads the file of a module, whose child modules have their files in `folder`.
    fn read_file(&mut self, file: &Path, folder: &Path, path: ModulePath) {
        let text =
            std::fs::read_to_string(file).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
        let parsed = syn::parse_file(&text).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
        let mut reader = Reader::default();
        reader.module.about = about(&text);
        reader.visit_file(&parsed);
        let Reader { module, children } = reader;
        self.modules.insert(path.clone(), module);
        for name in children {
            let places = [
                (folder.join(format!("{name}.rs")), folder.join(&name)),
                (folder.join(&name).join("mod.rs"), folder.join(&name)),
            ];
            // A module with a `path` attribute belongs to another crate.
            if let Some((file, folder)) = places.iter().find(|(file, _)| file.exists()) {
                let path = [path.clone(), vec![name]].concat();
                self.read_file(file, folder, path);
            }
        }
    }

    /// The module that holds what `path` names in the module `at`, or the library.
    fn resolve(&self, at: &[String], path: &[String]) -> Option<Target> {
        // Deeper than any chain of re-exports.
        self.resolve_for(at, at, path, 16)
    }

    fn resolve_for(
        &self,
        reader: &[String],
        at: &[String],
        path: &[String],
        depth: usize,
    ) -> Option<Target> {
        let depth = depth.checked_sub(1)?;
        let (first, mut rest) = path.split_first()?;
        let mut at = at.to_vec();
        match first.as_str() {
            "crate" => at.clear(),
            "self" => {}
            "super" => drop(at.pop()?),
            name => {
                let child = [&at[..], std::slice::from_ref(first)].concat();
                let module = &self.modules[&at];
                if self.modules.contains_key(&child) {
                    at = child;
                } else if let Some(library) = self.libraries.get(name) {
                    return Some(Target::Library(library.clone()));
                } else {
                    let (imported, _) = module.names.get(name)?;
                    return self.resolve_for(reader, &at, &[imported, rest].concat(), depth);
                }
            }
        }
        while let Some((name, after)) = rest.split_first() {
            let child = [&at[..], std::slice::from_ref(name)].concat();
            if name == "super" {
                at.pop()?;
            } else if self.modules.contains_key(&child) {
                at = child;
            } else if let Some((imported, is_public)) = self.modules[&at].names.get(name)
                && (*is_public || reader.starts_with(&at))
            {
                return self.resolve_for(reader, &at, &[imported, after].concat(), depth);
            } else {
                break;
            }
            rest = after;
        }
        Some(Target::Module(at))
    }

    /// The imports of each module: modules of the same parent, with everything in them, and
    /// libraries. A parent and its modules count as one.
    fn imports(&self) -> BTreeMap<ModulePath, BTreeSet<Target>> {
        let mut imports: BTreeMap<ModulePath, BTreeSet<Target>> = BTreeMap::new();
        for (from, module) in &self.modules {
            for path in &module.paths {
                match self.resolve(from, path) {
                    Some(Target::Module(to)) => {
                        let common = from.iter().zip(&to).take_while(|(x, y)| x == y).count();
                        if common < from.len() && common < to.len() {
                            let to = Target::Module(to[..=common].to_vec());
                            imports
                                .entry(from[..=common].to_vec())
                                .or_default()
                                .insert(to);
                        }
                    }
                    Some(Target::Library(library)) => {
                        for length in 1..=from.len() {
                            let library = Target::Library(library.clone());
                            imports
                                .entry(from[..length].to_vec())
                                .or_default()
                                .insert(library);
                        }
                    }
                    None => {}
                }
            }
        }
        imports
    }

    /// Pairs of modules that import each other.
    fn circles(&self) -> Vec<String> {
        let imports = self.imports();
        let mut circles = Vec::new();
        for (from, targets) in &imports {
            for target in targets {
                let Target::Module(to) = target else { continue };
                let back = imports
                    .get(to)
                    .is_some_and(|back| back.contains(&Target::Module(from.clone())));
                if back && from < to {
                    circles.push(format!("{} and {}", from.join("::"), to.join("::")));
                }
            }
        }
        circles
    }
}

/// Collects the names in a file, without its tests.
#[derive(Default)]
struct Reader {
    module: Module,
    children: Vec<String>,
}

fn is_test(attributes: &[syn::Attribute]) -> bool {
    attributes.iter().any(|attribute| {
        attribute.path().is_ident("cfg")
            && attribute
                .parse_args::<syn::Ident>()
                .is_ok_and(|ident| ident == "test")
    })
}

impl Reader {
    fn use_tree(&mut self, tree: &syn::UseTree, mut prefix: Vec<String>, is_public: bool) {
        match tree {
            syn::UseTree::Path(path) => {
                prefix.push(path.ident.to_string());
                self.use_tree(&path.tree, prefix, is_public);
            }
            syn::UseTree::Group(group) => {
                for tree in &group.items {
                    self.use_tree(tree, prefix.clone(), is_public);
                }
            }
            syn::UseTree::Glob(_) => self.module.paths.push(prefix),
            syn::UseTree::Name(name) => self.bring(prefix, name.ident.to_string(), None, is_public),
            syn::UseTree::Rename(rename) => {
                let (name, new) = (rename.ident.to_string(), rename.rename.to_string());
                self.bring(prefix, name, Some(new), is_public);
            }
        }
    }

    fn bring(&mut self, mut path: Vec<String>, name: String, new: Option<String>, is_public: bool) {
        if name != "self" {
            path.push(name);
        }
        let name = new.or_else(|| path.last().cloned()).expect("a name");
        self.module.paths.push(path.clone());
        // Otherwise `use config::config` would refer to itself.
        if path.len() > 1 || path[0] != name {
            self.module.names.insert(name, (path, is_public));
        }
    }
}

impl<'ast> Visit<'ast> for Reader {
    fn visit_item_mod(&mut self, item: &'ast syn::ItemMod) {
        if is_test(&item.attrs) {
            return;
        }
        match &item.content {
            None => self.children.push(item.ident.to_string()),
            Some(_) => syn::visit::visit_item_mod(self, item),
        }
    }

    fn visit_item_use(&mut self, item: &'ast syn::ItemUse) {
        let is_public = !matches!(item.vis, syn::Visibility::Inherited);
        self.use_tree(&item.tree, Vec::new(), is_public);
    }

    fn visit_item_fn(&mut self, item: &'ast syn::ItemFn) {
        if !is_test(&item.attrs) {
            syn::visit::visit_item_fn(self, item);
        }
    }

    fn visit_path(&mut self, path: &'ast syn::Path) {
        let segments: Vec<String> = path.segments.iter().map(|s| s.ident.to_string()).collect();
        if segments.len() > 1 {
            self.module.paths.push(segments);
        }
        syn::visit::visit_path(self, path);
    }
}

/// The first sentence of a file's documentation, without links.
fn about(text: &str) -> String {
    let lines = text.lines().map_while(|line| line.strip_prefix("//!"));
    let paragraph: Vec<&str> = lines
        .map(str::trim)
        .take_while(|line| !line.is_empty())
        .collect();
    let paragraph = paragraph.join(" ").replace("[`", "`").replace("`]", "`");
    let end = paragraph.find(". ").unwrap_or(paragraph.len());
    paragraph[..end].trim_end_matches([':', '.']).into()
}

/// A package of the workspace.
struct Package {
    name: String,
    description: String,
    folder: PathBuf,
    library: Option<PathBuf>,
    /// Other programs of several files.
    programs: Vec<PathBuf>,
    /// Packages of the workspace, and all others, without those for tests.
    dependencies: Vec<String>,
}

fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("..")
        .canonicalize()
        .unwrap()
}

fn packages() -> Vec<Package> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(cargo)
        .args([
            "metadata",
            "--no-deps",
            "--offline",
            "--format-version",
            "1",
        ])
        .current_dir(workspace())
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let text = |value: &serde_json::Value| value.as_str().unwrap_or_default().to_owned();
    let mut packages: Vec<Package> = metadata["packages"]
        .as_array()
        .unwrap()
        .iter()
        .map(|package| {
            let targets = package["targets"].as_array().unwrap();
            let sources = |kind: &str| -> Vec<PathBuf> {
                let targets = targets.iter().filter(|target| target["kind"][0] == kind);
                targets
                    .map(|target| text(&target["src_path"]).into())
                    .collect()
            };
            let dependencies = package["dependencies"].as_array().unwrap().iter();
            Package {
                name: text(&package["name"]),
                description: text(&package["description"]),
                folder: Path::new(&text(&package["manifest_path"]))
                    .parent()
                    .unwrap()
                    .into(),
                library: sources("lib").pop(),
                programs: [sources("bench"), sources("example")].concat(),
                dependencies: dependencies
                    .filter(|dependency| dependency["kind"].is_null())
                    .map(|dependency| text(&dependency["name"]))
                    .collect(),
            }
        })
        .collect();
    packages.sort_by(|x, y| x.name.cmp(&y.name));
    packages
}

fn trees(packages: &[Package], package: &Package) -> Vec<(PathBuf, Tree)> {
    let libraries = || {
        let named = packages.iter().filter(|other| other.library.is_some());
        let named = named.map(|other| (other.name.replace('-', "_"), other.name.clone()));
        named.collect()
    };
    let roots = package.library.iter().chain(&package.programs);
    roots
        .map(|root| (root.clone(), Tree::read(root, libraries())))
        .collect()
}

#[test]
fn no_two_modules_import_each_other() {
    let packages = packages();
    let mut found = BTreeSet::new();
    for package in &packages {
        for (_, tree) in trees(&packages, package) {
            let circles = tree.circles().into_iter();
            found.extend(circles.map(|circle| format!("{}: {circle}", package.name)));
        }
    }
    assert!(
        found.is_empty(),
        "modules that import each other: {found:#?}"
    );
}

#[test]
fn dependencies_point_one_way() {
    for package in packages() {
        let may_not: fn(&str) -> bool = match package.name.as_str() {
            "hd-pissa-bits" => |name| {
                ["burn", "cubecl", "hd-pissa"]
                    .iter()
                    .any(|start| name.starts_with(start))
            },
            "hd-pissa-kernels" => |name| {
                name.starts_with("burn")
                    || (name.starts_with("hd-pissa") && name != "hd-pissa-bits")
            },
            "hd-pissa-comm" => |name| name.starts_with("hd-pissa") || name.starts_with("cubecl"),
            "hd-pissa" => |name| {
                let may = ["hd-pissa-bits", "hd-pissa-comm", "hd-pissa-kernels"];
                name.starts_with("hd-pissa-") && !may.contains(&name)
            },
            _ => continue,
        };
        for dependency in &package.dependencies {
            assert!(
                !may_not(dependency),
                "{} depends on {dependency}",
                package.name
            );
        }
    }
}

/// The table, made of the packages, the first sentences of the modules' files, and their imports.
fn table() -> String {
    let packages = packages();
    let mut lines = vec![
        "| where | what lives there | imports |".to_owned(),
        "|---|---|---|".to_owned(),
    ];
    let is_ours = |name: &&String| packages.iter().any(|package| package.name == **name);
    for package in &packages {
        let dependencies = package.dependencies.iter().filter(is_ours);
        let dependencies: Vec<String> = dependencies.map(|name| format!("`{name}`")).collect();
        let folder = package
            .folder
            .strip_prefix(workspace())
            .unwrap()
            .display()
            .to_string();
        lines.push(format!(
            "| **`{}`**, `{folder}/` | {} | {} |",
            package.name,
            package.description,
            dependencies.join(", ")
        ));
        let Some(library) = package
            .library
            .as_ref()
            .filter(|_| folder.starts_with("crates/"))
        else {
            continue;
        };
        let (_, tree) = trees(&packages, package)
            .into_iter()
            .find(|(root, _)| root == library)
            .unwrap();
        let imports = tree.imports();
        for (path, module) in tree.modules.iter().filter(|(path, _)| path.len() == 1) {
            let targets = imports.get(path).into_iter().flatten();
            let targets: Vec<String> = targets
                .map(|target| match target {
                    Target::Module(path) => path.join("::"),
                    Target::Library(library) => format!("`{library}`"),
                })
                .collect();
            lines.push(format!(
                "| {} | {} | {} |",
                path[0],
                module.about,
                targets.join(", ")
            ));
        }
    }
    lines.join("\n") + "\n"
}

#[test]
fn the_table_in_contributing_is_that_of_the_sources() {
    const START: &str = "<!-- the layout: written by tests/layout.rs -->\n";
    const END: &str = "<!-- end of the layout -->\n";
    let file = workspace().join("CONTRIBUTING.md");
    let text = std::fs::read_to_string(&file).unwrap();
    let (before, rest) = text.split_once(START).expect("the start of the table");
    let (written, after) = rest.split_once(END).expect("the end of the table");
    let table = table();
    if std::env::var_os("HD_PISSA_WRITE_LAYOUT").is_some_and(|value| value == "1") {
        std::fs::write(&file, [before, START, &table, END, after].concat()).unwrap();
    } else {
        assert!(
            written == table,
            "CONTRIBUTING.md: the layout has changed; HD_PISSA_WRITE_LAYOUT=1 cargo test --release \
             --workspace --test layout writes it"
        );
    }
}

/// A small crate on the disk, with its expected imports.
#[test]
fn imports_are_followed_through_re_exports() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| {
        let file = folder.path().join(name);
        std::fs::create_dir_all(file.parent().unwrap()).unwrap();
        std::fs::write(file, text).unwrap();
    };
    write(
        "lib.rs",
        "//! A root.\nmod a;\nmod b;\nmod c;\npub use a::{One, inner::Two as Three};\npub use other as o;",
    );
    write(
        "a/mod.rs",
        "//! Maps. More.\nmod inner;\nmod next;\npub use next::One;",
    );
    write(
        "a/inner.rs",
        "//! Of `b`:\nuse crate::b;\nuse super::next::One;\npub struct Two;",
    );
    write(
        "a/next.rs",
        "pub struct One;\n#[cfg(test)] mod tests { use super::super::inner::Two; }",
    );
    write(
        "b.rs",
        "use crate::Three;\nfn f() { crate::o::g(); crate::c::a() }",
    );
    // A function with the name of a module that only this file imports.
    write("c.rs", "use crate::a;\nfn f(_: a::One) {}\npub fn a() {}");
    let libraries = [("other".to_owned(), "other-crate".to_owned())];
    let tree = Tree::read(&folder.path().join("lib.rs"), libraries.into());
    let path = |text: &str| -> ModulePath { text.split("::").map(Into::into).collect() };
    let module = |text: &str| Target::Module(path(text));
    let imports = tree.imports();
    assert_eq!(imports[&path("a")], [module("b")].into());
    assert_eq!(imports[&path("a::inner")], [module("a::next")].into());
    assert_eq!(imports.get(&path("a::next")), None);
    assert_eq!(
        imports[&path("b")],
        [
            module("a"),
            module("c"),
            Target::Library("other-crate".into())
        ]
        .into()
    );
    assert_eq!(imports[&path("c")], [module("a")].into());
    assert_eq!(tree.circles(), ["a and b"]);
    assert_eq!(tree.modules[&path("a")].about, "Maps");
    assert_eq!(tree.modules[&path("a::inner")].about, "Of `b`");
}
