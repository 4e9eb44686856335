//! Rest of step 3: that the quote was made for this challenge and for this statement.
//!
//! The nonce and the channel binding are the verifier's own. What the evidence says of them only chooses between the
//! names of failures. Qualifying data that fits proves both, and with them the statement: its digest is in there.

use onequote_evidence::{
    id::{HostId, Nonce, TimeMs},
    nonce_tree,
    statement::Statement,
    stream::Head,
};

use super::signature::Quoted;
use crate::{
    finding::{Code, Finding},
    result::Skipped,
};

/// What the evidence must answer.
#[derive(Debug, Clone)]
pub enum Freshness {
    /// A challenge that was sent.
    Asked {
        /// Its nonce.
        nonce: Nonce,
        /// The exporter value of the connection over which it was sent.
        binding: Vec<u8>,
        /// When an answer comes too late.
        expires: TimeMs,
        /// Whether this nonce was not answered before.
        unused: bool,
        /// Whether the nonce that the evidence names was answered before.
        claimed_was_answered: bool,
    },
    /// None: saved evidence, held against a nonce that the caller knows, or against what it says itself.
    Offline {
        /// The nonce, if the caller knows it.
        nonce: Option<Nonce>,
    },
}

/// The statement that the quote covers. Can be had only through [`check`].
#[derive(Debug, Clone)]
pub struct Stated {
    statement: Statement,
}

impl Stated {
    /// What the host says; see [`Statement`] for what of it is proven and what is believed.
    #[must_use]
    pub fn statement(&self) -> &Statement {
        &self.statement
    }
}

/// Checks qualifying data, nonce, binding and time, and reads the statement.
///
/// # Errors
/// The finding.
pub fn check(
    quoted: &Quoted,
    head: &Head,
    freshness: &Freshness,
    now: TimeMs,
    skipped: &mut Vec<Skipped>,
) -> Result<Stated, Finding> {
    let (nonce, binding) = match freshness {
        Freshness::Asked { nonce, binding, expires, unused, claimed_was_answered } => {
            if head.nonce.0 != nonce.as_bytes() {
                let code = if *claimed_was_answered { Code::NonceReused } else { Code::NonceOther };
                return Err(Finding::new(code, "nonce").expected(nonce).actual(&head.nonce));
            }
            if !unused {
                return Err(Finding::new(Code::NonceReused, "nonce").actual(nonce));
            }
            if head.binding.0 != *binding {
                let finding = Finding::new(Code::ChannelBinding, "channel binding");
                return Err(finding.expected(hex::encode(binding)).actual(&head.binding));
            }
            if now >= *expires {
                let late = now.0 - expires.0;
                return Err(Finding::new(Code::NonceExpired, "nonce").actual(format!("{late} ms too late")));
            }
            (nonce.clone(), binding.as_slice())
        }
        Freshness::Offline { nonce } => {
            let own = Nonce::new(head.nonce.0.clone());
            let Some(claimed) = own else {
                return Err(Finding::new(Code::EvidenceMalformed, "nonce").expected("16 to 64 bytes"));
            };
            match nonce {
                Some(nonce) if *nonce != claimed => {
                    return Err(Finding::new(Code::NonceOther, "nonce").expected(nonce).actual(&claimed));
                }
                Some(_) => skipped.push(Skipped::new("channel-binding", "saved evidence has no connection")),
                None => skipped.push(Skipped::new("freshness", "no nonce was given: the evidence may be of any age")),
            }
            (claimed, head.binding.0.as_slice())
        }
    };
    let root = nonce_tree::root(nonce_tree::leaf(&nonce, binding), &head.path);
    let expected = root.map(|root| nonce_tree::qualifying_data(&root, &head.statement.0));
    let actual = &quoted.attest().extra_data;
    if expected.is_none_or(|expected| expected.as_bytes() != actual.as_slice()) {
        let finding = Finding::new(Code::QualifyingData, "qualifying data").actual(hex::encode(actual));
        return Err(match expected {
            Some(expected) => finding.expected(expected),
            None => finding.expected("a path to the root of at most 20 steps"),
        });
    }
    let statement = Statement::parse(&head.statement.0)
        .map_err(|e| Finding::new(Code::StatementMalformed, "statement").actual(e))?;
    Ok(Stated { statement })
}

/// Step 1, first half: that the statement is that of the host that was asked.
///
/// # Errors
/// The finding.
pub fn check_host(stated: &Stated, host: Option<&HostId>) -> Result<(), Finding> {
    match host {
        Some(host) if *host != stated.statement.host => {
            Err(Finding::new(Code::HostMismatch, "host id").expected(host).actual(&stated.statement.host))
        }
        _ => Ok(()),
    }
}
