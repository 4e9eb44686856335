//! Guests' run time: one append-only list for each boot of each guest, bound to the TPM as it grows.
//!
//! ```text
//! vsock ──► protocol (one task a connection) ──► writer (one task) ──► files ──► log (PCR 13)
//!              │ looks entries up                   │      ▲
//!              └────────────► dictionary ◄──adds────┘      │
//! quote: collect, then lists for the evidence ─────────────┘
//! ```
//!
//! What costs time for each entry (cutting, looking up, hashing) is done by the connections, on all cores. The writer checks
//! that a piece follows what is there and takes it over; while files are synced and the TPM is busy, it goes on taking, and
//! the next batch carries all that came.
//!
//! A guest can hurt only itself: frames, window, entries and bytes are bounded for each, connections are served each
//! in its own task, and a collection waits for nobody longer than it is told to.

mod dictionary;
mod files;
mod list;
mod listener;
mod protocol;
mod room;
mod writer;

use std::{
    io,
    path::Path,
    sync::{Arc, RwLock},
};

use onequote_evidence::id::TimeMs;
use tokio::{sync::mpsc, task::JoinHandle};

pub use listener::{Listeners, VmDirectory, socket_path};
pub use protocol::{SessionError, serve};
pub use room::{Limits, Lists, Room, RoomError, Token};

use crate::{inventory::Inventory, sink::EventSink};

/// Jobs that may wait for the writer; with more, connections wait.
const QUEUE: usize = 256;

/// Opens the room: loads the lists of all VMs of the inventory from `folder` and starts the writer.
///
/// # Errors
/// Of the file system, or when the dictionary's file is damaged.
pub fn open(
    folder: &Path,
    limits: Limits,
    clock: fn() -> TimeMs,
    inventory: Arc<RwLock<Inventory>>,
    sink: Arc<dyn EventSink>,
) -> io::Result<(Arc<Room>, JoinHandle<()>)> {
    let (jobs, queue) = mpsc::channel(QUEUE);
    let writer = writer::Writer::open(folder, limits, clock, inventory, sink)?;
    Ok((Arc::new(Room::new(jobs, writer.dictionary())), tokio::spawn(writer.run(queue))))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests;
