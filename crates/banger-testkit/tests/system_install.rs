//! `banger driver install` with a daemon of the test's own and a server on loopback.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use banger_testkit::skip::skip;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::path::PathBuf;
use std::process::{Command, Output};

const FAKE: &str = env!("CARGO_BIN_EXE_fake-firecracker");

/// A daemon's folders; dropping it stops the daemon.
struct World {
    folder: tempfile::TempDir,
    banger: PathBuf,
}

impl World {
    fn make(test: &str) -> Option<Self> {
        let Some(libexec) = std::env::var_os("BANGER_LIBEXEC") else {
            skip(
                test,
                "BANGER_LIBEXEC is not set: `cargo xtask test` sets it",
            );
            return None;
        };
        Some(Self {
            folder: tempfile::tempdir().unwrap(),
            banger: PathBuf::from(libexec).join("banger"),
        })
    }

    fn run(&self, args: &[&str]) -> Output {
        #[expect(clippy::disallowed_methods, reason = "runs the program under test")]
        let mut command = Command::new(&self.banger);
        for (name, below) in [
            ("HOME", "home"),
            ("XDG_CONFIG_HOME", "config"),
            ("XDG_STATE_HOME", "state"),
            ("XDG_DATA_HOME", "data"),
            ("XDG_CACHE_HOME", "cache"),
            ("XDG_RUNTIME_DIR", "runtime"),
        ] {
            let path = self.folder.path().join(below);
            std::fs::create_dir_all(&path).unwrap();
            let private = std::os::unix::fs::PermissionsExt::from_mode(0o700);
            std::fs::set_permissions(&path, private).unwrap();
            command.env(name, path);
        }
        command.args(args).output().unwrap()
    }

    #[track_caller]
    fn refuse(&self, args: &[&str], why: &str) {
        let output = self.run(&[&["driver", "install"], args].concat());
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(9), "{said}");
        assert!(said.contains(why), "{said}");
        assert_eq!(self.installed(), Vec::<String>::new());
    }

    fn installed(&self) -> Vec<String> {
        std::fs::read_dir(self.folder.path().join("data/banger/drivers"))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect()
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.run(&["daemon", "stop"]);
    }
}

/// Serves the program at `/program`, and its first half at `/half`, to the end of the test.
fn serve() -> String {
    let program = std::fs::read(FAKE).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let mut request = Vec::new();
            let mut byte = [0];
            while !request.ends_with(b"\r\n\r\n") && stream.read(&mut byte).is_ok_and(|n| n == 1) {
                request.extend(byte);
            }
            let half = request.starts_with(b"GET /half");
            let sent = if half {
                program.len() / 2
            } else {
                program.len()
            };
            let head = format!(
                "HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
                program.len()
            );
            // A client that has heard enough closes, which is no fault.
            let _ = stream
                .write_all(head.as_bytes())
                .and_then(|()| stream.write_all(&program[..sent]));
        }
    });
    url
}

#[test]
#[ignore = "a system test: starts a daemon"]
fn firecracker_is_installed_from_a_file_and_not_from_what_is_wrong() {
    let Some(world) =
        World::make("firecracker_is_installed_from_a_file_and_not_from_what_is_wrong")
    else {
        return;
    };
    let base = serve();
    let wrong = "0".repeat(64);
    let (whole, half) = (format!("{base}/program"), format!("{base}/half"));
    world.refuse(&["--url", &whole, "--sha256", &wrong], "another checksum");
    world.refuse(&["--url", &half, "--sha256", &wrong], "cannot download");
    world.refuse(&["--from", FAKE, "--sha256", &wrong], "another checksum");
    world.refuse(&["--from", "/etc/hostname"], "neither a gzip");

    let output = world.run(&["driver", "install", "--from", FAKE]);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    assert!(said.contains("compared with no checksum"), "{said}");
    assert!(String::from_utf8_lossy(&output.stdout).contains("1.12.0"));
    assert_eq!(world.installed(), ["firecracker"]);
}
