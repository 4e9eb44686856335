//! What a verifier keeps: enrolled hosts with policy and state, challenges that are open or answered, verdicts, evidence.
//!
//! One trait, [`Store`], with [`Database`] behind it: SQLite in a file of its own, or PostgreSQL for several verifiers at
//! once. Writing a host's state is conditional on its version: whoever appraised against a state that was renewed
//! meanwhile begins again, so that two verifier processes on one database never take an older state for the newer.

mod database;
pub mod enrol;
mod form;

pub use database::Database;

/// The name that the store had when there was one back end.
pub mod sqlite {
    pub use super::Database as Sqlite;
}

use std::{future::Future, time::Duration};

use onequote_evidence::id::{HostId, Nonce, Sha256, TimeMs};

use crate::{appraise::state::HostState, challenge::Challenge, result::Verdict};

/// What the operator enrolled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Enrolment {
    /// The host.
    pub id: HostId,
    /// Where its proxy listens: `https://ADDRESS:PORT`.
    pub url: String,
    /// Its attestation key, as `TPM2B_PUBLIC`.
    pub ak: Vec<u8>,
    /// Its proxy's certificate, DER.
    pub certificate: Vec<u8>,
    /// Whether its TPM is software.
    pub software_tpm: bool,
}

/// A host with everything kept of it, evidence and the policy's text apart.
#[derive(Debug, Clone)]
pub struct Host {
    /// What the operator enrolled.
    pub enrolment: Enrolment,
    /// The policy in force.
    pub policy: Option<PolicyInForce>,
    /// What was accepted of it.
    pub state: HostState,
    /// Counts up with every change to anything that is kept of it.
    pub version: u64,
    /// The last verdict.
    pub verdict: Option<Verdict>,
    /// The challenge that its next report has to answer, if it reports.
    pub challenge: Option<Challenge>,
    /// Where it stands with the operator.
    pub standing: enrol::Standing,
    /// How it joined, if it did.
    pub joined: enrol::Joined,
}

/// Which policy is in force for a host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PolicyInForce {
    /// Its version, counted for each host from 1.
    pub version: u64,
    /// SHA-256 of its text: hosts with the same text share it. [`Store::policy_text`] has it.
    pub digest: Sha256,
}

/// What an appraisal came to, to be kept as one.
#[derive(Debug, Clone, Copy)]
pub struct Taken<'a> {
    /// The host.
    pub host: &'a HostId,
    /// The version of the host that it was appraised against.
    pub version: u64,
    /// The challenge that the evidence answered; none where no evidence came.
    pub nonce: Option<&'a Nonce>,
    /// When.
    pub now: TimeMs,
    /// The verdict.
    pub verdict: &'a Verdict,
    /// The new state; none when the evidence was not whole, and the state before stays.
    pub state: Option<&'a HostState>,
    /// Whether the state's trees (`base`, `tree`) are others than before. They are written only then.
    pub trees: bool,
    /// What is kept of the evidence; none leaves what was kept.
    pub part: Option<Part<'a>>,
    /// The challenge that the host's next report has to answer. None leaves one that is open, and takes away the one that
    /// `nonce` answers.
    pub next: Option<&'a Challenge>,
}

/// Evidence to keep, in the form that the caller chooses.
#[derive(Debug, Clone, Copy)]
pub enum Part<'a> {
    /// In place of everything that was kept.
    Whole(&'a [u8]),
    /// Behind what was kept.
    More(&'a [u8]),
}

/// What became of [`Taken`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Take {
    /// It is kept, and the host has this version now.
    Kept(u64),
    /// The host has another version meanwhile, or is gone: nothing was written, and the challenge was not marked.
    Moved,
    /// The challenge was not open for this host: nothing was written.
    Nonce(NonceUse),
}

/// What a nonce is when an answer comes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NonceUse {
    /// It was open for this host, and is answered now.
    Fresh,
    /// It was answered before.
    Answered,
    /// It was never issued to this host.
    Unknown,
}

/// What is forgotten.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Challenges that expired before.
    pub challenges: TimeMs,
    /// Lines of the audit log from before; none keeps them all.
    pub audit: Option<TimeMs>,
}

/// How many were forgotten.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Forgotten {
    /// Challenges.
    pub challenges: u64,
    /// Lines of the audit log.
    pub audit: u64,
    /// Texts of policies that no host has or had.
    pub policies: u64,
}

