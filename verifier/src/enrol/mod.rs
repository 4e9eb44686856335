//! Enrolment: how a host's attestation key becomes one that is believed.
//!
//! - [`hand`]: the operator names a host, its key, its proxy's certificate and its address. Needs no network.
//! - [`ek`], [`credential`]: a TPM's endorsement key is checked, and a secret made that only this TPM can open.

pub mod credential;
pub mod ek;
pub mod hand;
#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
pub(crate) mod testing;
mod x509;

#[cfg(test)]
pub(crate) use hand::self_signed;
pub use hand::{CERTIFICATE_FILE, EnrolError, IDENTITY_FILE, Identity, read_ak, read_enrolment};
