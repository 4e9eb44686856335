//! What can go wrong with the log.

use std::{io, path::PathBuf, sync::Arc};

use onequote_evidence::{digest::HashAlg, log::LogError};

use crate::tpm::TpmError;

/// The store could not do what it was asked for.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{}: cannot {doing}: {cause}", path.display())]
pub struct StoreError {
    /// The file or folder.
    pub path: PathBuf,
    /// What was being done to it.
    pub doing: &'static str,
    /// What the operating system says.
    pub cause: Arc<io::Error>,
}

impl StoreError {
    /// An error of this file, or of what takes its place.
    pub fn new(path: impl Into<PathBuf>, doing: &'static str, cause: io::Error) -> Self {
        Self { path: path.into(), doing, cause: Arc::new(cause) }
    }
}

/// Why the recorder did not do what it was asked for.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum RecorderError {
    /// The disk failed. Of an append nothing is left.
    #[error("the log can't be written: {0}")]
    Disk(StoreError),
    /// The TPM failed and could not be opened anew. The events of an append are on disk; they get into the register when
    /// the TPM is back, unless it was reset meanwhile.
    #[error("the log can't be bound to the TPM: {0}")]
    Tpm(TpmError),
    /// More than one record can take.
    #[error("{events} events of {bytes} bytes together are too many for one record")]
    TooLarge {
        /// Number of events.
        events: usize,
        /// Their size.
        bytes: usize,
    },
    /// The events were made for an epoch that has ended meanwhile. Nothing says that they are still true: what is must be
    /// found out and logged anew. They may be in the old log, which no evidence shows any more.
    #[error("epoch {asked} of the log is over, epoch {now} has begun: everything must be logged anew")]
    NewEpoch {
        /// The epoch in which the events were made.
        asked: u64,
        /// The one in force.
        now: u64,
    },
    /// There is no log yet.
    #[error("there is no log yet: the proxy has not run with this state folder")]
    NoLog,
    /// An append of no event.
    #[error("a record needs an event")]
    Empty,
    /// The configuration names other registers than the log of this boot.
    #[error(
        "this boot's log is in PCR {} and {}, the configuration says {} and {}: set it back, or reboot the host",
        log.0, log.1, configured.0, configured.1
    )]
    RegistersChanged {
        /// The log's registers.
        log: (u8, u8),
        /// The configured ones.
        configured: (u8, u8),
    },
    /// The configuration names registers that can't be ours.
    #[error("PCR {0} and {1} can't be the log's registers: two different ones, below 16, are needed")]
    BadRegisters(u8, u8),
    /// None of the banks that quotes should cover is active.
    #[error(
        "the TPM's active PCR banks are {active:?}, and a quote needs one of {quoted:?}: activate it in the firmware's settings"
    )]
    NoQuotedBank {
        /// The active banks.
        active: Vec<HashAlg>,
        /// The banks that quotes should cover.
        quoted: Vec<HashAlg>,
    },
    /// Registers were extended by others during each attempt to quote them.
    #[error("the registers changed during each of {attempts} attempts to quote them; ask again")]
    Unsteady {
        /// Number of attempts.
        attempts: u32,
    },
    /// The log was moved by somebody else's extend after the quote's qualifying data had been made for it.
    #[error("the log moved while it was being quoted; ask again")]
    HeadMoved,
    /// The TPM's quote is not what was asked for.
    #[error("the TPM's quote is not over what was asked: {0}")]
    BadQuote(&'static str),
    /// Records of an epoch that is over.
    #[error("epoch {asked} was asked for, the log is in epoch {current}")]
    OtherEpoch {
        /// The epoch asked for.
        asked: u64,
        /// The one in force.
        current: u64,
    },
    /// Records that do not exist.
    #[error("records {from} to {to} were asked for, the log has {len}")]
    NoSuchRecords {
        /// The first.
        from: u64,
        /// The one after the last.
        to: u64,
        /// The log's length.
        len: u64,
    },
    /// The file is not what was written. The next start, or the next quote, finds out how far.
    #[error("the log on disk is damaged: {0}")]
    Damaged(LogError),
    /// The recorder ended.
    #[error("the recorder has ended")]
    Ended,
}

impl From<StoreError> for RecorderError {
    fn from(error: StoreError) -> Self {
        Self::Disk(error)
    }
}

impl From<TpmError> for RecorderError {
    fn from(error: TpmError) -> Self {
        Self::Tpm(error)
    }
}
