//! The rules that ARCHITECTURE.md states and that can be read off the sources and the dependency graph.

#![expect(clippy::unwrap_used, reason = "all of this is a test")]

use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .unwrap()
        .to_owned()
}

/// The crates that each crate links, by name: normal dependencies only, neither those of tests nor of build scripts.
struct Graph {
    /// Without macros, which run in the compiler alone, and all that only they stand on.
    links: BTreeMap<String, BTreeSet<String>>,
    names: BTreeMap<String, String>,
}

impl Graph {
    fn read() -> Self {
        #[expect(
            clippy::disallowed_methods,
            reason = "asks cargo for the dependency graph"
        )]
        let output = Command::new(env!("CARGO"))
            .current_dir(root())
            .args(["metadata", "--format-version=1", "--offline"])
            .args(["--filter-platform", "x86_64-unknown-linux-gnu"])
            .output()
            .unwrap();
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        let metadata: Value = serde_json::from_slice(&output.stdout).unwrap();
        let text = |value: &Value| value.as_str().unwrap().to_owned();
        let names = metadata["packages"]
            .as_array()
            .unwrap()
            .iter()
            .map(|package| (text(&package["id"]), text(&package["name"])))
            .collect();
        let macros: BTreeSet<&str> = metadata["packages"]
            .as_array()
            .unwrap()
            .iter()
            .filter(|package| package["targets"][0]["kind"][0] == "proc-macro")
            .filter_map(|package| package["id"].as_str())
            .collect();
        let links = metadata["resolve"]["nodes"]
            .as_array()
            .unwrap()
            .iter()
            .map(|node| {
                let linked = node["deps"]
                    .as_array()
                    .unwrap()
                    .iter()
                    .filter(|dependency| {
                        let kinds = dependency["dep_kinds"].as_array().unwrap();
                        kinds.iter().any(|kind| kind["kind"].is_null())
                            && !macros.contains(dependency["pkg"].as_str().unwrap())
                    })
                    .map(|dependency| text(&dependency["pkg"]))
                    .collect();
                (text(&node["id"]), linked)
            })
            .collect();
        Self { links, names }
    }

    /// What `krate` names in its own manifest.
    fn direct(&self, krate: &str) -> BTreeSet<&str> {
        self.links[self.id(krate)]
            .iter()
            .map(|id| self.names[id].as_str())
            .collect()
    }

    /// All that ends up in `krate`.
    fn all(&self, krate: &str) -> BTreeSet<&str> {
        let mut seen = BTreeSet::new();
        let mut left = vec![self.id(krate)];
        while let Some(id) = left.pop() {
            for linked in &self.links[id] {
                if seen.insert(self.names[linked].as_str()) {
                    left.push(linked);
                }
            }
        }
        seen
    }

    fn id(&self, krate: &str) -> &str {
        let (id, _) = self
            .names
            .iter()
            .find(|(_, name)| *name == krate)
            .unwrap_or_else(|| panic!("there is no crate `{krate}`"));
        id
    }
}

#[track_caller]
fn assert_none(found: Vec<String>, rule: &str) {
    assert!(found.is_empty(), "{rule}:\n  {}", found.join("\n  "));
}

#[test]
fn core_stands_on_nothing_that_does_io() {
    let allowed = BTreeSet::from(["jiff", "schemars", "serde", "thiserror", "uuid"]);
    let graph = Graph::read();
    let strange = graph
        .direct("banger-core")
        .difference(&allowed)
        .map(|name| (*name).to_owned())
        .collect();
    assert_none(strange, "banger-core depends on more than data types");
}

#[test]
fn core_asks_nothing_of_the_machine() {
    const MACHINE: [&str; 8] = [
        "std::fs",
        "std::env",
        "std::io",
        "std::process",
        "std::thread",
        "Instant::now",
        "Timestamp::now",
        "now_v7",
    ];
    let found = sources()
        .into_iter()
        .filter(|(name, _)| name.contains("banger-core/src") && !is_test(name))
        .flat_map(|(name, text)| {
            let text = without_tests(&text).to_owned();
            let used = MACHINE.iter().filter(move |word| text.contains(**word));
            used.map(move |word| format!("{name}: {word}"))
                .collect::<Vec<_>>()
        })
        .collect();
    assert_none(
        found,
        "banger-core reads a clock, a file or the environment",
    );
}

