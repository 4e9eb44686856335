//! The running value of a list: what PCR 10 would hold in the SHA-256 bank.

use crate::{digest::sha256, id::Sha256, pcr::extend_sha256};

use super::Entry;

/// Count and SHA-256 replay of a list's first entries, beginning at zeros: a guest's *virtual PCR 10*.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Aggregate {
    /// Number of entries.
    pub count: u64,
    /// The value after them.
    pub value: Sha256,
}

impl Default for Aggregate {
    fn default() -> Self {
        Self::EMPTY
    }
}

impl Aggregate {
    /// No entry yet.
    pub const EMPTY: Self = Self { count: 0, value: Sha256::ZERO };

    /// Takes in the next entry.
    pub fn push(&mut self, entry: &Entry<'_>) {
        self.push_digest(&Self::digest(entry));
    }

    /// Takes in the next entry by its digest, for callers that keep [`Aggregate::digest`] of entries seen before.
    pub fn push_digest(&mut self, digest: &Sha256) {
        self.value = extend_sha256(&self.value, digest);
        self.count += 1;
    }

    /// What an entry extends the value with: all ones for a violation, else SHA-256 of its template data as hashed.
    #[must_use]
    pub fn digest(entry: &Entry<'_>) -> Sha256 {
        if entry.is_violation() {
            return Sha256([0xff; 32]);
        }
        if entry.name == b"ima" {
            let mut value = [0; 32];
            value.copy_from_slice(&entry.extended(crate::digest::HashAlg::Sha256));
            return Sha256(value);
        }
        sha256(&[entry.data])
    }
}
