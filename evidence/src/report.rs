//! What a proxy and a verifier say to each other over a connection that the proxy keeps: reports, and asking for them.
//!
//! The proxy connects to the verifier's door for hosts with the certificate of its membership, by TLS 1.3 with
//! [`ALPN`]. Frames go in both directions: u32 little-endian length, then that many bytes of canonical CBOR, an array of
//! two: the frame's number and the array of its fields.
//!
//! ```text
//! proxy                                   verifier
//! Hello {version, host}               →
//!                                     ←   Ask {nonce, statement, period, …}
//! NeedHave                            →                                only if it does not know that statement
//!                                     ←   Details {have}               or unasked, before the Ask that it belongs to
//! Begin {nonce, cause, size}          →                                at the period's end, at a change, when asked
//!                                     ←   Go                           only for more than EAGER bytes
//! Chunk {bytes} …                     →                                size bytes of evidence stream altogether
//!                                     ←   Taken {accepted, state, next Ask}, or Later {after}
//! ```
//!
//! The evidence answers the nonce of the last `Ask` and is bound to this connection by its exporter value. An `Ask` may
//! come at any time and takes the place of the one before; with `now` it wants its report at once. One report is under
//! way at a time. `Later` stands in place of `Go` or of `Taken` and means that nothing was taken: bytes of at most
//! [`EAGER`] that follow `Begin` unasked are read and dropped. `Refused` says why the verifier ends the connection. A
//! frame that breaks these rules ends it.
//!
//! Nothing that a proxy says in a frame is believed because it is there. Who it is says its certificate, and what it
//! reports says the evidence.

use std::marker::PhantomData;

use minicbor::{Decode, Encode};

use crate::{
    Malformed, cbor,
    id::{Blob, HostId, Nonce, Sha256},
    stream::Have,
};

/// The protocol's name in the TLS handshake (RFC 7301).
pub const ALPN: &[u8] = b"onequote-report/1";

/// This description's version, in [`ProxyFrame::Hello`].
pub const VERSION: u32 = 1;

/// The most bytes of evidence in one [`ProxyFrame::Chunk`].
pub const MAX_CHUNK: usize = 64 * 1024;

/// Evidence of so many bytes follows [`ProxyFrame::Begin`] without waiting for [`VerifierFrame::Go`].
pub const EAGER: u64 = 64 * 1024;

/// The longest evidence stream in a report, in bytes.
pub const MAX_REPORT: u64 = 64 * 1024 * 1024;

/// The longest frame from a proxy in bytes, without its length.
pub const MAX_PROXY_FRAME: usize = MAX_CHUNK + 64;

/// The longest frame from a verifier in bytes, without its length: the details of as many guests as there can be.
pub const MAX_VERIFIER_FRAME: usize = 512 * 1024;

/// The longest text in a frame, in bytes.
pub const MAX_TEXT: usize = 512;

/// Why a report is made now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode)]
#[cbor(index_only)]
pub enum Cause {
    /// The period is over.
    #[n(0)]
    Period,
    /// Something changed on the host.
    #[n(1)]
    Change,
    /// The verifier asked for it.
    #[n(2)]
    Asked,
    /// The proxy has not reported to this verifier since it started.
    #[n(3)]
    First,
}

impl Cause {
    /// The word for it.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Period => "period",
            Self::Change => "change",
            Self::Asked => "asked",
            Self::First => "first",
        }
    }
}

/// A frame from the proxy.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum ProxyFrame {
    /// First frame of a connection.
    #[n(0)]
    Hello {
        /// [`VERSION`].
        #[n(0)]
        version: u32,
        /// The host's id. It must be that of the certificate.
        #[n(1)]
        host: HostId,
    },
    /// The statement of the last [`Ask`] is not known: say what you have.
    #[n(1)]
    NeedHave,
    /// A report.
    #[n(2)]
    Begin {
        /// The nonce that it answers, 16 to 32 bytes.
        #[n(0)]
        nonce: Blob,
        /// Why it comes now. Only a claim.
        #[n(1)]
        cause: Cause,
        /// Bytes of its evidence stream, 1 to [`MAX_REPORT`].
        #[n(2)]
        size: u64,
    },
    /// The next bytes of its evidence stream.
    #[n(3)]
    Chunk {
        /// 1 to [`MAX_CHUNK`] of them.
        #[n(0)]
        bytes: Blob,
    },
    /// There is no report although the verifier asked for one.
    #[n(4)]
    Unable {
        /// Why, for people; at most [`MAX_TEXT`] bytes.
        #[n(0)]
        why: String,
    },
}

