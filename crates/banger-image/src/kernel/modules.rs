//! A kernel's modules: what depends on what, which of them a guest's root needs, and the indices that `modprobe`
//! reads, so that the host needs no `depmod`.

use super::index::{self, Keys};
use crate::context::Context;
use crate::error::BuildError;
use crate::tree::{Kind, Tree};
use crate::unpack::decompress;
use object::{Object, ObjectSection};
use std::collections::{BTreeMap, BTreeSet};

/// What a guest's root needs, in the order in which it is to be there. What is built in is left out; the variants of
/// CRC-32C are taken where they exist.
pub(crate) const WANTED: [&str; 9] = [
    "virtio_mmio",
    "virtio_pci",
    "virtio_blk",
    "virtio_net",
    "vmw_vsock_virtio_transport",
    "virtio_console",
    "virtio_rng",
    "ext4",
    "overlay",
];
/// What is loaded first where it exists.
pub(crate) const OPTIONAL: [&str; 2] = ["crc32c_generic", "crc32c_intel"];

/// The largest module, unpacked.
const MAX_MODULE: u64 = 128 << 20;

/// One module.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Module {
    /// Its path below `/lib/modules/<release>`.
    pub(crate) path: String,
    /// The modules it needs, by name.
    pub(crate) depends: Vec<String>,
    /// Patterns of the devices and names it answers to.
    pub(crate) aliases: Vec<String>,
    /// Its `softdep` lines.
    pub(crate) soft: Vec<String>,
}

/// All modules of a kernel by name; names use `_` throughout.
pub(crate) type Modules = BTreeMap<String, Module>;

/// The name of the module in the file `path`; `None` if it is no module's.
pub(crate) fn name_of(path: &str) -> Option<String> {
    let file = path.rsplit('/').next()?;
    let (stem, rest) = file.split_once(".ko")?;
    let known = matches!(rest, "" | ".xz" | ".zst" | ".gz");
    (known && !stem.is_empty()).then(|| stem.replace('-', "_"))
}

/// Reads every module of `tree`, the content of `/lib/modules/<release>`.
pub(crate) fn scan(tree: &Tree, context: &Context) -> Result<Modules, BuildError> {
    let paths: Vec<&str> = tree
        .entries()
        .filter(|(path, entry)| matches!(entry.kind, Kind::File(_)) && name_of(path).is_some())
        .map(|(path, _)| path)
        .collect();
    let mut modules = Modules::new();
    let total = paths.len() as u64;
    for (done, path) in paths.into_iter().enumerate() {
        context.check()?;
        if done % 100 == 0 {
            context.tell_amount(
                "modules",
                "reading the modules",
                Some(done as u64),
                Some(total),
            );
        }
        let Some(name) = name_of(path) else { continue };
        let content = read(tree, path)?;
        let info = section(&content, path)?;
        modules.insert(name, parse_info(path, &info));
    }
    Ok(modules)
}

/// The plain content of the module at `path`.
pub(crate) fn read(tree: &Tree, path: &str) -> Result<Vec<u8>, BuildError> {
    let content = tree
        .file(path)
        .ok_or_else(|| BuildError::archive(path, "it is no file"))?
        .read(path, MAX_MODULE)?;
    decompress(&content, path, MAX_MODULE)
}

fn section(content: &[u8], path: &str) -> Result<Vec<u8>, BuildError> {
    let file = object::File::parse(content).map_err(|error| BuildError::archive(path, error))?;
    match file.section_by_name(".modinfo") {
        None => Ok(Vec::new()),
        Some(section) => section
            .data()
            .map(<[u8]>::to_vec)
            .map_err(|error| BuildError::archive(path, error)),
    }
}

/// Reads `key=value` texts, each ended by a zero.
fn parse_info(path: &str, info: &[u8]) -> Module {
    let mut module = Module {
        path: path.to_owned(),
        ..Module::default()
    };
    for text in info.split(|&byte| byte == 0) {
        let text = String::from_utf8_lossy(text);
        match text.split_once('=') {
            Some(("depends", value)) => module.depends.extend(
                value
                    .split(',')
                    .filter(|d| !d.is_empty())
                    .map(|d| d.replace('-', "_")),
            ),
            Some(("alias", value)) => module.aliases.push(value.to_owned()),
            Some(("softdep", value)) => module.soft.push(value.to_owned()),
            _ => {}
        }
    }
    module
}

/// The names in a `modules.builtin`.
pub(crate) fn builtin(text: &str) -> BTreeSet<String> {
    text.lines().filter_map(name_of).collect()
}

/// What is to be loaded for the wanted modules.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Closure {
    /// Names in load order, dependencies first.
    pub(crate) order: Vec<String>,
    /// Names that are neither modules nor built in.
    pub(crate) missing: Vec<String>,
}

