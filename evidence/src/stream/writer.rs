//! Writing the second frame of a stream, whatever its size, in pieces that a reader takes.

use std::io::{self, Write};

use crate::{cbor, id::Blob};

use super::{Dictionary, Guest, Head, Item, PIECE_TARGET, Piece, Quote};

/// The items of the second frame as they are written: into memory, or through a [`super::Packer`] to wherever.
///
/// A writer that fails makes [`Self::finish`] fail; what is pushed after that goes nowhere.
#[derive(Debug)]
pub struct Pieces<W = Vec<u8>> {
    out: W,
    /// Behind the quote.
    items: u64,
    failed: Option<io::Error>,
}

impl Default for Pieces {
    /// Pieces without the quote that they belong to, which [`Self::stream`] puts before them.
    fn default() -> Self {
        Self { out: Vec::new(), items: 0, failed: None }
    }
}

impl Pieces {
    /// The whole stream behind this head, not yet compressed: the items of both frames, one behind the other.
    #[must_use]
    pub fn stream(&self, head: Head) -> Vec<u8> {
        let (answer, quote) = head.split();
        let mut out = cbor::encode(&Item::Answer(answer));
        out.extend_from_slice(&cbor::encode(&Item::Quote(quote)));
        out.extend_from_slice(&self.out);
        out.extend_from_slice(&cbor::encode(&Item::End(self.items + 1)));
        out
    }
}

impl<W: Write> Pieces<W> {
    /// Begins the frame of this quote.
    pub fn begin(out: W, quote: &Quote) -> Self {
        let mut pieces = Self { out, items: 0, failed: None };
        pieces.write(&cbor::encode(&Item::Quote(quote.clone())));
        pieces
    }

    /// Ends the frame.
    ///
    /// # Errors
    /// The first that the writer had.
    pub fn finish(mut self) -> io::Result<W> {
        self.write(&cbor::encode(&Item::End(self.items + 1)));
        match self.failed {
            Some(e) => Err(e),
            None => Ok(self.out),
        }
    }

    fn write(&mut self, bytes: &[u8]) {
        if self.failed.is_none() {
            self.failed = self.out.write_all(bytes).err();
        }
    }

    /// Adds a piece as it is. One that encodes to more than [`super::MAX_ITEM`] bytes cannot be read again: the other methods
    /// cut what may grow.
    pub fn push(&mut self, item: &Item) {
        self.write(&cbor::encode(item));
        self.items += 1;
    }

    /// Adds entries of the dictionary, the first of them with the index `first`, cut into parts. Where there is none and
    /// `first` is not 0, it is said that the dictionary goes on with nothing.
    pub fn push_dictionary(&mut self, mut first: u64, entries: impl IntoIterator<Item = Blob>) {
        let begin = first;
        let mut part = Dictionary { first, entries: Vec::new() };
        let mut len = 0;
        for entry in entries {
            len += entry.0.len();
            first += 1;
            part.entries.push(entry);
            if len >= PIECE_TARGET {
                self.push(&Item::Dictionary(part));
                part = Dictionary { first, entries: Vec::new() };
                len = 0;
            }
        }
        if !part.entries.is_empty() || (first != 0 && part.first == begin) {
            self.push(&Item::Dictionary(part));
        }
    }

    /// Adds a guest's list, cut into parts. A list without entries is added too: it says that the boot is known.
    pub fn push_guest(&mut self, guest: &Guest) {
        let mut first = guest.first;
        let mut parts = guest.entries.chunks(PIECE_TARGET / size_of::<u32>());
        loop {
            let entries = parts.next().unwrap_or_default().to_vec();
            let next = first + entries.len() as u64;
            self.push(&Item::Guest(Guest { first, entries, ..*guest }));
            first = next;
            if parts.len() == 0 {
                return;
            }
        }
    }

    /// Adds a log's bytes from `offset` on, cut into pieces. Where there are none and `offset` is not 0, it is said that the
    /// log goes on with nothing.
    pub fn push_log(&mut self, kind: fn(Piece) -> Item, offset: u64, bytes: &[u8]) {
        let mut at = offset;
        if bytes.is_empty() && offset != 0 {
            self.push(&kind(Piece { offset, bytes: Blob::default() }));
        }
        for part in bytes.chunks(PIECE_TARGET) {
            self.push(&kind(Piece { offset: at, bytes: Blob(part.to_vec()) }));
            at += part.len() as u64;
        }
    }
}
