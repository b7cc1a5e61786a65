//! What the host's apt knows: packages to download, and the sources that images are made from.

use crate::context::Context;
use crate::error::BuildError;
use crate::run::{Outcome, Program};
use crate::unpack::field;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The distribution of the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Host {
    /// `debian` or `ubuntu`.
    pub(crate) distribution: String,
    /// The suite's code name, such as `bookworm`.
    pub(crate) suite: String,
}

/// Reads the host's `os-release`.
pub(crate) fn host() -> Result<Host, BuildError> {
    let path = Path::new("/etc/os-release");
    let text = std::fs::read_to_string(path).map_err(BuildError::io("read", path))?;
    parse_host(&text)
}

fn parse_host(text: &str) -> Result<Host, BuildError> {
    let value = |key: &str| {
        text.lines().find_map(|line| {
            let (found, value) = line.split_once('=')?;
            (found == key).then(|| value.trim_matches('"').to_owned())
        })
    };
    let unknown = |reason: String| BuildError::UnknownHost { reason };
    let distribution = value("ID").unwrap_or_default();
    if distribution != "debian" && distribution != "ubuntu" {
        let like = value("ID_LIKE").unwrap_or_default();
        return Err(unknown(format!(
            "`{distribution}` (like `{like}`) is neither debian nor ubuntu"
        )));
    }
    let suite = value("VERSION_CODENAME")
        .filter(|suite| !suite.is_empty() && suite.bytes().all(|b| b.is_ascii_lowercase()))
        .ok_or_else(|| unknown("/etc/os-release has no VERSION_CODENAME".to_owned()))?;
    Ok(Host {
        distribution,
        suite,
    })
}

/// Downloads `package` with apt, which checks it against the signed lists, into the cache; returns the file. A file
/// that is there already is taken.
pub(crate) fn download(package: &str, context: &Context) -> Result<PathBuf, BuildError> {
    let mut paths = download_all(&[package.to_owned()], context)?;
    paths.pop().ok_or_else(|| unknown_package(package))
}

/// Downloads several packages as [`download`] does one.
pub(crate) fn download_all(
    packages: &[String],
    context: &Context,
) -> Result<Vec<PathBuf>, BuildError> {
    if let Some(bad) = packages.iter().find(|package| !is_package_name(package)) {
        return Err(unknown_package(bad));
    }
    let folder = context.cache_dir.join("packages");
    std::fs::create_dir_all(&folder).map_err(BuildError::io("create", &folder))?;
    // Where a file is already, apt would print nothing.
    let elsewhere = Path::new("/");
    let listed = apt_get(
        elsewhere,
        &["download", "--print-uris"],
        packages,
        None,
        context,
    )?;
    if !listed.status.success() {
        let unknown = [
            "Unable to locate",
            "no installation candidate",
            "Can't select",
        ];
        if unknown.iter().any(|text| listed.stderr.contains(text)) {
            let named = packages.iter().find(|p| listed.stderr.contains(p.as_str()));
            return Err(missing(named.unwrap_or(&packages[0]), context)?);
        }
        listed.check("apt-get")?;
        return Ok(Vec::new());
    }
    let mut paths = Vec::new();
    let mut absent = Vec::new();
    let text = String::from_utf8_lossy(&listed.stdout).into_owned();
    for package in packages {
        let (name, bytes) = text
            .lines()
            .filter_map(parse_uri)
            .find(|(name, _)| name.split('_').next() == Some(package))
            .ok_or_else(|| unknown_package(package))?;
        let path = folder.join(&name);
        if !std::fs::metadata(&path).is_ok_and(|metadata| metadata.len() == bytes) {
            context.tell_amount("download", &name, None, Some(bytes));
            absent.push(package.clone());
        }
        paths.push(path);
    }
    if !absent.is_empty() {
        let stage = Some("download");
        apt_get(&folder, &["download", "-q"], &absent, stage, context)?.check("apt-get")?;
    }
    for path in &paths {
        std::fs::metadata(path).map_err(BuildError::io("find the downloaded", path))?;
    }
    Ok(paths)
}

fn unknown_package(package: &str) -> BuildError {
    BuildError::PackageUnknown {
        package: package.escape_debug().take(80).collect(),
    }
}

/// Whether apt lacks one package or all lists.
fn missing(package: &str, context: &Context) -> Result<BuildError, BuildError> {
    let arguments = [
        "indextargets",
        "--format",
        "$(FILENAME)",
        "Created-By: Packages",
    ];
    let lists = apt_get(Path::new("/"), &arguments, &[], None, context)?;
    if lists.stdout.trim_ascii().is_empty() {
        return Ok(BuildError::NoAptLists);
    }
    Ok(unknown_package(package))
}

