//! The one error of every parser: what was read, where, and what was wrong.

use std::fmt;

/// Input that does not have the form it must have.
///
/// This is always the fault of whoever made the input, never of the caller.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{what}: {kind} at byte {offset}")]
pub struct Malformed {
    /// The structure that was being read, for example `TPMS_ATTEST`.
    pub what: &'static str,
    /// Offset in bytes from the start of that structure's input.
    pub offset: usize,
    /// What is wrong there.
    pub kind: MalformedKind,
}

/// What is wrong with malformed input.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum MalformedKind {
    /// The input ends inside the structure.
    Truncated,
    /// A length or count is over its limit.
    TooLarge {
        /// The limit, in the unit of the field (bytes or items).
        limit: usize,
    },
    /// Bytes follow the end of the structure.
    Trailing,
    /// The value is not in its one canonical encoding: an unknown or doubled key, a length in a longer form, …
    NotCanonical,
    /// A field has a value that it cannot have.
    Invalid(&'static str),
    /// Not CBOR, or not of the expected shape.
    Cbor(String),
}

impl Malformed {
    /// That `what` is not one, at this offset in bytes, for readers of several values.
    #[must_use]
    pub fn new(what: &'static str, offset: usize, kind: MalformedKind) -> Self {
        Self { what, offset, kind }
    }

    /// The same for a rule that is broken.
    #[must_use]
    pub fn invalid(what: &'static str, offset: usize, why: &'static str) -> Self {
        Self::new(what, offset, MalformedKind::Invalid(why))
    }

    /// Whether more bytes at the end could have made the input well-formed.
    #[must_use]
    pub fn is_truncated(&self) -> bool {
        self.kind == MalformedKind::Truncated
    }
}

impl fmt::Display for MalformedKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Truncated => f.write_str("input ends too early"),
            Self::TooLarge { limit } => write!(f, "over the limit of {limit}"),
            Self::Trailing => f.write_str("unexpected bytes after the end"),
            Self::NotCanonical => f.write_str("not the canonical encoding"),
            Self::Invalid(why) => f.write_str(why),
            Self::Cbor(why) => write!(f, "CBOR: {why}"),
        }
    }
}
