//! Values on the command line: read and checked before anything is sent; and sizes and times as people read them.

use crate::report::Failure;
use banger_api::error::ErrorCode;
use banger_api::network::ClosePort;
use banger_core::publish::PublishedPort;
use banger_core::size::{CpuLimit, DiskBytes, MemoryMib, SizeError, VcpuCount};
use std::path::Path;
use std::time::Duration;

/// Why a duration cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{}` is not a duration; write 30s, 2m or 1m 30s", .0.escape_debug())]
pub(crate) struct DurationError(String);

/// Why a number of vCPUs cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum VcpuError {
    /// It is no number.
    #[error("`{}` is not a number", .0.escape_debug())]
    NoNumber(String),
    /// It is out of range.
    #[error(transparent)]
    OutOfRange(#[from] SizeError),
}

/// Reads a number of vCPUs.
pub(crate) fn vcpus(text: &str) -> Result<u64, VcpuError> {
    let number = text
        .parse()
        .map_err(|_| VcpuError::NoNumber(text.to_owned()))?;
    Ok(VcpuCount::new(number)?.into())
}

/// Reads an amount of memory as MiB.
pub(crate) fn memory_mib(text: &str) -> Result<u64, SizeError> {
    MemoryMib::parse(text).map(u64::from)
}

/// Reads the size of a disk as bytes.
pub(crate) fn disk_bytes(text: &str) -> Result<u64, SizeError> {
    DiskBytes::parse(text).map(u64::from)
}

/// Reads a limit of CPU time as per cent of one CPU; 0 is no limit.
pub(crate) fn cpu_limit(text: &str) -> Result<u64, SizeError> {
    let limit = CpuLimit::parse(text)?;
    Ok(limit.map_or(0, u64::from))
}

/// Why a place of a published port cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{}` is not a port of the host; write [ADDRESS:]HOST[/udp], such as 8080", .0.escape_debug())]
pub(crate) struct PlaceError(String);

/// Reads where a published port listens: `[ADDRESS:]HOST[/udp]`. All of a published port, as `8080:80`, names it, too.
pub(crate) fn place(text: &str) -> Result<ClosePort, PlaceError> {
    let (place, protocol) = match text.rsplit_once('/') {
        Some((place, protocol)) => (place, format!("/{protocol}")),
        None => (text, String::new()),
    };
    let port = format!("{place}:1{protocol}")
        .parse::<PublishedPort>()
        .or_else(|_| text.parse())
        .map_err(|_| PlaceError(text.to_owned()))?;
    Ok(ClosePort {
        protocol: port.protocol,
        listen: port.listen,
    })
}

/// Reads `30s`, `2m`, `1m 30s`, or a plain number of seconds.
pub(crate) fn duration(text: &str) -> Result<Duration, DurationError> {
    let error = || DurationError(text.to_owned());
    if let Ok(seconds) = text.trim().parse::<u32>() {
        return Ok(Duration::from_secs(u64::from(seconds)));
    }
    let signed: jiff::SignedDuration = text.parse().map_err(|_| error())?;
    signed.try_into().map_err(|_| error())
}

/// A duration on the wire.
pub(crate) fn milliseconds(duration: Duration) -> u64 {
    duration.as_millis().try_into().unwrap_or(u64::MAX)
}

/// A file named on the command line, as the absolute path that goes to the daemon.
///
/// # Errors
/// The file cannot be read by this user, or its path is no UTF-8.
pub(crate) fn readable_path(path: &Path) -> Result<String, Failure> {
    std::fs::File::open(path).map_err(|error| {
        Failure::new(
            ErrorCode::BadFile,
            format!("cannot read `{}`", path.display()),
        )
        .caused_by(&error)
        .hint("name a file that is there and that you may read")
    })?;
    let absolute = std::path::absolute(path).map_err(|error| {
        Failure::new(
            ErrorCode::BadFile,
            format!("cannot find `{}`", path.display()),
        )
        .caused_by(&error)
    })?;
    absolute.into_os_string().into_string().map_err(|_| {
        Failure::new(
            ErrorCode::BadFile,
            format!("the path `{}` is not UTF-8", path.display()),
        )
    })
}

/// Bytes as people read them: `8 GiB`, `1.5 MiB`.
pub(crate) fn bytes(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    let text = format!("{value:.1}");
    format!(
        "{} {}",
        text.strip_suffix(".0").unwrap_or(&text),
        UNITS[unit]
    )
}

/// Microseconds as people read them.
pub(crate) fn microseconds(us: u64) -> String {
    match us {
        0..1_000 => format!("{us} µs"),
        1_000..1_000_000 => format!("{:.1} ms", us as f64 / 1e3),
        _ => format!("{:.2} s", us as f64 / 1e6),
    }
}

/// Milliseconds as people read them.
pub(crate) fn seconds(ms: u64) -> String {
    format!("{:.2} s", ms as f64 / 1e3)
}

/// A time to the millisecond, in UTC.
pub(crate) fn time(at: jiff::Timestamp) -> String {
    format!("{at:.3}")
}

/// A time to the second, in UTC.
pub(crate) fn date(at: jiff::Timestamp) -> String {
    format!("{at:.0}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_seconds_unless_they_say_more() {
        assert_eq!(duration("60"), Ok(Duration::from_secs(60)));
        assert_eq!(duration("60s"), Ok(Duration::from_secs(60)));
        assert_eq!(duration("1m 30s"), Ok(Duration::from_secs(90)));
        assert_eq!(duration("500ms"), Ok(Duration::from_millis(500)));
        for bad in ["", "-1s", "soon", "1 fortnight"] {
            assert!(duration(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_published_port_is_named_by_its_place_on_the_host() {
        for (text, says) in [
            ("8080", "127.0.0.1:8080/tcp"),
            ("8080/tcp", "127.0.0.1:8080/tcp"),
            ("53/udp", "127.0.0.1:53/udp"),
            ("0.0.0.0:8080", "0.0.0.0:8080/tcp"),
            ("[::1]:8080", "[::1]:8080/tcp"),
            ("8080:80", "127.0.0.1:8080/tcp"),
            ("0.0.0.0:53:5353/udp", "0.0.0.0:53/udp"),
        ] {
            let place = place(text).unwrap();
            assert_eq!(
                format!("{}/{}", place.listen, place.protocol),
                says,
                "{text}"
            );
        }
        for bad in ["", "0", "otter", "8080/sctp", "127.0.0.1", "1:2:3:4"] {
            assert!(place(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn sizes_read_as_people_write_them() {
        assert_eq!(bytes(8 << 30), "8 GiB");
        assert_eq!(bytes(1536), "1.5 KiB");
        assert_eq!(bytes(0), "0 B");
        assert_eq!(microseconds(999), "999 µs");
        assert_eq!(microseconds(1_500), "1.5 ms");
        assert_eq!(microseconds(2_340_000), "2.34 s");
    }

    #[test]
    fn an_unreadable_file_is_named() {
        let failure = readable_path(Path::new("/nowhere/vmlinux")).unwrap_err();
        assert_eq!(failure.exit_code(), 9);
        assert_eq!(failure.0.message, "cannot read `/nowhere/vmlinux`");
        assert_eq!(failure.0.causes.len(), 1);
    }
}