/// What a report must answer, and when one is wanted.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Ask {
    /// The nonce, 16 to 32 bytes.
    #[n(0)]
    pub nonce: Blob,
    /// SHA-256 of the statement of the last evidence that was accepted; none when all evidence is wanted, or what
    /// [`VerifierFrame::Details`] before this leave over.
    #[n(1)]
    pub statement: Option<Sha256>,
    /// For how long the nonce can be answered, in milliseconds.
    #[n(2)]
    pub expires_ms: u64,
    /// Time between two reports, in milliseconds.
    #[n(3)]
    pub period_ms: u64,
    /// Least time between two reports because something changed, in milliseconds; no such reports are wanted if 0.
    #[n(4)]
    pub gap_ms: u64,
    /// Whether a report is wanted at once.
    #[n(5)]
    pub now: bool,
}

/// A frame from the verifier.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum VerifierFrame {
    /// What the next report must answer.
    #[n(0)]
    Ask(#[n(0)] Ask),
    /// What is there already: answer to [`ProxyFrame::NeedHave`], or before an [`Ask`] without a statement.
    #[n(1)]
    Details(#[n(0)] Have),
    /// Send the evidence.
    #[n(2)]
    Go,
    /// The report was appraised.
    #[n(3)]
    Taken {
        /// Whether it is the host's last accepted evidence now.
        #[n(0)]
        accepted: bool,
        /// The host's state in the verdict, in a word; at most [`MAX_TEXT`] bytes.
        #[n(1)]
        state: String,
        /// What the next one must answer.
        #[n(2)]
        next: Ask,
    },
    /// The verifier has too much to do, or the nonce is not the last one: nothing was taken.
    #[n(4)]
    Later {
        /// Time to wait before the next attempt, in milliseconds.
        #[n(0)]
        after_ms: u64,
    },
    /// The verifier ends the connection.
    #[n(5)]
    Refused {
        /// The stable word; at most [`MAX_TEXT`] bytes.
        #[n(0)]
        code: String,
        /// Why, for people; at most [`MAX_TEXT`] bytes.
        #[n(1)]
        error: String,
    },
}

/// A frame with its length, ready to be sent.
pub fn to_wire<F: Encode<()>>(frame: &F) -> Vec<u8> {
    let body = cbor::encode(frame);
    let mut out = Vec::with_capacity(4 + body.len());
    // Frames are far below 4 GiB: their parts are bounded.
    out.extend_from_slice(&u32::try_from(body.len()).unwrap_or(u32::MAX).to_le_bytes());
    out.extend_from_slice(&body);
    out
}

/// A frame that can be read.
pub trait Frame: Sized {
    /// The longest one in bytes, without its length.
    const MAX: usize;

    /// Reads a frame's body (without the length).
    ///
    /// # Errors
    /// [`Malformed`].
    fn parse(body: &[u8]) -> Result<Self, Malformed>;

    /// Checks the length in front of a frame.
    ///
    /// # Errors
    /// [`Malformed`] for an empty frame or one over [`Self::MAX`].
    fn body_len(prefix: [u8; 4]) -> Result<usize, Malformed> {
        let len = u32::from_le_bytes(prefix) as usize;
        match len {
            0 => Err(bad("a frame without content")),
            _ if len > Self::MAX => Err(bad("a frame over the limit")),
            _ => Ok(len),
        }
    }
}

impl Frame for ProxyFrame {
    const MAX: usize = MAX_PROXY_FRAME;

    fn parse(body: &[u8]) -> Result<Self, Malformed> {
        let frame: Self = cbor::decode(WHAT, body, Self::MAX)?;
        match &frame {
            Self::Begin { nonce, .. } if Nonce::new(nonce.0.clone()).is_none() => {
                Err(bad("a nonce of no nonce's size"))
            }
            Self::Begin { size, .. } if !(1..=MAX_REPORT).contains(size) => Err(bad("a report of no report's size")),
            Self::Chunk { bytes } if !(1..=MAX_CHUNK).contains(&bytes.0.len()) => {
                Err(bad("a chunk of no chunk's size"))
            }
            Self::Unable { why } if why.len() > MAX_TEXT => Err(bad("too long a text")),
            _ => Ok(frame),
        }
    }
}

impl Frame for VerifierFrame {
    const MAX: usize = MAX_VERIFIER_FRAME;

    fn parse(body: &[u8]) -> Result<Self, Malformed> {
        let frame: Self = cbor::decode(WHAT, body, Self::MAX)?;
        let (ask, texts): (_, &[&String]) = match &frame {
            Self::Ask(ask) => (Some(ask), &[]),
            Self::Taken { state, next, .. } => (Some(next), &[state]),
            Self::Refused { code, error } => (None, &[code, error]),
            Self::Details(_) | Self::Go | Self::Later { .. } => (None, &[]),
        };
        if ask.is_some_and(|ask| Nonce::new(ask.nonce.0.clone()).is_none()) {
            return Err(bad("a nonce of no nonce's size"));
        }
        if texts.iter().any(|text| text.len() > MAX_TEXT) {
            return Err(bad("too long a text"));
        }
        Ok(frame)
    }
}

/// A frame as it comes in, piece by piece. Memory grows with what has come, never with what was only announced.
#[derive(Debug)]
pub struct Incoming<F> {
    prefix: [u8; 4],
    filled: usize,
    body: Vec<u8>,
    /// The body's length, once the prefix is whole.
    len: usize,
    frame: PhantomData<fn() -> F>,
}

impl<F> Default for Incoming<F> {
    fn default() -> Self {
        Self { prefix: [0; 4], filled: 0, body: Vec::new(), len: 0, frame: PhantomData }
    }
}

impl<F: Frame> Incoming<F> {
    /// Where the next bytes go; never more than belong to this frame, and never none.
    pub fn space(&mut self) -> &mut [u8] {
        if self.filled < 4 {
            return &mut self.prefix[self.filled..];
        }
        let at = self.filled - 4;
        if at == self.body.len() {
            self.body.resize(self.len.min(at + STEP), 0);
        }
        &mut self.body[at..]
    }

    /// So many bytes were put there. Gives the frame when it is whole; the next one begins then.
    ///
    /// # Errors
    /// [`Malformed`]: nothing more can be read.
    pub fn filled(&mut self, bytes: usize) -> Result<Option<F>, Malformed> {
        let space = self.space().len();
        self.filled += bytes.min(space);
        if self.filled == 4 && self.len == 0 {
            self.len = F::body_len(self.prefix)?;
        }
        if self.filled < 4 || self.filled < 4 + self.len {
            return Ok(None);
        }
        let whole = std::mem::take(self);
        F::parse(&whole.body).map(Some)
    }

    /// Whether a part of a frame has come.
    #[must_use]
    pub fn begun(&self) -> bool {
        self.filled > 0
    }
}

/// By how much a frame's memory grows at a time, in bytes.
const STEP: usize = 16 * 1024;

/// As much of a text as a frame may carry.
#[must_use]
pub fn short(text: &str) -> String {
    let end = (0..=MAX_TEXT.min(text.len())).rev().find(|&end| text.is_char_boundary(end));
    text[..end.unwrap_or_default()].to_owned()
}

fn bad(why: &'static str) -> Malformed {
    Malformed::invalid(WHAT, 0, why)
}

const WHAT: &str = "report frame";

// What one frame can carry at most.
const _: () = assert!(MAX_CHUNK + 16 <= MAX_PROXY_FRAME && EAGER as usize <= MAX_CHUNK);
const _: () = assert!(crate::stream::MAX_KNOWN_GUESTS * 112 + 1024 <= MAX_VERIFIER_FRAME);

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests;
