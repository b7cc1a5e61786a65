//! Whole installations, with a server of the test's own.

use super::*;
use crate::operations::Operations;
use banger_api::operation::OperationState;
use flate2::Compression;
use flate2::write::GzEncoder;
use sha2::{Digest, Sha256};
use std::collections::HashMap;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpListener;

const ARCHIVE: &str = "/v1.12.0/firecracker.tgz";

fn says_1_12(_: &Path) -> Result<Option<Version>, ExecError> {
    Ok(Some(Version::new(1, 12, 0)))
}

fn says_0_25(_: &Path) -> Result<Option<Version>, ExecError> {
    Ok(Some(Version::new(0, 25, 0)))
}

fn says_nothing(_: &Path) -> Result<Option<Version>, ExecError> {
    Ok(None)
}

fn never_asked(program: &Path) -> Result<Option<Version>, ExecError> {
    panic!("{} was asked", program.display())
}

/// The header of an ELF program of this machine, and something behind it.
fn elf() -> Vec<u8> {
    let mut elf = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x03\0".to_vec();
    let machine: u8 = if source::ARCH == "aarch64" { 183 } else { 62 };
    elf.extend([machine, 0]);
    // Noise, so that it does not shrink.
    let mut state = 1_u32;
    elf.extend((0..40_000).map(|_| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    }));
    elf
}

fn program_name() -> String {
    let arch = source::ARCH;
    format!("release-v1.12.0-{arch}/firecracker-v1.12.0-{arch}")
}

fn archive_of(entries: &[(&str, &[u8])]) -> Vec<u8> {
    let mut builder = tar::Builder::new(GzEncoder::new(Vec::new(), Compression::fast()));
    for (name, content) in entries {
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(0o755);
        builder.append_data(&mut header, name, *content).unwrap();
    }
    builder.into_inner().unwrap().finish().unwrap()
}

fn good_archive() -> Vec<u8> {
    archive_of(&[
        ("release-v1.12.0/LICENSE", b"text"),
        (&format!("{}.debug", program_name()), b"symbols"),
        (&program_name(), &elf()),
        ("release-v1.12.0/NOTICE", b"text"),
    ])
}

fn sha256(bytes: &[u8]) -> String {
    staged::hex(&Sha256::digest(bytes))
}

enum Reply {
    Bytes(Vec<u8>),
    /// Half of them, and then the connection ends.
    Half(Vec<u8>),
    /// Half of them, and then nothing.
    Stall(Vec<u8>),
    /// Without a length, for as long as somebody listens.
    Endless,
    Redirect(String),
}

/// Serves until the test's runtime ends.
async fn serve(replies: impl IntoIterator<Item = (String, Reply)>) -> String {
    let replies: Arc<HashMap<String, Reply>> = Arc::new(replies.into_iter().collect());
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let replies = Arc::clone(&replies);
            tokio::spawn(async move {
                let mut stream = BufReader::new(stream);
                let mut lines = Vec::new();
                loop {
                    let mut line = String::new();
                    if stream.read_line(&mut line).await.unwrap_or(0) == 0 {
                        return;
                    }
                    if line == "\r\n" {
                        break;
                    }
                    lines.push(line);
                }
                let path = lines[0].split(' ').nth(1).unwrap_or_default();
                // A client that has heard enough closes, which is no fault.
                let _ = answer(&mut stream, replies.get(path)).await;
            });
        }
    });
    url
}

async fn answer(
    stream: &mut (impl AsyncWriteExt + Unpin),
    reply: Option<&Reply>,
) -> std::io::Result<()> {
    let head = match reply {
        None => "404 Not Found\r\nContent-Length: 0".to_owned(),
        Some(Reply::Redirect(to)) => format!("302 Found\r\nLocation: {to}\r\nContent-Length: 0"),
        Some(Reply::Endless) => "200 OK".to_owned(),
        Some(Reply::Bytes(bytes) | Reply::Half(bytes) | Reply::Stall(bytes)) => {
            format!("200 OK\r\nContent-Length: {}", bytes.len())
        }
    };
    let head = format!("HTTP/1.1 {head}\r\nConnection: close\r\n\r\n");
    stream.write_all(head.as_bytes()).await?;
    match reply {
        None | Some(Reply::Redirect(_)) => {}
        Some(Reply::Bytes(bytes)) => stream.write_all(bytes).await?,
        Some(Reply::Half(bytes)) => stream.write_all(&bytes[..bytes.len() / 2]).await?,
        Some(Reply::Stall(bytes)) => {
            stream.write_all(&bytes[..bytes.len() / 2]).await?;
            stream.flush().await?;
            std::future::pending::<()>().await;
        }
        Some(Reply::Endless) => loop {
            stream.write_all(&[0x1f; 4096]).await?;
        },
    }
    stream.flush().await
}

