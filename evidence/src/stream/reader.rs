//! Reading a stream item by item.

use std::io;
#[cfg(feature = "zstd")]
use std::io::Read;

use super::{Answer, Head, Item, MAX_ANSWER_ITEM, MAX_EXPANDED, MAX_ITEM, MAX_ITEMS, Quote, VERSION, WHAT};
use crate::{Malformed, MalformedKind, cbor, id::Nonce, nonce_tree::BINDING_SIZE};

#[cfg(feature = "zstd")]
use super::frame::Frames;

/// A stream cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// It is not one.
    #[error(transparent)]
    Malformed(#[from] Malformed),
    /// What it is read from fails: a connection, a file.
    #[error("the evidence cannot be read to its end: {0}")]
    Source(#[source] io::Error),
}

/// Where expanded bytes come from, one frame at a time.
pub(super) trait Source {
    /// Some of the frame's bytes; none at its end.
    fn pull(&mut self, out: &mut [u8]) -> Result<usize, ReadError>;

    /// Whether nothing follows the frame.
    fn is_at_end(&mut self) -> Result<bool, ReadError>;
}

impl Source for &[u8] {
    fn pull(&mut self, out: &mut [u8]) -> Result<usize, ReadError> {
        let (now, rest) = self.split_at(out.len().min(self.len()));
        out[..now.len()].copy_from_slice(now);
        *self = rest;
        Ok(now.len())
    }

    fn is_at_end(&mut self) -> Result<bool, ReadError> {
        Ok(self.is_empty())
    }
}

/// Bytes that are pulled at least at a time, and after which it is looked again whether an item is whole.
const STEP: usize = 4096;

/// The items of one frame.
pub(super) struct Items<S> {
    source: S,
    buffer: Vec<u8>,
    /// Where in `buffer` the next item begins.
    start: usize,
    /// Where in `buffer` ends what was pulled. What is behind it is kept, so that it is made only once.
    filled: usize,
    /// Where in the frame that is.
    offset: usize,
    /// Bytes that were pulled.
    pulled: usize,
    /// The most that may be pulled.
    limit: usize,
    /// Items read.
    count: u64,
    drained: bool,
    ended: bool,
}

impl<S: Source> Items<S> {
    pub(super) fn new(source: S, limit: usize) -> Self {
        let (buffer, start, filled, offset, pulled, count) = (Vec::new(), 0, 0, 0, 0, 0);
        Self { source, buffer, start, filled, offset, pulled, limit, count, drained: false, ended: false }
    }

    /// Where in the frame the next item begins.
    pub(super) fn offset(&self) -> usize {
        self.offset
    }

    /// The next item, of at most `longest` bytes. Nothing else of the source is waited for.
    pub(super) fn read(&mut self, longest: usize) -> Result<Item, ReadError> {
        let mut look_at = 1;
        loop {
            let there = self.filled - self.start;
            if there < look_at && !self.drained {
                self.pull(look_at)?;
                continue;
            }
            let window = &self.buffer[self.start..][..there.min(longest)];
            match cbor::first_len(window) {
                Ok(len) => return self.take(len),
                Err(e) if !e.is_end_of_input() => {
                    let at = self.offset + e.position().unwrap_or_default();
                    return Err(Malformed::new(WHAT, at, MalformedKind::Cbor(e.to_string())).into());
                }
                Err(_) if window.len() == longest => return Err(self.too_large(longest)),
                Err(_) if self.drained => {
                    return Err(Malformed::new(WHAT, self.offset + window.len(), MalformedKind::Truncated).into());
                }
                // Twice as much each time, so that a sender of single bytes does not make it slow.
                Err(_) => look_at = (2 * window.len()).max(STEP).min(longest),
            }
        }
    }

    fn take(&mut self, len: usize) -> Result<Item, ReadError> {
        let bytes = &self.buffer[self.start..self.start + len];
        let item = cbor::decode(WHAT, bytes, len).map_err(|mut e| {
            e.offset += self.offset;
            e
        })?;
        self.start += len;
        self.offset += len;
        self.count += 1;
        Ok(item)
    }

    /// Gets some bytes more towards `wanted`.
    fn pull(&mut self, wanted: usize) -> Result<(), ReadError> {
        if self.start > 0 {
            self.buffer.copy_within(self.start..self.filled, 0);
            self.filled -= std::mem::take(&mut self.start);
        }
        let room = wanted.max(self.filled + STEP);
        if self.buffer.len() < room {
            self.buffer.resize(room, 0);
        }
        let pulled = self.source.pull(&mut self.buffer[self.filled..])?;
        self.filled += pulled;
        self.pulled += pulled;
        self.drained = pulled == 0;
        if self.pulled > self.limit { Err(self.too_large(self.limit)) } else { Ok(()) }
    }

    fn too_large(&self, limit: usize) -> ReadError {
        Malformed::new(WHAT, self.offset, MalformedKind::TooLarge { limit }).into()
    }

    /// That the frame ends here.
    fn end(&mut self) -> Result<(), ReadError> {
        while self.filled == self.start && !self.drained {
            self.pull(1)?;
        }
        match self.filled == self.start {
            true => Ok(()),
            false => Err(Malformed::new(WHAT, self.offset, MalformedKind::Trailing).into()),
        }
    }

    /// Only the quote can begin the second frame.
    pub(super) fn quote(&mut self) -> Result<Quote, ReadError> {
        match self.read(MAX_ITEM)? {
            Item::Quote(quote) => Ok(quote),
            _ => Err(Malformed::invalid(WHAT, 0, "does not begin with a quote").into()),
        }
    }

    /// The next piece; none behind the end, which is checked.
    pub(super) fn piece(&mut self) -> Option<Result<Item, ReadError>> {
        if self.ended {
            return None;
        }
        let item = self.checked();
        self.ended = !matches!(item, Ok(Some(_)));
        item.transpose()
    }

    fn checked(&mut self) -> Result<Option<Item>, ReadError> {
        if self.count == MAX_ITEMS {
            return Err(self.too_large(MAX_ITEMS as usize));
        }
        match self.read(MAX_ITEM)? {
            Item::Answer(_) | Item::Quote(_) => Err(Malformed::invalid(WHAT, self.offset, "a second head").into()),
            Item::End(count) if count + 1 != self.count => {
                Err(Malformed::invalid(WHAT, self.offset, "the end counts another number of items").into())
            }
            Item::End(_) => {
                self.end()?;
                match self.source.is_at_end()? {
                    true => Ok(None),
                    false => Err(Malformed::new(WHAT, self.offset, MalformedKind::Trailing).into()),
                }
            }
            piece => Ok(Some(piece)),
        }
    }
}

/// What the first frame may say.
fn check_answer(item: Item) -> Result<Answer, Malformed> {
    let Item::Answer(answer) = item else {
        return Err(Malformed::invalid(WHAT, 0, "does not begin with an answer"));
    };
    if answer.version != VERSION {
        return Err(Malformed::invalid(WHAT, 0, "unknown version"));
    }
    if Nonce::new(answer.nonce.0.clone()).is_none() || !matches!(answer.binding.0.len(), 0 | BINDING_SIZE) {
        return Err(Malformed::invalid(WHAT, 0, "nonce or channel binding has not its size"));
    }
    Ok(answer)
}

/// The items of an expanded stream, both frames one behind the other.
pub(super) fn expanded(bytes: &[u8]) -> Result<(Head, Items<&[u8]>), ReadError> {
    let mut first = Items::new(bytes, usize::MAX);
    let answer = check_answer(first.read(MAX_ANSWER_ITEM)?)?;
    let mut items = Items::new(&bytes[first.offset..], usize::MAX);
    let quote = items.quote()?;
    Ok((Head::new(answer, quote), items))
}

/// Reads a stream from whatever gives its bytes, without ever holding more than an item of it.
///
/// [`Reader::open`] takes two items, so that signature, nonce and binding can be checked before anything else is taken
/// from the source. What follows comes as an iterator; nothing may be used before its end came without an error.
#[cfg(feature = "zstd")]
pub struct Reader<R> {
    head: Head,
    items: Items<Frames<R>>,
}

#[cfg(feature = "zstd")]
impl<R: Read> Reader<R> {
    /// Reads the head.
    ///
    /// # Errors
    /// [`ReadError`]: also for another version, or a nonce or channel binding that has not its size.
    pub fn open(source: R) -> Result<Self, ReadError> {
        let mut first = Items::new(Frames::new(source)?, MAX_ANSWER_ITEM);
        let answer = check_answer(first.read(MAX_ANSWER_ITEM)?)?;
        first.end()?;
        let mut frames = first.source;
        frames.next_frame()?;
        let mut items = Items::new(frames, MAX_EXPANDED);
        let quote = items.quote()?;
        Ok(Self { head: Head::new(answer, quote), items })
    }

    /// The quote and what it is about.
    #[must_use]
    pub fn head(&self) -> &Head {
        &self.head
    }

    /// Bytes of the second frame that were expanded until now.
    #[must_use]
    pub fn expanded(&self) -> usize {
        self.items.pulled
    }

    pub(super) fn into_parts(self) -> (Head, Items<Frames<R>>) {
        (self.head, self.items)
    }
}

/// The pieces: every item behind the quote but the end, in the order in which they stand.
#[cfg(feature = "zstd")]
impl<R: Read> Iterator for Reader<R> {
    type Item = Result<Item, ReadError>;

    fn next(&mut self) -> Option<Self::Item> {
        self.items.piece()
    }
}
