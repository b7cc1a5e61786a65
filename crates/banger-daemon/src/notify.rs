//! Tells the service manager that started the daemon how far it is, where one did.

use std::io;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram};

/// The daemon serves.
pub(crate) const READY: &str = "READY=1";
/// The daemon goes down.
pub(crate) const STOPPING: &str = "STOPPING=1";

/// Says `state` to whoever waits for it. That nobody hears it is not worth more than a line in the log.
pub(crate) fn notify(state: &str) {
    let Ok(socket) = std::env::var("NOTIFY_SOCKET") else {
        return;
    };
    if let Err(error) = send(&socket, state) {
        tracing::warn!(socket, %error, "the service manager could not be told `{state}`");
    }
}

fn send(socket: &str, state: &str) -> io::Result<()> {
    let address = match socket.strip_prefix('@') {
        Some(name) => SocketAddr::from_abstract_name(name)?,
        None => SocketAddr::from_pathname(socket)?,
    };
    UnixDatagram::unbound()?.send_to_addr(state.as_bytes(), &address)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_and_an_abstract_name_are_both_reached() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("notify");
        let name = format!("banger-notify-test-{}", std::process::id());
        for (socket, address) in [
            (
                path.display().to_string(),
                SocketAddr::from_pathname(&path).unwrap(),
            ),
            (
                format!("@{name}"),
                SocketAddr::from_abstract_name(&name).unwrap(),
            ),
        ] {
            let heard = UnixDatagram::bind_addr(&address).unwrap();
            send(&socket, READY).unwrap();
            let mut buffer = [0; 64];
            let count = heard.recv(&mut buffer).unwrap();
            assert_eq!(&buffer[..count], b"READY=1");
        }
        assert!(send("/nonexistent/notify", READY).is_err());
    }
}
