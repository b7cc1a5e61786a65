//! What a daemon's world has on the host, from the kernel's own view.

use serde_json::Value;
use std::collections::BTreeSet;
use std::fs::File;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};

/// A process that has to do with a folder.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Process {
    /// The file name of its program.
    pub program: String,
    /// Its id.
    pub pid: i32,
}

/// All that belongs to one world. Equal snapshots mean that nothing came and nothing stayed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Host {
    /// Processes that name the world's folder or have something in it open.
    pub processes: Vec<Process>,
    /// Network links of the host, by name.
    pub links: Vec<String>,
    /// Addresses of the host in the world's pool.
    pub addresses: Vec<String>,
    /// Routes of the host that lead into the pool.
    pub routes: Vec<String>,
    /// Network namespaces of the processes, other than the calling thread's, which plays the host.
    pub namespaces: BTreeSet<String>,
    /// Mounts below the world's folder.
    pub mounts: Vec<String>,
}

impl Host {
    /// Looks. `pool` is the base of the world's /20, `veth` the name of its link if it has one.
    ///
    /// # Panics
    /// `ip` or `/proc` cannot be read.
    pub fn look(folder: &Path, pool: Ipv4Addr, veth: Option<&str>) -> Self {
        let processes = processes(folder);
        let own = std::fs::read_link("/proc/thread-self/ns/net").ok();
        let namespaces = processes
            .iter()
            .filter_map(|process| network_namespace(process.pid))
            .filter(|namespace| Some(namespace) != own.as_ref())
            .map(|namespace| namespace.display().to_string())
            .collect();
        let in_pool = |address: &str| {
            let address = address.split('/').next().unwrap_or_default();
            address
                .parse::<Ipv4Addr>()
                .is_ok_and(|address| address.to_bits() >> 12 == pool.to_bits() >> 12)
        };
        let mut host = Self {
            processes,
            namespaces,
            mounts: mounts(folder),
            ..Self::default()
        };
        for link in ip(None, &["address", "show"]) {
            let name = link["ifname"].as_str().unwrap_or_default().to_owned();
            let addresses: Vec<String> = link["addr_info"]
                .as_array()
                .into_iter()
                .flatten()
                .filter_map(|info| info["local"].as_str())
                .filter(|address| in_pool(address))
                .map(str::to_owned)
                .collect();
            if veth == Some(name.as_str()) || !addresses.is_empty() {
                host.links.push(name);
            }
            host.addresses.extend(addresses);
        }
        for route in ip(None, &["route", "show", "table", "all"]) {
            let to = route["dst"].as_str().unwrap_or_default();
            let via = route["dev"].as_str();
            if in_pool(to) || (veth.is_some() && via == veth) {
                host.routes.push(to.to_owned());
            }
        }
        host
    }

    /// Whether there is nothing else but mounts.
    pub fn is_only_mounts(&self) -> bool {
        let without = Self {
            mounts: Vec::new(),
            ..self.clone()
        };
        without == Self::default()
    }

    /// Holds open the network namespaces of the processes.
    pub fn hold_namespaces(&self) -> Vec<HeldNamespace> {
        let own = std::fs::read_link("/proc/thread-self/ns/net").ok();
        let held = self.processes.iter().filter_map(|process| {
            let open = File::open(format!("/proc/{}/ns/net", process.pid)).ok()?;
            let name = network_namespace(process.pid)?;
            (Some(&name) != own.as_ref()).then_some(HeldNamespace { name, _open: open })
        });
        held.collect()
    }

    /// The processes that run `program`.
    pub fn running(&self, program: &str) -> Vec<i32> {
        self.processes
            .iter()
            .filter(|process| process.program == program)
            .map(|process| process.pid)
            .collect()
    }
}

/// The ports (TAPs) in the network namespace of process `keeper`.
///
/// # Panics
/// `ip` cannot be run there.
pub fn taps(keeper: i32) -> Vec<String> {
    ip(Some(keeper), &["link", "show"])
        .iter()
        .filter_map(|link| link["ifname"].as_str())
        .filter(|name| name.starts_with("bt"))
        .map(str::to_owned)
        .collect()
}

/// A network namespace that the test holds open, so that its number is not given to another one.
#[derive(Debug)]
pub struct HeldNamespace {
    /// `net:[…]`.
    pub name: PathBuf,
    _open: File,
}

impl HeldNamespace {
    /// Whether any process of another program is in, or holds open, or anything is mounted on it.
    pub fn is_used(&self) -> bool {
        let mounted = std::fs::read_to_string("/proc/thread-self/mountinfo").unwrap_or_default();
        mounted.contains(&self.name.display().to_string())
            || others().into_iter().any(|pid| {
                network_namespace(pid).as_ref() == Some(&self.name)
                    || descriptors(pid).contains(&self.name)
            })
    }
}