/// A store that failed.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The database.
    #[error("the verifier's database failed while {doing}")]
    Database {
        /// What was being done.
        doing: &'static str,
        /// Why.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// What was read is not what was written.
    #[error("the verifier's database holds a {what} of host {host} that cannot be read")]
    Content {
        /// Which part.
        what: &'static str,
        /// Of which host.
        host: String,
        /// Why.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The host is not enrolled.
    #[error("host {0} is not enrolled: see the hosts command, or enrol it")]
    NoHost(HostId),
    /// The host is enrolled already.
    #[error("host {0} is enrolled already: give --replace to put another key or certificate in its place")]
    HostExists(HostId),
}

/// Keeps what must outlive a process.
pub trait Store: Send + Sync + 'static {
    /// Enrols a host. One that is enrolled with the same key and certificate gets the new URL. Only with `replace` it
    /// gets another key or certificate; its policy stays, and so does its state unless the key is another.
    fn enrol(&self, host: &Enrolment, replace: bool) -> impl Future<Output = Result<(), StoreError>> + Send;

    /// Forgets a host.
    fn remove(&self, id: &HostId) -> impl Future<Output = Result<(), StoreError>> + Send;

    /// The ids of all hosts, in order.
    fn hosts(&self) -> impl Future<Output = Result<Vec<HostId>, StoreError>> + Send;

    /// One host.
    fn host(&self, id: &HostId) -> impl Future<Output = Result<Host, StoreError>> + Send;

    /// Puts a policy in force and gives its version.
    fn set_policy(&self, id: &HostId, text: &str, now: TimeMs) -> impl Future<Output = Result<u64, StoreError>> + Send;

    /// Writes down a challenge before it is sent.
    fn issue(
        &self,
        nonce: &Nonce,
        id: &HostId,
        issued: TimeMs,
        expires: TimeMs,
    ) -> impl Future<Output = Result<(), StoreError>> + Send;

    /// Marks a challenge as answered. Of two callers only one gets [`NonceUse::Fresh`].
    fn answer(
        &self,
        nonce: &Nonce,
        id: &HostId,
        now: TimeMs,
    ) -> impl Future<Output = Result<NonceUse, StoreError>> + Send;

    /// Whether these bytes are a nonce that this host answered before: those of active rounds as long as they are
    /// remembered, and that of its last report.
    fn was_answered(&self, id: &HostId, nonce: &[u8]) -> impl Future<Output = Result<bool, StoreError>> + Send;

    /// Forgets what is older than these limits, and what belongs to nobody any more.
    fn forget(&self, limits: &Limits) -> impl Future<Output = Result<Forgotten, StoreError>> + Send;

    /// Says that this verifier is there for the next while, by the database's clock; with no time, that it goes. Gives the
    /// ids of all that are there, in order.
    fn present(&self, replica: &str, lease: Duration) -> impl Future<Output = Result<Vec<String>, StoreError>> + Send;

    /// A host's version, which costs less than the host.
    fn version(&self, id: &HostId) -> impl Future<Output = Result<u64, StoreError>> + Send;

    /// The text of a policy by its SHA-256.
    fn policy_text(&self, digest: &Sha256) -> impl Future<Output = Result<Option<String>, StoreError>> + Send;

    /// The policy in force for a host, as it was read: version and text.
    fn policy(&self, host: &Host) -> impl Future<Output = Result<Option<(u64, String)>, StoreError>> + Send {
        async {
            let Some(PolicyInForce { version, digest }) = host.policy else { return Ok(None) };
            let text = self.policy_text(&digest).await?.ok_or_else(|| StoreError::Content {
                what: "policy",
                host: host.enrolment.id.to_string(),
                source: format!("there is no text with the hash {digest}").into(),
            })?;
            Ok(Some((version, text)))
        }
    }

    /// Keeps what an appraisal came to, in one transaction that marks its challenge as answered too; or, unless the host
    /// has the version that it was appraised against and the challenge was open, nothing of it.
    fn take(&self, taken: Taken<'_>) -> impl Future<Output = Result<Take, StoreError>> + Send;

    /// The evidence that was kept of the host, in the order in which it came. It saves sending, and nothing rests on it.
    fn parts(&self, id: &HostId) -> impl Future<Output = Result<Vec<Vec<u8>>, StoreError>> + Send;

    /// Writes a state by the operator's word, provided that the host still has this version. Tells whether it had.
    fn put_state(
        &self,
        id: &HostId,
        version: u64,
        state: &HostState,
    ) -> impl Future<Output = Result<bool, StoreError>> + Send;
}