#[test]
fn crates_of_ours_depend_on_each_other_in_one_direction_only() {
    let allowed: BTreeMap<&str, &[&str]> = BTreeMap::from([
        ("banger-core", &[] as &[&str]),
        ("banger-guest", &[]),
        ("banger-api", &["banger-core"]),
        ("banger-host", &["banger-core"]),
        // The shim hears the agent, so it knows its words.
        ("banger-vmm", &["banger-core", "banger-guest"]),
        ("banger-image", &["banger-core"]),
        ("banger-dns", &["banger-core"]),
        ("banger-helper", &["banger-core", "banger-host"]),
        ("banger-cli", &["banger-core", "banger-api"]),
        (
            "banger-daemon",
            &[
                "banger-core",
                "banger-api",
                "banger-guest",
                "banger-host",
                "banger-vmm",
                "banger-image",
                "banger-dns",
            ],
        ),
    ]);
    let graph = Graph::read();
    let mut wrong = Vec::new();
    for (krate, allowed) in allowed {
        for linked in graph.direct(krate) {
            if (linked.starts_with("banger-") || linked == "xtask") && !allowed.contains(&linked) {
                wrong.push(format!("{krate} -> {linked}"));
            }
        }
    }
    assert_none(wrong, "a dependency against the direction");
}

#[test]
fn each_program_links_only_what_its_job_needs() {
    let graph = Graph::read();
    let forbidden: [(&str, &[&str]); 7] = [
        (
            "banger-cli",
            &["rusqlite", "netlink-bindings", "rustls", "kvm-ioctls"],
        ),
        ("banger-helper", &["tokio", "rusqlite", "hyper", "rustls"]),
        ("banger-guest", &["tokio", "rusqlite", "hyper"]),
        ("banger-vmm", &["tokio", "rusqlite"]),
        ("banger-host", &["tokio", "rusqlite"]),
        ("banger-image", &["tokio", "rusqlite"]),
        (
            "banger-dns",
            &["rusqlite", "hyper", "rustix", "netlink-bindings"],
        ),
    ];
    let mut wrong = Vec::new();
    for (krate, forbidden) in forbidden {
        let all = graph.all(krate);
        for name in forbidden.iter().filter(|name| all.contains(**name)) {
            wrong.push(format!("{krate} links {name}"));
        }
    }
    assert_none(wrong, "a program links what it must not");
    let helper = graph.all("banger-helper").len();
    assert!(helper < 40, "banger-helper stands on {helper} crates");
}

/// All Rust sources of the project, by their path in the checkout.
fn sources() -> Vec<(String, String)> {
    let mut files = Vec::new();
    collect(&root().join("crates"), "rs", &mut files);
    collect(&root().join("xtask"), "rs", &mut files);
    files
}

fn collect(folder: &Path, extension: &str, files: &mut Vec<(String, String)>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            collect(&path, extension, files);
        } else if path.extension().is_some_and(|found| found == extension) {
            let name = path.strip_prefix(root()).unwrap().display().to_string();
            files.push((name, std::fs::read_to_string(&path).unwrap()));
        }
    }
}

/// The part of a source before its tests.
fn without_tests(text: &str) -> &str {
    text.split("\n#[cfg(test)]\nmod tests")
        .next()
        .unwrap_or(text)
}

fn is_test(name: &str) -> bool {
    name.contains("/tests/") || name.contains("/examples/") || name.ends_with("/tests.rs")
}

