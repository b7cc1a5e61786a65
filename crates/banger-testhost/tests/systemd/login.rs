//! An ordinary user who is logged in.

use super::host::{LIMIT, command, eventually, journal, root, state};
use serde_json::Value;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Stdio};

/// Their name.
pub(crate) const USER: &str = "otter";
/// Makes a small VM and waits for it.
pub(crate) const CREATE: &str = "banger vm create --image tiny --memory 256 --vcpu 1 --wait";
/// What ends the answer to a line, before its exit code.
const END: &str = "@end-of-line ";

/// A login session with a shell in it. Logs out when it goes.
pub(crate) struct Login {
    shell: Child,
    lines: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
}

/// What a line wrote, and its exit code.
#[derive(Debug)]
pub(crate) struct Said {
    pub(crate) status: i32,
    pub(crate) stdout: String,
}

impl Login {
    /// Logs in as somebody does at a terminal: by PAM, so that logind opens a session and starts the user's systemd.
    pub(crate) fn new() -> Self {
        let mut shell = command("systemd-run")
            .args(["--quiet", "--pipe", "--wait", "--collect"])
            .args(["--property=PAMName=login", "--property=User=otter"])
            .args(["--property=StandardError=journal", "bash", "--login"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut login = Self {
            lines: shell.stdin.take(),
            answers: BufReader::new(shell.stdout.take().unwrap()),
            shell,
        };
        let runtime = login.run("cd; echo $XDG_RUNTIME_DIR");
        assert!(
            runtime.stdout.starts_with("/run/user/"),
            "no session: {runtime:?}\n{}",
            journal()
        );
        eventually("the user's systemd runs", || {
            (state(&manager()) == "active").then_some(())
        });
        login
    }

    /// Runs a shell's line in the session.
    #[track_caller]
    pub(crate) fn run(&mut self, line: &str) -> Said {
        let lines = self.lines.as_mut().unwrap();
        writeln!(
            lines,
            "{{ {line}\n}} < /dev/null 2> /tmp/otter.stderr; status=$?; echo; echo {END}$status"
        )
        .unwrap();
        let mut stdout = String::new();
        loop {
            let mut answer = String::new();
            let count = self.answers.read_line(&mut answer).unwrap();
            assert!(count > 0, "the shell ended at `{line}`\n{}", journal());
            if let Some(status) = answer.strip_prefix(END) {
                let status = status.trim().parse().unwrap();
                stdout.pop();
                return Said { status, stdout };
            }
            stdout.push_str(&answer);
        }
    }

    /// As [`Login::run`], of what must succeed. Gives its standard output.
    #[track_caller]
    pub(crate) fn ok(&mut self, line: &str) -> String {
        let said = self.run(&format!("timeout {} {line}", LIMIT.as_secs()));
        assert_eq!(
            said.status,
            0,
            "`{line}` failed: {}\n{}\n{}\n{}",
            said.stdout,
            root("cat /tmp/otter.stderr"),
            self.run("banger daemon logs -n 30").stdout,
            journal()
        );
        said.stdout
    }

    /// What banger answers with `--json`.
    #[track_caller]
    pub(crate) fn json(&mut self, line: &str) -> Value {
        serde_json::from_str(&self.ok(&format!("{line} --json"))).unwrap()
    }

    /// The VM as it is now.
    #[track_caller]
    pub(crate) fn vm(&mut self, name: &str) -> Value {
        self.json(&format!("banger vm show {name}"))
    }

    /// A small VM of the tests' image that is ready.
    #[track_caller]
    pub(crate) fn create(&mut self, name: &str, options: &str) -> Value {
        self.has_images();
        self.ok(&format!("{CREATE} --name {name} {options}"));
        self.vm(name)
    }

    /// Runs a command in the guest, which must succeed there.
    #[track_caller]
    pub(crate) fn ssh(&mut self, name: &str, guest_command: &str) -> String {
        self.ok(&format!("banger vm ssh {name} -- '{guest_command}'"))
    }

    /// Gives the user the tests' image and kernel, if there are none.
    pub(crate) fn has_images(&mut self) {
        let data = "~/.local/share/banger";
        self.ok(&format!(
            "sh -c '[ -e {data}/images ] || {{ mkdir -p {data} && cp -r /mnt/fixtures/banger/. {data}; }}'"
        ));
    }

    /// Ends the session.
    pub(crate) fn log_out(mut self) {
        self.end();
    }

    fn end(&mut self) {
        self.lines = None;
        self.shell.wait().unwrap();
    }
}

impl Drop for Login {
    fn drop(&mut self) {
        self.end();
    }
}

/// The unit of the user's systemd.
pub(crate) fn manager() -> String {
    format!("user@{}.service", root(&format!("id -u {USER}")).trim())
}
