//! Where Firecracker comes from, as a request says it.

use banger_api::daemon::InstallDriver;
use banger_api::error::{ErrorBody, ErrorCode};
use banger_vmm::firecracker::version::judge;
use banger_vmm::version::{Verdict, Version};
use reqwest::Url;
use std::path::PathBuf;

/// The newest released version when this was written.
const NEWEST_RELEASE: Version = Version::new(1, 16, 1);
const RELEASES: &str = "https://github.com/firecracker-microvm/firecracker/releases/download";
/// This machine, as release archives name it.
pub(super) const ARCH: &str = std::env::consts::ARCH;

/// A place that holds a release archive or a program.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Place {
    File(PathBuf),
    Url(Url),
}

/// What to install, checked as far as it can be without touching anything.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Source {
    pub(super) place: Place,
    /// In lower case.
    pub(super) sha256: Option<String>,
    /// What the program must say it is.
    pub(super) version: Option<Version>,
}

impl Source {
    pub(super) fn new(request: InstallDriver) -> Result<Self, ErrorBody> {
        let sha256 = request.sha256.map(check_sha256).transpose()?;
        let version = request.version.as_deref().map(check_version).transpose()?;
        let (place, version) = match (request.from, request.url) {
            (Some(_), Some(_)) => {
                return Err(
                    invalid("both a file and a URL to install from were given".to_owned())
                        .hint("give `--from` or `--url`"),
                );
            }
            (Some(path), None) => {
                let path = PathBuf::from(path);
                if !path.is_absolute() {
                    return Err(invalid(format!(
                        "the path `{}` is not absolute",
                        path.display()
                    )));
                }
                (Place::File(path), version)
            }
            (None, Some(url)) => (Place::Url(check_url(&url, sha256.is_some())?), version),
            (None, None) => {
                let version = version.unwrap_or(NEWEST_RELEASE);
                let url = release_url(version);
                (Place::Url(check_url(&url, true)?), Some(version))
            }
        };
        Ok(Self {
            place,
            sha256,
            version,
        })
    }

    /// As messages name it; without a password that a URL may hold.
    pub(super) fn subject(&self) -> String {
        match &self.place {
            Place::File(path) => path.display().to_string(),
            Place::Url(url) => shown(url),
        }
    }
}

/// A URL as messages name it: without user, password and query, which may be secrets.
pub(super) fn shown(url: &Url) -> String {
    let mut url = url.clone();
    // Neither fails for a URL with a host, and others hold no such part.
    let _ = url.set_username("");
    let _ = url.set_password(None);
    url.set_query(None);
    url.set_fragment(None);
    url.to_string()
}

fn release_url(version: Version) -> String {
    format!("{RELEASES}/v{version}/firecracker-v{version}-{ARCH}.tgz")
}

/// Whether a server is this machine itself.
pub(super) fn is_loopback(url: &Url) -> bool {
    match url.host_str() {
        Some("localhost" | "[::1]") => true,
        Some(host) => host
            .parse::<std::net::Ipv4Addr>()
            .is_ok_and(|address| address.is_loopback()),
        None => false,
    }
}

/// Whether what comes from there cannot be changed on its way without notice.
pub(super) fn is_allowed(url: &Url, has_sha256: bool) -> bool {
    match url.scheme() {
        "https" => true,
        "http" => has_sha256 || is_loopback(url),
        _ => false,
    }
}

fn invalid(message: String) -> ErrorBody {
    ErrorBody::new(ErrorCode::InvalidRequest, message)
}

fn check_url(text: &str, has_sha256: bool) -> Result<Url, ErrorBody> {
    let url = Url::parse(text)
        .map_err(|error| invalid(format!("`{text}` is not a URL")).caused_by(&error))?;
    if !is_allowed(&url, has_sha256) {
        return Err(invalid(format!(
            "`{}` is not downloaded from: its `{}` protects nothing on the way",
            shown(&url),
            url.scheme()
        ))
        .hint("use https://; http:// is taken only with `--sha256`, or from this machine itself"));
    }
    Ok(url)
}

fn check_sha256(text: String) -> Result<String, ErrorBody> {
    if is_sha256(&text) {
        Ok(text.to_ascii_lowercase())
    } else {
        Err(invalid(format!(
            "`{text}` is not a SHA-256, which is 64 hexadecimal digits"
        )))
    }
}

