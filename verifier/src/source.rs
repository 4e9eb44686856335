//! Where time and randomness come from.

use std::time::{SystemTime, UNIX_EPOCH};

use onequote_evidence::id::TimeMs;

/// Gives the time and fills bytes with randomness. Handed in, so that a test can hold both still.
pub trait Source: Send + Sync {
    /// Now, by the verifier's own clock.
    fn now(&self) -> TimeMs;

    /// Fills `bytes` from a cryptographically strong source.
    fn fill(&self, bytes: &mut [u8]);
}

/// The machine's clock and the operating system's randomness.
#[derive(Debug, Clone, Copy, Default)]
pub struct System;

impl Source for System {
    fn now(&self) -> TimeMs {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        TimeMs(u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
    }

    fn fill(&self, bytes: &mut [u8]) {
        rand::Rng::fill(&mut rand::rng(), bytes);
    }
}
