//! Challenges: nonces that are asked once and answered once.
//!
//! A nonce is 32 random bytes, written down before it is sent. An answer marks it; a second answer is a replay. Old
//! challenges are kept for [`MEMORY`] after their expiry, so that old evidence is recognised as what it is.

use onequote_evidence::id::{HostId, Nonce, TimeMs};

use crate::{
    source::Source,
    store::{Store, StoreError},
};

/// Bytes of a nonce.
const SIZE: usize = 32;

/// How long a challenge is remembered after its expiry, in milliseconds: a week.
pub const MEMORY: u64 = 7 * 24 * 3600 * 1000;

/// A challenge that was written down.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Challenge {
    /// Its nonce.
    pub nonce: Nonce,
    /// When an answer comes too late.
    pub expires: TimeMs,
}

/// Makes a challenge that holds for `lifetime` milliseconds. It must be written down before it is sent.
#[must_use]
pub fn make(source: &dyn Source, lifetime: u64) -> Challenge {
    let mut bytes = vec![0; SIZE];
    source.fill(&mut bytes);
    // SIZE is within what a nonce may have.
    #[allow(clippy::expect_used)]
    let nonce = Nonce::new(bytes).expect("32 bytes make a nonce");
    Challenge { nonce, expires: TimeMs(source.now().0.saturating_add(lifetime)) }
}

/// Makes a challenge for a host that holds for `lifetime` milliseconds, and writes it down.
///
/// # Errors
/// [`StoreError`]: then nothing may be sent.
pub async fn issue<S: Store>(
    store: &S,
    source: &dyn Source,
    host: &HostId,
    lifetime: u64,
) -> Result<Challenge, StoreError> {
    let challenge = make(source, lifetime);
    let now = source.now();
    store.issue(&challenge.nonce, host, now, challenge.expires).await?;
    Ok(challenge)
}
