//! Evidence: what a proxy answers to a challenge, and what is saved to a file to be verified later.
//!
//! A stream is one zstd frame. Expanded it is a sequence of canonical CBOR items, each an array of the item's number
//! and its fields: first [`Item::Head`], then pieces of logs in any order, last [`Item::End`] with the number of
//! items before it. Each piece says where in its log it begins; pieces of one log follow each other without gap.
//!
//! Nothing in a stream is true because it is there. Statement, signature and registers are tied together by the
//! quote; firmware log, IMA list, records and guests' lists by replay to the quoted registers.

use minicbor::{Decode, Encode};

use crate::{
    Malformed, MalformedKind, cbor,
    id::{Blob, SessionId, VmId},
    nonce_tree::Step,
    pcr::RegisterValue,
};

/// Media type of a stream.
pub const MEDIA_TYPE: &str = "application/vnd.onequote.evidence";

/// The most bytes that a stream may expand to.
pub const MAX_EXPANDED: usize = 256 * 1024 * 1024;

/// The most bytes of log in one piece.
pub const PIECE_TARGET: usize = 256 * 1024;

/// The version of this form.
pub const VERSION: u32 = 1;

/// One item of a stream.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum Item {
    /// The quote and what it is about.
    #[n(0)]
    Head(#[n(0)] Head),
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
        /// Number of items before this one.
        #[n(0)]
        u64,
    ),
}

/// The quote and what it is about.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Head {
    /// [`VERSION`].
    #[n(0)]
    pub version: u32,
    /// The statement's bytes ([`crate::statement::Statement`]).
    #[n(1)]
    pub statement: Blob,
    /// `TPMS_ATTEST` as the TPM signed it.
    #[n(2)]
    pub attest: Blob,
    /// `TPMT_SIGNATURE` over it.
    #[n(3)]
    pub signature: Blob,
    /// From the challenge's leaf to the root in the qualifying data.
    #[n(4)]
    pub path: Vec<Step>,
    /// The quoted registers' values.
    #[n(5)]
    pub registers: Vec<RegisterValue>,
    /// The nonce that this answers. A verifier online holds its own; offline this is only a claim.
    #[n(6)]
    pub nonce: Blob,
    /// The channel binding that went into the leaf. Likewise.
    #[n(7)]
    pub binding: Blob,
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
    /// Entries as the guests' kernels list them.
    #[n(1)]
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

/// The items between head and end, encoded once for every stream that carries them.
#[derive(Debug, Clone, Default)]
pub struct Pieces {
    bytes: Vec<u8>,
    items: u64,
}

impl Pieces {
    /// Adds a piece.
    pub fn push(&mut self, item: &Item) {
        self.bytes.extend_from_slice(&cbor::encode(item));
        self.items += 1;
    }

    /// Adds a log's bytes from `offset` on, cut into pieces.
    pub fn push_log(&mut self, kind: fn(Piece) -> Item, offset: u64, bytes: &[u8]) {
        let mut at = offset;
        for part in bytes.chunks(PIECE_TARGET) {
            self.push(&kind(Piece { offset: at, bytes: Blob(part.to_vec()) }));
            at += part.len() as u64;
        }
    }

    /// The whole stream behind this head, not yet compressed.
    #[must_use]
    pub fn stream(&self, head: Head) -> Vec<u8> {
        let mut out = cbor::encode(&Item::Head(head));
        out.extend_from_slice(&self.bytes);
        out.extend_from_slice(&cbor::encode(&Item::End(self.items + 1)));
        out
    }
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

impl Evidence {
    /// Reads an expanded stream that begins every log at its start.
    ///
    /// # Errors
    /// [`Malformed`]: also for a missing or second head, a missing end, items after it, or pieces that leave a gap.
    pub fn parse(bytes: &[u8]) -> Result<Self, Malformed> {
        let mut items = Items { bytes, offset: 0, count: 0, ended: false };
        let Some(Item::Head(head)) = items.next().transpose()? else {
            return Err(Malformed::invalid(WHAT, 0, "does not begin with a head"));
        };
        if head.version != VERSION {
            return Err(Malformed::invalid(WHAT, 0, "unknown version"));
        }
        let mut evidence = Self {
            head,
            firmware: Vec::new(),
            host_ima: Vec::new(),
            records: Vec::new(),
            dictionary: Vec::new(),
            guests: Vec::new(),
        };
        while let Some(item) = items.next().transpose()? {
            let ok = match item {
                Item::Head(_) => return Err(Malformed::invalid(WHAT, items.offset, "a second head")),
                Item::Firmware(piece) => append(&mut evidence.firmware, piece),
                Item::HostIma(piece) => append(&mut evidence.host_ima, piece),
                Item::Records(piece) => append(&mut evidence.records, piece),
                Item::Dictionary(part) => {
                    let fits = part.first == evidence.dictionary.len() as u64;
                    evidence.dictionary.extend(part.entries);
                    fits
                }
                Item::Guest(part) => append_guest(&mut evidence.guests, part),
                Item::End(_) => true,
            };
            if !ok {
                return Err(Malformed::invalid(WHAT, items.offset, "a piece does not follow the one before it"));
            }
        }
        Ok(evidence)
    }
}

/// The items of an expanded stream; checks the end.
struct Items<'a> {
    bytes: &'a [u8],
    offset: usize,
    count: u64,
    ended: bool,
}

