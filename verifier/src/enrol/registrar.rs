//! Joining and renewing, as steps: who asks, what must be true, what they get.
//!
//! A join has two steps. In the first a host shows its token, its endorsement key with what vouches for it, its attestation
//! key and the TLS key that it wants certified; whatever can be refused is refused here, in the order below, and nothing is
//! written but the audit log. It gets a credential. In the second it shows that its TPM opened the credential. Only then
//! the token is used up and the host enrolled, both in one transaction that asks the rules about names again.
//!
//! A renewal is asked with the certificate that is to be renewed, and shown by a quote of the attestation key over this very
//! connection: who has stolen the certificate's key, or a copy of the host's files, cannot renew it.

use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use aws_lc_rs::{
    constant_time,
    signature::{ECDSA_P256_SHA256_ASN1, UnparsedPublicKey},
};
use onequote_evidence::{
    Malformed,
    digest::sha256,
    id::{Blob, HostId, Sha256, TimeMs},
    join::{
        Certified, Here, JoinChallenge, JoinProof, JoinRequest, RenewChallenge, RenewProof, RenewRequest, SECRET_SIZE,
        VERIFIER_NAME, key_message, proof, renewal_data,
    },
    tpm::{Public, StorageKey},
};

use super::{
    authority::{Authority, HostCertificate},
    credential::{self, CredentialError},
    ek::{EkError, Roots},
    x509,
};
use crate::{
    appraise::signature,
    source::Source,
    store::{
        Enrolment, StoreError,
        enrol::{AuditEntry, Claim, EnrolStore, IssuedCertificate, Join, JoinRefusal, Standing},
    },
};

/// Attempts that may be under way at a time. The oldest gives way.
const MAX_PENDING: usize = 256;

/// How long an attempt may take, in milliseconds: a TPM makes an RSA key in it.
const PATIENCE: u64 = 120_000;

/// What the operator chooses.
#[derive(Debug, Clone)]
pub struct Settings {
    /// What vouches for endorsement keys.
    pub roots: Roots,
    /// How long a host's certificate holds.
    pub certificate: Duration,
}

/// Who asks.
#[derive(Debug, Clone)]
pub struct Caller {
    /// Where the request came from.
    pub address: SocketAddr,
    /// The exporter value of its connection.
    pub binding: Vec<u8>,
    /// The certificate that it showed, DER; the handshake has checked that the authority issued it.
    pub certificate: Option<Vec<u8>>,
}

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

/// A join that waits for its proof.
struct Pending {
    since: TimeMs,
    request: Sha256,
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

/// A renewal that waits for its quote.
struct Renewal {
    since: TimeMs,
    nonce: Sha256,
    key: Vec<u8>,
    body: Vec<u8>,
}

/// Lets hosts join.
pub struct Registrar<S> {
    store: S,
    source: Arc<dyn Source>,
    authority: Arc<Authority>,
    settings: Settings,
    joins: Mutex<HashMap<Vec<u8>, Pending>>,
    renewals: Mutex<HashMap<Vec<u8>, Renewal>>,
}

impl<S: EnrolStore> Registrar<S> {
    /// A registrar.
    pub fn new(store: S, source: Arc<dyn Source>, authority: Arc<Authority>, settings: Settings) -> Self {
        Self { store, source, authority, settings, joins: Mutex::default(), renewals: Mutex::default() }
    }

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
            request: sha256(&[body]),
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
        debug_assert_eq!(pending.request, sha256(&[&pending.body]));
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

    fn certify(&self, host: &HostId, key: &[u8], ak: &[u8]) -> Result<HostCertificate, Refusal> {
        self.authority.certify(host, key, ak, self.settings.certificate).map_err(Refusal::Certify)
    }

    fn certified(&self, host: &HostId, made: HostCertificate, software_tpm: bool) -> Certified {
        Certified {
            host: host.clone(),
            certificate: Blob(made.certificate),
            authority: Blob(self.authority.certificate().to_vec()),
            expires: made.expires,
            lifetime: u64::try_from(self.settings.certificate.as_millis()).unwrap_or(u64::MAX),
            software_tpm,
        }
    }

