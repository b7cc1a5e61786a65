//! The command line of the system's `ssh`, for one VM; and the configuration of the person's own `ssh`, for all.
//!
//! On the command line nothing of the person's own ssh configuration takes part, the key is banger's own, and the VM's
//! host key is the pinned one: `ssh` gets it from a command that prints it, so that no file is left behind.

use std::ffi::OsString;
use std::path::Path;

/// What an `ssh` command line is made of.
#[derive(Debug, Clone)]
pub(crate) struct SshTarget<'a> {
    /// This program.
    pub(crate) banger: &'a Path,
    /// The private key.
    pub(crate) identity: &'a Path,
    /// The VM's id, which stands for its host name.
    pub(crate) id: String,
    /// The VM's address.
    pub(crate) address: String,
    /// The public half of the VM's host key, as OpenSSH writes it.
    pub(crate) host_key: &'a str,
    /// Connect through the daemon rather than to the address.
    pub(crate) through_daemon: bool,
    /// Ask for a terminal although there is a command.
    pub(crate) tty: bool,
}

/// The host key is not `type base64`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the pinned host key `{}` is no OpenSSH public key", .0.escape_debug())]
pub(crate) struct HostKeyError(pub(crate) String);

/// The way to the guest never leaves this machine, and the default costs an emulated guest half a second.
const KEX: &str = "^curve25519-sha256";

/// The end of the names that VMs have as hosts.
const DOMAIN: &str = ".vm";

/// The VM that a host is, as ssh says it: `otter.vm`, or `[otter.vm]:2222` where the port is not 22.
pub(crate) fn vm_of_host(host: &str) -> &str {
    let bare = host.strip_prefix('[').and_then(|rest| rest.split_once(']'));
    let name = bare.map_or(host, |(name, _)| name);
    name.strip_suffix(DOMAIN).unwrap_or(name)
}

/// What holds however ssh comes to a guest: its pinned key alone is believed, and it knows one key of ours.
const ALWAYS: [(&str, &str); 9] = [
    ("IdentitiesOnly", "yes"),
    ("IdentityAgent", "none"),
    ("PreferredAuthentications", "publickey"),
    ("KexAlgorithms", KEX),
    ("UserKnownHostsFile", "/dev/null"),
    ("GlobalKnownHostsFile", "/dev/null"),
    ("StrictHostKeyChecking", "yes"),
    ("UpdateHostKeys", "no"),
    // An emulated guest takes its time to answer.
    ("ConnectTimeout", "20"),
];

/// A block of ssh's configuration for all VMs by name: `banger` is this program, `identity` the private key.
pub(crate) fn config_block(banger: &Path, identity: &Path) -> String {
    let banger = banger.to_string_lossy();
    let own = [
        "User root".to_owned(),
        format!("ProxyCommand {} vm proxy %h %p", shell_word(&banger)),
        format!(
            "KnownHostsCommand {} vm known-host %H",
            config_word(&banger)
        ),
        format!("IdentityFile {}", config_word(identity.to_string_lossy())),
    ];
    let always = ALWAYS.map(|(key, value)| format!("{key} {value}"));
    let lines: String = own
        .iter()
        .chain(&always)
        .map(|line| format!("  {line}\n"))
        .collect();
    format!(
        "# What `banger ssh-config` printed: `ssh NAME{DOMAIN}` reaches the VM NAME.\nHost *{DOMAIN}\n{lines}"
    )
}

/// The arguments after `ssh`.
///
/// # Errors
/// The host key is not what OpenSSH writes.
pub(crate) fn arguments(
    target: &SshTarget<'_>,
    command: &[String],
) -> Result<Vec<OsString>, HostKeyError> {
    let (kind, key) =
        split_host_key(target.host_key).ok_or_else(|| HostKeyError(target.host_key.to_owned()))?;
    let banger = target.banger.to_string_lossy();
    let known_host = [banger.as_ref(), "vm", "known-host", &target.id, kind, key].map(config_word);
    let mut options = vec![
        format!(
            "IdentityFile={}",
            config_word(target.identity.to_string_lossy())
        ),
        format!("KnownHostsCommand={}", known_host.join(" ")),
        format!("HostKeyAlias={}", target.id),
        "LogLevel=ERROR".to_owned(),
    ];
    options.extend(ALWAYS.map(|(key, value)| format!("{key}={value}")));
    if target.through_daemon {
        let proxy = [banger.as_ref(), "vm", "proxy", &target.id].map(shell_word);
        options.push(format!("ProxyCommand={} %p", proxy.join(" ")));
    }
    if !command.is_empty() {
        options.push("BatchMode=yes".to_owned());
    }
    let mut arguments: Vec<OsString> = vec!["-F".into(), "/dev/null".into()];
    if target.tty {
        arguments.push("-t".into());
    }
    for option in options {
        arguments.push("-o".into());
        arguments.push(option.into());
    }
    arguments.push(format!("root@{}", target.address).into());
    // `ssh` would read options behind the destination too.
    if !command.is_empty() {
        arguments.push("--".into());
    }
    arguments.extend(command.iter().map(OsString::from));
    Ok(arguments)
}

/// Type and key of a public host key; its comment is left out.
pub(crate) fn split_host_key(line: &str) -> Option<(&str, &str)> {
    let mut words = line.split_ascii_whitespace();
    let (kind, key) = (words.next()?, words.next()?);
    let is_kind = kind
        .bytes()
        .all(|byte| byte.is_ascii_alphanumeric() || b"-@.".contains(&byte));
    let is_key = key
        .bytes()
        .all(|byte| byte.is_ascii_alphanumeric() || b"+/=".contains(&byte));
    (is_kind && is_key).then_some((kind, key))
}

