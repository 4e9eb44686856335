//! Connections to QEMU's monitor (QMP): our own connection, `qapi`'s types.
//!
//! # Protocol
//! Both sides send JSON objects, one a line. QEMU begins with a greeting (`{"QMP": …}`), the client answers with
//! `qmp_capabilities`, and from then on commands (`{"execute", "arguments", "id"}`) are answered by `{"return", "id"}`
//! or `{"error", "id"}`, with events (`{"event", "data", "timestamp"}`) at any time in between
//! (QEMU `docs/interop/qmp-spec`).
//!
//! # State machine
//! *connecting* → greeting read in time → *negotiating* → capabilities accepted → *open* → *closed*.
//! An open connection has two tasks: one writes whole command lines, so that a cancelled caller never leaves half a
//! line behind; one reads lines and routes them: answers by their id to the caller that waits, if it still does, and
//! events to [`Events`]. Ids are never used twice in one connection. Anything that is not QMP closes the connection,
//! and every caller learns why. Dropping the last [`Qmp`] closes it too: QEMU serves one client a socket, and an
//! abandoned one would block the next.
//!
//! # Other people's commands
//! [`Qmp::pass`] takes a command that somebody else gave, under an id of our own, with a descriptor beside it if it
//! takes one, and gives QEMU's answer as it was written; a [`Tap`] is told every event as it was written.
//! Out-of-band execution is enabled where QEMU offers it, so that such a command can overtake ours.
//!
//! # Limits
//! A line is at most [`Limits::line`] bytes. At most [`Limits::events`] events wait to be taken; those that come while
//! so many wait are dropped and counted, and [`Event::Missed`] stands in the place where they were.

mod connection;
pub(crate) mod descriptors;
mod error;
mod events;
mod line;
mod peer;
#[cfg(test)]
mod tests;

use std::time::Duration;

pub(crate) use connection::listener;
pub use connection::{Answer, ErrorBody, Passed, Qmp, Tap, WeakQmp};
pub use error::QmpError;
pub use events::{Event, Events};

/// What a connection may use.
#[derive(Debug, Clone)]
pub struct Limits {
    /// The longest line from QEMU in bytes, without its end.
    pub line: usize,
    /// The most events that wait to be taken.
    pub events: usize,
    /// How long the greeting and the negotiation may take each. A monitor that already has a client stays silent.
    pub greeting: Duration,
    /// How long an answer may take.
    pub reply: Duration,
    /// Whether commands are to be able to overtake others, where QEMU offers that. QEMU then reads on while a command
    /// runs, which nobody but tools behind the intercept mode needs.
    pub oob: bool,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            line: 16 * 1024 * 1024,
            events: 4096,
            greeting: Duration::from_secs(5),
            reply: Duration::from_secs(30),
            oob: false,
        }
    }
}
