//! What the records before a segment say, for a start that no longer has them.
//!
//! A snapshot is the proxy's own note and no evidence. It lies beside its segment, whose first record has its SHA-256: that
//! record went into the TPM, so a snapshot that was changed or exchanged is found.

use minicbor::{Decode, Encode};
use onequote_evidence::{
    cbor,
    digest::sha256,
    event::ProxyStart,
    id::{Epoch, Sha256},
};

use super::{LogRead, StoreError};
use crate::inventory::Inventory;

/// This form's version.
const VERSION: u32 = 1;

/// The largest that is read: thousands of VMs, each with all its images.
pub(super) const MAX_SNAPSHOT: usize = 64 * 1024 * 1024;

/// The fold of an epoch's first records.
#[derive(Debug, Clone, Encode, Decode)]
#[cbor(map)]
pub(super) struct Snapshot {
    #[n(0)]
    version: u32,
    /// The epoch.
    #[n(1)]
    pub(super) epoch: Epoch,
    /// The segment that begins behind them.
    #[n(2)]
    pub(super) number: u64,
    /// How many records they are.
    #[n(3)]
    pub(super) records: u64,
    /// The last `proxy-start` among them.
    #[n(4)]
    pub(super) last: ProxyStart,
    /// Whether the epoch began with a `log-gap` for a reason that sets the log before it aside.
    #[n(5)]
    pub(super) gap: bool,
    /// The VMs that they speak of.
    #[n(6)]
    pub(super) inventory: Inventory,
}

impl Snapshot {
    pub(super) fn new(
        epoch: Epoch,
        number: u64,
        records: u64,
        last: ProxyStart,
        gap: bool,
        inventory: Inventory,
    ) -> Self {
        Self { version: VERSION, epoch, number, records, last, gap, inventory }
    }

    pub(super) fn to_bytes(&self) -> Vec<u8> {
        cbor::encode(self)
    }

    /// # Errors
    /// Why it is none, in words.
    pub(super) fn parse(bytes: &[u8]) -> Result<Self, String> {
        let snapshot: Self = cbor::decode("snapshot", bytes, MAX_SNAPSHOT).map_err(|error| error.to_string())?;
        match snapshot.version {
            VERSION => Ok(snapshot),
            other => Err(format!("its version is {other}")),
        }
    }
}

pub(super) fn digest(bytes: &[u8]) -> Sha256 {
    sha256(&[bytes])
}

/// What the records of an epoch before the oldest that are there say of VMs: nothing where none were dropped, or where the
/// snapshot of a log that is over cannot be read.
///
/// # Errors
/// Of the store.
pub fn remembered(reader: &dyn LogRead, epoch: u64) -> Result<Inventory, StoreError> {
    let Some(oldest) = reader.segments(epoch)?.first().copied().filter(|oldest| *oldest > 0) else {
        return Ok(Inventory::default());
    };
    let snapshot = reader.snapshot(epoch, oldest, MAX_SNAPSHOT)?;
    let snapshot = snapshot.and_then(|bytes| Snapshot::parse(&bytes).ok());
    Ok(snapshot.map(|snapshot| snapshot.inventory).unwrap_or_default())
}
