//! `fake-vmm`: a small real program that stands for QEMU in tests.
//!
//! It takes QEMU's arguments, opens the drives, listens for QMP and for the agent's port, prints a console, and plays
//! the guest's agent. A file `fake-vmm.script` in its working folder, or in the folder `share/qemu` of its prefix,
//! makes it misbehave: one JSON object with any of
//!
//! | key | what it does |
//! | --- | --- |
//! | `exit_before_qmp` | `{"code": 1, "stderr": "text"}`: print and exit at once |
//! | `no_qmp` | never listen for QMP |
//! | `never_ready` | the agent speaks, but never says ready |
//! | `no_agent` | there is no agent |
//! | `ignore_powerdown` | neither the button nor the agent's poweroff does anything |
//! | `on_go` | what happens once there is a file `go` in the working folder: `die` (exit with code 1), `disk_full` (stop as QEMU does), or what a guest does by itself: `poweroff`, `reboot`, `panic` |
//! | `flood_console_bytes` | so many bytes on the console |
//! | `flood_agent_lines` | so many lines of rubbish from the agent |
//! | `count_every_ms` | numbered lines on the console, one in so many milliseconds |
//! | `try` | `[["read", "/etc/passwd"], …]`: try such things and print what came of each; see `attempt` |
//! | `ready_after_ms` | the agent takes its time |
//! | `port_told_late` | that the agent's port is open is told once more, in the middle of the line that says ready |

use banger_guest::agent_protocol::{FromGuest, GuestEnd, GuestStage, ToGuest};
use serde_json::{Value, json};
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// QEMU ends on SIGTERM by a handler of its own. Without one, the first process of a pid namespace is spared.
#[expect(
    unsafe_code,
    reason = "there is no safe call that handles a signal without a library"
)]
fn end_on_sigterm() {
    unsafe extern "C" {
        safe fn signal(number: i32, handler: extern "C" fn(i32)) -> usize;
        safe fn _exit(code: i32) -> !;
    }
    extern "C" fn end(_: i32) {
        _exit(0);
    }
    signal(rustix::process::Signal::TERM.as_raw(), end);
}

fn main() -> ExitCode {
    end_on_sigterm();
    let args: Vec<String> = std::env::args().skip(1).collect();
    if args
        .iter()
        .any(|arg| arg == "--version" || arg == "-version")
    {
        println!("QEMU emulator version 10.0.2 (banger fake)");
        return ExitCode::SUCCESS;
    }
    let script = read_script();
    if let Some(end) = script.get("exit_before_qmp") {
        eprintln!("{}", end["stderr"].as_str().unwrap_or_default());
        return ExitCode::from(end["code"].as_u64().unwrap_or(1) as u8);
    }
    let drives = match open_drives(&args) {
        Ok(drives) => drives,
        Err(error) => {
            eprintln!("fake-vmm: -drive: Could not open {error}");
            return ExitCode::FAILURE;
        }
    };
    let machine = Arc::new(Machine {
        script,
        started: Instant::now(),
        state: Mutex::new(State::default()),
        _drives: drives,
    });
    machine.print("Linux version 0.0.0 (banger fake)");
    if let Some(path) = socket_path(&args, "-chardev", "path=") {
        let listener = listen(&path);
        let machine = Arc::clone(&machine);
        thread::spawn(move || machine.serve_agent(&listener));
    }
    if !machine.flag("no_qmp")
        && let Some(path) = socket_path(&args, "-qmp", "unix:")
    {
        let listener = listen(&path);
        let machine = Arc::clone(&machine);
        thread::spawn(move || machine.serve_qmp(&listener));
    }
    machine.follow_script();
    loop {
        thread::park();
    }
}

fn read_script() -> Value {
    let shared = std::env::args_os().next().and_then(|program| {
        let prefix = Path::new(&program).parent()?.parent()?;
        Some(prefix.join("share/qemu/fake-vmm.script"))
    });
    [Some(PathBuf::from("fake-vmm.script")), shared]
        .into_iter()
        .flatten()
        .find_map(|path| std::fs::read(path).ok())
        .map_or(Value::Null, |bytes| {
            serde_json::from_slice(&bytes).expect("the script of a test is JSON")
        })
}

