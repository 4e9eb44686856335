//! Enrolment: how a host's attestation key becomes one that is believed.
//!
//! - [`hand`]: the operator names a host, its key, its proxy's certificate and its address. Needs no network.
//! - [`ek`], [`credential`]: a TPM's endorsement key is checked, and a secret made that only this TPM can open.
//! - [`authority`]: the verifier's own certificate authority.
//! - [`registrar`], [`api`], [`door`]: hosts join with a token, and renew their certificates.

pub mod api;
pub mod authority;
pub mod credential;
pub mod door;
pub mod ek;
pub mod hand;
pub mod registrar;
#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
pub(crate) mod testing;
mod x509;

#[cfg(test)]
pub(crate) use hand::self_signed;
/// The serial number of a certificate, if it is one.
pub(crate) fn serial(der: &[u8]) -> Option<Vec<u8>> {
    x509::Certificate::parse(der).ok().map(|certificate| certificate.serial().to_vec())
}

pub use hand::{CERTIFICATE_FILE, EnrolError, IDENTITY_FILE, Identity, read_ak, read_enrolment};
