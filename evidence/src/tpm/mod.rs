//! The TPM's own structures, as far as a verifier needs them, read without a TPM library.
//!
//! All numbers are big-endian (TPM 2.0 Library Specification, Part 2). Parsing says only that bytes have the right
//! form. What an [`Attest`] says is the TPM's word only after its signature was checked with an AK that the caller
//! trusts for other reasons than the evidence itself.

mod area;
mod attest;
mod public;
mod signature;
#[cfg(feature = "software")]
pub mod software;
mod storage;
#[cfg(any(test, feature = "software"))]
pub mod write;

pub use attest::{Attest, ClockInfo, PcrSelection};
pub use public::{Attributes, EccPublic, KeyParameters, Public, RsaPublic, SigScheme};
pub use signature::Signature;
pub use storage::{Curve, StorageKey, StorageParameters};

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests;