impl Items<'_> {
    fn read(&mut self) -> Result<Item, Malformed> {
        let rest = &self.bytes[self.offset..];
        if rest.is_empty() {
            return Err(Malformed::new(WHAT, self.offset, MalformedKind::Truncated));
        }
        let (item, len) = cbor::decode_first(WHAT, rest).map_err(|mut e| {
            e.offset += self.offset;
            e
        })?;
        self.offset += len;
        if let Item::End(count) = item {
            self.ended = true;
            if count != self.count {
                return Err(Malformed::invalid(WHAT, self.offset, "the end counts another number of items"));
            }
            if self.offset != self.bytes.len() {
                return Err(Malformed::new(WHAT, self.offset, MalformedKind::Trailing));
            }
        }
        self.count += 1;
        Ok(item)
    }
}

impl Iterator for Items<'_> {
    type Item = Result<Item, Malformed>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.ended {
            return None;
        }
        let item = self.read();
        self.ended |= item.is_err();
        Some(item)
    }
}

fn append(log: &mut Vec<u8>, piece: Piece) -> bool {
    let fits = piece.offset == log.len() as u64;
    log.extend(piece.bytes.0);
    fits
}

/// A part goes on with the last list, or begins a list that is not there yet.
fn append_guest(guests: &mut Vec<Guest>, part: Guest) -> bool {
    let same = |g: &Guest| g.vm == part.vm && g.session == part.session && g.boot == part.boot;
    if let Some(last) = guests.last_mut().filter(|last| same(last)) {
        let fits = part.first == last.entries.len() as u64;
        last.entries.extend(part.entries);
        return fits;
    }
    let fits = part.first == 0 && !guests.iter().any(same);
    guests.push(part);
    fits
}

const WHAT: &str = "evidence stream";

/// Compresses an expanded stream.
///
/// # Errors
/// When zstd fails, which it does only for want of memory.
#[cfg(feature = "zstd")]
pub fn compress(expanded: &[u8]) -> std::io::Result<Vec<u8>> {
    zstd::bulk::compress(expanded, 3)
}

/// Expands a stream of exactly one zstd frame, to at most `limit` bytes whatever its header says.
///
/// # Errors
/// [`Malformed`] when it is not zstd, too large, cut off, or followed by anything.
#[cfg(feature = "zstd")]
pub fn expand(compressed: &[u8], limit: usize) -> Result<Vec<u8>, Malformed> {
    use std::io::Read as _;

    let bad = |e: std::io::Error| match e.kind() {
        std::io::ErrorKind::UnexpectedEof => Malformed::new(WHAT, compressed.len(), MalformedKind::Truncated),
        _ => Malformed::invalid(WHAT, 0, "not a zstd frame, or a damaged one"),
    };
    let mut rest = compressed;
    let decoder = zstd::Decoder::with_buffer(&mut rest).map_err(bad)?.single_frame();
    let mut out = Vec::new();
    decoder.take(limit as u64 + 1).read_to_end(&mut out).map_err(bad)?;
    if out.len() > limit {
        return Err(Malformed::new(WHAT, 0, MalformedKind::TooLarge { limit }));
    }
    if !rest.is_empty() {
        return Err(Malformed::new(WHAT, compressed.len() - rest.len(), MalformedKind::Trailing));
    }
    Ok(out)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests;
