//! A host's logs as they were received: whole, or what they go on with.
//!
//! Nothing in them is believed yet. A log that is not mentioned is empty, also where it was not before.

use std::collections::{BTreeMap, BTreeSet};

use onequote_evidence::{
    Malformed, MalformedKind,
    id::{Blob, Epoch, Nonce, SessionId, VmId},
    log::Replay,
    record::Record,
    stream::{self, Evidence, Guest, Have, Item, Known, KnownGuest, MAX_EXPANDED, MAX_KNOWN_GUESTS},
};

const WHAT: &str = "evidence stream";

/// Part of a log, or of the dictionary.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Part<T> {
    /// Where it begins: how many bytes or entries are before it.
    pub first: u64,
    /// What there is from there on, up to the end.
    pub items: Vec<T>,
}

impl<T> Default for Part<T> {
    fn default() -> Self {
        Self { first: 0, items: Vec::new() }
    }
}

impl<T> Part<T> {
    /// Where the log ends.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.first + self.items.len() as u64
    }

    /// What is said again is taken as it is said now.
    fn append(&mut self, more: Self) -> Result<(), Malformed> {
        if more.first == 0 {
            *self = more;
            return Ok(());
        }
        let again = more.first.checked_sub(self.first).and_then(|again| usize::try_from(again).ok());
        let Some(again) = again.filter(|&again| again <= self.items.len()) else { return Err(gap()) };
        self.items.truncate(again);
        self.items.extend(more.items);
        Ok(())
    }
}

/// The logs.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Logs {
    /// The firmware's event log.
    pub firmware: Part<u8>,
    /// The host's IMA list.
    pub host_ima: Part<u8>,
    /// The measurement log.
    pub records: Part<u8>,
    /// Distinct entries of the guests' lists.
    pub dictionary: Part<Blob>,
    /// The guests' lists, each of a session's boot at most once.
    pub guests: Vec<Guest>,
}

impl From<Evidence> for Logs {
    fn from(evidence: Evidence) -> Self {
        let Evidence { firmware, host_ima, records, dictionary, guests, head: _ } = evidence;
        let whole = |items| Part { first: 0, items };
        let dictionary = Part { first: 0, items: dictionary };
        Self { firmware: whole(firmware), host_ima: whole(host_ima), records: whole(records), dictionary, guests }
    }
}

impl Logs {
    /// Whether every log is there from its start.
    #[must_use]
    pub fn are_whole(&self) -> bool {
        let logs = [self.firmware.first, self.host_ima.first, self.records.first, self.dictionary.first];
        logs.iter().chain(self.guests.iter().map(|list| &list.first)).all(|&first| first == 0)
    }

    /// Whether it can be appraised by itself: every log is there from its start, but for a beginning of the measurement log that
    /// the host has dropped.
    #[must_use]
    pub fn begin(&self) -> bool {
        let Self { firmware, host_ima, records, dictionary, guests } = self;
        let others = [firmware.first, host_ima.first, dictionary.first];
        let whole = others.iter().chain(guests.iter().map(|list| &list.first)).all(|&first| first == 0);
        whole && (records.first == 0 || segment(records).is_some())
    }

    /// Puts what came later behind what came before. What it says again of the end is taken as it says it now. Lists that it
    /// does not name are not there any more.
    ///
    /// # Errors
    /// [`Malformed`] when it leaves a gap, or all of it together is more than a stream may hold.
    pub fn append(&mut self, more: Self) -> Result<(), Malformed> {
        let named: BTreeSet<_> = more.guests.iter().map(key).collect();
        self.append_part(more)?;
        self.guests.retain(|list| named.contains(&key(list)));
        Ok(())
    }

