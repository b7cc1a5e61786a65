//! A daemon for the tests of the command line: it keeps the protocol of starting and stopping, and answers a few
//! requests from fixed text. It ends by itself, whatever becomes of the test.
//!
//! `FAKE_BANGERD` makes it misbehave: `error`, `silent-exit`, `garbage`, `refuse`, and `slow`, which answers questions
//! but does nothing in time.

use banger_api::error::{ErrorBody, ErrorCode};
use banger_api::paths::{Paths, ProcessEnv};
use banger_api::version::{BUILD_HEADER, VERSION, VERSION_HEADER, build_id};
use std::fs::{File, OpenOptions};
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Duration;

/// How long it lives at most.
const LIFETIME: Duration = Duration::from_secs(60);

fn say(value: &serde_json::Value) {
    println!("{value}");
}

fn main() -> std::io::Result<()> {
    let misbehaviour = std::env::var("FAKE_BANGERD").unwrap_or_default();
    let paths = Paths::from_env(&ProcessEnv).map_err(std::io::Error::other)?;
    std::fs::create_dir_all(&paths.state)?;
    let mut starts = OpenOptions::new()
        .create(true)
        .append(true)
        .open(paths.state.join("starts"))?;
    writeln!(starts, "{}", std::process::id())?;
    match misbehaviour.as_str() {
        "error" => {
            let error = ErrorBody::new(ErrorCode::NewerSchema, "the database is newer")
                .hint("install a newer banger");
            say(&serde_json::json!({"error": error}));
            return Ok(());
        }
        "silent-exit" => {
            eprintln!("cannot find my \u{1b}[31mfeet");
            std::process::exit(4);
        }
        "garbage" => {
            println!("hello");
            std::thread::sleep(LIFETIME);
            return Ok(());
        }
        _ => {}
    }
    let lock = File::create(paths.daemon_lock())?;
    if lock.try_lock().is_err() {
        let error = ErrorBody::new(ErrorCode::Internal, "another daemon runs");
        say(&serde_json::json!({"error": error}));
        return Ok(());
    }
    let _ = std::fs::remove_file(paths.socket());
    let listener = UnixListener::bind(paths.socket())?;
    std::thread::spawn(|| {
        std::thread::sleep(LIFETIME);
        std::process::exit(0);
    });
    say(&serde_json::json!({"ready": true}));
    let refuses = misbehaviour == "refuse";
    let slow = misbehaviour == "slow";
    for stream in listener.incoming() {
        let paths = paths.clone();
        std::thread::spawn(move || serve(stream?, &paths, refuses, slow));
    }
    Ok(())
}

fn serve(stream: UnixStream, paths: &Paths, refuses: bool, slow: bool) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut request = String::new();
    reader.read_line(&mut request)?;
    let mut length = 0;
    loop {
        let mut header = String::new();
        reader.read_line(&mut header)?;
        let header = header.trim().to_ascii_lowercase();
        if header.is_empty() {
            break;
        }
        if let Some(value) = header.strip_prefix("content-length:") {
            length = value.trim().parse().unwrap_or(0);
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body)?;
    let mut requests = OpenOptions::new()
        .create(true)
        .append(true)
        .open(paths.state.join("requests"))?;
    writeln!(
        requests,
        "{}{}",
        request.trim_end(),
        String::from_utf8_lossy(&body)
    )?;

    let body = String::from_utf8_lossy(&body);
    let ends = request.contains("/v1/daemon/stop") && !body.contains("\"vms\":true");
    if slow && !request.starts_with("GET ") && !ends {
        std::thread::sleep(LIFETIME);
        return Ok(());
    }
    let (status, reply) = answer(&request, paths, refuses);
    let build = std::env::var("FAKE_BUILD")
        .or_else(|_| build_id(&std::env::current_exe()?))
        .unwrap_or_default();
    let mut stream = stream;
    write!(
        stream,
        "HTTP/1.1 {status} X\r\n{VERSION_HEADER}: {VERSION}\r\n{BUILD_HEADER}: {build}\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{reply}",
        reply.len()
    )?;
    if request.contains("/v1/daemon/stop") {
        let _ = std::fs::remove_file(paths.socket());
        std::process::exit(0);
    }
    Ok(())
}