/// The processes that have `file` open.
pub fn openers(file: &Path) -> Vec<i32> {
    let mut pids = others();
    pids.retain(|pid| descriptors(*pid).iter().any(|target| target == file));
    pids
}

/// Where every thread of every process that belongs to `folder` waits in the kernel, one a line.
pub fn threads(folder: &Path) -> String {
    let mut text = String::new();
    for process in processes(folder) {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", process.pid));
        for task in tasks.into_iter().flatten().flatten() {
            let read = |name: &str| {
                let line = std::fs::read_to_string(task.path().join(name)).unwrap_or_default();
                line.trim().to_owned()
            };
            let (comm, wchan, syscall) = (read("comm"), read("wchan"), read("syscall"));
            text += &format!(
                "{} {} {comm}: {wchan} {syscall}\n",
                process.program,
                task.file_name().display()
            );
        }
    }
    text
}

fn ip(namespace_of: Option<i32>, args: &[&str]) -> Vec<Value> {
    let mut words: Vec<String> = Vec::new();
    if let Some(pid) = namespace_of {
        words.extend([
            "nsenter".to_owned(),
            format!("--net=/proc/{pid}/ns/net"),
            "--".to_owned(),
        ]);
    }
    words.extend(["ip".to_owned(), "-j".to_owned(), "-4".to_owned()]);
    if namespace_of.is_some() {
        words.retain(|word| word != "-4");
    }
    words.extend(args.iter().map(|arg| (*arg).to_owned()));
    #[expect(clippy::disallowed_methods, reason = "asks the kernel in a test")]
    let output = std::process::Command::new(&words[0])
        .args(&words[1..])
        .output()
        .unwrap_or_else(|error| panic!("cannot run `{}`: {error}", words[0]));
    assert!(
        output.status.success(),
        "{words:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    serde_json::from_slice(&output.stdout).unwrap_or_default()
}

/// All processes but this one, and but children of any thread of it that are about to become another program: until
/// then they have copies of all that this one has open, which is other worlds' as well.
fn others() -> Vec<i32> {
    let program = |pid: &str| std::fs::read_link(format!("/proc/{pid}/exe")).ok();
    let own = program("self");
    // The program changes first, then the copies are closed, and only then is there a command line.
    let is_another = |pid: &String| {
        program(pid) != own
            && std::fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|line| !line.is_empty())
    };
    std::fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(is_another)
        .filter_map(|pid| pid.parse().ok())
        .collect()
}

fn network_namespace(pid: i32) -> Option<PathBuf> {
    std::fs::read_link(format!("/proc/{pid}/ns/net")).ok()
}

fn descriptors(pid: i32) -> Vec<PathBuf> {
    std::fs::read_dir(format!("/proc/{pid}/fd"))
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| std::fs::read_link(entry.path()).ok())
        .collect()
}

fn processes(folder: &Path) -> Vec<Process> {
    let text = folder.display().to_string();
    let mut found: Vec<Process> = others()
        .into_iter()
        .filter(|&pid| belongs(pid, folder, &text))
        .filter_map(|pid| {
            let program = std::fs::read_link(format!("/proc/{pid}/exe")).ok()?;
            let program = program.file_name()?.to_string_lossy().into_owned();
            Some(Process { program, pid })
        })
        .collect();
    found.sort();
    found
}

/// Whether a process names the folder in its command line or environment, or has something in it open.
fn belongs(pid: i32, folder: &Path, text: &str) -> bool {
    let named = |file: &str| {
        std::fs::read(format!("/proc/{pid}/{file}"))
            .is_ok_and(|bytes| String::from_utf8_lossy(&bytes).contains(text))
    };
    let inside = |link: &str| {
        std::fs::read_link(format!("/proc/{pid}/{link}")).is_ok_and(|path| path.starts_with(folder))
    };
    named("cmdline")
        || named("environ")
        || inside("cwd")
        || inside("exe")
        || descriptors(pid).iter().any(|path| path.starts_with(folder))
}

fn mounts(folder: &Path) -> Vec<String> {
    let text = std::fs::read_to_string("/proc/thread-self/mountinfo").unwrap_or_default();
    text.lines()
        .filter_map(|line| line.split(' ').nth(4))
        .filter(|point| Path::new(point).starts_with(folder))
        .map(str::to_owned)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, Ordering};

    #[test]
    fn children_that_are_about_to_become_another_program_belong_to_no_world() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("open");
        std::fs::write(&file, "").unwrap();
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    while !over.load(Ordering::Relaxed) {
                        let _open = File::open(&file).unwrap();
                        #[expect(clippy::disallowed_methods, reason = "a child, whatever it is")]
                        let ended = std::process::Command::new("true").status();
                        assert!(ended.unwrap().success());
                    }
                });
            }
            let seen: Vec<_> = (0..40)
                .flat_map(|_| (processes(folder.path()), openers(&file)).0)
                .collect();
            over.store(true, Ordering::Relaxed);
            assert_eq!(seen, []);
        });
    }
}
