//! What a verifier keeps: enrolled hosts with policy and state, challenges that are open or answered, verdicts.
//!
//! One trait, so that a back end can be put in place of another; [`sqlite`] is the one there is. Writing a host's
//! state is conditional on its version: whoever appraised against a state that was renewed meanwhile begins again,
//! so that two verifier processes on one database never take an older state for the newer.

pub mod enrol;
pub mod sqlite;

use std::future::Future;

use onequote_evidence::id::{HostId, Nonce, TimeMs};

use crate::{appraise::state::HostState, result::Verdict};

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

/// A host with everything kept of it.
#[derive(Debug, Clone)]
pub struct Host {
    /// What the operator enrolled.
    pub enrolment: Enrolment,
    /// The policy in force, with its version.
    pub policy: Option<(u64, String)>,
    /// What was accepted of it.
    pub state: HostState,
    /// Counts up with every change of policy or state.
    pub version: u64,
    /// The last verdict.
    pub verdict: Option<Verdict>,
    /// Where it stands with the operator.
    pub standing: enrol::Standing,
    /// How it joined, if it did.
    pub joined: enrol::Joined,
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

    /// Whether these bytes are a nonce that was answered before.
    fn was_answered(&self, nonce: &[u8]) -> impl Future<Output = Result<bool, StoreError>> + Send;

    /// Forgets challenges that expired before `before`.
    fn prune(&self, before: TimeMs) -> impl Future<Output = Result<(), StoreError>> + Send;

    /// The host's last evidence that was accepted, as a whole stream.
    fn evidence(&self, id: &HostId) -> impl Future<Output = Result<Option<Vec<u8>>, StoreError>> + Send;

    /// Keeps this evidence in place of the last. It saves sending, and nothing rests on it: whoever keeps it last may do so.
    fn keep_evidence(&self, id: &HostId, stream: &[u8]) -> impl Future<Output = Result<(), StoreError>> + Send;

    /// Writes verdict and, if there is a new one, state, provided that the host still has this version. Tells whether
    /// it had.
    fn commit(
        &self,
        id: &HostId,
        version: u64,
        state: Option<&HostState>,
        verdict: Option<&Verdict>,
    ) -> impl Future<Output = Result<bool, StoreError>> + Send;
}