/// An archive, and the checksum file that names `sha256` for it.
fn with_checksum(archive: Reply, sha256: &str) -> Vec<(String, Reply)> {
    let line = format!("{sha256}  firecracker.tgz\n");
    vec![
        (ARCHIVE.to_owned(), archive),
        (
            format!("{ARCHIVE}{CHECKSUM_SUFFIX}"),
            Reply::Bytes(line.into_bytes()),
        ),
    ]
}

fn url(base: &str) -> InstallDriver {
    InstallDriver {
        url: Some(format!("{base}{ARCHIVE}")),
        ..InstallDriver::default()
    }
}

struct Try {
    folder: tempfile::TempDir,
    operations: Operations,
    limits: Limits,
    ask: Ask,
}

impl Try {
    fn new() -> Self {
        Self {
            folder: tempfile::tempdir().unwrap(),
            operations: Operations::default(),
            limits: Limits {
                stall: Duration::from_secs(20),
                ..Limits::default()
            },
            ask: says_1_12,
        }
    }

    fn drivers(&self) -> PathBuf {
        self.folder.path().join("drivers")
    }

    fn begin(&self, request: InstallDriver) -> Operation {
        let source = Source::new(request).unwrap();
        let (folder, limits, ask) = (self.drivers(), self.limits.clone(), self.ask);
        self.operations
            .start("driver.install", |reporter| async move {
                Ok(install(folder, source, limits, reporter, ask).await?)
            })
    }

    async fn run(&self, request: InstallDriver) -> (Result<bool, ErrorBody>, Option<Progress>) {
        let id = self.begin(request).id;
        let mut state = self.operations.follow(id).unwrap();
        let ended = state
            .wait_for(|operation| operation.status != OperationState::Running)
            .await
            .unwrap()
            .clone();
        let result = match ended.status {
            OperationState::Done { unchanged, .. } => Ok(unchanged),
            OperationState::Failed { error } => Err(error),
            OperationState::Running => unreachable!("it was waited for"),
        };
        (result, ended.progress)
    }

    fn names(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.drivers()).unwrap();
        entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect()
    }

    #[track_caller]
    fn assert_installed(&self) {
        assert_eq!(self.names(), [PROGRAM]);
        let path = self.drivers().join(PROGRAM);
        assert_eq!(std::fs::read(&path).unwrap(), elf());
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o7777, 0o755);
    }

    /// The error of an installation that must fail and leave nothing.
    async fn refuse(&self, request: InstallDriver) -> ErrorBody {
        let error = self.run(request).await.0.unwrap_err();
        assert_eq!(self.names(), Vec::<String>::new());
        error
    }

    fn file(&self, name: &str, bytes: &[u8]) -> InstallDriver {
        let path = self.folder.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        InstallDriver {
            from: Some(path.to_str().unwrap().to_owned()),
            ..InstallDriver::default()
        }
    }
}

#[tokio::test]
async fn an_archive_with_the_right_checksum_file_is_installed_and_then_unchanged() {
    let attempt = Try::new();
    let archive = good_archive();
    let base = serve(with_checksum(
        Reply::Bytes(archive.clone()),
        &sha256(&archive),
    ))
    .await;
    let (result, progress) = attempt.run(url(&base)).await;
    assert_eq!(result, Ok(false));
    assert_eq!(progress.unwrap().message, "Firecracker 1.12.0 is installed");
    attempt.assert_installed();
    assert_eq!(attempt.run(url(&base)).await.0, Ok(true));
    attempt.assert_installed();
}

