use super::message::{ERROR, RETURN, SIGNAL, call};
use super::*;
use std::os::unix::net::UnixListener;
use std::thread::JoinHandle;

const UNIT: &str = "banger-a-b-7.scope";

/// What a systemd of our own does once it has heard a call.
type Manner = fn(&mut UnixStream);

/// Takes one connection and so many calls, and gives the calls.
fn serve(folder: &Path, manners: &'static [Manner]) -> (Systemd, JoinHandle<Vec<Vec<u8>>>) {
    let socket = folder.join("private");
    let listener = UnixListener::bind(&socket).unwrap();
    let served = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let user = rustix::process::geteuid().as_raw().to_string();
        let user: String = user.bytes().map(|digit| format!("{digit:02x}")).collect();
        let greeting = format!("\0AUTH EXTERNAL {user}\r\n");
        let mut heard = vec![0; greeting.len()];
        stream.read_exact(&mut heard).unwrap();
        assert_eq!(heard, greeting.as_bytes());
        stream.write_all(b"OK 0123456789abcdef\r\n").unwrap();
        let mut begin = [0; 7];
        stream.read_exact(&mut begin).unwrap();
        assert_eq!(&begin, b"BEGIN\r\n");
        let calls = manners.iter().map(|manner| {
            let mut head = [0; HEAD];
            stream.read_exact(&mut head).unwrap();
            let mut rest = vec![0; message::rest(&head).unwrap()];
            stream.read_exact(&mut rest).unwrap();
            manner(&mut stream);
            [&head[..], &rest].concat()
        });
        calls.collect()
    });
    let whose = Whose::User;
    (Systemd { socket, whose }, served)
}

/// A message of `kind` that answers the call of that number, or is `JobRemoved`, with texts after as many numbers.
fn say(stream: &mut UnixStream, kind: u8, answers: u32, numbers: &[u32], texts: &[&str]) {
    let mut body = Writer::default();
    numbers.iter().for_each(|number| body.u32(*number));
    texts.iter().for_each(|text| body.text(text));
    // A call has all that a signal has; an answer has the number of the call in place of the rest.
    let mut message = call(9, "JobRemoved", "s", body.into_bytes());
    message[1] = kind;
    if kind != SIGNAL {
        let body_at = HEAD + rest_fields(&message).next_multiple_of(8);
        let body = message.split_off(body_at);
        message.truncate(12);
        message.extend(8_u32.to_le_bytes());
        message.extend(b"\x05\x01u\0");
        message.extend(answers.to_le_bytes());
        message.extend(body);
    }
    stream.write_all(&message).unwrap();
}

fn rest_fields(message: &[u8]) -> usize {
    u32::from_le_bytes(message[12..16].try_into().unwrap()) as usize
}

fn scope() -> Scope<'static> {
    Scope {
        unit: UNIT,
        description: "microVM calm-otter (banger)",
        process: 7,
        cpu_percent: Some(150),
    }
}

fn contains(call: &[u8], bytes: &[u8]) -> bool {
    call.windows(bytes.len()).any(|window| window == bytes)
}

#[test]
fn a_scope_is_there_once_its_job_is_done() {
    let folder = tempfile::tempdir().unwrap();
    let (systemd, served) = serve(
        folder.path(),
        &[|stream| {
            // What comes before the answer, and of others, does not count.
            say(stream, SIGNAL, 0, &[], &[UNIT, "/unit"]);
            say(
                stream,
                SIGNAL,
                0,
                &[3],
                &["/job/3", "other.scope", "failed"],
            );
            say(stream, RETURN, 1, &[], &["/job/4"]);
            say(stream, SIGNAL, 0, &[4], &["/job/4", UNIT, "done"]);
        }],
    );
    systemd.start_scope(&scope()).unwrap();
    let call = &served.join().unwrap()[0];
    for text in [
        "StartTransientUnit",
        "ssa(sv)a(sa(sv))",
        UNIT,
        "microVM calm-otter (banger)",
        "app-banger.slice",
        "banger-guests.service",
        "inactive-or-failed",
    ] {
        assert!(contains(call, text.as_bytes()), "{text}");
    }
    assert!(contains(call, &1_500_000_u64.to_le_bytes()));
}