fn apt_get(
    folder: &Path,
    arguments: &[&str],
    packages: &[String],
    stage: Option<&'static str>,
    context: &Context,
) -> Result<Outcome, BuildError> {
    let options = context.apt_options.iter().map(OsString::from);
    Program {
        name: "apt-get",
        package: "apt",
        // As root, apt would download as a user who cannot write here, and warn that it does not.
        arguments: ["-o", "APT::Sandbox::User=root"]
            .map(OsString::from)
            .into_iter()
            .chain(options)
            .chain(arguments.iter().map(OsString::from))
            .chain(packages.iter().map(OsString::from))
            .collect(),
        folder: Some(folder),
        environment: Vec::new(),
        limit: Duration::from_secs(1800),
        stage,
    }
    .run(context)
}

/// File name and size in a line of the form `'address' name size digest`.
fn parse_uri(line: &str) -> Option<(String, u64)> {
    let mut parts = line.strip_prefix('\'')?.trim_end().rsplit(' ');
    let _digest = parts.next()?;
    let bytes = parts.next()?.parse().ok()?;
    let name = parts.next()?;
    let safe = name.ends_with(".deb") && !name.starts_with('.') && !name.contains('/');
    safe.then(|| (name.to_owned(), bytes))
}

/// Whether the text may be a package's name.
pub(crate) fn is_package_name(text: &str) -> bool {
    text.len() >= 2
        && text.len() <= 128
        && text.starts_with(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit())
        && text
            .chars()
            .all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || "+-.".contains(c))
}

/// The host's own sources of `host`'s suite with its updates, as one-line entries of `sources.list`.
pub(crate) fn sources(host: &Host) -> Result<Vec<String>, BuildError> {
    let mut lines = Vec::new();
    let mut paths = vec![PathBuf::from("/etc/apt/sources.list")];
    let folder = Path::new("/etc/apt/sources.list.d");
    if let Ok(entries) = std::fs::read_dir(folder) {
        let mut more: Vec<PathBuf> = entries.filter_map(|e| Some(e.ok()?.path())).collect();
        more.sort();
        paths.extend(more);
    }
    for path in paths {
        let Ok(text) = std::fs::read_to_string(&path) else {
            continue;
        };
        let found = match path.extension().and_then(|e| e.to_str()) {
            Some("sources") => parse_deb822(&text),
            Some("list") => parse_one_line(&text),
            _ => Vec::new(),
        };
        lines.extend(found.into_iter().flat_map(|source| source.lines(host)));
    }
    lines.dedup();
    if lines.is_empty() {
        return Err(BuildError::NoSources {
            suite: host.suite.clone(),
        });
    }
    Ok(lines)
}

#[derive(Debug, Default, Clone, PartialEq, Eq)]
struct Source {
    uris: Vec<String>,
    suites: Vec<String>,
    components: Vec<String>,
    signed_by: Option<String>,
}

impl Source {
    /// Entries for what belongs to the host's suite; other vendors' suites have other names or no `main`.
    fn lines(&self, host: &Host) -> Vec<String> {
        let components: Vec<&str> = self
            .components
            .iter()
            .map(String::as_str)
            .filter(|c| ["main", "universe"].contains(c))
            .collect();
        if !components.contains(&"main") {
            return Vec::new();
        }
        let option = match &self.signed_by {
            Some(keyring) if keyring.starts_with('/') => format!("[signed-by={keyring}] "),
            _ => String::new(),
        };
        let ours = |suite: &&String| {
            let rest = suite.strip_prefix(host.suite.as_str());
            matches!(rest, Some("" | "-updates" | "-security" | "/updates"))
        };
        let mut lines = Vec::new();
        for suite in self.suites.iter().filter(ours) {
            for uri in &self.uris {
                lines.push(format!(
                    "deb {option}{uri} {suite} {}",
                    components.join(" ")
                ));
            }
        }
        lines
    }
}

fn words(text: &str) -> Vec<String> {
    text.split_whitespace().map(str::to_owned).collect()
}