#[tokio::test]
async fn a_wrong_checksum_names_the_file_and_both_sums_and_keeps_what_was_there() {
    let mut attempt = Try::new();
    attempt.ask = never_asked;
    let archive = good_archive();
    let wrong = "0".repeat(64);
    let base = serve(with_checksum(Reply::Bytes(archive.clone()), &wrong)).await;
    std::fs::create_dir(attempt.drivers()).unwrap();
    std::fs::write(attempt.drivers().join(PROGRAM), "old").unwrap();
    let error = attempt.run(url(&base)).await.0.unwrap_err();
    assert_eq!(error.code, ErrorCode::BadFile);
    for part in [ARCHIVE, &wrong, &sha256(&archive)] {
        assert!(error.message.contains(part), "{error}");
    }
    assert_eq!(attempt.names(), [PROGRAM]);
    let kept = std::fs::read(attempt.drivers().join(PROGRAM)).unwrap();
    assert_eq!(kept, b"old");
}

#[tokio::test]
async fn a_given_checksum_replaces_the_checksum_file() {
    let attempt = Try::new();
    let archive = good_archive();
    let base = serve([(ARCHIVE.to_owned(), Reply::Bytes(archive.clone()))]).await;
    let error = attempt.refuse(url(&base)).await;
    assert!(error.message.contains("404"), "{error}");
    assert!(error.hints[0].contains("--sha256"), "{error:?}");
    let mut request = url(&base);
    request.sha256 = Some("1".repeat(64));
    assert_eq!(
        attempt.refuse(request.clone()).await.code,
        ErrorCode::BadFile
    );
    request.sha256 = Some(sha256(&archive).to_uppercase());
    assert_eq!(attempt.run(request).await.0, Ok(false));
    attempt.assert_installed();
}

#[tokio::test]
async fn a_checksum_file_that_names_another_archive_is_no_checksum() {
    let attempt = Try::new();
    let line = format!("{}  other.tgz\n", "0".repeat(64));
    let base = serve([
        (ARCHIVE.to_owned(), Reply::Bytes(good_archive())),
        (
            format!("{ARCHIVE}{CHECKSUM_SUFFIX}"),
            Reply::Bytes(line.into_bytes()),
        ),
    ])
    .await;
    let error = attempt.refuse(url(&base)).await;
    assert!(
        error.message.contains("no SHA-256 of `firecracker.tgz`"),
        "{error}"
    );
}

#[tokio::test]
async fn a_download_that_breaks_off_leaves_nothing() {
    let attempt = Try::new();
    let archive = good_archive();
    let base = serve(with_checksum(
        Reply::Half(archive.clone()),
        &sha256(&archive),
    ))
    .await;
    let error = attempt.refuse(url(&base)).await;
    assert_eq!(error.code, ErrorCode::BadFile);
    assert!(error.message.starts_with("cannot download"), "{error}");
}

#[tokio::test]
async fn a_server_that_stalls_is_given_up() {
    let mut attempt = Try::new();
    attempt.limits.stall = Duration::from_millis(100);
    let archive = good_archive();
    let base = serve(with_checksum(
        Reply::Stall(archive.clone()),
        &sha256(&archive),
    ))
    .await;
    let error = attempt.refuse(url(&base)).await;
    assert!(error.message.contains("nothing came for 0.1 s"), "{error}");
}

#[tokio::test]
async fn a_cancelled_download_leaves_nothing() {
    let attempt = Try::new();
    let archive = good_archive();
    let base = serve(with_checksum(
        Reply::Stall(archive.clone()),
        &sha256(&archive),
    ))
    .await;
    let id = attempt.begin(url(&base)).id;
    let mut state = attempt.operations.follow(id).unwrap();
    let begun = |operation: &Operation| {
        operation
            .progress
            .as_ref()
            .is_some_and(|p| p.done > Some(0))
    };
    state.wait_for(begun).await.unwrap();
    assert_eq!(attempt.names().len(), 1);
    let ended = attempt.operations.cancel(id).await.unwrap();
    match ended.status {
        OperationState::Failed { error } => assert_eq!(error.code, ErrorCode::Cancelled),
        other => panic!("{other:?}"),
    }
    assert_eq!(attempt.names(), Vec::<String>::new());
}

#[tokio::test]
async fn a_download_without_end_is_cut() {
    let mut attempt = Try::new();
    attempt.limits.archive = 100_000;
    let base = serve(with_checksum(Reply::Endless, &"0".repeat(64))).await;
    let error = attempt.refuse(url(&base)).await;
    assert!(
        error.message.contains("larger than 100000 bytes"),
        "{error}"
    );
    let base = serve(with_checksum(
        Reply::Bytes(vec![0; 100_001]),
        &"0".repeat(64),
    ))
    .await;
    let error = attempt.refuse(url(&base)).await;
    assert!(
        error.message.contains("larger than 100000 bytes"),
        "{error}"
    );
}

