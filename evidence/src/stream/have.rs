//! What a verifier has of a host's logs already, so that it is not sent again.
//!
//! Every log only grows, so what was received once is a beginning of what there is now, as long as it is the same log: the
//! digest says that. Nothing rests on this for truth: whoever puts a stream onto what it has replays the whole of it to
//! the registers of the quote, and a piece that does not fit gives a log that does not replay.

use minicbor::{Decode, Encode};
use sha2::{Digest as _, Sha256 as Hasher};

use super::{Evidence, Guest};
use crate::{
    cbor,
    digest::sha256,
    id::{SessionId, Sha256, VmId},
};

/// The most guests' lists in a [`Have`]; of more than that, the rest is sent again.
pub const MAX_KNOWN_GUESTS: usize = 4096;

/// The beginnings of logs that a verifier has. What is left out is not there, or not wanted to be relied on.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash, Encode, Decode)]
#[cbor(map)]
#[cfg_attr(feature = "json", derive(serde::Serialize, serde::Deserialize), serde(deny_unknown_fields, default))]
pub struct Have {
    /// SHA-256 of the statement of evidence that the verifier has accepted and has all of. A proxy that remembers this
    /// statement knows with it how much of every log that is, and looks at nothing else in here; for another one the
    /// details count.
    #[cfg_attr(feature = "json", serde(skip_serializing_if = "Option::is_none"))]
    #[n(0)]
    pub statement: Option<Sha256>,
    /// Of the firmware's event log, in bytes.
    #[cfg_attr(feature = "json", serde(skip_serializing_if = "Option::is_none"))]
    #[n(1)]
    pub firmware: Option<Known>,
    /// Of the host's IMA list, in bytes.
    #[cfg_attr(feature = "json", serde(skip_serializing_if = "Option::is_none"))]
    #[n(2)]
    pub host_ima: Option<Known>,
    /// Of the measurement log, in bytes.
    #[cfg_attr(feature = "json", serde(skip_serializing_if = "Option::is_none"))]
    #[n(3)]
    pub records: Option<Known>,
    /// Of the dictionary, in entries.
    #[cfg_attr(feature = "json", serde(skip_serializing_if = "Option::is_none"))]
    #[n(4)]
    pub dictionary: Option<Known>,
    /// Of guests' lists, in references; they are those of this dictionary.
    #[cfg_attr(feature = "json", serde(skip_serializing_if = "Vec::is_empty"))]
    #[cbor(n(5), decode_with = "cbor::at_most::<MAX_KNOWN_GUESTS, _, _>")]
    pub guests: Vec<KnownGuest>,
}

/// The beginning of a log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Encode, Decode)]
#[cbor(map)]
#[cfg_attr(feature = "json", derive(serde::Serialize, serde::Deserialize), serde(deny_unknown_fields))]
pub struct Known {
    /// How much of it: bytes, entries or references.
    #[n(0)]
    pub len: u64,
    /// SHA-256 of that.
    #[n(1)]
    pub digest: Sha256,
}

/// The beginning of one guest's list.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Encode, Decode)]
#[cbor(map)]
#[cfg_attr(feature = "json", derive(serde::Serialize, serde::Deserialize), serde(deny_unknown_fields))]
pub struct KnownGuest {
    /// The VM.
    #[n(0)]
    pub vm: VmId,
    /// Its QEMU process.
    #[n(1)]
    pub session: SessionId,
    /// Which boot of it.
    #[n(2)]
    pub boot: u32,
    /// How much.
    #[n(3)]
    pub known: Known,
}

impl Known {
    /// Of a log in bytes.
    #[must_use]
    pub fn of_bytes(bytes: &[u8]) -> Self {
        Self { len: bytes.len() as u64, digest: finish(Hasher::new_with_prefix(bytes)) }
    }

    /// Of a dictionary: the digest is over each entry's length, a little-endian u64, and the entry.
    pub fn of_entries<'a>(entries: impl IntoIterator<Item = &'a [u8]>) -> Self {
        let (mut hasher, mut len) = (Hasher::new(), 0);
        for entry in entries {
            hasher.update((entry.len() as u64).to_le_bytes());
            hasher.update(entry);
            len += 1;
        }
        Self { len, digest: finish(hasher) }
    }

    /// Of a list of references: the digest is over each as a little-endian u32.
    #[must_use]
    pub fn of_references(references: &[u32]) -> Self {
        let mut hasher = Hasher::new();
        for reference in references {
            hasher.update(reference.to_le_bytes());
        }
        Self { len: references.len() as u64, digest: finish(hasher) }
    }

    /// Its length, if it is the beginning of a log with `len` parts whose first `n` are described by `of(n)`. Nothing
    /// known is the beginning of every log.
    fn begins(known: Option<Self>, len: usize, of: impl FnOnce(usize) -> Self) -> usize {
        let Some(known) = known else { return 0 };
        match usize::try_from(known.len) {
            Ok(count) if count <= len && of(count) == known => count,
            _ => 0,
        }
    }

    /// How many bytes of `log` need not be sent.
    #[must_use]
    pub fn bytes_of(known: Option<Self>, log: &[u8]) -> usize {
        Self::begins(known, log.len(), |count| Self::of_bytes(&log[..count]))
    }

    /// How many entries of a dictionary need not be sent.
    #[must_use]
    pub fn entries_of<T: AsRef<[u8]>>(known: Option<Self>, entries: &[T]) -> usize {
        Self::begins(known, entries.len(), |count| Self::of_entries(entries[..count].iter().map(AsRef::as_ref)))
    }

    /// How many references of a list need not be sent.
    #[must_use]
    pub fn references_of(known: Option<Self>, references: &[u32]) -> usize {
        Self::begins(known, references.len(), |count| Self::of_references(&references[..count]))
    }
}

fn finish(hasher: Hasher) -> Sha256 {
    Sha256(hasher.finalize().into())
}

impl Have {
    /// What is had by who has this evidence.
    #[must_use]
    pub fn of(evidence: &Evidence) -> Self {
        let bytes = |log: &[u8]| (!log.is_empty()).then(|| Known::of_bytes(log));
        let entries = || evidence.dictionary.iter().map(|entry| entry.0.as_slice());
        Self {
            statement: Some(sha256(&[&evidence.head.statement.0])),
            firmware: bytes(&evidence.firmware),
            host_ima: bytes(&evidence.host_ima),
            records: bytes(&evidence.records),
            dictionary: (!evidence.dictionary.is_empty()).then(|| Known::of_entries(entries())),
            guests: evidence.guests.iter().take(MAX_KNOWN_GUESTS).map(known_guest).collect(),
        }
    }

    /// What is had of one guest's list.
    #[must_use]
    pub fn guest(&self, vm: VmId, session: SessionId, boot: u32) -> Option<Known> {
        let found = self.guests.iter().find(|g| (g.vm, g.session, g.boot) == (vm, session, boot));
        found.map(|guest| guest.known)
    }
}

fn known_guest(guest: &Guest) -> KnownGuest {
    let known = Known::of_references(&guest.entries);
    KnownGuest { vm: guest.vm, session: guest.session, boot: guest.boot, known }
}
