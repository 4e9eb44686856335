//! What a verifier keeps of a host between two pieces of evidence, and writes down.
//!
//! The *expectation tree*: host → VM → disk image, each image with how it must be at its VM's next start, whose word
//! that is, and what it was before. The tree is kept as it was when the current epoch began and as it is now. The
//! log of the epoch is replayed onto the first, at once or round by round, so that the same evidence gives the same
//! verdict however often it is appraised, and a new policy judges everything that still counts. VMs that did not change
//! are shared between both, and between rounds.

use std::{collections::BTreeMap, sync::Arc};

use minicbor::{Decode, Encode};
use serde::{Deserialize, Serialize};

use onequote_evidence::{
    digest::FileDigest,
    event::VmStart,
    id::{BootId, Epoch, SessionId, Sha256, TimeMs, VmId},
    pcr::RegisterValue,
    tpm::ClockInfo,
};

use super::epoch::PastGap;
use crate::finding::Finding;

/// Past digests that are kept of an image.
const MAX_HISTORY: usize = 8;

/// Everything kept of one host. Written only from evidence that was authentic and whole.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostState {
    /// The last accepted quote and log.
    pub accepted: Option<Accepted>,
    /// The expectations when the accepted epoch began.
    pub base: Tree,
    /// The expectations now.
    pub tree: Tree,
    /// Guests' lists as accepted, of the VMs that ran.
    pub guests: Vec<AcceptedGuest>,
}

/// The last accepted quote and log. It changes with every evidence, and is kept as CBOR: a new item needs a new number, and a
/// value for those who were written without it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Encode, Decode)]
pub struct Accepted {
    /// The log's epoch.
    #[n(0)]
    pub epoch: Epoch,
    /// Records in the log.
    #[n(1)]
    pub records: u64,
    /// The log's registers after them.
    #[n(2)]
    pub registers: Vec<RegisterValue>,
    /// Whether what the registers held before the log was explained when its first records were accepted.
    #[n(3)]
    pub history_accepted: bool,
    /// The TPM's clock and counters.
    #[n(4)]
    pub clock: ClockInfo,
    /// The host's kernel, by its boot id.
    #[serde(default)]
    #[n(5)]
    pub boot_id: Option<BootId>,
    /// Gaps that this log tells of its host.
    #[serde(default)]
    #[n(6)]
    pub gaps: Vec<PastGap>,
    /// Gaps of the same boot that it does not tell.
    #[serde(default)]
    #[n(7)]
    pub past_gaps: Vec<PastGap>,
    /// SHA-256 of the host's statement.
    #[serde(default)]
    #[n(8)]
    pub statement: Option<Sha256>,
}

/// A guest's list as accepted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Encode, Decode)]
pub struct AcceptedGuest {
    /// The QEMU process.
    #[n(0)]
    pub session: SessionId,
    /// Which boot of it.
    #[n(1)]
    pub boot: u32,
    /// Entries.
    #[n(2)]
    pub count: u64,
    /// The virtual PCR 10 after them.
    #[n(3)]
    pub aggregate: Sha256,
}

/// Expectations of all VMs that were ever seen on the host.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tree {
    /// By UUID.
    pub vms: BTreeMap<VmId, Arc<VmExpectation>>,
}

impl Tree {
    /// A VM's expectations, to be changed.
    pub fn vm_mut(&mut self, vm: VmId) -> &mut VmExpectation {
        Arc::make_mut(self.vms.entry(vm).or_default())
    }
}

/// Expectations of one VM.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmExpectation {
    /// Its last name.
    pub name: String,
    /// The QEMU process that runs it.
    pub session: Option<KnownSession>,
    /// Its images by slot.
    pub images: BTreeMap<String, Box<ImageExpectation>>,
}

/// A QEMU process that was measured before it ran.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KnownSession {
    /// Which.
    pub session: SessionId,
    /// The measurement: the body of its `vm-start` event; written down as CBOR.
    #[serde(with = "as_cbor")]
    pub start: Arc<VmStart>,
    /// The number of its record, and the epoch.
    pub record: u64,
    /// What was found of it so far: it stays so for as long as the process lives.
    #[serde(default)]
    pub findings: Vec<Finding>,
}

/// Expectation of one image.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageExpectation {
    /// How it must be.
    pub now: ImageStatus,
    /// How it was at its VM's last start, and by what that was judged.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub started: Option<StartedImage>,
    /// Digests that the operator has accepted for the next start at which they are found; each serves once.
    #[serde(default)]
    pub accepted: Vec<FileDigest>,
    /// What it was before, oldest first.
    #[serde(default)]
    pub history: Vec<PastImage>,
}