#[tokio::test]
async fn redirects_are_followed_but_not_to_where_nothing_is_protected() {
    let attempt = Try::new();
    let archive = good_archive();
    let mut replies = with_checksum(Reply::Redirect("/moved.tgz".to_owned()), &sha256(&archive));
    replies.push(("/moved.tgz".to_owned(), Reply::Bytes(archive.clone())));
    let base = serve(replies).await;
    assert_eq!(attempt.run(url(&base)).await.0, Ok(false));
    attempt.assert_installed();

    let attempt = Try::new();
    let elsewhere = Reply::Redirect("http://192.0.2.1/a.tgz".to_owned());
    let base = serve(with_checksum(elsewhere, &sha256(&archive))).await;
    let error = attempt.refuse(url(&base)).await;
    assert!(
        error
            .causes
            .iter()
            .any(|cause| cause.contains("protects nothing")),
        "{error:?}"
    );
}

#[tokio::test]
async fn a_server_that_does_not_speak_tls_is_an_error() {
    let attempt = Try::new();
    let base = serve([]).await.replace("http://", "https://");
    let error = attempt.refuse(url(&base)).await;
    assert!(
        error.message.starts_with("cannot download `https://"),
        "{error}"
    );
    assert!(!error.causes.is_empty());
}

#[tokio::test]
async fn a_truncated_archive_is_damaged_even_behind_the_program() {
    let attempt = Try::new();
    let archive = good_archive();
    for left in [4, 100, archive.len() / 2, archive.len() - 4] {
        let error = attempt
            .refuse(attempt.file("firecracker.tgz", &archive[..left]))
            .await;
        assert!(error.message.contains("is damaged"), "{left}: {error}");
        assert_eq!(error.code, ErrorCode::BadFile);
    }
}

#[tokio::test]
async fn an_archive_without_the_program_says_what_was_looked_for() {
    let attempt = Try::new();
    let archive = archive_of(&[("release-v1.12.0/jailer", &elf()), ("firecracker", &elf())]);
    let error = attempt.refuse(attempt.file("a.tgz", &archive)).await;
    assert!(
        error
            .message
            .contains(&format!("no `release-v*/firecracker-v*-{}`", source::ARCH)),
        "{error}"
    );
}

#[tokio::test]
async fn a_link_with_the_programs_name_is_not_followed() {
    let attempt = Try::new();
    let mut builder = tar::Builder::new(GzEncoder::new(Vec::new(), Compression::fast()));
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(tar::EntryType::Symlink);
    header.set_size(0);
    builder
        .append_link(&mut header, program_name(), "/bin/true")
        .unwrap();
    let archive = builder.into_inner().unwrap().finish().unwrap();
    let error = attempt.refuse(attempt.file("a.tgz", &archive)).await;
    assert!(error.message.contains("holds no"), "{error}");
}

#[tokio::test]
async fn an_entry_that_is_too_large_and_an_archive_that_unpacks_to_too_much_are_refused() {
    let mut attempt = Try::new();
    attempt.limits.program = 1000;
    let request = attempt.file("a.tgz", &good_archive());
    let error = attempt.refuse(request).await;
    assert!(
        error.message.contains(&program_name()) && error.message.contains("larger than 1000"),
        "{error}"
    );
    let error = attempt.refuse(attempt.file("firecracker", &elf())).await;
    assert!(error.message.contains("larger than 1000"), "{error}");

    let mut attempt = Try::new();
    attempt.limits.unpacked = 100_000;
    let bomb = archive_of(&[("bomb", &vec![0; 1_000_000]), (&program_name(), &elf())]);
    let error = attempt.refuse(attempt.file("a.tgz", &bomb)).await;
    assert!(
        error.message.contains("unpacked") && error.message.contains("larger than 100000"),
        "{error}"
    );
}