pub(super) fn is_sha256(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

fn check_version(text: &str) -> Result<Version, ErrorBody> {
    let bad = || {
        invalid(format!(
            "`{text}` is not a version of Firecracker, such as {NEWEST_RELEASE}"
        ))
    };
    let mut numbers = text
        .strip_prefix('v')
        .unwrap_or(text)
        .split('.')
        .map(|part| {
            // A sign is a number's, but not a version's.
            Some(part)
                .filter(|part| part.bytes().all(|byte| byte.is_ascii_digit()))
                .and_then(|part| part.parse().ok())
        });
    let mut next = || numbers.next().flatten().ok_or_else(bad);
    let version = Version::new(next()?, next()?, next()?);
    if numbers.next().is_some() {
        return Err(bad());
    }
    match judge(version) {
        Verdict::Refused(why) => Err(invalid(why).hint(format!(
            "without `--version`, {NEWEST_RELEASE} is installed"
        ))),
        Verdict::Known | Verdict::Noted(_) => Ok(version),
    }
}

/// Finds the SHA-256 of `file` in the text of a checksum file: lines `<hex>  <name>`, or one hash alone.
pub(super) fn find_sha256(text: &str, file: &str) -> Option<String> {
    text.lines().find_map(|line| {
        let (hash, name) = line
            .trim()
            .split_once(char::is_whitespace)
            .unwrap_or((line.trim(), ""));
        let name = name.trim_start();
        let name = name.strip_prefix('*').unwrap_or(name);
        let name = name.rsplit('/').next().unwrap_or(name);
        (is_sha256(hash) && (name.is_empty() || name == file)).then(|| hash.to_ascii_lowercase())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const HASH: &str = "AAaa0000000000000000000000000000000000000000000000000000000000ff";

    fn from(change: impl FnOnce(&mut InstallDriver)) -> Result<Source, ErrorBody> {
        let mut request = InstallDriver::default();
        change(&mut request);
        Source::new(request)
    }

    #[test]
    fn without_a_wish_the_newest_release_is_taken() {
        let source = from(|_| ()).unwrap();
        let subject = source.subject();
        assert!(
            subject.starts_with("https://github.com/firecracker-microvm/firecracker/releases/")
                && subject.ends_with(&format!("/v1.16.1/firecracker-v1.16.1-{ARCH}.tgz")),
            "{subject}"
        );
        assert_eq!(source.version, Some(NEWEST_RELEASE));
        assert_eq!(judge(NEWEST_RELEASE), Verdict::Known);
    }

    #[test]
    fn a_version_is_three_numbers_and_one_that_is_used() {
        for good in ["1.12.0", "v1.12.0"] {
            let source = from(|r| r.version = Some(good.to_owned())).unwrap();
            assert!(source.subject().contains("/v1.12.0/firecracker-v1.12.0-"));
        }
        for bad in [
            "1.12",
            "1.12.0.1",
            "1.+2.0",
            "../..",
            "1.12.0-dev",
            "",
            "1..2",
        ] {
            let error = from(|r| r.version = Some(bad.to_owned())).unwrap_err();
            assert_eq!(error.code, ErrorCode::InvalidRequest, "{bad}");
        }
        let old = from(|r| r.version = Some("0.25.0".to_owned())).unwrap_err();
        assert!(old.message.contains("too old"), "{old}");
    }

    #[test]
    fn plain_http_needs_a_checksum_or_this_machine() {
        let ask = |url: &str, sha256: Option<&str>| {
            from(|r| {
                r.url = Some(url.to_owned());
                r.sha256 = sha256.map(str::to_owned);
            })
        };
        for good in [
            "https://example.com/a.tgz",
            "http://127.0.0.1:80/a.tgz",
            "http://[::1]/a.tgz",
            "http://localhost/a.tgz",
        ] {
            assert!(ask(good, None).is_ok(), "{good}");
        }
        for bad in [
            "http://example.com/a.tgz",
            "http://127.0.0.1.example.com/a.tgz",
            "ftp://127.0.0.1/a.tgz",
            "file:///etc/passwd",
            "a.tgz",
        ] {
            let error = ask(bad, None).unwrap_err();
            assert_eq!(error.code, ErrorCode::InvalidRequest, "{bad}");
        }
        let error = ask("http://example.com/a.tgz", None).unwrap_err();
        assert!(error.hints[0].contains("--sha256"), "{error:?}");
        let source = ask("http://example.com/a.tgz", Some(HASH)).unwrap();
        assert_eq!(source.sha256, Some(HASH.to_ascii_lowercase()));
        assert!(ask("ftp://example.com/a.tgz", Some(HASH)).is_err());
    }

    #[test]
    fn secrets_of_a_url_are_not_shown() {
        let source =
            from(|r| r.url = Some("https://me:pass@example.com/a.tgz?token=1".to_owned())).unwrap();
        assert_eq!(source.subject(), "https://example.com/a.tgz");
    }

    #[test]
    fn a_file_is_named_by_an_absolute_path_and_alone() {
        assert!(from(|r| r.from = Some("/tmp/a.tgz".to_owned())).is_ok());
        assert!(from(|r| r.from = Some("a.tgz".to_owned())).is_err());
        let both = from(|r| {
            r.from = Some("/tmp/a.tgz".to_owned());
            r.url = Some("https://example.com/a.tgz".to_owned());
        });
        assert!(both.is_err());
        assert!(from(|r| r.sha256 = Some("abc".to_owned())).is_err());
    }

    #[test]
    fn a_checksum_file_is_searched_for_the_archives_own_line() {
        let lower = Some(HASH.to_ascii_lowercase());
        for text in [
            format!("{HASH}  a.tgz\n"),
            format!("{HASH} *a.tgz"),
            format!("{HASH}  ./out/a.tgz\r\n"),
            format!("{HASH}\n"),
            format!("{}  b.tgz\n{HASH}  a.tgz\n", "0".repeat(64)),
        ] {
            assert_eq!(find_sha256(&text, "a.tgz"), lower, "{text}");
        }
        for text in ["", "a.tgz", "<html>", &format!("{HASH}  b.tgz")] {
            assert_eq!(find_sha256(text, "a.tgz"), None, "{text}");
        }
    }
}