fn answer(request: &str, paths: &Paths, refuses: bool) -> (u16, String) {
    let path = request.split(' ').nth(1).unwrap_or_default();
    let name = |text: &str| text.split(['/', '?']).nth(3).unwrap_or_default().to_owned();
    let reply = match (request.split(' ').next(), path) {
        (_, "/v1/daemon") => serde_json::json!({
            "version": VERSION, "build": "fake", "schema": 1, "pid": std::process::id(),
            "instance": "0198c2a4-7d1e-7b3a-9c4d-1f2e3d4c5b6a", "mode": "root", "pool": "172.16.0.0/20",
            "started_at": "2026-11-24T09:00:00Z", "vms": 1, "live": 0,
            "state_dir": paths.state.to_string_lossy(), "notices": [],
        }),
        (_, "/v1/daemon/stop") => serde_json::json!({}),
        (Some("GET"), "/v1/vms?trash=true") => serde_json::json!([vm("old-owl")]),
        (Some("GET"), path) if path.starts_with("/v1/vms?") || path == "/v1/vms" => {
            serde_json::json!([vm("calm-otter")])
        }
        (_, path) if refuses || path.contains("nobody") => {
            let error = ErrorBody::new(
                ErrorCode::NotFound,
                format!("there is no vm `{}`", name(path)),
            )
            .hint("did you mean `calm-otter`?");
            return (404, serde_json::json!(error).to_string());
        }
        (Some("POST"), "/v1/vms") => vm("calm-otter"),
        (_, path) if HOST.iter().any(|(known, _)| *known == path) => {
            let known = HOST.iter().find(|(known, _)| *known == path);
            serde_json::from_str(known.map_or("null", |(_, reply)| *reply)).unwrap_or_default()
        }
        (_, path) => vm(&name(path)),
    };
    (200, reply.to_string())
}

/// What is answered about the host and several VMs at once.
const HOST: &[(&str, &str)] = &[
    (
        "/v1/network",
        r#"{"mode": "root", "dropped": {"private": 12}, "repairs": 0,
            "way_out": {"state": "open", "by": ["eth0"], "closed_by": [
                {"chain": "chain FORWARD of table ip filter", "remedy": "iptables -I DOCKER-USER -j ACCEPT"}]},
            "vms": [{"id": "0198c2a4-7d1e-7b3a-9c4d-1f2e3d4c5b6a", "name": "calm-otter", "address": "172.16.0.2",
                "live": true, "nat": true, "nat_now": true, "joins": ["fox"], "ports": [
                    {"protocol": "tcp", "listen": "127.0.0.1:8080", "guest_port": 80, "open": true,
                     "connections": 1, "problem": null}]}]}"#,
    ),
    (
        "/v1/dns",
        r#"{"guests": "172.16.0.1:53", "host": null, "host_names": "not configured", "records_file": "/s/records.json",
            "records": [{"name": "calm-otter.vm", "address": "172.16.0.2"}], "counters": {}}"#,
    ),
    (
        "/v1/host",
        r#"[{"kind": "tap", "name": "bt1f2e3d4c5b", "owner": "calm-otter", "expected": false}]"#,
    ),
    (
        "/v1/host/clean",
        r#"{"done": ["removed tap bt1f2e3d4c5b"], "left": []}"#,
    ),
    (
        "/v1/doctor/repair",
        r#"{"done": ["loaded the rules"], "left": [{"code": "host-unfit", "message": "veth bv1", "causes": ["it is busy"],
            "hints": ["end who uses it"]}]}"#,
    ),
    (
        "/v1/restore",
        r#"[{"id": "0198c2a4-7d1e-7b3a-9c4d-1f2e3d4c5b6a", "name": "calm-otter", "error": null}]"#,
    ),
    (
        "/v1/trash/empty",
        r#"[{"id": "0198c2a4-7d1e-7b3a-9c4d-1f2e3d4c5b6a", "name": "calm-otter", "error": null},
            {"id": "0198c2a4-7d1e-7b3a-9c4d-1f2e3d4c5b6b", "name": "fox", "error":
                {"code": "no-space", "message": "cannot purge `fox`", "causes": [], "hints": []}}]"#,
    ),
];

fn vm(name: &str) -> serde_json::Value {
    serde_json::json!({
        "id": "0198c2a4-7d1e-7b3a-9c4d-1f2e3d4c5b6a", "name": name,
        "phase": {"state": "stopped", "why": {"reason": "never-started"}},
        "address": "172.16.0.2", "mac": "06:2e:3d:4c:5b:6a",
        "spec": {
            "image": "0198c2a4-0000-7b3a-9c4d-1f2e3d4c5b6a", "kernel": "0198c2a4-1111-7b3a-9c4d-1f2e3d4c5b6a",
            "vcpus": 2, "memory_mib": 1024, "overlay_bytes": 8_589_934_592_u64, "disk_bytes": null,
            "driver": "auto", "storage": "overlay",
            "ports": [{"protocol": "tcp", "listen": "127.0.0.1:8080", "guest_port": 80}],
        },
        "generation": 1, "desired": "off", "revision": 7, "image_name": "default", "kernel_name": null,
        "storage_reason": "asked for", "attempt": null, "boot": null, "host_key": "ssh-ed25519 AAAA calm-otter",
        "created_at": "2026-11-24T09:00:00Z", "trashed_at": null, "directory": "/s",
    })
}
