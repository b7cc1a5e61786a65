//! A TCP connection to a guest that may still be starting.

use crate::exec::timespec;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fd::OwnedFd;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use std::net::SocketAddrV4;
use std::time::{Duration, Instant};

/// The first attempt's limit. A guest whose network comes up just after the first packet would otherwise be found
/// only when the kernel repeats it, a second later; one that is slow to answer gets twice the time at each attempt.
const FIRST_ATTEMPT: Duration = Duration::from_millis(200);
const LONGEST_ATTEMPT: Duration = Duration::from_secs(5);
/// The pause after an attempt that failed at once: the guest is up, its server not yet, or its address is unknown.
const PAUSE: Duration = Duration::from_millis(20);

/// The guest could not be reached in time.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// It refused, or nobody is there.
    #[error("cannot connect to {address} within {} s", .timeout.as_secs_f32())]
    Timeout {
        /// Whom.
        address: SocketAddrV4,
        /// The limit.
        timeout: Duration,
        /// What the last attempt ran into.
        #[source]
        source: Errno,
    },
    /// The attempt itself makes no sense.
    #[error("cannot connect to {address}")]
    Failed {
        /// Whom.
        address: SocketAddrV4,
        /// Why.
        #[source]
        source: Errno,
    },
}

/// Connects, trying again until `timeout` is over. The socket blocks.
///
/// # Errors
/// Nobody accepted in time.
pub fn connect(address: SocketAddrV4, timeout: Duration) -> Result<OwnedFd, ConnectError> {
    let deadline = Instant::now() + timeout;
    let mut attempt = FIRST_ATTEMPT;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let limit = attempt.min(left);
        let error = match connect_once(address, limit) {
            Ok(socket) => return Ok(socket),
            Err(error) => error,
        };
        let over = Instant::now() + PAUSE >= deadline;
        match error {
            Errno::TIMEDOUT if !over => attempt = (attempt * 2).min(LONGEST_ATTEMPT),
            Errno::CONNREFUSED
            | Errno::CONNRESET
            | Errno::HOSTUNREACH
            | Errno::NETUNREACH
            | Errno::HOSTDOWN
                if !over =>
            {
                std::thread::sleep(PAUSE);
            }
            source if over => {
                return Err(ConnectError::Timeout {
                    address,
                    timeout,
                    source,
                });
            }
            source => return Err(ConnectError::Failed { address, source }),
        }
    }
}

fn connect_once(address: SocketAddrV4, limit: Duration) -> Result<OwnedFd, Errno> {
    let deadline = Instant::now() + limit;
    let socket = rustix::net::socket_with(
        AddressFamily::INET,
        SocketType::STREAM,
        SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
        None,
    )?;
    match rustix::net::connect(&socket, &address) {
        Ok(()) => {}
        Err(Errno::INPROGRESS) => loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match poll(
                &mut [PollFd::new(&socket, PollFlags::OUT)],
                Some(&timespec(left)),
            ) {
                Ok(0) => return Err(Errno::TIMEDOUT),
                Ok(_) => break rustix::net::sockopt::socket_error(&socket)??,
                Err(Errno::INTR) => {}
                Err(error) => return Err(error),
            }
        },
        Err(error) => return Err(error),
    }
    rustix::io::ioctl_fionbio(&socket, false)?;
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{Ipv4Addr, TcpListener};

    #[test]
    fn a_server_that_comes_late_is_still_reached() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        drop(listener);
        let address = SocketAddrV4::new(Ipv4Addr::LOCALHOST, port);
        let client = std::thread::spawn(move || connect(address, Duration::from_secs(10)));
        assert!(connect_once(address, Duration::from_secs(1)).is_err());
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port)).unwrap();
        client.join().unwrap().unwrap();
        drop(listener);
    }

    #[test]
    fn a_server_that_never_comes_is_given_up_with_the_cause() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        drop(listener);
        let address = SocketAddrV4::new(Ipv4Addr::LOCALHOST, port);
        let error = connect(address, Duration::from_millis(100)).unwrap_err();
        assert!(
            matches!(
                error,
                ConnectError::Timeout {
                    source: Errno::CONNREFUSED,
                    ..
                }
            ),
            "{error}"
        );
    }
}
