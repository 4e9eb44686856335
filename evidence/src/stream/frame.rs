//! The two zstd frames of a stream (RFC 8878).

use std::io::{self, Read, Write};

use zstd::stream::raw::{DParameter, Decoder, Operation as _};

use super::{
    Answer, Item, MAX_ANSWER_ITEM, MAX_EXPANDED, WHAT,
    reader::{ReadError, Source},
};
use crate::{Malformed, MalformedKind, cbor};

/// The most memory, as a power of two of bytes, that expanding may take beside its result (zstd's window). What
/// [`Packer`] writes needs less.
const WINDOW_LOG_MAX: u32 = 23;

/// Compression level: zstd's own default, and its window of 2 MiB.
const LEVEL: i32 = 3;

/// Bytes up to which a frame is compressed in one go: then its header tells its size, and expanding it takes no more
/// memory than it needs.
const AT_ONCE: usize = 1024 * 1024;

/// Bytes that are read from the source at a time.
const INPUT: usize = 32 * 1024;

/// Magic number, frame header descriptor (single segment, content size in four bytes).
const FRAME_HEADER: [u8; 5] = [0x28, 0xb5, 0x2f, 0xfd, 0xa0];

impl Answer {
    /// The first frame of a stream. It is not compressed: hashes and nonces cannot be.
    #[must_use]
    pub fn to_frame(&self) -> Vec<u8> {
        raw_frame(&cbor::encode(&Item::Answer(self.clone())))
    }
}

/// A frame of one raw block, which is the last. Its content is an answer's, so it is shorter than a block can be (128 KiB).
fn raw_frame(content: &[u8]) -> Vec<u8> {
    let len = content.len() as u32;
    let mut out = Vec::with_capacity(FRAME_HEADER.len() + 7 + content.len());
    out.extend_from_slice(&FRAME_HEADER);
    out.extend_from_slice(&len.to_le_bytes());
    // Block header: size from bit 3 on, type raw (0) in bits 1 and 2, last block in bit 0.
    out.extend_from_slice(&(len << 3 | 1).to_le_bytes()[..3]);
    out.extend_from_slice(content);
    out
}

/// Compresses what is written into one frame, without ever holding more than a part of it.
pub struct Packer<W: Write> {
    state: State<W>,
}

enum State<W: Write> {
    /// So little that it is kept until the end.
    Small(W, Vec<u8>),
    Large(zstd::Encoder<'static, W>),
    /// Failed before.
    Broken,
}

impl<W: Write> Packer<W> {
    /// Into this writer.
    pub fn new(out: W) -> Self {
        Self { state: State::Small(out, Vec::new()) }
    }

    /// Ends the frame.
    ///
    /// # Errors
    /// Of the writer, or when zstd fails for want of memory.
    pub fn finish(self) -> io::Result<W> {
        match self.state {
            State::Small(mut out, bytes) => {
                out.write_all(&zstd::bulk::compress(&bytes, LEVEL)?)?;
                Ok(out)
            }
            State::Large(encoder) => encoder.finish(),
            State::Broken => Err(broken()),
        }
    }
}

fn broken() -> io::Error {
    io::Error::other("the frame failed before")
}

impl<W: Write> Write for Packer<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match &mut self.state {
            State::Small(_, kept) if kept.len() + bytes.len() <= AT_ONCE => {
                kept.extend_from_slice(bytes);
                return Ok(bytes.len());
            }
            State::Small(..) => {}
            State::Large(encoder) => return encoder.write(bytes),
            State::Broken => return Err(broken()),
        }
        if let State::Small(out, kept) = std::mem::replace(&mut self.state, State::Broken) {
            let mut encoder = zstd::Encoder::new(out, LEVEL)?;
            encoder.write_all(&kept)?;
            self.state = State::Large(encoder);
        }
        self.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Expands one frame after the other from a source.
pub(super) struct Frames<R> {
    source: R,
    decoder: Decoder<'static>,
    input: Box<[u8]>,
    /// Where in `input` the next byte is, and where the last was.
    at: usize,
    filled: usize,
    /// Bytes that came from the source.
    received: u64,
    /// Whether the frame has ended.
    ended: bool,
}

impl<R: Read> Frames<R> {
    pub(super) fn new(source: R) -> Result<Self, ReadError> {
        let mut decoder = Decoder::new().map_err(ReadError::Source)?;
        decoder.set_parameter(DParameter::WindowLogMax(WINDOW_LOG_MAX)).map_err(ReadError::Source)?;
        let input = vec![0; INPUT].into_boxed_slice();
        Ok(Self { source, decoder, input, at: 0, filled: 0, received: 0, ended: false })
    }