/// How an image must be at its VM's next start.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "status", rename_all = "kebab-case")]
pub enum ImageStatus {
    /// It was never seen.
    #[default]
    New,
    /// As it was left.
    Left {
        /// So.
        digest: FileDigest,
        /// Which event tells so.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        by: Option<Place>,
    },
    /// A VM writes it.
    InUse {
        /// The VM's QEMU process.
        session: SessionId,
        /// Where its start broke the expectation: the expectation, which stays in force.
        broken: Option<Box<ImageStatus>>,
    },
    /// Nobody knows.
    Unknown {
        /// Why.
        why: String,
    },
}

/// An image at its VM's last start.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StartedImage {
    /// The VM's QEMU process.
    pub session: SessionId,
    /// The file's path on the host.
    pub path: String,
    /// Its digest then.
    pub digest: FileDigest,
    /// Whether the VM may not write it.
    pub read_only: bool,
    /// Whose word it was held against.
    pub origin: Origin,
}

/// Where an expectation came from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "source", rename_all = "kebab-case")]
pub enum Origin {
    /// The policy names the digests.
    Policy,
    /// It was left so by the VM's last run.
    Continuity {
        /// The event that told it.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        by: Option<Place>,
    },
    /// The operator accepted this digest.
    Operator,
    /// There was none: it was taken as it was.
    FirstSeen,
    /// There was none that could be known.
    Unknown {
        /// Why.
        why: String,
    },
}

impl Origin {
    /// The word for it.
    #[must_use]
    pub fn word(&self) -> &'static str {
        match self {
            Self::Policy => "policy",
            Self::Continuity { .. } => "continuity",
            Self::Operator => "operator",
            Self::FirstSeen => "first-seen",
            Self::Unknown { .. } => "unknown",
        }
    }
}

/// An event in a host's log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    /// Its kind.
    pub event: String,
    /// When, by the host's clock.
    pub time: TimeMs,
    /// The number of the log's epoch.
    #[serde(default)]
    pub epoch: u64,
    /// The number of its record.
    #[serde(default)]
    pub record: u64,
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} in epoch {}, record {}", self.event, self.epoch, self.record)
    }
}

/// What an image was at some time.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PastImage {
    /// Its digest.
    pub digest: FileDigest,
    /// The event that told it.
    #[serde(flatten)]
    pub by: Place,
}

impl ImageExpectation {
    /// Keeps a past digest, and forgets the oldest when there are too many.
    pub fn remember(&mut self, digest: FileDigest, by: &Place) {
        self.history.push(PastImage { digest, by: by.clone() });
        let surplus = self.history.len().saturating_sub(MAX_HISTORY);
        self.history.drain(..surplus);
    }
}

impl HostState {
    /// Whether the expectations are those of `other`.
    #[must_use]
    pub fn same_trees(&self, other: &Self) -> bool {
        self.base == other.base && self.tree == other.tree
    }

    /// Notes that the operator accepts an image's digest for the next start at which it is found, which may be one
    /// that was found wrong before.
    pub fn accept_image(&mut self, vm: VmId, slot: &str, digest: FileDigest) {
        for tree in [&mut self.base, &mut self.tree] {
            let image = tree.vm_mut(vm).images.entry(slot.to_owned()).or_default();
            image.accepted.push(digest);
        }
    }

    /// The expectations that a log of `epoch` is replayed onto.
    #[must_use]
    pub fn base_for(&self, epoch: Epoch) -> Tree {
        match &self.accepted {
            Some(accepted) if accepted.epoch == epoch => self.base.clone(),
            _ => self.tree.clone(),
        }
    }
}

/// A measurement in state is written as its event has it.
mod as_cbor {
    use std::sync::Arc;

    use onequote_evidence::{cbor, event::VmStart, id::Blob, record};
    use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

    pub(super) fn serialize<S: Serializer>(start: &Arc<VmStart>, s: S) -> Result<S::Ok, S::Error> {
        Blob(cbor::encode(&**start)).serialize(s)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<Arc<VmStart>, D::Error> {
        let bytes = Blob::deserialize(d)?;
        cbor::decode("kept start", &bytes.0, record::MAX_CONTENT).map(Arc::new).map_err(de::Error::custom)
    }
}