/// What a program that a guest has taken over might try.
fn attempt(what: &str, on: &str) -> std::io::Result<()> {
    match what {
        "read" => std::fs::read(on).map(drop),
        "write" => File::options().write(true).open(on).map(drop),
        "list" => std::fs::read_dir(on).map(drop),
        "make" => File::create_new(on).map(drop),
        "link" => std::os::unix::fs::symlink("/etc/passwd", on),
        "socket" => UnixListener::bind(on).map(drop),
        "signal" => {
            let pid = on.parse().ok().and_then(rustix::process::Pid::from_raw);
            let pid = pid.ok_or(std::io::ErrorKind::InvalidInput)?;
            Ok(rustix::process::test_kill_process(pid)?)
        }
        "connect" => std::net::TcpStream::connect(on).map(drop),
        _ => Err(std::io::ErrorKind::Unsupported.into()),
    }
}

/// The parts of a comma-separated option; a doubled comma stands for one.
fn parts(option: &str) -> Vec<String> {
    option
        .replace(",,", "\0")
        .split(',')
        .map(|part| part.replace('\0', ","))
        .collect()
}

fn options<'a>(args: &'a [String], name: &'a str) -> impl Iterator<Item = Vec<String>> + 'a {
    args.windows(2)
        .filter(move |pair| pair[0] == name)
        .map(|pair| parts(&pair[1]))
}

fn socket_path(args: &[String], option: &str, prefix: &str) -> Option<PathBuf> {
    options(args, option)
        .flatten()
        .find_map(|part| part.strip_prefix(prefix).map(PathBuf::from))
}

fn open_drives(args: &[String]) -> Result<Vec<File>, String> {
    options(args, "-drive")
        .map(|parts| {
            let path = parts
                .iter()
                .find_map(|part| part.strip_prefix("file="))
                .ok_or("a drive without a file")?;
            let writable = !parts.iter().any(|part| part == "readonly=on");
            File::options()
                .read(true)
                .write(writable)
                .open(path)
                .map_err(|error| format!("'{path}': {error}"))
        })
        .collect()
}

fn listen(path: &Path) -> UnixListener {
    let _ = std::fs::remove_file(path);
    UnixListener::bind(path).expect("the socket's folder is the working folder")
}

#[derive(Default)]
struct State {
    paused: bool,
    qmp: Vec<UnixStream>,
    agent: Option<UnixStream>,
    /// Events that came before anyone listened.
    agent_open: bool,
}

struct Machine {
    script: Value,
    started: Instant,
    state: Mutex<State>,
    _drives: Vec<File>,
}

type Action = fn(&Machine);

impl Machine {
    fn flag(&self, key: &str) -> bool {
        self.script.get(key).and_then(Value::as_bool) == Some(true)
    }

