//! A join's two steps.

use aws_lc_rs::constant_time;
use onequote_evidence::{
    digest::sha256,
    id::{Blob, HostId, TimeMs},
    join::{Certified, JoinChallenge, JoinProof, JoinRequest, SECRET_SIZE, VERIFIER_NAME, key_message, proof},
    tpm::{Public, StorageKey},
};

use super::{Caller, PATIENCE, Refusal, Registrar, check_key, issued, keep, lock, parse, url_of};
use crate::{
    appraise::signature,
    enrol::{credential, ek::EkError},
    store::{
        Enrolment,
        enrol::{Claim, EnrolStore, Join, JoinRefusal},
    },
};

/// A join that waits for its proof.
pub(super) struct Pending {
    since: TimeMs,
    token: String,
    secret: [u8; SECRET_SIZE],
    host: Enrolment,
    ek: Vec<u8>,
    ak: Vec<u8>,
    vouched: String,
    url_fixed: bool,
    key: Vec<u8>,
    body: Vec<u8>,
}

impl<S: EnrolStore> Registrar<S> {
    /// First step of a join. `body` is the request as it came.
    ///
    /// # Errors
    /// [`Refusal`], which is in the audit log then.
    pub async fn join(&self, caller: &Caller, body: &[u8]) -> Result<JoinChallenge, Refusal> {
        let request = parse::<JoinRequest>(body);
        let host = request.as_ref().ok().map(|request| request.host.clone());
        let outcome = match request {
            Ok(request) => self.begin(caller, &request, body).await,
            Err(refusal) => Err(refusal),
        };
        if let Err(refusal) = &outcome {
            self.refused(caller, "join", host, refusal).await?;
        }
        outcome
    }

    async fn begin(&self, caller: &Caller, request: &JoinRequest, body: &[u8]) -> Result<JoinChallenge, Refusal> {
        let now = self.source.now();
        if request.host.as_str() == VERIFIER_NAME {
            return Err(Refusal::Reserved);
        }
        // Without a token nothing is told of hosts and their keys.
        let id = hex::encode(&request.token.0);
        let token = self.store.token(&id).await?.ok_or(JoinRefusal::TokenUnknown)?;
        let hashed = sha256(&[&request.secret.0]);
        if constant_time::verify_slices_are_equal(hashed.as_bytes(), token.secret.as_bytes()).is_err() {
            return Err(JoinRefusal::TokenUnknown.into());
        }
        let ak = Public::parse(&request.ak.0).map_err(|e| Refusal::Ak(e.to_string()))?;
        signature::check_key(&ak).map_err(|finding| Refusal::Ak(finding.actual.unwrap_or_default()))?;
        let ek = StorageKey::parse(&request.ek.0).map_err(|e| Refusal::Ek(e.to_string()))?;
        if let Some(defect) = ek.attributes.ek_defect() {
            return Err(Refusal::Ek(defect.to_owned()));
        }
        let claim = Claim { token: &id, host: &request.host, ek: &ek.name(), ak: &request.ak.0 };
        self.store.may_join(claim, now).await??;
        let (software_tpm, vouched) = self.vouched(&ek, request, now)?;
        if software_tpm && !token.software_tpm {
            return Err(Refusal::SoftwareTpm(vouched));
        }
        if request.key.0.len() != 65 || request.key.0[0] != 4 {
            return Err(Refusal::Malformed("the TLS key is no point on P-256".to_owned()));
        }
        let url = match token.url.as_ref().or(request.url.as_ref()) {
            Some(url) => url.clone(),
            None => url_of(caller.address.ip(), request.port),
        };
        if crate::client::address(&url).is_none() {
            return Err(Refusal::Malformed(format!("{url:?} is not a URL of the form https://ADDRESS:PORT")));
        }
        let mut secret = [0; SECRET_SIZE];
        self.source.fill(&mut secret);
        let made = credential::make(&ek, &ak.name(), &secret, &*self.source)?;
        let mut session = vec![0; 16];
        self.source.fill(&mut session);
        let pending = Pending {
            since: now,
            token: id,
            secret,
            host: Enrolment {
                id: request.host.clone(),
                url,
                ak: request.ak.0.clone(),
                certificate: self.authority.certificate().to_vec(),
                software_tpm,
            },
            ek: ek.name(),
            ak: ak.name(),
            vouched,
            url_fixed: token.url.is_some(),
            key: request.key.0.clone(),
            body: body.to_vec(),
        };
        keep(&mut lock(&self.joins), session.clone(), pending, now, |p| p.since);
        Ok(JoinChallenge {
            session: Blob(session),
            credential: Blob(made.blob),
            encrypted_seed: Blob(made.encrypted_seed),
        })
    }