fn parse_deb822(text: &str) -> Vec<Source> {
    let plain: Vec<&str> = text.lines().filter(|line| !line.starts_with('#')).collect();
    let stanzas = plain.split(|line| line.trim().is_empty());
    stanzas
        .filter_map(|stanza| {
            let stanza = stanza.join("\n");
            let disabled = field(&stanza, "Enabled").is_some_and(|v| v.eq_ignore_ascii_case("no"));
            if disabled || !words(&field(&stanza, "Types")?).contains(&"deb".to_owned()) {
                return None;
            }
            Some(Source {
                uris: words(&field(&stanza, "URIs")?),
                suites: words(&field(&stanza, "Suites")?),
                components: words(&field(&stanza, "Components").unwrap_or_default()),
                signed_by: field(&stanza, "Signed-By"),
            })
        })
        .collect()
}

fn parse_one_line(text: &str) -> Vec<Source> {
    text.lines()
        .filter_map(|line| {
            let line = line.split('#').next()?.trim();
            let rest = line.strip_prefix("deb")?;
            let rest = rest.strip_prefix([' ', '\t'])?.trim_start();
            let (options, rest) = match rest.strip_prefix('[') {
                Some(rest) => rest.split_once(']')?,
                None => ("", rest),
            };
            let signed_by = options
                .split_whitespace()
                .find_map(|option| option.strip_prefix("signed-by="))
                .map(str::to_owned);
            let mut parts = rest.split_whitespace().map(str::to_owned);
            Some(Source {
                uris: vec![parts.next()?],
                suites: vec![parts.next()?],
                components: parts.collect(),
                signed_by,
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bookworm() -> Host {
        parse_host("ID=debian\nVERSION_CODENAME=bookworm\n").unwrap()
    }

    fn lines(sources: &[Source]) -> Vec<String> {
        sources
            .iter()
            .flat_map(|source| source.lines(&bookworm()))
            .collect()
    }

    #[test]
    fn deb822_sources_of_the_host_are_taken_and_others_left() {
        let text = "Types: deb deb-src\n# a comment\nURIs: http://mirror.example/debian\nSuites: bookworm bookworm-updates bookworm-backports\nComponents: main contrib\nSigned-By: /usr/share/keyrings/some.gpg\n\nTypes: deb\nURIs: http://other.example\nSuites: nodistro\nComponents: main\n\nEnabled: no\nTypes: deb\nURIs: http://off.example\nSuites: bookworm\nComponents: main\n";
        assert_eq!(
            lines(&parse_deb822(text)),
            [
                "deb [signed-by=/usr/share/keyrings/some.gpg] http://mirror.example/debian bookworm main",
                "deb [signed-by=/usr/share/keyrings/some.gpg] http://mirror.example/debian bookworm-updates main",
            ]
        );
    }

    #[test]
    fn one_line_sources_of_the_host_are_taken_and_others_left() {
        let text = "# deb http://a bookworm main\ndeb [arch=amd64 signed-by=/k.gpg] http://b/debian bookworm main non-free # why\ndeb-src http://c bookworm main\ndeb http://security/ bookworm-security main\ndeb http://vendor bookworm stable\ndeb\n";
        assert_eq!(
            lines(&parse_one_line(text)),
            [
                "deb [signed-by=/k.gpg] http://b/debian bookworm main",
                "deb http://security/ bookworm-security main",
            ]
        );
    }

    #[test]
    fn the_host_must_be_a_known_distribution() {
        assert!(parse_host("ID=fedora\n").is_err());
        assert!(parse_host("ID=debian\n").is_err());
        assert!(parse_host("ID=debian\nVERSION_CODENAME=\"../x\"\n").is_err());
        assert_eq!(bookworm().suite, "bookworm");
    }

    #[test]
    fn a_file_name_from_a_package_list_is_never_a_path() {
        let line = "'http://h/pool/a_1%3a2_amd64.deb' a_1%3a2_amd64.deb 1234 SHA256:00\n";
        assert_eq!(
            parse_uri(line),
            Some(("a_1%3a2_amd64.deb".to_owned(), 1234))
        );
        for bad in [
            "'u' ../a.deb 1 x",
            "'u' .deb 1 x",
            "'u' a.deb y x",
            "E: nothing",
            "",
        ] {
            assert_eq!(parse_uri(bad), None, "{bad}");
        }
    }

    #[test]
    fn package_names_are_never_options() {
        for good in ["linux-image-6.12.95+deb12-cloud-amd64", "g++", "a0"] {
            assert!(is_package_name(good), "{good}");
        }
        for bad in ["", "a", "-o", "--allow", "a b", "a/b", "A", "a,b", "a=1"] {
            assert!(!is_package_name(bad), "{bad}");
        }
    }
}
