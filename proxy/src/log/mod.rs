//! The measurement log: written ahead of the TPM, replayed after every start.
//!
//! One thread, the *recorder*, owns the log's files and the TPM. Everybody else holds a [`LogHandle`] and asks it to
//! append events or to quote.
//!
//! # Writing
//! ```text
//! events ──► queue ──► record ──► append ──► fdatasync ──► TPM2_PCR_Extend ──► whoever waited is told
//! ```
//! in this order, one record at a time. Events that come while the TPM is busy wait in a queue of bounded size; the
//! next record of their register carries all of them under one extend, so that cost in TPM commands follows time and not
//! the number of events. The digest of a record goes into every active bank by one command.
//!
//! # After a crash
//! At most one whole record can be in the file and not in the registers, and at most one torn one behind it. Every start
//! replays the file and looks for the number of records after which the replay has the registers' values:
//!
//! | registers hold | then |
//! | --- | --- |
//! | all whole records | go on; bytes of a torn record are cut off and kept in a file of their own |
//! | all but the last one | the missing extend is made up; go on |
//! | anything, and the TPM was reset since | a new epoch: new file, `proxy-start` with the registers' values as history; if the kernel is the same as before, also `log-gap` (`tpm-reset`) |
//! | anything else | a new epoch that also says `log-gap`; the old file is kept, renamed to end in `.aside` |
//!
//! A log that goes on under another kernel (kexec: registers are not reset) says so with `log-gap` (`kexec`).
//!
//! The last row is never papered over: it means that somebody else extended our registers, or that the file was
//! changed. The same look at the registers is taken before every quote.
//!
//! # Segments
//! A log that has grown long goes on in a new file, if that is worth it: the first record there is a `log-segment` with the
//! registers' values and the digest of a [`snapshot`] of what all records before it say. When everybody who is enrolled has
//! accepted the records before a segment ([`Acknowledged`]), their files are dropped, and a start begins with the snapshot of the
//! oldest segment that is there. The event is extended like any other: a snapshot that was changed, or is missing, makes a
//! damaged log, and so do files that are missing and were not dropped by the proxy. What a crash leaves:
//!
//! | there is | then |
//! | --- | --- |
//! | a snapshot without a segment | it is left alone, and goes with what is dropped next |
//! | a segment without a whole record | it is removed with its snapshot: the log ends before it |
//! | a segment's record that was not extended | made up like any other |
//! | less than was noted as dropped | the rest of it stays until the next drop |
//!
//! # Failures while running
//! A record that could not be written is cut off again and its events fail: nothing happened. When the TPM fails, the
//! record stays in the file; the recorder opens the TPM anew at once, and again with each later request, and recovers
//! as above. A record whose extend was made up that way counts as if nothing had happened; if the TPM stays away, the
//! events fail with [`RecorderError::Tpm`], and may yet turn up in the log later. If the recovery begins a new epoch,
//! events that were made for the old one fail with [`RecorderError::NewEpoch`]: the new log knows nothing of what they
//! rest on.

mod acknowledged;
mod error;
mod file;
mod index;
mod journal;
mod pace;
mod recorder;
mod recovery;
mod segment;
mod snapshot;
mod store;
mod stream;

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
pub(crate) mod memory;
#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stdout)]
mod tests;

pub use acknowledged::{Acknowledged, Acknowledgement};
pub use error::{RecorderError, StoreError};
pub use file::{FileStore, LogFolder};
pub use recorder::{Appended, Chunk, LogHandle, Recorder, TpmInfo};
pub use snapshot::remembered;
pub use store::{LogRead, LogStore};
pub use stream::RecordStream;

use std::sync::{Arc, RwLock};

use serde::{Deserialize, Serialize};

use onequote_evidence::{
    digest::{FileDigest, HashAlg},
    id::{BootId, Epoch, EpochId, HostId, Sha256, TimeMs},
    pcr::Registers,
};

use crate::{
    inventory::Inventory,
    tpm::{Quote, Tpm, TpmError},
};

/// Which of the log's two registers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PcrRole {
    /// Host and VM life cycle (PCR 12 unless configured otherwise).
    Vm,
    /// Guest run time (PCR 13 unless configured otherwise).
    Guest,
}

/// Opens the TPM; called at the start and whenever the TPM was lost.
pub type TpmFactory = Box<dyn FnMut() -> Result<Box<dyn Tpm>, TpmError> + Send>;

/// What the recorder has to know of the world.
pub struct RecorderConfig {
    /// The host, as `proxy-start` names it.
    pub host: HostId,
    /// The host kernel's boot id.
    pub boot_id: BootId,
    /// The proxy's version.
    pub version: String,
    /// The proxy's binary, if it could be measured.
    pub binary: Option<FileDigest>,
    /// Where that is, as the kernel shows it.
    pub path: Option<String>,
    /// The register for [`PcrRole::Vm`].
    pub pcr_vm: u8,
    /// The register for [`PcrRole::Guest`]; another one.
    pub pcr_guest: u8,
    /// The registers that quotes cover. Ours are covered in any case.
    pub quoted_pcrs: Vec<u8>,
    /// The banks that quotes cover, of those that are active.
    pub quoted_banks: Vec<HashAlg>,
    /// Kept in step with the log: the fold of exactly those records that are on disk and in the registers.
    pub inventory: Arc<RwLock<Inventory>>,
    /// The host's clock, for `proxy-start` and `log-gap`.
    pub now: Box<dyn FnMut() -> TimeMs + Send>,
    /// From which length on, in bytes, a segment is long enough for a next one to begin.
    pub segment_bytes: u64,
    /// Draws the id of a new epoch, at random.
    pub new_epoch_id: Box<dyn FnMut() -> EpochId + Send>,
}

/// A place in an epoch's log, between two records.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct LogPlace {
    /// Records before it.
    pub records: u64,
    /// Bytes before it.
    pub bytes: u64,
}

/// Where the log stands: everything in it is on disk and in the registers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogHead {
    /// The epoch. When it changes, whatever was logged before is in a log that evidence no longer shows.
    pub epoch: Epoch,
    /// Number of records.
    pub log_len: u64,
    /// Both registers in every active bank, after those records.
    pub registers: Registers,
    /// Its length in bytes, with what was dropped.
    pub bytes: u64,
    /// Where the oldest record that is there begins.
    pub first: LogPlace,
}

impl LogHead {
    /// The log's end.
    #[must_use]
    pub fn place(&self) -> LogPlace {
        LogPlace { records: self.log_len, bytes: self.bytes }
    }
}

/// What [`LogHandle::quote`] has signed besides the registers: the SHA-256 that a verifier expects there.
pub type QualifyingData = Sha256;

/// A quote and all that is needed to explain it.
#[derive(Debug, Clone)]
pub struct Quoted {
    /// What the TPM signed, and its signature.
    pub quote: Quote,
    /// The values of all quoted registers; their digest is the one in the quote.
    pub pcr_values: Registers,
    /// The log whose replay gives the values of our two registers.
    pub head: LogHead,
}