#[tokio::test]
async fn a_refused_version_is_not_installed() {
    let mut attempt = Try::new();
    attempt.ask = says_0_25;
    let error = attempt.refuse(attempt.file("a.tgz", &good_archive())).await;
    assert!(error.message.contains("0.25.0 is too old"), "{error}");
    attempt.ask = says_nothing;
    let error = attempt.refuse(attempt.file("a.tgz", &good_archive())).await;
    assert!(error.message.contains("is not Firecracker"), "{error}");
    attempt.ask = says_1_12;
    let mut request = attempt.file("a.tgz", &good_archive());
    request.version = Some("1.13.0".to_owned());
    let error = attempt.refuse(request).await;
    assert!(
        error.message.contains("1.12.0, but 1.13.0 was asked for"),
        "{error}"
    );
}

#[tokio::test]
async fn a_program_of_another_machine_is_never_run() {
    let mut attempt = Try::new();
    attempt.ask = never_asked;
    let mut other = elf();
    other[18] = if source::ARCH == "aarch64" { 62 } else { 183 };
    for bytes in [other.clone(), archive_of(&[(&program_name(), &other)])] {
        let error = attempt.refuse(attempt.file("a", &bytes)).await;
        assert!(error.message.contains("cannot run here"), "{error}");
    }
    let script = archive_of(&[(&program_name(), b"#!/bin/sh\necho Firecracker v1.12.0\n")]);
    let error = attempt.refuse(attempt.file("a", &script)).await;
    assert!(error.message.contains("no ELF program"), "{error}");
}

#[tokio::test]
async fn a_program_file_is_installed_with_a_note_that_nothing_was_compared() {
    let attempt = Try::new();
    let (result, progress) = attempt.run(attempt.file("firecracker", &elf())).await;
    assert_eq!(result, Ok(false));
    let message = progress.unwrap().message;
    assert!(message.contains("compared with no checksum"), "{message}");
    attempt.assert_installed();
}

#[tokio::test]
async fn a_checksum_file_beside_a_file_counts() {
    let attempt = Try::new();
    let archive = good_archive();
    let request = attempt.file("a.tgz", &archive);
    attempt.file(
        "a.tgz.sha256.txt",
        format!("{}  a.tgz\n", "0".repeat(64)).as_bytes(),
    );
    let error = attempt.refuse(request.clone()).await;
    assert!(error.message.contains("another checksum"), "{error}");
    attempt.file(
        "a.tgz.sha256.txt",
        format!("{}  a.tgz\n", sha256(&archive)).as_bytes(),
    );
    let (result, progress) = attempt.run(request).await;
    assert_eq!(result, Ok(false));
    assert_eq!(progress.unwrap().message, "Firecracker 1.12.0 is installed");
}

#[tokio::test]
async fn what_is_no_archive_and_no_file_is_told_apart() {
    let attempt = Try::new();
    let error = attempt.refuse(attempt.file("a.txt", b"hello")).await;
    assert!(error.message.contains("neither a gzip"), "{error}");
    let mut request = InstallDriver {
        from: Some(attempt.folder.path().to_str().unwrap().to_owned()),
        ..InstallDriver::default()
    };
    let error = attempt.refuse(request.clone()).await;
    assert!(error.message.contains("not a regular file"), "{error}");
    request.from = Some("/nonexistent/a.tgz".to_owned());
    let error = attempt.refuse(request).await;
    assert_eq!(error.code, ErrorCode::BadFile);
    assert_eq!(error.message, "cannot read `/nonexistent/a.tgz`");
}

#[tokio::test]
async fn what_a_killed_installation_left_is_swept() {
    let attempt = Try::new();
    std::fs::create_dir(attempt.drivers()).unwrap();
    std::fs::write(attempt.drivers().join(".new-0"), "half").unwrap();
    assert_eq!(
        attempt.run(attempt.file("firecracker", &elf())).await.0,
        Ok(false)
    );
    attempt.assert_installed();
}

#[test]
fn a_real_program_is_asked_and_its_failure_told() {
    let folder = tempfile::tempdir().unwrap();
    let program = folder.path().join("program");
    let mut file = File::create(&program).unwrap();
    file.write_all(b"#!/bin/sh\necho \"Firecracker v1.12.0 $1\"\n")
        .unwrap();
    file.set_permissions(std::fs::Permissions::from_mode(0o755))
        .unwrap();
    drop(file);
    assert_eq!(ask_version(&program).unwrap(), Some(Version::new(1, 12, 0)));
    std::fs::write(&program, "#!/bin/sh\necho bad >&2; exit 3\n").unwrap();
    assert!(matches!(
        ask_version(&program),
        Err(ExecError::Failed { .. })
    ));
}
