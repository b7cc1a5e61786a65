//! `fake-firecracker`: a small real program that stands for Firecracker in tests of the shim.
//!
//! It takes Firecracker's arguments and configuration, answers its API, writes a log and metrics as Firecracker does
//! (without ever blocking), and plays the guest's agent, which says ready and nothing else. A file
//! `fake-firecracker.script` in its working folder, one JSON object, may hold:
//!
//! | key | what it does |
//! | --- | --- |
//! | `flood_metrics_bytes` | so many bytes of metrics at once, before the API answers |

use banger_guest::agent_protocol::{FromGuest, VSOCK_PORT};
use serde_json::Value;
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::ExitCode;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if args.first().map(String::as_str) == Some("--version") {
        println!("Firecracker v1.12.0");
        return ExitCode::SUCCESS;
    }
    let option = |name: &str| {
        args.windows(2)
            .find(|pair| pair[0] == name)
            .map(|pair| pair[1].as_str())
    };
    let (Some(config), Some(api)) = (option("--config-file"), option("--api-sock")) else {
        eprintln!("fake-firecracker: --version, or --config-file and --api-sock");
        return ExitCode::FAILURE;
    };
    let config = json(config).expect("the configuration is there");
    let script = json("fake-firecracker.script").unwrap_or_default();
    let mut log = open(option("--log-path").expect("there is a log"));
    let mut metrics = open(
        config["metrics"]["metrics_path"]
            .as_str()
            .expect("metrics are on"),
    );
    let listener = UnixListener::bind(api).expect("the socket's folder is the working folder");
    println!("Linux version 0.0.0 (banger fake)");
    let _ = writeln!(log, "fake-firecracker: its log");
    let line = [&[b'x'; 99][..], b"\n"].concat();
    for _ in 0..script["flood_metrics_bytes"].as_u64().unwrap_or(0) / 100 {
        // What finds the pipe full is lost.
        let _ = metrics.write(&line);
    }
    let vsock = config["vsock"]["uds_path"].as_str().expect("there is one");
    let agent = UnixStream::connect(format!("{vsock}_{VSOCK_PORT}"));
    if let Ok(mut agent) = agent.as_ref() {
        let ready = serde_json::to_string(&FromGuest::Ready).expect("messages are plain JSON");
        let _ = writeln!(agent, "{ready}");
    }
    for stream in listener.incoming().flatten() {
        let answered = answer(&stream, &mut metrics);
        if matches!(answered, Some(true)) {
            break;
        }
    }
    ExitCode::SUCCESS
}

fn json(path: &str) -> Option<Value> {
    serde_json::from_slice(&std::fs::read(path).ok()?).ok()
}

/// As Firecracker opens what it writes to.
fn open(path: &str) -> File {
    File::options()
        .create(true)
        .truncate(false)
        .read(true)
        .write(true)
        .custom_flags(rustix::fs::OFlags::NONBLOCK.bits() as i32)
        .open(path)
        .expect("it can be opened")
}

/// Answers one request. Tells whether it was the button.
fn answer(mut stream: &UnixStream, metrics: &mut File) -> Option<bool> {
    let mut input = BufReader::new(stream);
    let mut length = 0;
    loop {
        let mut line = String::new();
        input.read_line(&mut line).ok()?;
        if let Some(value) = line.strip_prefix("Content-Length: ") {
            length = value.trim().parse().ok()?;
        }
        if line.trim().is_empty() {
            break;
        }
    }
    let mut body = vec![0; length];
    input.read_exact(&mut body).ok()?;
    let action = serde_json::from_slice::<Value>(&body).unwrap_or_default();
    let action = action["action_type"].as_str().unwrap_or_default();
    if action == "FlushMetrics" {
        let _ = writeln!(metrics, r#"{{"flushed":true}}"#);
    }
    let _ = stream.write_all(b"HTTP/1.1 204 \r\nServer: Firecracker API\r\n\r\n");
    Some(action == "SendCtrlAltDel")
}