    /// The same for a part as it is kept, which names only lists with something new.
    ///
    /// # Errors
    /// As [`Self::append`].
    pub fn append_part(&mut self, more: Self) -> Result<(), Malformed> {
        let references_go_on = more.dictionary.first != 0 || self.dictionary.items.is_empty();
        self.firmware.append(more.firmware)?;
        self.host_ima.append(more.host_ima)?;
        match segment(&more.records) {
            // The rest of a log that is not this one, or of which a part in between was dropped.
            Some(epoch) if more.records.first > self.records.end() || beginning(&self.records) != Some(epoch) => {
                self.records = more.records;
            }
            _ => self.records.append(more.records)?,
        }
        self.dictionary.append(more.dictionary)?;
        let mut at: BTreeMap<_, usize> = self.guests.iter().enumerate().map(|(at, list)| (key(list), at)).collect();
        for list in more.guests {
            match at.get(&key(&list)) {
                Some(&at) => {
                    let known = &mut self.guests[at];
                    let first = usize::try_from(list.first).ok().filter(|&first| first <= known.entries.len());
                    let Some(first) = first.filter(|&first| first == 0 || references_go_on) else { return Err(gap()) };
                    known.entries.truncate(first);
                    known.entries.extend(list.entries);
                }
                None if list.first == 0 => {
                    at.insert(key(&list), self.guests.len());
                    self.guests.push(list);
                }
                None => return Err(gap()),
            }
        }
        match self.size() {
            0..=MAX_EXPANDED => Ok(()),
            _ => Err(Malformed::new(WHAT, 0, MalformedKind::TooLarge { limit: MAX_EXPANDED })),
        }
    }

    /// What there is of it, for who may leave that out.
    #[must_use]
    pub fn have(&self) -> Have {
        let bytes = |log: &Part<u8>| (!log.items.is_empty()).then(|| Known::of_bytes(&log.items));
        let entries = || self.dictionary.items.iter().map(|entry| entry.0.as_slice());
        let guest = |list: &Guest| KnownGuest {
            vm: list.vm,
            session: list.session,
            boot: list.boot,
            known: Known::of_references(&list.entries),
        };
        Have {
            statement: None,
            firmware: bytes(&self.firmware),
            host_ima: bytes(&self.host_ima),
            records: bytes(&self.records),
            dictionary: (!self.dictionary.items.is_empty()).then(|| Known::of_entries(entries())),
            guests: self.guests.iter().take(MAX_KNOWN_GUESTS).map(guest).collect(),
        }
    }

    /// It, without lists that have nothing new; none where nothing is new at all.
    #[must_use]
    pub fn news(&self) -> Option<Self> {
        let guests: Vec<Guest> = self.guests.iter().filter(|list| !list.entries.is_empty()).cloned().collect();
        let bytes = [&self.firmware, &self.host_ima, &self.records];
        let new =
            bytes.iter().any(|log| !log.items.is_empty()) || !self.dictionary.items.is_empty() || !guests.is_empty();
        new.then(|| Self { guests, ..self.clone() })
    }

    /// Puts together the pieces of a stream.
    ///
    /// # Errors
    /// Of the stream; and when a piece does not follow the one before it, or references go on whose dictionary does not.
    pub fn collect<E: From<Malformed>>(pieces: impl IntoIterator<Item = Result<Item, E>>) -> Result<Self, E> {
        let mut parts = Collected::default();
        for piece in pieces {
            let fits = match piece? {
                Item::Firmware(piece) => add(&mut parts.firmware, piece.offset, piece.bytes.0),
                Item::HostIma(piece) => add(&mut parts.host_ima, piece.offset, piece.bytes.0),
                Item::Records(piece) => add(&mut parts.records, piece.offset, piece.bytes.0),
                Item::Dictionary(part) => add(&mut parts.dictionary, part.first, part.entries),
                // References mean entries of the dictionary that they came with.
                Item::Guest(part) => parts.add_guest(part),
                Item::Answer(_) | Item::Quote(_) | Item::End(_) => false,
            };
            if !fits {
                return Err(gap().into());
            }
        }
        let Collected { firmware, host_ima, records, dictionary, guests, .. } = parts;
        Ok(Self {
            firmware: firmware.unwrap_or_default(),
            host_ima: host_ima.unwrap_or_default(),
            records: records.unwrap_or_default(),
            dictionary: dictionary.unwrap_or_default(),
            guests,
        })
    }