#[test]
fn programs_are_started_in_few_places() {
    let allowed = [
        // Short commands, and what enters the namespace.
        "crates/banger-host/src/exec.rs",
        "crates/banger-host/src/net/keeper.rs",
        // `pasta`, held by a process that ends it with the namespace.
        "crates/banger-helper/src/way_out.rs",
        // The guest that shows whether KVM works.
        "crates/banger-host/src/probe/mod.rs",
        // The VMM, and the shim that starts it.
        "crates/banger-vmm/src/launch.rs",
        "crates/banger-vmm/src/shim",
        // mmdebstrap and its kin.
        "crates/banger-image/src/run.rs",
        // The daemon, systemctl and loginctl, and ssh.
        "crates/banger-cli/src/ensure_daemon",
        "crates/banger-cli/src/systemd.rs",
        "crates/banger-cli/src/commands/vm/ssh.rs",
        // What the guest's image is made of.
        "crates/banger-guest/src/",
        // Not shipped.
        "crates/banger-testkit/",
        "crates/banger-testhost/src/run.rs",
        "xtask/src/command.rs",
    ];
    let wrong = sources()
        .into_iter()
        .filter(|(name, _)| !is_test(name) && !allowed.iter().any(|place| name.starts_with(place)))
        .filter(|(_, text)| without_tests(text).contains(concat!("Command", "::new(")))
        // clap has a type of that name.
        .filter(|(_, text)| {
            text.contains(concat!("process::", "Command")) || text.contains("process::{")
        })
        .map(|(name, _)| name)
        .collect();
    assert_none(wrong, "starts a program, outside of the places that may");
}

#[test]
fn only_the_store_speaks_sql() {
    let wrong = sources()
        .into_iter()
        .filter(|(name, _)| {
            !name.starts_with("crates/banger-daemon/src/store") && !name.starts_with("xtask/tests/")
        })
        .filter(|(name, text)| !is_test(name) && without_tests(text).contains("rusqlite"))
        .map(|(name, _)| name)
        .collect();
    assert_none(wrong, "names rusqlite outside of the daemon's store");
}

#[test]
fn unsafe_code_is_argued_for() {
    let wrong = sources()
        .into_iter()
        .filter(|(name, _)| !name.starts_with("xtask/tests/"))
        .filter(|(_, text)| text.contains("unsafe {") && !text.contains("SAFETY:"))
        .map(|(name, _)| name)
        .collect();
    assert_none(wrong, "has an unsafe block without a SAFETY comment");
}

/// Packages and crates come from where the machine is set up to take them from.
#[test]
fn no_file_names_a_package_host() {
    let mut files = sources();
    for extension in ["toml", "md", "sh", "json", "nft", "apt"] {
        collect(&root().join("crates"), extension, &mut files);
    }
    for name in [
        "Cargo.toml",
        "Makefile",
        "deny.toml",
        "README.md",
        ".ci/run",
    ] {
        if let Ok(text) = std::fs::read_to_string(root().join(name)) {
            files.push((name.to_owned(), text));
        }
    }
    let hosts = [
        concat!("deb.", "debian.org"),
        concat!("security.", "debian.org"),
        concat!("archive.", "ubuntu.com"),
        concat!("static.", "crates.io"),
        concat!("index.", "crates.io"),
        concat!("registry.", "npmjs.org"),
        concat!("pypi", ".org"),
        concat!("docker", ".io"),
    ];
    // A package of Debian's has this name.
    let package = concat!("\"docker", ".io\",");
    let wrong = files
        .iter()
        .flat_map(|(name, text)| {
            let text = text.replace(package, "");
            let named = hosts.iter().filter(move |host| text.contains(**host));
            named.map(move |host| format!("{name}: {host}"))
        })
        .collect();
    assert_none(wrong, "names a package host");
}

/// Tables aside, which cannot be broken.
#[test]
fn no_comment_is_wider_than_120_columns() {
    let is_comment = |line: &str| {
        let comment = line.trim_start();
        comment.starts_with("//") && !comment.trim_start_matches(['/', '!', ' ']).starts_with('|')
    };
    let too_wide = |line: &&str| line.chars().count() > 120;
    let mut wrong = Vec::new();
    for (name, text) in sources() {
        let lines = text.lines().filter(|line| is_comment(line));
        wrong.extend(lines.filter(too_wide).map(|line| format!("{name}: {line}")));
    }
    assert_none(wrong, "is wider than 120 columns");
}