    /// Goes on to the next frame. The one before must have ended.
    pub(super) fn next_frame(&mut self) -> Result<(), ReadError> {
        self.decoder.reinit().map_err(ReadError::Source)?;
        self.ended = false;
        Ok(())
    }

    /// Whether the source has more; gives false at its end.
    fn fill(&mut self) -> Result<bool, ReadError> {
        if self.at < self.filled {
            return Ok(true);
        }
        self.at = 0;
        self.filled = loop {
            match self.source.read(&mut self.input) {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                read => break read.map_err(ReadError::Source)?,
            }
        };
        self.received += self.filled as u64;
        // A frame can have blocks that expand to nothing, without end.
        if self.received > MAX_EXPANDED as u64 {
            return Err(Malformed::new(WHAT, 0, MalformedKind::TooLarge { limit: MAX_EXPANDED }).into());
        }
        Ok(self.filled > 0)
    }
}

impl<R: Read> Source for Frames<R> {
    fn pull(&mut self, out: &mut [u8]) -> Result<usize, ReadError> {
        if self.ended || out.is_empty() {
            return Ok(0);
        }
        loop {
            let more = self.fill()?;
            let step = self.decoder.run_on_buffers(&self.input[self.at..self.filled], out);
            let step = step.map_err(|_| Malformed::invalid(WHAT, 0, "not a zstd frame, or a damaged one"))?;
            self.at += step.bytes_read;
            if step.remaining == 0 {
                self.ended = true;
                return Ok(step.bytes_written);
            }
            if step.bytes_written > 0 {
                return Ok(step.bytes_written);
            }
            if !more {
                return Err(Malformed::new(WHAT, self.received as usize, MalformedKind::Truncated).into());
            }
        }
    }

    fn is_at_end(&mut self) -> Result<bool, ReadError> {
        Ok(!self.fill()?)
    }
}

/// Compresses the items of both frames, one behind the other, into a stream.
///
/// # Errors
/// When they do not begin with an [`Item::Answer`], or zstd fails for want of memory.
pub fn compress(expanded: &[u8]) -> io::Result<Vec<u8>> {
    let window = &expanded[..expanded.len().min(MAX_ANSWER_ITEM)];
    let first = cbor::first_len(window).map_err(|e| io::Error::new(io::ErrorKind::InvalidInput, e.to_string()))?;
    let mut out = raw_frame(&expanded[..first]);
    let mut packer = Packer::new(&mut out);
    packer.write_all(&expanded[first..])?;
    packer.finish()?;
    Ok(out)
}

/// Expands a stream of exactly two frames, to at most `limit` bytes whatever their headers say: the items of both, one
/// behind the other.
///
/// # Errors
/// [`Malformed`] when it is not zstd, too large, cut off, or followed by anything.
pub fn expand(compressed: &[u8], limit: usize) -> Result<Vec<u8>, Malformed> {
    let expanded = || {
        let mut frames = Frames::new(compressed)?;
        let mut out = Vec::new();
        pull_all(&mut frames, &mut out, limit.min(MAX_ANSWER_ITEM))?;
        frames.next_frame()?;
        pull_all(&mut frames, &mut out, limit)?;
        match frames.is_at_end()? {
            true => Ok(out),
            false => Err(Malformed::new(WHAT, compressed.len(), MalformedKind::Trailing).into()),
        }
    };
    expanded().map_err(|e| match e {
        ReadError::Malformed(e) => e,
        // Memory does not fail as a source; zstd does for want of memory.
        ReadError::Source(_) => Malformed::invalid(WHAT, 0, "zstd has no memory"),
    })
}

fn pull_all(source: &mut impl Source, out: &mut Vec<u8>, limit: usize) -> Result<(), ReadError> {
    let mut part = vec![0; 128 * 1024];
    loop {
        match source.pull(&mut part)? {
            0 => return Ok(()),
            len if out.len() + len > limit => {
                return Err(Malformed::new(WHAT, 0, MalformedKind::TooLarge { limit }).into());
            }
            len => out.extend_from_slice(&part[..len]),
        }
    }
}
