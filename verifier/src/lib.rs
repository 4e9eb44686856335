//! The verifier: asks hosts for evidence, appraises it, says what is true of a host and of each of its VMs.
//!
//! The rooms, from the door inwards:
//! - [`cli`], [`api`]: people and programs ask here. [`result`] is what they get.
//! - [`round`]: one attestation of one host that is asked: [`challenge`] → [`client`] → [`intake`].
//! - [`intake`]: the one way in for evidence: what is kept of a host at hand → [`appraise`] → [`store`].
//! - [`replicas`]: which of several verifiers on one database asks which host.
//! - [`report`]: the other way round: hosts that keep a connection and report over it.
//! - [`enrol`]: what the operator has said of a host: its attestation key, its certificate, where it is.
//! - [`appraise`]: evidence, the host's accepted state, policy and time in; findings, verdict and new state out. Pure.
//! - [`policy`]: what a host and its VMs should be, as the operator wrote it, or as [`policy::learn`] proposes it.
//! - [`finding`]: every way in which an appraisal can fail, with its stable code.
//!
//! Time and randomness come in through [`source`].

pub mod api;
pub mod appraise;
pub mod challenge;
pub mod cli;
pub mod client;
pub mod enrol;
pub mod expectation;
pub mod finding;
pub mod intake;
pub mod policy;
pub mod replicas;
pub mod report;
pub mod result;
pub mod round;
pub mod source;
pub mod store;
