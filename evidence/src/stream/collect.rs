//! A whole stream put together in memory.

use std::collections::BTreeSet;
#[cfg(feature = "zstd")]
use std::io::Read;

#[cfg(feature = "zstd")]
use super::Reader;
use super::{
    Evidence, Guest, Head, Item, MAX_EXPANDED, Pieces, ReadError, WHAT,
    reader::{self, Items, Source},
};
use crate::{
    Malformed, MalformedKind,
    id::{SessionId, VmId},
};

impl Evidence {
    /// Reads an expanded stream that begins every log at its start.
    ///
    /// # Errors
    /// [`Malformed`]: also for a missing or second head, a missing end, items after it, or pieces that leave a gap.
    pub fn parse(bytes: &[u8]) -> Result<Self, Malformed> {
        Self::parse_from(bytes, None)
    }

    /// Reads an expanded stream whose logs begin at their start or where those of `before` end.
    ///
    /// # Errors
    /// As [`Self::parse`]; also when all of it together is more than a stream may hold.
    pub fn parse_onto(bytes: &[u8], before: &Self) -> Result<Self, Malformed> {
        Self::parse_from(bytes, Some(before))
    }

    fn parse_from(bytes: &[u8], before: Option<&Self>) -> Result<Self, Malformed> {
        let read = || {
            let (head, items) = reader::expanded(bytes)?;
            Self::collect(head, items, before)
        };
        read().map_err(|e| match e {
            ReadError::Malformed(e) => e,
            // Memory does not fail.
            ReadError::Source(_) => Malformed::invalid(WHAT, 0, "cannot be read"),
        })
    }

    /// Reads the rest of a stream, whose logs begin at their start or, if there was evidence `before`, where those end.
    ///
    /// # Errors
    /// As [`Self::parse_onto`], and of the source.
    #[cfg(feature = "zstd")]
    pub fn read<R: Read>(reader: Reader<R>, before: Option<&Self>) -> Result<Self, ReadError> {
        let (head, items) = reader.into_parts();
        Self::collect(head, items, before)
    }

    fn collect<S: Source>(head: Head, mut items: Items<S>, before: Option<&Self>) -> Result<Self, ReadError> {
        let log = |of: fn(&Self) -> &Vec<u8>| Growing::new(before.map_or(&[][..], |before| of(before)));
        let (mut firmware, mut host_ima) = (log(|e| &e.firmware), log(|e| &e.host_ima));
        let mut records = log(|e| &e.records);
        let mut dictionary = Growing::new(before.map_or(&[][..], |before| &before.dictionary));
        let mut guests = Guests { before: before.map_or(&[][..], |before| &before.guests), ..Guests::default() };
        while let Some(item) = items.piece().transpose()? {
            let ok = match item {
                Item::Firmware(piece) => firmware.add(piece.offset, piece.bytes.0),
                Item::HostIma(piece) => host_ima.add(piece.offset, piece.bytes.0),
                Item::Records(piece) => records.add(piece.offset, piece.bytes.0),
                Item::Dictionary(part) => dictionary.add(part.first, part.entries),
                // References mean entries of the dictionary that they came with.
                Item::Guest(part) => guests.add(part, dictionary.onto()),
                Item::Answer(_) | Item::Quote(_) | Item::End(_) => false,
            };
            if !ok {
                let at = items.offset();
                return Err(Malformed::invalid(WHAT, at, "a piece does not follow the one before it").into());
            }
        }
        let whole = Self {
            head,
            firmware: firmware.finish(),
            host_ima: host_ima.finish(),
            records: records.finish(),
            dictionary: dictionary.finish(),
            guests: guests.lists,
        };
        match before.is_some() && whole.size() > MAX_EXPANDED {
            true => Err(Malformed::new(WHAT, items.offset(), MalformedKind::TooLarge { limit: MAX_EXPANDED }).into()),
            false => Ok(whole),
        }
    }

    fn size(&self) -> usize {
        let entries: usize = self.dictionary.iter().map(|entry| entry.0.len()).sum();
        let references: usize = self.guests.iter().map(|guest| size_of_val(guest.entries.as_slice())).sum();
        self.firmware.len() + self.host_ima.len() + self.records.len() + entries + references
    }

    /// The stream of all of it, every log from its start, not yet compressed.
    #[must_use]
    pub fn stream(&self) -> Vec<u8> {
        let mut pieces = Pieces::default();
        self.push_all(&mut pieces);
        pieces.stream(self.head.clone())
    }

    /// The stream of all of it, every log from its start.
    ///
    /// # Errors
    /// When zstd fails, which it does only for want of memory.
    #[cfg(feature = "zstd")]
    pub fn to_bytes(&self) -> std::io::Result<Vec<u8>> {
        let (answer, quote) = self.head.clone().split();
        let mut pieces = Pieces::begin(super::Packer::new(answer.to_frame()), &quote);
        self.push_all(&mut pieces);
        pieces.finish()?.finish()
    }

    fn push_all<W: std::io::Write>(&self, pieces: &mut Pieces<W>) {
        pieces.push_log(Item::Firmware, 0, &self.firmware);
        pieces.push_log(Item::HostIma, 0, &self.host_ima);
        pieces.push_log(Item::Records, 0, &self.records);
        pieces.push_dictionary(0, self.dictionary.iter().cloned());
        for guest in &self.guests {
            pieces.push_guest(guest);
        }
    }
}

/// A log as it is put together: from its start, or onto what there was before.
struct Growing<'a, T> {
    before: &'a [T],
    /// None until the first piece came.
    now: Option<Vec<T>>,
    /// Whether it goes on where `before` ends.
    onto: bool,
}

impl<'a, T: Clone> Growing<'a, T> {
    fn new(before: &'a [T]) -> Self {
        Self { before, now: None, onto: false }
    }

    /// Adds a piece; tells whether it begins where the log ends so far.
    fn add(&mut self, first: u64, part: Vec<T>) -> bool {
        let now = match &mut self.now {
            Some(now) => now,
            None => {
                self.onto = first != 0;
                self.now.insert(if self.onto { self.before.to_vec() } else { Vec::new() })
            }
        };
        if first != now.len() as u64 {
            return false;
        }
        now.extend(part);
        true
    }

    /// Whether it goes on where the log before ended.
    fn onto(&self) -> bool {
        self.onto
    }

    fn finish(self) -> Vec<T> {
        self.now.unwrap_or_default()
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
