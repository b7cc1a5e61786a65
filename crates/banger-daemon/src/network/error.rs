//! Why the network did not do what it was asked, and what helps.

use banger_api::error::{ErrorBody, ErrorCode};
use banger_core::publish::Protocol;
use banger_host::net::host::HostOpError;
use banger_host::net::keeper::KeeperError;
use banger_host::net::pasta::PastaError;
use std::io::ErrorKind;
use std::net::{SocketAddr, SocketAddrV4};

/// The node that guests' networks need.
const TUN: &str = "/dev/net/tun";
const TUN_HINT: &str = "make the node usable for everyone: `sudo chmod 0666 /dev/net/tun`";
const DOCTOR_HINT: &str = "`banger doctor` checks the host";
const PASTA_HINT: &str = "guests get out by `pasta` of the package `passt` (`sudo apt-get install passt`), where the \
    host itself is connected; `banger doctor` checks the host";

/// Why the network did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NetworkError {
    #[error("the instance's network namespace cannot be used")]
    Keeper(#[from] KeeperError),
    #[error("the host's end of the network cannot be set up")]
    Host(#[from] HostOpError),
    #[error("guests cannot be given a way to the internet")]
    Pasta(#[from] PastaError),
    #[error("cannot listen on {listen} ({protocol})")]
    Listen {
        protocol: Protocol,
        listen: SocketAddr,
        #[source]
        source: std::io::Error,
    },
    #[error("cannot listen on {listen} ({protocol}): it leads to the VM at {guest}")]
    Taken {
        protocol: Protocol,
        listen: SocketAddr,
        guest: SocketAddrV4,
    },
    #[error("a descriptor of the network namespace cannot be copied")]
    Descriptor(#[source] std::io::Error),
    #[error("the keeper of the network namespace answered something else")]
    Answer,
    #[error("the network's actor has ended")]
    Closed,
}

/// A network's error on the wire.
pub(crate) fn network_error(error: &NetworkError) -> ErrorBody {
    let (code, hint) = told(error);
    let body = ErrorBody::from_error(code, error);
    match hint {
        Some(hint) => body.hint(hint),
        None => body,
    }
}

/// Whose matter it is, and what helps.
fn told(error: &NetworkError) -> (ErrorCode, Option<String>) {
    if banger_host::error_chain(error).contains(TUN) {
        return (ErrorCode::HostUnfit, Some(TUN_HINT.to_owned()));
    }
    match error {
        NetworkError::Listen {
            protocol, source, ..
        } => not_listening(*protocol, source.kind()),
        NetworkError::Taken { .. } => (
            ErrorCode::Conflict,
            Some(
                "choose another port of the host; `banger port list` shows whose it is".to_owned(),
            ),
        ),
        NetworkError::Pasta(_) => (ErrorCode::HostUnfit, Some(PASTA_HINT.to_owned())),
        NetworkError::Keeper(KeeperError::NotReady { .. } | KeeperError::Start { .. })
        | NetworkError::Host(HostOpError::RouteInTheWay { .. }) => {
            (ErrorCode::HostUnfit, Some(DOCTOR_HINT.to_owned()))
        }
        NetworkError::Keeper(_)
        | NetworkError::Host(_)
        | NetworkError::Descriptor(_)
        | NetworkError::Answer
        | NetworkError::Closed => (ErrorCode::Internal, None),
    }
}

fn not_listening(protocol: Protocol, kind: ErrorKind) -> (ErrorCode, Option<String>) {
    let (code, hint) = match kind {
        ErrorKind::AddrInUse => {
            let sockets = match protocol {
                Protocol::Tcp => "ss -ltnp",
                Protocol::Udp => "ss -lunp",
            };
            let hint = format!("choose another port of the host; `{sockets}` shows who listens");
            (ErrorCode::Conflict, hint)
        }
        ErrorKind::PermissionDenied => (
            ErrorCode::HostUnfit,
            "low ports are root's: choose another port of the host, from 1024 on".to_owned(),
        ),
        ErrorKind::AddrNotAvailable => (
            ErrorCode::HostUnfit,
            "listen on an address of this host; `ip address` shows them".to_owned(),
        ),
        _ => return (ErrorCode::Internal, None),
    };
    (code, Some(hint))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::Ipv4Addr;

    fn listen(kind: ErrorKind) -> ErrorBody {
        network_error(&NetworkError::Listen {
            protocol: Protocol::Tcp,
            listen: (Ipv4Addr::LOCALHOST, 80).into(),
            source: kind.into(),
        })
    }

    #[test]
    fn a_port_that_cannot_be_had_comes_with_what_helps() {
        let busy = listen(ErrorKind::AddrInUse);
        assert_eq!(busy.code, ErrorCode::Conflict);
        assert!(busy.hints[0].contains("`ss -ltnp`"));
        let low = listen(ErrorKind::PermissionDenied);
        assert_eq!(low.code, ErrorCode::HostUnfit);
        assert!(low.hints[0].contains("1024"));
    }

    #[test]
    fn without_pasta_its_package_is_named() {
        let why = "cannot start `pasta` (is `passt` installed?)".to_owned();
        let body = network_error(&NetworkError::Pasta(PastaError::Failed { why }));
        assert_eq!(body.code, ErrorCode::HostUnfit);
        assert!(body.hints[0].contains("apt-get install passt"));
    }
}
