//! Joining and renewing, as steps: who asks, what must be true, what they get.
//!
//! A join has two steps. In the first a host shows its token, its endorsement key with what vouches for it, its attestation
//! key and the TLS key that it wants certified; whatever can be refused is refused here, in the order below, and nothing is
//! written but the audit log. It gets a credential. In the second it shows that its TPM opened the credential. Only then
//! the token is used up and the host enrolled, both in one transaction that asks the rules about names again.
//!
//! A renewal is asked with the certificate that is to be renewed, and shown by a quote of the attestation key over this very
//! connection: who has stolen the certificate's key, or a copy of the host's files, cannot renew it.

mod joining;
mod refusal;
mod renewing;

use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use aws_lc_rs::signature::{ECDSA_P256_SHA256_ASN1, UnparsedPublicKey};
use onequote_evidence::{
    id::{Blob, HostId, TimeMs},
    join::{Certified, Here},
};

pub use refusal::Refusal;

use self::{joining::Pending, renewing::Renewal};
use super::{
    authority::{Authority, HostCertificate},
    ek::Roots,
    x509,
};
use crate::{
    report::Members,
    source::Source,
    store::{
        StoreError,
        enrol::{AuditEntry, EnrolStore, IssuedCertificate, JoinRefusal, Standing},
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
    ///
    /// # Errors
    /// [`Refusal`].
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

impl<S: EnrolStore> Members for Registrar<S> {
    async fn member(&self, caller: &Caller) -> Result<IssuedCertificate, Refusal> {
        Self::member(self, caller).await
    }

    async fn refused(&self, caller: &Caller, refusal: &Refusal) {
        let host = self.host_of(caller).await;
        if let Err(e) = Self::refused(self, caller, "report", host, refusal).await {
            tracing::error!(error = &e as &dyn std::error::Error, "cannot write the audit log");
        }
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