    /// The pieces, as they are kept until more comes behind them: a stream without a head of its own.
    ///
    /// # Errors
    /// When zstd fails, which it does only for want of memory.
    pub fn to_part(&self) -> std::io::Result<Vec<u8>> {
        let mut pieces = stream::Pieces::default();
        self.push_all(&mut pieces);
        let nothing = || Blob(Vec::new());
        stream::compress(&pieces.stream(stream::Head {
            version: stream::VERSION,
            statement: nothing(),
            attest: nothing(),
            signature: nothing(),
            path: Vec::new(),
            registers: Vec::new(),
            nonce: Blob(vec![0; Nonce::MIN]),
            binding: nothing(),
        }))
    }

    /// Adds all of it to a stream.
    pub fn push_all(&self, pieces: &mut stream::Pieces) {
        pieces.push_log(Item::Firmware, self.firmware.first, &self.firmware.items);
        pieces.push_log(Item::HostIma, self.host_ima.first, &self.host_ima.items);
        pieces.push_log(Item::Records, self.records.first, &self.records.items);
        pieces.push_dictionary(self.dictionary.first, self.dictionary.items.iter().cloned());
        for guest in &self.guests {
            pieces.push_guest(guest);
        }
    }

    /// Bytes of all of it.
    #[must_use]
    pub fn size(&self) -> usize {
        let entries: usize = self.dictionary.items.iter().map(|entry| entry.0.len()).sum();
        let references: usize = self.guests.iter().map(|guest| size_of_val(guest.entries.as_slice())).sum();
        self.firmware.items.len() + self.host_ima.items.len() + self.records.items.len() + entries + references
    }
}

/// Logs while their pieces come; none where there was no piece yet.
#[derive(Default)]
struct Collected {
    firmware: Option<Part<u8>>,
    host_ima: Option<Part<u8>>,
    records: Option<Part<u8>>,
    dictionary: Option<Part<Blob>>,
    guests: Vec<Guest>,
    known: BTreeSet<(VmId, SessionId, u32)>,
}

impl Collected {
    /// A part goes on with the last list, or begins one that is not there yet.
    fn add_guest(&mut self, part: Guest) -> bool {
        if let Some(last) = self.guests.last_mut().filter(|last| key(last) == key(&part)) {
            let fits = part.first == last.first + last.entries.len() as u64;
            last.entries.extend(part.entries);
            return fits;
        }
        let goes_on = self.dictionary.as_ref().is_some_and(|part| part.first != 0);
        let fits = (part.first == 0 || goes_on) && self.known.insert(key(&part));
        self.guests.push(part);
        fits
    }
}

fn add<T>(log: &mut Option<Part<T>>, first: u64, items: Vec<T>) -> bool {
    match log {
        Some(log) => {
            let fits = first == log.end();
            log.items.extend(items);
            fits
        }
        None => {
            *log = Some(Part { first, items });
            true
        }
    }
}

fn key(list: &Guest) -> (VmId, SessionId, u32) {
    (list.vm, list.session, list.boot)
}

/// The epoch of a log that does not begin at its start, but where a segment does.
fn segment(records: &Part<u8>) -> Option<Epoch> {
    (records.first > 0).then(|| beginning(records)).flatten()
}

/// The epoch of a log that begins with its start, or with a segment's.
fn beginning(records: &Part<u8>) -> Option<Epoch> {
    let (record, _) = Record::parse_first(&records.items).ok()?;
    Replay::begin(&record).ok().map(|replay| replay.start().epoch)
}

fn gap() -> Malformed {
    Malformed::invalid(WHAT, 0, "a piece does not follow the one before it")
}