    fn number(&self, key: &str) -> Option<u64> {
        self.script.get(key).and_then(Value::as_u64)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn uptime_ms(&self) -> u64 {
        self.started.elapsed().as_millis() as u64
    }

    /// Prints a line as a guest's serial console does.
    fn print(&self, line: &str) {
        let _ = write!(std::io::stdout().lock(), "{line}\r\n");
    }

    fn emit(&self, event: &str, data: &Value) {
        let mut state = self.state();
        if event == "VSERPORT_CHANGE" {
            state.agent_open = data["open"] == true;
        }
        let line = json!({
            "timestamp": { "seconds": 0, "microseconds": 0 }, "event": event, "data": data,
        });
        for client in &mut state.qmp {
            let _ = writeln!(client, "{line}");
        }
    }

    fn say(&self, message: &FromGuest) {
        let line = serde_json::to_string(message).expect("messages are plain JSON");
        if let Some(agent) = &mut self.state().agent {
            let _ = writeln!(agent, "{line}");
        }
    }

    fn say_while_the_port_is_told(&self, message: &FromGuest) {
        const TO_BE_HEARD: Duration = Duration::from_millis(50);
        let line = serde_json::to_string(message).expect("messages are plain JSON");
        let (begin, rest) = line.split_at(line.len() / 2);
        let say = |text: &str| {
            if let Some(agent) = &mut self.state().agent {
                let _ = agent.write_all(text.as_bytes());
            }
            thread::sleep(TO_BE_HEARD);
        };
        say(begin);
        self.emit("VSERPORT_CHANGE", &json!({ "open": true, "id": "agent" }));
        thread::sleep(TO_BE_HEARD);
        say(rest);
        say("\n");
    }

    fn stage(&self, stage: GuestStage) {
        let uptime_ms = self.uptime_ms();
        self.say(&FromGuest::Stage { stage, uptime_ms });
    }

    /// The guest ends by itself, or because it was asked to.
    fn end(&self, end: GuestEnd) -> ! {
        self.say(&FromGuest::Bye { end });
        let (last_word, reason) = match end {
            GuestEnd::Reboot => ("reboot: Restarting system", "guest-reset"),
            _ => ("reboot: Power down", "guest-shutdown"),
        };
        self.print(&format!("[    1.000000] {last_word}"));
        self.emit("SHUTDOWN", &json!({ "guest": true, "reason": reason }));
        std::process::exit(0);
    }

    fn asked_to_power_off(&self) {
        if !self.flag("ignore_powerdown") {
            self.end(GuestEnd::Poweroff);
        }
    }

    fn follow_script(self: &Arc<Self>) {
        for tried in self.script["try"].as_array().into_iter().flatten() {
            let what = tried[0].as_str().unwrap_or_default();
            let on = tried[1].as_str().unwrap_or_default();
            let outcome =
                attempt(what, on).map_or_else(|error| error.to_string(), |()| "done".into());
            self.print(&format!("tried to {what} {on}: {outcome}"));
        }
        let actions: [(&str, Action); 5] = [
            ("die", |_| std::process::exit(1)),
            ("poweroff", |machine| {
                machine.end(GuestEnd::Poweroff);
            }),
            ("reboot", |machine| machine.end(GuestEnd::Reboot)),
            ("panic", |machine| {
                machine.print("[    1.000000] Kernel panic - not syncing: fake");
                machine.emit(
                    "SHUTDOWN",
                    &json!({ "guest": true, "reason": "guest-reset" }),
                );
                std::process::exit(0);
            }),
            ("disk_full", |machine| {
                let data = json!({ "device": "drive3", "nospace": true, "action": "stop" });
                machine.emit("BLOCK_IO_ERROR", &data);
                machine.state().paused = true;
                machine.emit("STOP", &json!({}));
            }),
        ];
        for (key, action) in actions {
            if self.script["on_go"] == key {
                let machine = Arc::clone(self);
                thread::spawn(move || {
                    while !Path::new("go").exists() {
                        thread::sleep(Duration::from_millis(2));
                    }
                    action(&machine);
                });
            }
        }
        if let Some(every) = self.number("count_every_ms") {
            self.count(Duration::from_millis(every));
        }
        if let Some(bytes) = self.number("flood_console_bytes") {
            let machine = Arc::clone(self);
            thread::spawn(move || {
                let line = "x".repeat(98);
                for _ in 0..bytes / 100 {
                    machine.print(&line);
                }
                machine.print("the flood is over");
            });
        }
    }

    fn count(self: &Arc<Self>, every: Duration) {
        let machine = Arc::clone(self);
        thread::spawn(move || {
            for number in 1_u64.. {
                machine.print(&format!("line {number}"));
                thread::sleep(every);
            }
        });
    }

    fn serve_qmp(self: &Arc<Self>, listener: &UnixListener) {
        for mut stream in listener.incoming().flatten() {
            let machine = Arc::clone(self);
            thread::spawn(move || {
                let greeting = json!({ "QMP": {
                    "version": { "qemu": { "major": 10, "minor": 0, "micro": 2 } },
                    "capabilities": [],
                } });
                let Ok(mut input) = stream.try_clone().map(BufReader::new) else {
                    return;
                };
                let _ = writeln!(stream, "{greeting}");
                let mut line = String::new();
                while input.read_line(&mut line).is_ok_and(|length| length > 0) {
                    machine.obey(&mut stream, &line);
                    line.clear();
                }
            });
        }
    }

    fn obey(&self, stream: &mut UnixStream, line: &str) {
        let Ok(command) = serde_json::from_str::<Value>(line) else {
            let _ = writeln!(
                stream,
                r#"{{"error":{{"class":"GenericError","desc":"no JSON"}}}}"#
            );
            return;
        };
        let id = command["id"].clone();
        let answer = |stream: &mut UnixStream, value: Value| {
            let _ = writeln!(stream, "{}", json!({ "return": value, "id": id }));
        };
        match command["execute"].as_str().unwrap_or_default() {
            "qmp_capabilities" => {
                answer(stream, json!({}));
                let open = {
                    let mut state = self.state();
                    state.qmp.extend(stream.try_clone());
                    state.agent_open
                };
                if open {
                    self.emit("VSERPORT_CHANGE", &json!({ "open": true, "id": "agent" }));
                }
            }
            "query-status" => {
                let paused = self.state().paused;
                let status = if paused { "paused" } else { "running" };
                answer(stream, json!({ "running": !paused, "status": status }));
            }
            "stop" => {
                self.state().paused = true;
                self.emit("STOP", &json!({}));
                answer(stream, json!({}));
            }
            "cont" => {
                self.state().paused = false;
                self.emit("RESUME", &json!({}));
                answer(stream, json!({}));
            }
            "system_powerdown" => {
                answer(stream, json!({}));
                self.emit("POWERDOWN", &json!({}));
                self.print("the button was pressed");
                self.asked_to_power_off();
            }
            "quit" => {
                answer(stream, json!({}));
                let data = json!({ "guest": false, "reason": "host-qmp-quit" });
                self.emit("SHUTDOWN", &data);
                std::process::exit(0);
            }
            other => {
                let error = json!({
                    "error": { "class": "CommandNotFound", "desc": format!("no command {other}") },
                    "id": id,
                });
                let _ = writeln!(stream, "{error}");
            }
        }
    }

    fn serve_agent(self: &Arc<Self>, listener: &UnixListener) {
        for stream in listener.incoming().flatten() {
            if self.flag("no_agent") {
                self.state().agent = Some(stream);
                continue;
            }
            let Ok(input) = stream.try_clone().map(BufReader::new) else {
                continue;
            };
            self.state().agent = Some(stream);
            self.emit("VSERPORT_CHANGE", &json!({ "open": true, "id": "agent" }));
            let machine = Arc::clone(self);
            thread::spawn(move || machine.speak());
            for line in input.lines().map_while(Result::ok) {
                match serde_json::from_str(&line) {
                    Ok(ToGuest::Poweroff) => {
                        self.print("the agent was asked to power off");
                        self.asked_to_power_off();
                    }
                    Ok(ToGuest::SetClock { .. }) => self.print("the clock was set"),
                    Ok(ToGuest::Ping) => self.say(&FromGuest::Pong),
                    Err(error) => self.print(&format!("the agent was told rubbish: {error}")),
                }
            }
        }
    }

    /// What an agent says of itself.
    fn speak(&self) {
        if let Some(delay) = self.number("ready_after_ms") {
            thread::sleep(Duration::from_millis(delay));
        }
        self.stage(GuestStage::Init);
        self.stage(GuestStage::ImageInit);
        for _ in 0..self.number("flood_agent_lines").unwrap_or(0) {
            if let Some(agent) = &mut self.state().agent {
                let _ = agent.write_all(b"{\"type\":\"rubbish\"}\n\xff\xfe\n");
            }
            self.say(&FromGuest::Warning {
                text: "\u{1b}[31mwarning".to_owned(),
            });
        }
        self.stage(GuestStage::Agent);
        self.stage(GuestStage::Ssh);
        if !self.flag("never_ready") {
            if self.flag("port_told_late") {
                self.say_while_the_port_is_told(&FromGuest::Ready);
            } else {
                self.say(&FromGuest::Ready);
            }
            self.print("fake login:");
        }
    }
}
