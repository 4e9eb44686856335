//! A renewal's two steps.

use onequote_evidence::{
    id::{Sha256, TimeMs},
    join::{Certified, RenewChallenge, RenewProof, RenewRequest, key_message, renewal_data},
    tpm::Public,
};

use super::{Caller, PATIENCE, Refusal, Registrar, check_key, issued, keep, lock, parse};
use crate::{appraise::signature, store::enrol::EnrolStore};

/// A renewal that waits for its quote.
pub(super) struct Renewal {
    since: TimeMs,
    nonce: Sha256,
    key: Vec<u8>,
    body: Vec<u8>,
}

impl<S: EnrolStore> Registrar<S> {
    /// First step of a renewal.
    ///
    /// # Errors
    /// [`Refusal`], which is in the audit log then.
    pub async fn renew(&self, caller: &Caller, body: &[u8]) -> Result<RenewChallenge, Refusal> {
        let outcome = self.begin_renewal(caller, body).await;
        if let Err(refusal) = &outcome {
            self.refused(caller, "renew", self.host_of(caller).await, refusal).await?;
        }
        outcome
    }

    async fn begin_renewal(&self, caller: &Caller, body: &[u8]) -> Result<RenewChallenge, Refusal> {
        self.member(caller).await?;
        let request = parse::<RenewRequest>(body)?;
        let now = self.source.now();
        let mut nonce = Sha256::ZERO;
        self.source.fill(&mut nonce.0);
        let renewal = Renewal { since: now, nonce, key: request.key.0, body: body.to_vec() };
        keep(&mut lock(&self.renewals), caller.binding.clone(), renewal, now, |r| r.since);
        Ok(RenewChallenge { nonce })
    }

    /// Second step of a renewal, on the same connection.
    ///
    /// # Errors
    /// [`Refusal`], which is in the audit log then.
    pub async fn prove_renewal(&self, caller: &Caller, body: &[u8]) -> Result<Certified, Refusal> {
        let outcome = self.finish_renewal(caller, body).await;
        match &outcome {
            Ok(certified) => {
                let until = format!("until {}", certified.expires.0);
                self.audit(caller, "renew", Some(certified.host.clone()), "ok", until).await?;
            }
            Err(refusal) => self.refused(caller, "renew", self.host_of(caller).await, refusal).await?,
        }
        outcome
    }

    async fn finish_renewal(&self, caller: &Caller, body: &[u8]) -> Result<Certified, Refusal> {
        let member = self.member(caller).await?;
        let now = self.source.now();
        let shown = parse::<RenewProof>(body)?;
        let renewal = lock(&self.renewals).remove(&caller.binding);
        let renewal = renewal.filter(|r| now.0.saturating_sub(r.since.0) <= PATIENCE).ok_or(Refusal::NoAttempt)?;
        let host = self.store.host(&member.host).await?;
        let ak = Public::parse(&host.enrolment.ak)?;
        if ak.name() != member.ak {
            return Err(Refusal::Certificate("the certificate belongs to another attestation key"));
        }
        let quoted = signature::check(&ak, &shown.attest.0, &shown.signature.0);
        let quoted = quoted.map_err(|finding| Refusal::Quote(finding.code.to_string()))?;
        if quoted.attest().extra_data != renewal_data(&renewal.nonce, &renewal.body, &caller.binding).as_bytes() {
            return Err(Refusal::Quote("it is over something else".to_owned()));
        }
        check_key(&renewal.key, &key_message(&renewal.body, &caller.binding), &shown.key_signature.0)?;
        let made = self.certify(&member.host, &renewal.key, &member.ak)?;
        self.store.add_certificate(&issued(&member.host, &member.ak, &made)).await?;
        Ok(self.certified(&member.host, made, host.enrolment.software_tpm))
    }
}
