//! What can go wrong with a monitor.

use std::{io, sync::Arc, time::Duration};

/// A monitor's fault. Cloneable, since every caller of a connection that ends is told the same.
#[derive(Debug, Clone, thiserror::Error)]
pub enum QmpError {
    /// The socket could not be reached, or failed.
    #[error("the monitor's socket failed: {0}")]
    Io(Arc<io::Error>),
    /// QEMU closed the connection or ended.
    #[error("the monitor closed the connection")]
    Closed,
    /// No greeting came. Usually another client holds the monitor: QEMU serves one at a time.
    #[error("no greeting from the monitor within {0:?}: another client may hold it")]
    NoGreeting(Duration),
    /// The first line was no greeting: no QEMU listens there.
    #[error("this is no QEMU monitor, it began with {0:?}")]
    NotQmp(String),
    /// A command was not answered in time.
    #[error("the monitor did not answer {command} within {after:?}")]
    Timeout {
        /// The command.
        command: String,
        /// How long was waited.
        after: Duration,
    },
    /// QEMU refused a command.
    #[error("the monitor refused {command}: {} ({class})", desc.escape_debug())]
    Refused {
        /// The command.
        command: String,
        /// QEMU's error class.
        class: String,
        /// QEMU's words.
        desc: String,
    },
    /// An answer is not what the command should give.
    #[error("the monitor's answer to {command} is not understood: {what}")]
    Answer {
        /// The command.
        command: String,
        /// What is wrong with it.
        what: String,
    },
    /// A line is longer than the limit.
    #[error("the monitor sent a line longer than {0} bytes")]
    LineTooLong(usize),
    /// A line is not QMP.
    #[error("the monitor sent what is not QMP: {0:?}")]
    Rubbish(String),
}

impl QmpError {
    /// Whether QEMU refused because it does not know the command.
    #[must_use]
    pub fn is_unknown_command(&self) -> bool {
        matches!(self, Self::Refused { class, .. } if class == "CommandNotFound")
    }

    /// Whether what the command was about is not there.
    #[must_use]
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::Refused { class, .. } if class == "DeviceNotFound")
    }

    /// Whether nobody listens at the socket (any more).
    #[must_use]
    pub fn is_not_listening(&self) -> bool {
        matches!(self, Self::Io(e) if matches!(e.kind(), io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound))
    }

    /// The start of a line, to be shown.
    pub(super) fn excerpt(line: &[u8]) -> String {
        // It comes from a peer: control characters must not reach a log as they are.
        let start = String::from_utf8_lossy(&line[..line.len().min(80)]).escape_debug().to_string();
        if line.len() > 80 { start + "…" } else { start }
    }
}

impl From<io::Error> for QmpError {
    fn from(e: io::Error) -> Self {
        match e.kind() {
            io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => Self::Closed,
            _ => Self::Io(Arc::new(e)),
        }
    }
}
