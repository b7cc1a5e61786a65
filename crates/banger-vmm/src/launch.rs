//! Spawning a shim, and the one message that a shim starts with.

use crate::process::timespec;
use crate::protocol::{Launch, Launched};
use rustix::event::{PollFd, PollFlags};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags,
    SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, SocketType,
};
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

/// The most descriptors that go with a [`Launch`].
pub const MAX_DESCRIPTORS: usize = 4;
/// The longest message.
pub(crate) const MAX_MESSAGE_BYTES: usize = 128 * 1024;
/// How long a shim may take to answer; its own limit for the VMM is shorter.
const ANSWER_LIMIT: Duration = Duration::from_secs(70);
const DESCRIPTOR_SPACE: usize = rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS));

/// Why a shim did not answer. A shim that answers that its VMM failed is no error.
#[derive(Debug, thiserror::Error)]
pub enum SpawnError {
    /// It could not be started.
    #[error("cannot start the shim `{}`", program.display())]
    Start {
        /// The shim.
        program: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It could not be talked to.
    #[error("cannot talk to the shim `{}`", program.display())]
    Talk {
        /// The shim.
        program: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It ended, or did not answer in time; it was killed.
    #[error("the shim `{}` gave no answer: {why}", program.display())]
    NoAnswer {
        /// The shim.
        program: PathBuf,
        /// What happened instead.
        why: String,
    },
}

/// A shim that waits for the one message that it starts with. Dropped without, it ends.
#[derive(Debug)]
pub struct Waiting {
    program: PathBuf,
    socket: OwnedFd,
    /// There until it is launched.
    child: Option<Child>,
}

impl Drop for Waiting {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            // Its socket's end would end it, too, but somebody has to collect it.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Starts a shim, which then waits for its [`Launch`]: what it is to do need not be known yet.
///
/// # Errors
/// The program cannot be started.
pub fn spawn(shim_program: &Path) -> Result<Waiting, SpawnError> {
    let start = |source| SpawnError::Start {
        program: shim_program.to_owned(),
        source,
    };
    let (ours, theirs) = rustix::net::socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )
    .map_err(|error| start(error.into()))?;
    #[expect(
        clippy::disallowed_methods,
        reason = "the one place where a shim starts: a long-lived child that outlives the daemon"
    )]
    let mut command = Command::new(shim_program);
    let child = command
        .stdin(Stdio::from(theirs))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .map_err(start)?;
    // The command holds the other end, whose closing says that the shim is gone.
    drop(command);
    Ok(Waiting {
        program: shim_program.to_owned(),
        socket: ours,
        child: Some(child),
    })
}

impl Waiting {
    /// The shim's process id; `None` only after it was launched.
    pub fn pid(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }

    /// Gives the shim `launch` and the descriptors that it names, and waits for its answer (at most 20 seconds).
    ///
    /// The child outlives its parent. A living parent should wait for it, or it stays a zombie; one whose launch
    /// failed has been waited for, and is none.
    ///
    /// # Errors
    /// It does not answer; it was killed.
    pub fn launch(
        mut self,
        launch: &Launch,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<(Launched, Option<Child>), SpawnError> {
        let answer = send(&self.socket, launch, descriptors)
            .and_then(|()| receive_answer(&self.socket))
            .map_err(|source| SpawnError::Talk {
                program: self.program.clone(),
                source,
            })?;
        let launched = answer.map_err(|why| SpawnError::NoAnswer {
            program: self.program.clone(),
            why,
        })?;
        let mut child = self.child.take();
        if matches!(launched, Launched::Failed { .. })
            && let Some(mut child) = child.take()
        {
            // It has nothing left to do but to exit.
            let _ = child.wait();
        }
        Ok((launched, child))
    }
}

fn send(socket: &OwnedFd, launch: &Launch, descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
    if descriptors.len() != launch.descriptors.len() {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "the launch names another number of descriptors",
        ));
    }
    let message = serde_json::to_vec(launch)?;
    let mut space = [MaybeUninit::uninit(); DESCRIPTOR_SPACE];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "too many descriptors",
        ));
    }
    rustix::net::sendmsg(
        socket,
        &[IoSlice::new(&message)],
        &mut ancillary,
        SendFlags::NOSIGNAL,
    )?;
    Ok(())
}

fn receive_answer(socket: &OwnedFd) -> io::Result<Result<Launched, String>> {
    let mut polled = [PollFd::new(socket, PollFlags::IN)];
    let ready = rustix::io::retry_on_intr(|| {
        rustix::event::poll(&mut polled, Some(&timespec(ANSWER_LIMIT)))
    })?;
    if ready == 0 {
        return Ok(Err(format!(
            "nothing came within {} seconds",
            ANSWER_LIMIT.as_secs()
        )));
    }
    let mut message = vec![0; MAX_MESSAGE_BYTES];
    let (length, _) = rustix::net::recv(socket, message.as_mut_slice(), RecvFlags::empty())?;
    if length == 0 {
        return Ok(Err("it ended".to_owned()));
    }
    Ok(serde_json::from_slice(&message[..length]).map_err(|error| error.to_string()))
}

/// Receives the one message a shim starts with; `None` if the sender is gone.
pub(crate) fn receive(socket: BorrowedFd<'_>) -> io::Result<Option<(Launch, Vec<OwnedFd>)>> {
    let mut message = vec![0; MAX_MESSAGE_BYTES];
    let mut space = [MaybeUninit::uninit(); DESCRIPTOR_SPACE];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let received = rustix::io::retry_on_intr(|| {
        rustix::net::recvmsg(
            socket,
            &mut [IoSliceMut::new(&mut message)],
            &mut ancillary,
            RecvFlags::CMSG_CLOEXEC,
        )
    })?;
    let descriptors: Vec<OwnedFd> = ancillary
        .drain()
        .filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(descriptors) => Some(descriptors),
            _ => None,
        })
        .flatten()
        .collect();
    if received.bytes == 0 {
        return Ok(None);
    }
    let refuse = |why: &str| Err(io::Error::new(io::ErrorKind::InvalidData, why));
    if received
        .flags
        .intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC)
    {
        return refuse("the launch message was cut off");
    }
    let launch: Launch = serde_json::from_slice(&message[..received.bytes])?;
    if launch.descriptors.len() != descriptors.len() {
        return refuse("the launch names another number of descriptors");
    }
    Ok(Some((launch, descriptors)))
}

/// Sends a shim's answer.
pub(crate) fn answer(socket: BorrowedFd<'_>, launched: &Launched) -> io::Result<()> {
    let message = serde_json::to_vec(launched)?;
    rustix::net::send(socket, &message, SendFlags::NOSIGNAL)?;
    Ok(())
}