/// The closure of `wanted` over the modules' dependencies. A cycle, which no kernel has, is cut where it closes.
pub(crate) fn closure<'a>(
    wanted: impl IntoIterator<Item = &'a str>,
    modules: &Modules,
    builtin: &BTreeSet<String>,
) -> Closure {
    let mut closure = Closure::default();
    let mut seen = BTreeSet::new();
    for name in wanted {
        // Depth first without recursion: a name is visited, its dependencies pushed above it, then it is placed.
        let mut stack = vec![(name.to_owned(), false)];
        while let Some((name, placed)) = stack.pop() {
            if placed {
                closure.order.push(name);
                continue;
            }
            if !seen.insert(name.clone()) {
                continue;
            }
            match modules.get(&name) {
                None if builtin.contains(&name) => {}
                None => closure.missing.push(name),
                Some(module) => {
                    stack.push((name, true));
                    for dependency in module.depends.iter().rev() {
                        stack.push((dependency.clone(), false));
                    }
                }
            }
        }
    }
    closure
}

/// Adds the files that `depmod` would write to `tree`, the content of `/lib/modules/<release>`.
pub(crate) fn add_indices(tree: &mut Tree, modules: &Modules, mtime: i64) {
    let builtin_names = text(tree, "modules.builtin").map(|text| builtin(&text));
    let builtin_names = builtin_names.unwrap_or_default();
    let order: BTreeMap<String, u32> = text(tree, "modules.order")
        .unwrap_or_default()
        .lines()
        .filter_map(name_of)
        .zip(0..)
        .collect();
    let rank = |name: &str| order.get(name).copied().unwrap_or(u32::MAX >> 1);

    let (mut dep, mut alias, mut soft, mut devname) =
        (String::new(), String::new(), String::new(), String::new());
    let (mut dep_keys, mut alias_keys, mut builtin_alias) = (Keys::new(), Keys::new(), Keys::new());
    for (name, module) in modules {
        let mut needs = closure([name.as_str()], modules, &builtin_names).order;
        needs.pop();
        // What is to be loaded first stands last.
        let paths = needs.iter().rev().filter_map(|need| modules.get(need));
        let line = paths.fold(format!("{}:", module.path), |line, need| {
            line + " " + &need.path
        });
        dep.push_str(&line);
        dep.push('\n');
        dep_keys.insert(name.clone().into_bytes(), vec![(rank(name), line)]);
        for pattern in module
            .aliases
            .iter()
            .filter(|p| !p.contains(char::is_whitespace))
        {
            let pattern = normalize(pattern);
            alias.push_str(&format!("alias {pattern} {name}\n"));
            let values = alias_keys.entry(pattern.into_bytes()).or_default();
            if !values.iter().any(|(_, value)| value == name) {
                values.push((rank(name), name.clone()));
            }
        }
        for line in module.soft.iter().filter(|line| !line.contains('\n')) {
            soft.push_str(&format!("softdep {name} {line}\n"));
        }
        if let Some((device, node)) = device_node(&module.aliases) {
            devname.push_str(&format!("{name} {device} {node}\n"));
        }
    }
    for (name, pattern) in text(tree, "modules.builtin.modinfo")
        .iter()
        .flat_map(|t| builtin_aliases(t))
    {
        let values = builtin_alias
            .entry(normalize(&pattern).into_bytes())
            .or_default();
        if !values.iter().any(|(_, value)| *value == name) {
            values.push((0, name));
        }
    }
    let builtin_keys: Keys = builtin_names
        .into_iter()
        .map(|name| (name.into_bytes(), vec![(0, String::new())]))
        .collect();

    for (path, content) in [
        ("modules.dep", dep.into_bytes()),
        ("modules.dep.bin", index::write(&dep_keys)),
        ("modules.alias", alias.into_bytes()),
        ("modules.alias.bin", index::write(&alias_keys)),
        ("modules.softdep", soft.into_bytes()),
        ("modules.devname", devname.into_bytes()),
        ("modules.symbols", Vec::new()),
        ("modules.symbols.bin", index::write(&Keys::new())),
        ("modules.builtin.bin", index::write(&builtin_keys)),
        ("modules.builtin.alias.bin", index::write(&builtin_alias)),
    ] {
        tree.write(path, 0o644, mtime, content);
    }
}

fn text(tree: &Tree, path: &str) -> Option<String> {
    let bytes = tree.file(path)?.read(path, 16 << 20).ok()?;
    Some(String::from_utf8_lossy(&bytes).into_owned())
}

/// Aliases in a `modules.builtin.modinfo`: `name.alias=pattern`, each ended by a zero.
fn builtin_aliases(text: &str) -> Vec<(String, String)> {
    text.split('\0')
        .filter_map(|text| {
            let (key, pattern) = text.split_once('=')?;
            let (name, field) = key.split_once('.')?;
            (field == "alias").then(|| (name.replace('-', "_"), pattern.to_owned()))
        })
        .collect()
}

/// An alias as `modprobe` looks for it: `_` for `-` outside brackets.
fn normalize(pattern: &str) -> String {
    let mut inside = false;
    pattern
        .chars()
        .map(|c| {
            match c {
                '[' => inside = true,
                ']' => inside = false,
                '-' if !inside => return '_',
                _ => {}
            }
            c
        })
        .collect()
}

