//! One connection to the host, from the first frame to its loss.
//!
//! `Hello` → (`Have`) → `Resume` → entries, heartbeats and answers to `Collect`, until the connection ends.

use std::convert::Infallible;
use std::fmt;
use std::io::{self, Read, Seek, Write};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use onequote_evidence::guest_frame::{
    ENTRIES_TARGET, GuestFrame, HEARTBEAT_SECONDS, HostFrame, VERSION, body_len, to_wire,
};
use onequote_evidence::id::{Blob, BootId};

use crate::list::{List, ListError};

/// The list cannot be waited for: its length is looked at this often.
const LOOK: Duration = Duration::from_millis(200);

/// How long the host may take to say what it has.
const HAVE_LIMIT: Duration = Duration::from_secs(20);

/// The host's frames are short; a longer one is none.
const MAX_HOST_FRAME: usize = 256;

/// Who we are, as [`GuestFrame::Hello`] has it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Identity {
    pub(crate) boot_id: BootId,
    pub(crate) hash_size: usize,
}

/// Why a session ended.
#[derive(Debug)]
pub(crate) enum SessionError {
    /// The connection was lost or never came.
    Connection(io::Error),
    /// The host said what the protocol doesn't have.
    Protocol(&'static str),
    /// Our own list failed us.
    List(ListError),
    /// The host has entries that are not the first ones of our list.
    OtherPast {
        /// Entries that the host has.
        host: u64,
        /// Entries of ours, at most as many.
        own: u64,
    },
}

impl fmt::Display for SessionError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Connection(error) => write!(f, "no connection to the host: {error}"),
            Self::Protocol(what) => write!(f, "the host broke the protocol: {what}"),
            Self::List(error) => error.fmt(f),
            Self::OtherPast { host, own } => {
                write!(f, "the host has {host} entries which are not the first {own} of this list")
            }
        }
    }
}

impl From<io::Error> for SessionError {
    fn from(error: io::Error) -> Self {
        Self::Connection(error)
    }
}

impl From<ListError> for SessionError {
    fn from(error: ListError) -> Self {
        Self::List(error)
    }
}

/// The length of the list, cheaply: reading the list's end costs the kernel a walk over all of it.
pub(crate) trait Count {
    /// Entries in the list now.
    fn count(&mut self) -> io::Result<u64>;
}

/// Serves one connection until it ends. `resumed` is called once the host has said how many entries it holds.
pub(crate) fn run<C: Read + Write + AsFd, S: Read + Seek>(
    stream: &mut C,
    list: &mut List<S>,
    count: &mut impl Count,
    identity: Identity,
    resumed: impl FnOnce(u64),
) -> Result<Infallible, SessionError> {
    let hello = GuestFrame::Hello {
        version: VERSION,
        boot_id: identity.boot_id,
        hash_size: identity.hash_size as u32,
        count: count.count()?,
    };
    stream.write_all(&to_wire(&hello))?;

    let mut inbox = Inbox::default();
    let HostFrame::Have { count: held, aggregate } = inbox.wait(stream, HAVE_LIMIT)? else {
        return Err(SessionError::Protocol("its first frame is not what it has"));
    };
    list.go_to(held)?;
    let own = list.passed();
    let resume = GuestFrame::Resume { count: own.count, aggregate: own.value };
    stream.write_all(&to_wire(&resume))?;
    if (own.count, own.value) != (held, aggregate) {
        return Err(SessionError::OtherPast { host: held, own: own.count });
    }
    resumed(held);

    let mut spoken = Instant::now();
    loop {
        let quiet = spoken.elapsed() >= Duration::from_secs(HEARTBEAT_SECONDS);
        // Once a heartbeat the list is read whatever its counter says.
        if (quiet || count.count()? != list.passed().count) && send_new(stream, list)? {
            spoken = Instant::now();
        } else if quiet {
            stream.write_all(&to_wire(&GuestFrame::Heartbeat { count: list.passed().count }))?;
            spoken = Instant::now();
        }
        match inbox.poll(stream, LOOK)? {
            None => {}
            Some(HostFrame::Collect { id }) => {
                send_new(stream, list)?;
                let collected = GuestFrame::Collected { id, count: list.passed().count };
                stream.write_all(&to_wire(&collected))?;
                spoken = Instant::now();
            }
            Some(HostFrame::Have { .. }) => {
                return Err(SessionError::Protocol("it said twice what it has"));
            }
        }
    }
}

/// Sends all that is new; true if there was something.
fn send_new<C: Write, S: Read + Seek>(stream: &mut C, list: &mut List<S>) -> Result<bool, SessionError> {
    let mut some = false;
    while let Some(batch) = list.next_batch(ENTRIES_TARGET)? {
        let frame = GuestFrame::Entries { first: batch.first, entries: Blob(batch.bytes) };
        stream.write_all(&to_wire(&frame))?;
        some = true;
    }
    Ok(some)
}

/// Bytes from the host that are no whole frame yet.
#[derive(Default)]
struct Inbox {
    bytes: Vec<u8>,
}

impl Inbox {
    /// The next frame, or none if it does not come within `limit`.
    fn poll<C: Read + AsFd>(&mut self, stream: &mut C, limit: Duration) -> Result<Option<HostFrame>, SessionError> {
        let start = Instant::now();
        loop {
            if let Some(frame) = self.take()? {
                return Ok(Some(frame));
            }
            let left = limit.saturating_sub(start.elapsed());
            // Rounded up, or the last millisecond would be spent spinning.
            let timeout = PollTimeout::try_from(left + Duration::from_micros(999)).unwrap_or(PollTimeout::MAX);
            let mut wanted = [PollFd::new(stream.as_fd(), PollFlags::POLLIN)];
            match poll(&mut wanted, timeout) {
                Ok(0) => return Ok(None),
                Ok(_) => {}
                Err(nix::errno::Errno::EINTR) => continue,
                Err(error) => return Err(SessionError::Connection(error.into())),
            }
            let mut buffer = [0; MAX_HOST_FRAME];
            match stream.read(&mut buffer)? {
                0 => return Err(SessionError::Connection(io::ErrorKind::UnexpectedEof.into())),
                count => self.bytes.extend_from_slice(&buffer[..count]),
            }
        }
    }

    fn wait<C: Read + AsFd>(&mut self, stream: &mut C, limit: Duration) -> Result<HostFrame, SessionError> {
        self.poll(stream, limit)?.ok_or_else(|| SessionError::Connection(io::ErrorKind::TimedOut.into()))
    }

    fn take(&mut self) -> Result<Option<HostFrame>, SessionError> {
        let Some(prefix) = self.bytes.first_chunk::<4>() else { return Ok(None) };
        let length = body_len(*prefix)
            .ok()
            .filter(|length| *length <= MAX_HOST_FRAME)
            .ok_or(SessionError::Protocol("a frame of impossible length"))?;
        let Some(body) = self.bytes.get(4..4 + length) else { return Ok(None) };
        let frame = HostFrame::parse(body).map_err(|_| SessionError::Protocol("a malformed frame"))?;
        self.bytes.drain(..4 + length);
        Ok(Some(frame))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests;
