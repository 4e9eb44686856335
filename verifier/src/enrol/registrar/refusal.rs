//! Why hosts are refused.

use onequote_evidence::{Malformed, join::VERIFIER_NAME};

use super::super::{credential::CredentialError, ek::EkError};
use crate::store::{StoreError, enrol::JoinRefusal};

/// Why a request is refused.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// The form of the request.
    #[error("the request is not what it must be: {0}")]
    Malformed(String),
    /// Tokens, names and keys.
    #[error(transparent)]
    Join(#[from] JoinRefusal),
    /// A name that no host may have.
    #[error("{VERIFIER_NAME} is the verifier's own name")]
    Reserved,
    /// The attestation key.
    #[error("the attestation key cannot attest: {0}")]
    Ak(String),
    /// The endorsement key.
    #[error("the endorsement key is none: {0}")]
    Ek(String),
    /// What vouches for the endorsement key.
    #[error("the endorsement key is not vouched for: {0}")]
    EkCertificate(#[from] EkError),
    /// A software TPM.
    #[error("the TPM is a program ({0}), and the token is not for one: token create --software-tpm makes one that is")]
    SoftwareTpm(String),
    /// A credential that cannot be made.
    #[error(transparent)]
    Credential(#[from] CredentialError),
    /// An attempt that is not known.
    #[error("there is no such attempt under way: it took too long, or was made already")]
    NoAttempt,
    /// The credential was not opened.
    #[error("the credential was not opened: the attestation key is not in that TPM")]
    Proof,
    /// The TLS key is somebody else's.
    #[error("the TLS key did not sign this request")]
    Key,
    /// No certificate, or one that was taken back.
    #[error("{0}")]
    Certificate(&'static str),
    /// The quote of a renewal.
    #[error("the attestation key did not sign this renewal: {0}")]
    Quote(String),
    /// Too much is asked.
    #[error("too many requests; try again in a moment")]
    Busy,
    /// Our own fault.
    #[error("the verifier failed")]
    Store(#[from] StoreError),
    /// Our own fault.
    #[error("the verifier failed")]
    Certify(#[source] rcgen::Error),
}

impl Refusal {
    /// The stable word for it.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::Malformed(_) => "request-malformed",
            Self::Join(refusal) => refusal.code(),
            Self::Reserved => "host-reserved",
            Self::Ak(_) => "ak-attributes",
            Self::Ek(_) => "ek-malformed",
            Self::EkCertificate(_) => "ek-certificate",
            Self::SoftwareTpm(_) => "software-tpm",
            Self::Credential(_) => "ek-unusable",
            Self::NoAttempt => "no-attempt",
            Self::Proof => "proof-wrong",
            Self::Key => "key-proof-wrong",
            Self::Certificate(_) => "certificate-refused",
            Self::Quote(_) => "quote-wrong",
            Self::Busy => "busy",
            Self::Store(_) | Self::Certify(_) => "verifier-fault",
        }
    }
}

impl From<Malformed> for Refusal {
    fn from(e: Malformed) -> Self {
        Self::Malformed(e.to_string())
    }
}
