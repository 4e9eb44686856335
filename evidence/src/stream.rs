//! Evidence: what a proxy answers to a challenge, and what is saved to a file to be verified later.
//!
//! A stream is two zstd frames. Expanded each is a sequence of canonical CBOR items, each an array of two, the item's
//! number and the array of its one field. The first frame holds one item, [`Item::Answer`]: what is this challenge's own.
//! The second is the same for all that share the quote and have the same: first [`Item::Quote`], then pieces of logs in any order, last
//! [`Item::End`] with the number of items before it in this frame. Each piece says where in its log it begins; pieces of one log follow
//! each other without gap. The pieces of one guest's list stand together, behind the dictionary if they go on with a list
//! that was sent before ([`Have`]).
//!
//! A stream is read item by item ([`Reader`]): after two items it is known whether quote and challenge fit, before anything
//! else is taken.
//!
//! Nothing in a stream is true because it is there. Statement, signature and registers are tied together by the
//! quote; firmware log, IMA list, records and guests' lists by replay to the quoted registers.

use minicbor::{Decode, Encode};

use crate::{
    cbor,
    id::{Blob, SessionId, VmId},
    ima,
    nonce_tree::{MAX_PATH, Step},
    pcr::{MAX_REGISTERS, RegisterValue},
};

mod collect;
#[cfg(feature = "zstd")]
mod frame;
mod have;
mod reader;
mod writer;

#[cfg(feature = "zstd")]
pub use frame::{Packer, compress, expand};
pub use have::{Have, Known, KnownGuest, MAX_KNOWN_GUESTS};
pub use reader::ReadError;
#[cfg(feature = "zstd")]
pub use reader::Reader;
pub use writer::Pieces;

/// Media type of a stream.
pub const MEDIA_TYPE: &str = "application/vnd.onequote.evidence";

/// The most bytes that a stream may expand to.
pub const MAX_EXPANDED: usize = 256 * 1024 * 1024;

/// The most bytes of log in one piece, and about the most of entries or references in one part.
pub const PIECE_TARGET: usize = 256 * 1024;

/// The longest item in bytes: a quote with the longest statement, with much to spare for everything else.
pub const MAX_ITEM: usize = 8 * 1024 * 1024;

/// The longest [`Item::Answer`] in bytes, with the longest path, and so the most that the first frame may expand to.
pub const MAX_ANSWER_ITEM: usize = 1024;

/// The most items in the second frame: far more than pieces of [`PIECE_TARGET`] and guests that a host can have.
pub const MAX_ITEMS: u64 = 1 << 20;

/// The version of this form.
pub const VERSION: u32 = 2;