    /// Whose certificate the caller showed, if it still counts.
    async fn member(&self, caller: &Caller) -> Result<IssuedCertificate, Refusal> {
        let der = caller.certificate.as_deref().ok_or(Refusal::Certificate("no certificate was shown"))?;
        let certificate = x509::Certificate::parse(der).map_err(|e| Refusal::Malformed(e.to_string()))?;
        let known = self.store.certificate(certificate.serial()).await?;
        let known = known.ok_or(Refusal::Certificate("the certificate is not known here"))?;
        let (standing, _) = self.store.joined(&known.host).await?;
        if standing != Standing::Enrolled {
            return Err(JoinRefusal::Withdrawn(known.host, standing).into());
        }
        if known.revoked {
            return Err(Refusal::Certificate("the certificate was taken back: the host joined anew since"));
        }
        Ok(known)
    }

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

    /// A host says where it is.
    ///
    /// # Errors
    /// [`Refusal`], which is in the audit log then.
    pub async fn here(&self, caller: &Caller, body: &[u8]) -> Result<Here, Refusal> {
        let outcome = self.moved(caller, body).await;
        if let Err(refusal) = &outcome {
            self.refused(caller, "here", self.host_of(caller).await, refusal).await?;
        }
        outcome
    }

    async fn moved(&self, caller: &Caller, body: &[u8]) -> Result<Here, Refusal> {
        let member = self.member(caller).await?;
        let here = parse::<Here>(body)?;
        let url = here.url.unwrap_or_else(|| url_of(caller.address.ip(), here.port));
        if crate::client::address(&url).is_none() {
            return Err(Refusal::Malformed(format!("{url:?} is not a URL of the form https://ADDRESS:PORT")));
        }
        self.store.move_to(&member.host, &url).await?;
        let url = self.store.host(&member.host).await?.enrolment.url;
        Ok(Here { url: Some(url), port: here.port })
    }

    /// The host whose certificate the caller showed, whatever it is worth; for the audit log.
    async fn host_of(&self, caller: &Caller) -> Option<HostId> {
        let certificate = x509::Certificate::parse(caller.certificate.as_deref()?).ok()?;
        self.store.certificate(certificate.serial()).await.ok()?.map(|known| known.host)
    }

    async fn refused(
        &self,
        caller: &Caller,
        what: &str,
        host: Option<HostId>,
        refusal: &Refusal,
    ) -> Result<(), StoreError> {
        tracing::warn!(from = %caller.address, code = refusal.code(), "refused to {what}: {refusal}");
        self.audit(caller, what, host, refusal.code(), refusal.to_string()).await
    }

    async fn audit(
        &self,
        caller: &Caller,
        what: &str,
        host: Option<HostId>,
        result: &str,
        detail: String,
    ) -> Result<(), StoreError> {
        let who = caller.address.to_string();
        let (what, result) = (what.to_owned(), result.to_owned());
        self.store.audit(&AuditEntry { time: self.source.now(), who, what, host, result, detail }).await
    }
}

fn issued(host: &HostId, ak: &[u8], made: &HostCertificate) -> IssuedCertificate {
    let (serial, expires) = (made.serial.clone(), made.expires);
    IssuedCertificate { serial, host: host.clone(), ak: ak.to_vec(), expires, revoked: false }
}

fn parse<T: serde::de::DeserializeOwned>(body: &[u8]) -> Result<T, Refusal> {
    serde_json::from_slice(body).map_err(|e| Refusal::Malformed(e.to_string()))
}

fn check_key(key: &[u8], message: &[u8], signature: &[u8]) -> Result<(), Refusal> {
    UnparsedPublicKey::new(&ECDSA_P256_SHA256_ASN1, key).verify(message, signature).map_err(|_| Refusal::Key)
}

fn url_of(address: IpAddr, port: u16) -> String {
    format!("https://{}", SocketAddr::new(address.to_canonical(), port))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing in here can panic between two changes that belong together.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Adds one, after those that took too long are gone, and the oldest if there are too many.
fn keep<T>(map: &mut HashMap<Vec<u8>, T>, key: Vec<u8>, value: T, now: TimeMs, since: impl Fn(&T) -> TimeMs) {
    map.retain(|_, value| now.0.saturating_sub(since(value).0) <= PATIENCE);
    if map.len() >= MAX_PENDING
        && let Some(oldest) = map.iter().min_by_key(|(_, value)| since(value)).map(|(key, _)| key.clone())
    {
        map.remove(&oldest);
    }
    map.insert(key, value);
}