/// The device node that opening loads the module: its name and number.
fn device_node(aliases: &[String]) -> Option<(String, String)> {
    let name = aliases
        .iter()
        .find_map(|alias| alias.strip_prefix("devname:"))?;
    let numbers = |kind: &str, letter: char| {
        aliases.iter().find_map(|alias| {
            let (major, minor) = alias.strip_prefix(kind)?.split_once('-')?;
            let (major, minor): (u32, u32) = (major.parse().ok()?, minor.parse().ok()?);
            Some(format!("{letter}{major}:{minor}"))
        })
    };
    let node = numbers("char-major-", 'c').or_else(|| numbers("block-major-", 'b'))?;
    Some((name.to_owned(), node))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn modules(list: &[(&str, &[&str])]) -> Modules {
        list.iter()
            .map(|(name, depends)| {
                let module = Module {
                    path: format!("kernel/{name}.ko"),
                    depends: depends.iter().map(|&d| d.to_owned()).collect(),
                    ..Module::default()
                };
                ((*name).to_owned(), module)
            })
            .collect()
    }

    fn order(wanted: &[&str], list: &[(&str, &[&str])]) -> Closure {
        let builtin = BTreeSet::from(["virtio_pci".to_owned()]);
        closure(wanted.iter().copied(), &modules(list), &builtin)
    }

    #[test]
    fn dependencies_come_first_and_only_once() {
        let list: &[(&str, &[&str])] = &[
            ("ext4", &["mbcache", "jbd2", "crc16"]),
            ("jbd2", &[]),
            ("mbcache", &[]),
            ("crc16", &[]),
            ("virtio_net", &["net_failover", "virtio_pci"]),
            ("net_failover", &["failover"]),
            ("failover", &[]),
        ];
        let closure = order(&["virtio_net", "ext4", "jbd2"], list);
        let expected = [
            "failover",
            "net_failover",
            "virtio_net",
            "mbcache",
            "jbd2",
            "crc16",
            "ext4",
        ];
        assert_eq!(closure.order, expected);
        assert!(closure.missing.is_empty());
    }

    #[test]
    fn what_is_built_in_is_left_out_and_what_is_nowhere_is_named() {
        let closure = order(&["virtio_pci", "virtio_mmio"], &[]);
        assert!(closure.order.is_empty());
        assert_eq!(closure.missing, ["virtio_mmio"]);
    }

    #[test]
    fn a_cycle_ends() {
        let closure = order(&["a"], &[("a", &["b"]), ("b", &["c"]), ("c", &["a", "b"])]);
        assert_eq!(closure.order, ["c", "b", "a"]);
    }

    #[test]
    fn module_files_have_names_with_underscores() {
        assert_eq!(
            name_of("kernel/crypto/crc32c-intel.ko.xz").as_deref(),
            Some("crc32c_intel")
        );
        assert_eq!(name_of("a/virtio.ko").as_deref(), Some("virtio"));
        for other in ["modules.order", "a/.ko", "a.ko.sig", "kernel/", "a.kobject"] {
            assert_eq!(name_of(other), None, "{other}");
        }
    }

    #[test]
    fn a_modinfo_section_is_read_whatever_it_holds() {
        let info = b"license=GPL\0alias=virtio:d00000002v*\0depends=a-b,c\0softdep=pre: crc32c\0\0\xff\xfe=x\0noise";
        let module = parse_info("kernel/m.ko", info);
        assert_eq!(module.depends, ["a_b", "c"]);
        assert_eq!(module.aliases, ["virtio:d00000002v*"]);
        assert_eq!(module.soft, ["pre: crc32c"]);
        assert_eq!(parse_info("m", b"depends=\0").depends, [""; 0]);
    }

    #[test]
    fn hyphens_in_brackets_of_an_alias_stay() {
        assert_eq!(normalize("char-major-[1-3]-x"), "char_major_[1-3]_x");
    }

    #[test]
    fn a_device_node_needs_a_name_and_a_number() {
        let aliases = ["devname:net/tun", "char-major-10-200"].map(str::to_owned);
        assert_eq!(
            device_node(&aliases),
            Some(("net/tun".to_owned(), "c10:200".to_owned()))
        );
        assert_eq!(device_node(&aliases[..1]), None);
    }

    #[test]
    fn the_dependency_list_names_what_to_load_first_last() {
        let mut tree = Tree::default();
        tree.write("modules.builtin", 0o644, 1, "kernel/x/virtio.ko\n");
        let list = modules(&[("a", &["b"]), ("b", &["c"]), ("c", &[])]);
        add_indices(&mut tree, &list, 1);
        let dep = text(&tree, "modules.dep").unwrap();
        assert!(
            dep.starts_with("kernel/a.ko: kernel/b.ko kernel/c.ko\n"),
            "{dep}"
        );
        assert!(tree.file("modules.builtin.bin").unwrap().length() > 12);
    }
}
