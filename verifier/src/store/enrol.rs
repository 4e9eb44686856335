//! What a verifier keeps of enrolment: tokens, which TPM is which host, certificates, the audit log.

use std::future::Future;

use onequote_evidence::id::{HostId, Sha256, TimeMs};
use serde::{Deserialize, Serialize};

use super::{Store, StoreError};

/// A right to join, as the operator gave it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Token {
    /// Names it; no secret.
    pub id: String,
    /// SHA-256 of its secret.
    pub secret: Sha256,
    /// The only host that may use it, if there is one.
    pub host: Option<HostId>,
    /// Whether that host may come with another endorsement key or attestation key, or come back after it was revoked or
    /// retired.
    pub replace: bool,
    /// Whether the TPM may be software.
    pub software_tpm: bool,
    /// Where the host's proxy is, whatever it says itself.
    pub url: Option<String>,
    /// When it ends.
    pub expires: TimeMs,
    /// How often it can still be used.
    pub uses: u32,
}

/// Where a host stands with the operator.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Standing {
    /// It may be asked, and renew its certificate.
    Enrolled,
    /// Nothing of it counts any more, and its TPM cannot come back under another name.
    Revoked,
    /// It is at its end; its TPM may become another host.
    Retired,
}

impl Standing {
    /// The stable word for it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Enrolled => "enrolled",
            Self::Revoked => "revoked",
            Self::Retired => "retired",
        }
    }
}

impl std::fmt::Display for Standing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What is known of a host beyond what the operator said.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Joined {
    /// The name of its TPM's endorsement key; none when it was enrolled by hand.
    pub ek: Option<Vec<u8>>,
    /// Who vouches for that key, in words.
    pub vouched: Option<String>,
    /// Whether its certificate is one that we issued, and not one that was pinned.
    pub issued: bool,
    /// Whether its address is the operator's word.
    pub url_fixed: bool,
}

/// A host that has shown all that it must show.
#[derive(Debug, Clone)]
pub struct Join<'a> {
    /// The token that it used.
    pub token: &'a str,
    /// What to enrol; its certificate is the authority's.
    pub host: &'a super::Enrolment,
    /// The name of its endorsement key.
    pub ek: &'a [u8],
    /// Who vouches for it, in words.
    pub vouched: &'a str,
    /// Whether the address is the operator's word.
    pub url_fixed: bool,
    /// The certificate that it gets.
    pub certificate: &'a IssuedCertificate,
}

/// A certificate that we issued.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IssuedCertificate {
    /// Its serial number.
    pub serial: Vec<u8>,
    /// The host.
    pub host: HostId,
    /// The name of the attestation key that it belongs to.
    pub ak: Vec<u8>,
    /// When it ends.
    pub expires: TimeMs,
    /// Whether it was taken back.
    pub revoked: bool,
}

/// Why a host may not join.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum JoinRefusal {
    /// The token.
    #[error("the token is not known here: it was never made, or by another verifier")]
    TokenUnknown,
    /// The token's time.
    #[error("the token has expired")]
    TokenExpired,
    /// The token's uses.
    #[error("the token was used already")]
    TokenUsed,
    /// The token's host.
    #[error("the token is for the host {0}")]
    TokenOtherHost(HostId),
    /// The id belongs to another TPM.
    #[error("the id {0} belongs to another TPM: it has another endorsement key")]
    OtherEk(HostId),
    /// The id belongs to another attestation key.
    #[error("the id {0} belongs to another attestation key")]
    OtherAk(HostId),
    /// The TPM is another host already.
    #[error("this TPM is the host {0} already: its endorsement key is enrolled")]
    EkInUse(HostId),
    /// The attestation key is another host's already.
    #[error("this attestation key is that of the host {0} already")]
    AkInUse(HostId),
    /// The operator withdrew the host.
    #[error("the host {0} was {1}")]
    Withdrawn(HostId, Standing),
}

impl JoinRefusal {
    /// The stable word for it.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::TokenUnknown => "token-unknown",
            Self::TokenExpired => "token-expired",
            Self::TokenUsed => "token-used",
            Self::TokenOtherHost(_) => "token-other-host",
            Self::OtherEk(_) => "id-other-ek",
            Self::OtherAk(_) => "id-other-ak",
            Self::EkInUse(_) => "ek-in-use",
            Self::AkInUse(_) => "ak-in-use",
            Self::Withdrawn(..) => "host-withdrawn",
        }
    }
}

/// Who wants to join, as far as the rules about names and keys ask.
#[derive(Debug, Clone, Copy)]
pub struct Claim<'a> {
    /// The token.
    pub token: &'a str,
    /// The id that is wanted.
    pub host: &'a HostId,
    /// The name of the endorsement key.
    pub ek: &'a [u8],
    /// The attestation key, `TPM2B_PUBLIC`.
    pub ak: &'a [u8],
}

/// A line of the audit log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct AuditEntry {
    /// When.
    pub time: TimeMs,
    /// Who: `operator UID`, or the address that a request came from.
    pub who: String,
    /// What: a stable word, such as `join`.
    pub what: String,
    /// Of which host, if there is one.
    pub host: Option<HostId>,
    /// `ok`, or the code of the refusal.
    pub result: String,
    /// In words.
    pub detail: String,
}

/// Keeps what enrolment needs.
pub trait EnrolStore: Store {
    /// Keeps a token.
    fn create_token(&self, token: &Token, now: TimeMs) -> impl Future<Output = Result<(), StoreError>> + Send;

    /// A token by its id.
    fn token(&self, id: &str) -> impl Future<Output = Result<Option<Token>, StoreError>> + Send;

    /// Whether a join would be allowed now. Changes nothing.
    fn may_join(
        &self,
        claim: Claim<'_>,
        now: TimeMs,
    ) -> impl Future<Output = Result<Result<(), JoinRefusal>, StoreError>> + Send;

    /// Uses the token and enrols the host, or does neither. Earlier certificates of the host end.
    fn join(
        &self,
        join: &Join<'_>,
        now: TimeMs,
    ) -> impl Future<Output = Result<Result<(), JoinRefusal>, StoreError>> + Send;

    /// What is known of a host beyond what the operator said.
    fn joined(&self, id: &HostId) -> impl Future<Output = Result<(Standing, Joined), StoreError>> + Send;

    /// Withdraws a host, or not any more. Its certificates end when it is withdrawn.
    fn set_standing(&self, id: &HostId, standing: Standing) -> impl Future<Output = Result<(), StoreError>> + Send;

    /// A host's new address, unless the operator gave it one.
    fn move_to(&self, id: &HostId, url: &str) -> impl Future<Output = Result<(), StoreError>> + Send;

    /// Keeps a certificate that was renewed.
    fn add_certificate(&self, certificate: &IssuedCertificate) -> impl Future<Output = Result<(), StoreError>> + Send;

    /// A certificate by its serial number.
    fn certificate(&self, serial: &[u8]) -> impl Future<Output = Result<Option<IssuedCertificate>, StoreError>> + Send;

    /// Writes a line of the audit log.
    fn audit(&self, entry: &AuditEntry) -> impl Future<Output = Result<(), StoreError>> + Send;

    /// The last lines of the audit log, oldest first.
    fn audit_log(&self, most: u32) -> impl Future<Output = Result<Vec<AuditEntry>, StoreError>> + Send;
}