    /// Whether the TPM is software, and who says what it is.
    fn vouched(&self, ek: &StorageKey, request: &JoinRequest, now: TimeMs) -> Result<(bool, String), Refusal> {
        let certificate = request.ek_certificate.as_ref().map(|certificate| certificate.0.as_slice());
        let chain: Vec<Vec<u8>> = request.ek_chain.iter().map(|der| der.0.clone()).collect();
        match self.settings.roots.check(ek, certificate, &chain, now) {
            Ok(vouched) => {
                Ok((vouched.software, format!("{}, vouched for by {}", vouched.model.words(), vouched.root)))
            }
            // Nobody vouches for such a TPM: the operator's token must do.
            Err(EkError::Missing) => Ok((true, "no certificate for its endorsement key".to_owned())),
            Err(e) => Err(e.into()),
        }
    }

    /// Second step of a join.
    ///
    /// # Errors
    /// [`Refusal`], which is in the audit log then.
    pub async fn prove(&self, caller: &Caller, body: &[u8]) -> Result<Certified, Refusal> {
        let mut host = None;
        let outcome = self.finish(caller, body, &mut host).await;
        match &outcome {
            Ok((certified, vouched)) => {
                let tpm = if certified.software_tpm { "software TPM, " } else { "" };
                self.audit(caller, "join", Some(certified.host.clone()), "ok", format!("{tpm}{vouched}")).await?;
            }
            Err(refusal) => self.refused(caller, "join", host, refusal).await?,
        }
        outcome.map(|(certified, _)| certified)
    }

    async fn finish(
        &self,
        caller: &Caller,
        body: &[u8],
        host: &mut Option<HostId>,
    ) -> Result<(Certified, String), Refusal> {
        let now = self.source.now();
        let shown = parse::<JoinProof>(body)?;
        // An attempt has one proof.
        let pending = lock(&self.joins).remove(&shown.session.0);
        let pending = pending.filter(|p| now.0.saturating_sub(p.since.0) <= PATIENCE).ok_or(Refusal::NoAttempt)?;
        *host = Some(pending.host.id.clone());
        let expected = proof(&pending.secret, &pending.body, &caller.binding);
        if constant_time::verify_slices_are_equal(expected.as_bytes(), shown.proof.as_bytes()).is_err() {
            return Err(Refusal::Proof);
        }
        check_key(&pending.key, &key_message(&pending.body, &caller.binding), &shown.key_signature.0)?;
        let made = self.certify(&pending.host.id, &pending.key, &pending.ak)?;
        let certificate = issued(&pending.host.id, &pending.ak, &made);
        let join = Join {
            token: &pending.token,
            host: &pending.host,
            ek: &pending.ek,
            vouched: &pending.vouched,
            url_fixed: pending.url_fixed,
            certificate: &certificate,
        };
        self.store.join(&join, now).await??;
        tracing::info!(host = %pending.host.id, software_tpm = pending.host.software_tpm, "joined");
        Ok((self.certified(&pending.host.id, made, pending.host.software_tpm), pending.vouched))
    }
}