#[test]
fn a_scope_that_fails_or_is_refused_is_none() {
    let folder = tempfile::tempdir().unwrap();
    let (systemd, served) = serve(
        folder.path(),
        &[|stream| {
            say(stream, RETURN, 1, &[], &["/job/4"]);
            say(stream, SIGNAL, 0, &[4], &["/job/4", UNIT, "failed"]);
        }],
    );
    let error = systemd.start_scope(&scope()).unwrap_err().to_string();
    assert_eq!(error, format!("systemd could not make `{UNIT}`: failed"));
    served.join().unwrap();

    let folder = tempfile::tempdir().unwrap();
    let (systemd, served) = serve(
        folder.path(),
        &[|stream| {
            say(stream, ERROR, 1, &[], &["Unit exists\u{1b}[2J"]);
        }],
    );
    let error = systemd.start_scope(&scope()).unwrap_err().to_string();
    assert_eq!(error, "systemd refuses: Unit exists\\u{1b}[2J");
    served.join().unwrap();
}

#[test]
fn one_that_ends_or_answers_nonsense_is_told() {
    for manner in [
        &[(|_| {}) as Manner] as &[Manner],
        &[|stream| stream.write_all(&[0xff; 64]).unwrap()],
    ] {
        let folder = tempfile::tempdir().unwrap();
        let (systemd, served) = serve(folder.path(), manner);
        let error = systemd.limit_cpu(UNIT, None).unwrap_err();
        assert!(matches!(error, SystemdError::Talk { .. }), "{error}");
        served.join().unwrap();
    }
}

#[test]
fn one_that_hangs_is_waited_for_so_long_and_no_longer() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("private");
    let listener = UnixListener::bind(&socket).unwrap();
    let begun = Instant::now();
    let deadline = begun + Duration::from_millis(50);
    let error = Connection::open(&socket, deadline).map(|_| ()).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::TimedOut, "{error}");
    assert!(begun.elapsed() < LIMIT);
    // With its queue full, it is not even waited for.
    rustix::net::listen(&listener, 0).unwrap();
    let queued: Vec<_> = std::iter::from_fn(|| {
        let socket = rustix::net::socket_with(
            AddressFamily::UNIX,
            SocketType::STREAM,
            SocketFlags::NONBLOCK,
            None,
        )
        .unwrap();
        let address = SocketAddrUnix::new(folder.path().join("private")).unwrap();
        rustix::net::connect(&socket, &address)
            .ok()
            .map(|()| socket)
    })
    .collect();
    let full = Connection::open(&socket, Instant::now() + LIMIT).map(|_| ());
    assert_eq!(full.unwrap_err().kind(), io::ErrorKind::WouldBlock);
    drop(queued);
}

#[test]
fn a_limit_is_changed_and_taken_away() {
    for (percent, number) in [(Some(20), 200_000_u64), (None, u64::MAX)] {
        let folder = tempfile::tempdir().unwrap();
        let (systemd, served) = serve(
            folder.path(),
            &[
                |stream| say(stream, RETURN, 1, &[], &[]),
                |stream| say(stream, RETURN, 2, &[], &["/unit"]),
            ],
        );
        systemd.limit_cpu(UNIT, percent).unwrap();
        let calls = served.join().unwrap();
        let call = &calls[0];
        assert!(contains(call, b"SetUnitProperties\0"));
        assert!(contains(call, b"CPUQuotaPerSecUSec\0\x01t\0"));
        assert!(call.ends_with(&number.to_le_bytes()));
    }
}

#[test]
fn the_kernels_words_are_read() {
    assert_eq!(read_cpu_limit("max 100000\n"), Some(None));
    assert_eq!(read_cpu_limit("150000 100000\n"), Some(Some(150)));
    for noise in ["", "max", "x 100000", "1 0", "-1 100000"] {
        assert_eq!(read_cpu_limit(noise), None, "{noise}");
    }
    assert_eq!(scope_in("/user.slice/a-b.slice/x.scope"), Some("x.scope"));
    assert_eq!(scope_in("/system.slice/x.service"), None);
    assert_eq!(scope_in("/"), None);
    // No such process, or cgroups of version 1: no panic in any case.
    let _ = cgroup_of(u32::MAX);
    assert!(cpu_limit_of("/no-such-group").is_err());
}
