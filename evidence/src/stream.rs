//! Evidence: what a proxy answers to a challenge, and what is saved to a file to be verified later.
//!
//! A stream is one zstd frame. Expanded it is a sequence of canonical CBOR items, each an array of two, the item's
//! number and the array of its one field: first [`Item::Head`], then pieces of logs in any order, last [`Item::End`] with the number of
//! items before it. Each piece says where in its log it begins; pieces of one log follow each other without gap. The
//! pieces of one guest's list stand together, behind the dictionary if they go on with a list that was sent before ([`Have`]).
//!
//! Nothing in a stream is true because it is there. Statement, signature and registers are tied together by the
//! quote; firmware log, IMA list, records and guests' lists by replay to the quoted registers.

use minicbor::{Decode, Encode};

use std::collections::BTreeSet;

use crate::{
    Malformed, MalformedKind, cbor,
    id::{Blob, Nonce, SessionId, VmId},
    ima,
    nonce_tree::{BINDING_SIZE, MAX_PATH, Step},
    pcr::{MAX_REGISTERS, RegisterValue},
};

mod have;
mod writer;

pub use have::{Have, Known, KnownGuest, MAX_KNOWN_GUESTS};
pub use writer::Pieces;

use have::Growing;

/// Media type of a stream.
pub const MEDIA_TYPE: &str = "application/vnd.onequote.evidence";

/// The most bytes that a stream may expand to.
pub const MAX_EXPANDED: usize = 256 * 1024 * 1024;

/// The most bytes of log in one piece, and about the most of entries or references in one part.
pub const PIECE_TARGET: usize = 256 * 1024;

/// The longest item in bytes: a head with the longest statement, with much to spare for everything else.
pub const MAX_ITEM: usize = 8 * 1024 * 1024;

/// The most items in a stream: far more than pieces of [`PIECE_TARGET`] and guests that a host can have.
pub const MAX_ITEMS: u64 = 1 << 20;

/// The most memory, as a power of two of bytes, that expanding may take beside its result (zstd's window). What
/// [`compress`] writes needs less.
#[cfg(feature = "zstd")]
const WINDOW_LOG_MAX: u32 = 23;

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
    #[cbor(n(4), decode_with = "cbor::at_most::<MAX_PATH, _, _>")]
    pub path: Vec<Step>,
    /// The quoted registers' values.
    #[cbor(n(5), decode_with = "cbor::at_most::<MAX_REGISTERS, _, _>")]
    pub registers: Vec<RegisterValue>,
    /// The nonce that this answers. A verifier online holds its own; offline this is only a claim.
    #[n(6)]
    pub nonce: Blob,
    /// The channel binding that went into the leaf, 32 bytes or empty. Likewise.
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

impl Evidence {
    /// Reads an expanded stream that begins every log at its start.
    ///
    /// # Errors
    /// [`Malformed`]: also for a missing or second head, a missing end, items after it, or pieces that leave a gap.
    pub fn parse(bytes: &[u8]) -> Result<Self, Malformed> {
        Self::parse_from(bytes, None)
    }

    fn parse_from(bytes: &[u8], before: Option<&Self>) -> Result<Self, Malformed> {
        let mut items = Items { bytes, offset: 0, count: 0, ended: false };
        let Some(Item::Head(head)) = items.next().transpose()? else {
            return Err(Malformed::invalid(WHAT, 0, "does not begin with a head"));
        };
        if head.version != VERSION {
            return Err(Malformed::invalid(WHAT, 0, "unknown version"));
        }
        if Nonce::new(head.nonce.0.clone()).is_none() || !matches!(head.binding.0.len(), 0 | BINDING_SIZE) {
            return Err(Malformed::invalid(WHAT, 0, "nonce or channel binding has not its size"));
        }
        let log = |of: fn(&Self) -> &Vec<u8>| Growing::new(before.map_or(&[][..], |before| of(before)));
        let (mut firmware, mut host_ima) = (log(|e| &e.firmware), log(|e| &e.host_ima));
        let mut records = log(|e| &e.records);
        let mut dictionary = Growing::new(before.map_or(&[][..], |before| &before.dictionary));
        let mut guests = Guests { before: before.map_or(&[][..], |before| &before.guests), ..Guests::default() };
        while let Some(item) = items.next().transpose()? {
            let ok = match item {
                Item::Head(_) => return Err(Malformed::invalid(WHAT, items.offset, "a second head")),
                Item::Firmware(piece) => firmware.add(piece.offset, piece.bytes.0),
                Item::HostIma(piece) => host_ima.add(piece.offset, piece.bytes.0),
                Item::Records(piece) => records.add(piece.offset, piece.bytes.0),
                Item::Dictionary(part) => dictionary.add(part.first, part.entries),
                // References mean entries of the dictionary that they came with.
                Item::Guest(part) => guests.add(part, dictionary.onto()),
                Item::End(_) => true,
            };
            if !ok {
                return Err(Malformed::invalid(WHAT, items.offset, "a piece does not follow the one before it"));
            }
        }
        Ok(Self {
            head,
            firmware: firmware.finish(),
            host_ima: host_ima.finish(),
            records: records.finish(),
            dictionary: dictionary.finish(),
            guests: guests.lists,
        })
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
        if self.count == MAX_ITEMS {
            return Err(Malformed::new(WHAT, self.offset, MalformedKind::TooLarge { limit: MAX_ITEMS as usize }));
        }
        let window = &rest[..rest.len().min(MAX_ITEM)];
        let (item, len) = cbor::decode_first(WHAT, window).map_err(|mut e| {
            if e.is_truncated() && window.len() < rest.len() {
                e.kind = MalformedKind::TooLarge { limit: MAX_ITEM };
            }
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

/// Guests' lists as they are put together.
#[derive(Default)]
struct Guests<'a> {
    before: &'a [Guest],
    lists: Vec<Guest>,
    known: BTreeSet<(VmId, SessionId, u32)>,
}

impl Guests<'_> {
    /// A part goes on with the last list, or begins one that is not there yet: at its start or, where the dictionary goes
    /// on with the one before, where that list ended before.
    fn add(&mut self, mut part: Guest, dictionary_goes_on: bool) -> bool {
        let key = |g: &Guest| (g.vm, g.session, g.boot);
        if let Some(last) = self.lists.last_mut().filter(|last| key(last) == key(&part)) {
            let fits = part.first == last.entries.len() as u64;
            last.entries.extend(part.entries);
            return fits;
        }
        if part.first != 0 {
            let before = self.before.iter().find(|before| key(before) == key(&part) && dictionary_goes_on);
            let Some(before) = before.filter(|before| before.entries.len() as u64 == part.first) else { return false };
            part.entries.splice(0..0, before.entries.iter().copied());
            part.first = 0;
        }
        let fits = self.known.insert(key(&part));
        self.lists.push(part);
        fits
    }
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
    let mut decoder = zstd::Decoder::with_buffer(&mut rest).map_err(bad)?.single_frame();
    decoder.window_log_max(WINDOW_LOG_MAX).map_err(bad)?;
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