/// A word as ssh's configuration reads it: quoted, with its `%` tokens taken literally.
fn config_word(word: impl AsRef<str>) -> String {
    let escaped = word
        .as_ref()
        .replace('\\', "\\\\")
        .replace('"', "\\\"")
        .replace('%', "%%");
    format!("\"{escaped}\"")
}

/// A word as the shell reads it, with ssh's `%` tokens taken literally.
fn shell_word(word: impl AsRef<str>) -> String {
    let escaped = word.as_ref().replace('\'', "'\\''").replace('%', "%%");
    format!("'{escaped}'")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn target(through_daemon: bool) -> SshTarget<'static> {
        SshTarget {
            banger: Path::new("/opt/100% mine/it's/banger"),
            identity: Path::new("/home/o/my \"keys\"/id_ed25519"),
            id: "0198c2a4-7d1e-7b3a-9c4d-1f2e3d4c5b6a".to_owned(),
            address: "172.16.0.2".to_owned(),
            host_key: "ssh-ed25519 AAAAC3Nza+/= root@calm-otter",
            through_daemon,
            tty: false,
        }
    }

    fn option(arguments: &[OsString], name: &str) -> Option<String> {
        let prefix = format!("{name}=");
        let found = arguments
            .iter()
            .find_map(|argument| argument.to_str()?.strip_prefix(&prefix));
        found.map(str::to_owned)
    }

    #[test]
    fn the_host_key_is_pinned_and_no_other_is_believed() {
        let arguments = arguments(&target(false), &[]).unwrap();
        assert_eq!(
            option(&arguments, "StrictHostKeyChecking").as_deref(),
            Some("yes")
        );
        assert_eq!(
            option(&arguments, "UserKnownHostsFile").as_deref(),
            Some("/dev/null")
        );
        assert_eq!(
            option(&arguments, "KnownHostsCommand").as_deref(),
            Some(
                "\"/opt/100%% mine/it's/banger\" \"vm\" \"known-host\" \"0198c2a4-7d1e-7b3a-9c4d-1f2e3d4c5b6a\" \"ssh-ed25519\" \"AAAAC3Nza+/=\""
            )
        );
        assert_eq!(
            option(&arguments, "HostKeyAlias").as_deref(),
            Some("0198c2a4-7d1e-7b3a-9c4d-1f2e3d4c5b6a")
        );
        assert_eq!(
            option(&arguments, "IdentityFile").as_deref(),
            Some("\"/home/o/my \\\"keys\\\"/id_ed25519\"")
        );
    }

    #[test]
    fn as_root_ssh_connects_to_the_address_itself() {
        let arguments = arguments(&target(false), &[]).unwrap();
        assert_eq!(option(&arguments, "ProxyCommand"), None);
        assert_eq!(arguments.last().unwrap(), "root@172.16.0.2");
        assert_eq!(option(&arguments, "BatchMode"), None);
    }

    #[test]
    fn without_root_ssh_goes_through_the_daemon() {
        let arguments = arguments(&target(true), &[]).unwrap();
        assert_eq!(
            option(&arguments, "ProxyCommand").as_deref(),
            Some(
                "'/opt/100%% mine/it'\\''s/banger' 'vm' 'proxy' '0198c2a4-7d1e-7b3a-9c4d-1f2e3d4c5b6a' %p"
            )
        );
    }

    #[test]
    fn a_host_is_a_vm_also_at_another_port() {
        assert_eq!(vm_of_host("otter.vm"), "otter");
        assert_eq!(vm_of_host("[otter.vm]:2222"), "otter");
        assert_eq!(vm_of_host("otter"), "otter");
    }

    #[test]
    fn the_configuration_for_all_vms_holds_with_any_path() {
        let block = config_block(
            Path::new("/opt/100% mine/it's/banger"),
            Path::new("/home/o/my \"keys\"/id_ed25519"),
        );
        insta::assert_snapshot!(block, @r#"
        # What `banger ssh-config` printed: `ssh NAME.vm` reaches the VM NAME.
        Host *.vm
          User root
          ProxyCommand '/opt/100%% mine/it'\''s/banger' vm proxy %h %p
          KnownHostsCommand "/opt/100%% mine/it's/banger" vm known-host %H
          IdentityFile "/home/o/my \"keys\"/id_ed25519"
          IdentitiesOnly yes
          IdentityAgent none
          PreferredAuthentications publickey
          KexAlgorithms ^curve25519-sha256
          UserKnownHostsFile /dev/null
          GlobalKnownHostsFile /dev/null
          StrictHostKeyChecking yes
          UpdateHostKeys no
          ConnectTimeout 20
        "#);
    }

    #[test]
    fn a_command_follows_the_destination_as_it_is() {
        let command = ["uname -a; id".to_owned(), "-x".to_owned()];
        let arguments = arguments(&target(false), &command).unwrap();
        let end: Vec<_> = arguments.iter().rev().take(4).rev().collect();
        assert_eq!(end, ["root@172.16.0.2", "--", "uname -a; id", "-x"]);
        assert_eq!(option(&arguments, "BatchMode").as_deref(), Some("yes"));
    }

    #[test]
    fn a_host_key_cannot_smuggle_words_into_the_command() {
        for bad in [
            "",
            "ssh-ed25519",
            "ssh-ed25519 AA\"BB",
            "ssh%h AAAA",
            "a;b AAAA",
        ] {
            let target = SshTarget {
                host_key: bad,
                ..target(false)
            };
            assert!(arguments(&target, &[]).is_err(), "{bad}");
        }
    }
}