/// One item of a stream.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum Item {
    /// What is this challenge's own.
    #[n(0)]
    Answer(#[n(0)] Answer),
    /// Bytes of the firmware's event log.
    #[n(1)]
    Firmware(#[n(0)] Piece),
    /// Bytes of the host's IMA binary list.
    #[n(2)]
    HostIma(#[n(0)] Piece),
    /// Bytes of the measurement log of the statement's epoch.
    #[n(3)]
    Records(#[n(0)] Piece),
    /// Distinct entries of the guests' IMA lists.
    #[n(4)]
    Dictionary(#[n(0)] Dictionary),
    /// References of one guest's list into the dictionary.
    #[n(5)]
    Guest(#[n(0)] Guest),
    /// The end.
    #[n(6)]
    End(
        /// Number of items before this one in the second frame.
        #[n(0)]
        u64,
    ),
    /// The quote and what it is about.
    #[n(7)]
    Quote(#[n(0)] Quote),
}

/// What is this challenge's own.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Answer {
    /// [`VERSION`].
    #[n(0)]
    pub version: u32,
    /// From the challenge's leaf to the root in the qualifying data.
    #[cbor(n(1), decode_with = "cbor::at_most::<MAX_PATH, _, _>")]
    pub path: Vec<Step>,
    /// The nonce that this answers. A verifier online holds its own; offline this is only a claim.
    #[n(2)]
    pub nonce: Blob,
    /// The channel binding that went into the leaf, 32 bytes or empty. Likewise.
    #[n(3)]
    pub binding: Blob,
}

/// The quote and what it is about.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Quote {
    /// The statement's bytes ([`crate::statement::Statement`]).
    #[n(0)]
    pub statement: Blob,
    /// `TPMS_ATTEST` as the TPM signed it.
    #[n(1)]
    pub attest: Blob,
    /// `TPMT_SIGNATURE` over it.
    #[n(2)]
    pub signature: Blob,
    /// The quoted registers' values.
    #[cbor(n(3), decode_with = "cbor::at_most::<MAX_REGISTERS, _, _>")]
    pub registers: Vec<RegisterValue>,
}

/// [`Answer`] and [`Quote`] together: all that a stream begins with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Head {
    /// [`VERSION`].
    pub version: u32,
    /// See [`Quote::statement`].
    pub statement: Blob,
    /// See [`Quote::attest`].
    pub attest: Blob,
    /// See [`Quote::signature`].
    pub signature: Blob,
    /// See [`Answer::path`].
    pub path: Vec<Step>,
    /// See [`Quote::registers`].
    pub registers: Vec<RegisterValue>,
    /// See [`Answer::nonce`].
    pub nonce: Blob,
    /// See [`Answer::binding`].
    pub binding: Blob,
}

impl Head {
    /// Puts the two together.
    #[must_use]
    pub fn new(answer: Answer, quote: Quote) -> Self {
        let Answer { version, path, nonce, binding } = answer;
        let Quote { statement, attest, signature, registers } = quote;
        Self { version, statement, attest, signature, path, registers, nonce, binding }
    }

    /// Takes them apart again.
    #[must_use]
    pub fn split(self) -> (Answer, Quote) {
        let Self { version, statement, attest, signature, path, registers, nonce, binding } = self;
        (Answer { version, path, nonce, binding }, Quote { statement, attest, signature, registers })
    }
}

/// Part of a log in bytes.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Piece {
    /// Where in the log it begins, in bytes from the log's start.
    #[n(0)]
    pub offset: u64,
    /// The bytes.
    #[n(1)]
    pub bytes: Blob,
}

/// Distinct IMA entries.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Dictionary {
    /// Index of the first of them.
    #[n(0)]
    pub first: u64,
    /// Entries as the guests' kernels list them, each of [`ima::MIN_ENTRY`] to [`ima::MAX_ENTRY`] bytes.
    #[cbor(n(1), decode_with = "ima_entries")]
    pub entries: Vec<Blob>,
}

/// Part of one guest's list.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Guest {
    /// The VM.
    #[n(0)]
    pub vm: VmId,
    /// Its QEMU process.
    #[n(1)]
    pub session: SessionId,
    /// Which boot of the session, from 0.
    #[n(2)]
    pub boot: u32,
    /// Index of the first entry in the guest's list.
    #[n(3)]
    pub first: u64,
    /// For each entry its index in the dictionary.
    #[n(4)]
    pub entries: Vec<u32>,
}

/// Everything in a stream, its pieces put together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Evidence {
    /// The quote.
    pub head: Head,
    /// The firmware's event log; empty when the host has none.
    pub firmware: Vec<u8>,
    /// The host's IMA list; empty when the host has none.
    pub host_ima: Vec<u8>,
    /// The measurement log.
    pub records: Vec<u8>,
    /// Distinct entries of the guests' lists.
    pub dictionary: Vec<Blob>,
    /// The guests' lists: VM, session and boot, and references.
    pub guests: Vec<Guest>,
}

/// Reads a dictionary's entries. What is too short or too long to be one is refused here, before many of them take
/// memory; whether it is one is seen when it is parsed.
fn ima_entries<C>(d: &mut minicbor::Decoder<'_>, _: &mut C) -> Result<Vec<Blob>, minicbor::decode::Error> {
    let at = d.position();
    let bad = |why| minicbor::decode::Error::message(why).at(at);
    let len = d.array()?.ok_or_else(|| bad("an array of unknown length"))?;
    (0..len)
        .map(|_| match d.bytes()? {
            entry if (ima::MIN_ENTRY..=ima::MAX_ENTRY).contains(&entry.len()) => Ok(Blob(entry.to_vec())),
            _ => Err(bad("an IMA entry is shorter or longer than one can be")),
        })
        .collect()
}

const WHAT: &str = "evidence stream";

#[cfg(all(test, feature = "zstd"))]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests;
