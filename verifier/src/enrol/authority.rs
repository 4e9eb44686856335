//! The verifier's own certificate authority: it vouches for this verifier and for hosts that have joined, for nobody else.
//!
//! A host's certificate is short-lived, names the host (as DNS name) and its attestation key (as URI
//! `urn:onequote:ak:NAME`), and its serial number is written down. The verifier's own certificates have the name
//! [`VERIFIER_NAME`], which no host can have.

use std::{
    error::Error as _,
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use onequote_evidence::{
    digest::sha256,
    id::{HostId, Sha256, TimeMs},
    join::VERIFIER_NAME,
};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, PublicKeyData, SanType, SerialNumber, SignatureAlgorithm,
};
use rustls::{
    pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer},
    server::{ClientHello, ResolvesServerCert},
    sign::CertifiedKey,
};

use super::{EnrolError, Identity, hand::write_private};
use crate::source::Source;

/// Key and certificate of the authority, in one PEM file that only its owner reads.
pub const AUTHORITY_FILE: &str = "authority.pem";

/// How far a host's clock may be behind ours.
const SKEW: Duration = Duration::from_secs(300);

/// The authority's own life.
const YEARS: u64 = 20;

/// Life of the verifier's own certificates, and the age at which another one is made.
const OWN_LIFE: Duration = Duration::from_secs(30 * 24 * 3600);
const OWN_AGE: Duration = Duration::from_secs(7 * 24 * 3600);

/// Bytes of a serial number.
const SERIAL: usize = 16;

/// The authority.
pub struct Authority {
    certificate: CertificateDer<'static>,
    issuer: Issuer<'static, KeyPair>,
    source: Arc<dyn Source>,
    own: Mutex<Option<Own>>,
}

/// A certificate of the verifier itself.
#[derive(Clone)]
struct Own {
    made: TimeMs,
    identity: Arc<Identity>,
    tls: Arc<CertifiedKey>,
}

/// A certificate for a host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostCertificate {
    /// DER.
    pub certificate: Vec<u8>,
    /// Its serial number.
    pub serial: Vec<u8>,
    /// When it ends.
    pub expires: TimeMs,
}

/// Somebody else's P-256 key: an uncompressed point.
struct Point<'a>(&'a [u8]);

impl PublicKeyData for Point<'_> {
    fn der_bytes(&self) -> &[u8] {
        self.0
    }

    fn algorithm(&self) -> &'static SignatureAlgorithm {
        &rcgen::PKCS_ECDSA_P256_SHA256
    }
}

impl std::fmt::Debug for Authority {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Authority({})", self.pin())
    }
}

impl Authority {
    /// Reads the authority of the state folder; makes it when there is none.
    ///
    /// # Errors
    /// [`EnrolError`].
    pub fn open(state: &Path, source: Arc<dyn Source>) -> Result<Self, EnrolError> {
        match Self::load(state, Arc::clone(&source))? {
            Some(authority) => Ok(authority),
            None => Self::create(state, source),
        }
    }

    /// Reads the authority of the state folder, if there is one.
    ///
    /// # Errors
    /// [`EnrolError`].
    pub fn load(state: &Path, source: Arc<dyn Source>) -> Result<Option<Self>, EnrolError> {
        let path = state.join(AUTHORITY_FILE);
        if !path.exists() {
            return Ok(None);
        }
        let Identity { certificate, key } = Identity::read(&path)?;
        let key = KeyPair::try_from(&key).map_err(|source| EnrolError::Certificate { source })?;
        Ok(Some(Self::new(certificate, key, source)))
    }

    fn create(state: &Path, source: Arc<dyn Source>) -> Result<Self, EnrolError> {
        let made = |source| EnrolError::Certificate { source };
        let key = KeyPair::generate().map_err(made)?;
        let mut params = params(&key);
        params.not_before = date(source.now()) - SKEW;
        params.not_after = date(source.now()) + Duration::from_secs(YEARS * 365 * 24 * 3600);
        let certificate = params.self_signed(&key).map_err(made)?;
        let text = format!("{}{}", key.serialize_pem(), certificate.pem());
        // Two processes may make it at once: the first one's counts.
        match write_private(&state.join(AUTHORITY_FILE), text.as_bytes()) {
            Ok(()) => Ok(Self::new(certificate.der().clone(), key, source)),
            Err(e) => Self::load(state, source)?.ok_or(e),
        }
    }

    fn new(certificate: CertificateDer<'static>, key: KeyPair, source: Arc<dyn Source>) -> Self {
        let params = params(&key);
        Self { certificate, issuer: Issuer::new(params, key), source, own: Mutex::default() }
    }

    /// Its certificate.
    #[must_use]
    pub fn certificate(&self) -> &CertificateDer<'static> {
        &self.certificate
    }

    /// By what a token knows it: SHA-256 of its `SubjectPublicKeyInfo`.
    #[must_use]
    pub fn pin(&self) -> Sha256 {
        sha256(&[&self.issuer.key().subject_public_key_info()])
    }

    /// A certificate for a host with this TLS key (65 bytes) and attestation key (its name).
    ///
    /// # Errors
    /// The key is none.
    pub fn certify(
        &self,
        host: &HostId,
        key: &[u8],
        ak: &[u8],
        lifetime: Duration,
    ) -> Result<HostCertificate, rcgen::Error> {
        let mut serial = vec![0; SERIAL];
        self.source.fill(&mut serial);
        // A positive number with all its bytes.
        serial[0] = serial[0] & 0x7F | 0x40;
        let now = self.source.now();
        let mut params = leaf(host.as_str())?;
        let urn = format!("urn:onequote:ak:{}", hex::encode(ak));
        params.subject_alt_names.push(SanType::URI(urn.try_into()?));
        params.serial_number = Some(SerialNumber::from_slice(&serial));
        params.not_before = date(now) - SKEW;
        params.not_after = date(now) + lifetime;
        let certificate = params.signed_by(&Point(key), &self.issuer)?.der().to_vec();
        let expires = TimeMs(now.0.saturating_add(u64::try_from(lifetime.as_millis()).unwrap_or(u64::MAX)));
        Ok(HostCertificate { certificate, serial, expires })
    }

    /// The verifier's own certificate, for asking hosts.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn identity(&self) -> Result<Arc<Identity>, EnrolError> {
        Ok(self.own()?.identity)
    }

    fn own(&self) -> Result<Own, EnrolError> {
        let now = self.source.now();
        let mut own = self.lock();
        if let Some(own) = own.as_ref().filter(|own| now.0.saturating_sub(own.made.0) < millis(OWN_AGE)) {
            return Ok(own.clone());
        }
        let made = self.make_own(now).map_err(|source| EnrolError::Certificate { source })?;
        *own = Some(made.clone());
        Ok(made)
    }

    fn make_own(&self, now: TimeMs) -> Result<Own, rcgen::Error> {
        let key = KeyPair::generate()?;
        let mut params = leaf(VERIFIER_NAME)?;
        params.not_before = date(now) - SKEW;
        params.not_after = date(now) + OWN_LIFE;
        let certificate = params.signed_by(&key, &self.issuer)?.der().clone();
        let private = || PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.serialize_der()));
        let provider = rustls::crypto::aws_lc_rs::default_provider();
        // A host that knows only our pin learns the authority from the handshake.
        let chain = vec![certificate.clone(), self.certificate.clone()];
        let tls = CertifiedKey::from_der(chain, private(), &provider);
        // The key was made a moment ago, for this certificate.
        let tls = tls.map_err(|_| rcgen::Error::CouldNotParseKeyPair)?;
        Ok(Own { made: now, identity: Arc::new(Identity { certificate, key: private() }), tls: Arc::new(tls) })
    }

    fn lock(&self) -> MutexGuard<'_, Option<Own>> {
        // A value is put in place whole.
        self.own.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ResolvesServerCert for Authority {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let own = self.own().inspect_err(|e| tracing::error!("hosts cannot be answered: {e}: {:?}", e.source()));
        own.ok().map(|own| own.tls)
    }
}

/// The authority's own name follows from its key: two verifiers' authorities have two names.
fn params(key: &KeyPair) -> CertificateParams {
    let pin = sha256(&[&key.subject_public_key_info()]).to_string();
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, format!("onequote authority {}", &pin[..16]));
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    params
}

fn leaf(name: &str) -> Result<CertificateParams, rcgen::Error> {
    let mut params = CertificateParams::new(vec![name.to_owned()])?;
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    params.use_authority_key_identifier_extension = true;
    Ok(params)
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

fn date(time: TimeMs) -> time::OffsetDateTime {
    // Whole seconds: a certificate has no others. Not beyond the year 9999.
    rcgen::date_time_ymd(1970, 1, 1) + Duration::from_secs((time.0 / 1000).min(250_000_000_000))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;
    use crate::{enrol::x509, source::System};

    #[test]
    fn an_authority_stays() {
        let dir = tempfile::tempdir().unwrap();
        assert!(Authority::load(dir.path(), Arc::new(System)).unwrap().is_none());
        let made = Authority::open(dir.path(), Arc::new(System)).unwrap();
        let read = Authority::open(dir.path(), Arc::new(System)).unwrap();
        assert_eq!((made.pin(), made.certificate()), (read.pin(), read.certificate()));
        let mode = std::fs::metadata(dir.path().join(AUTHORITY_FILE)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let authority = x509::Certificate::parse(made.certificate()).unwrap();
        let key = KeyPair::generate().unwrap();
        let host = "h1".parse().unwrap();
        let first = read.certify(&host, key.public_key_raw(), &[1, 2], Duration::from_secs(60)).unwrap();
        let certificate = x509::Certificate::parse(&first.certificate).unwrap();
        assert!(certificate.is_signed_by(&authority) && certificate.issuer == authority.subject);
        assert_eq!(certificate.serial(), first.serial);
        assert!(first.certificate.windows(20).any(|w| w == b"urn:onequote:ak:0102"));
        let second = read.certify(&host, key.public_key_raw(), &[1, 2], Duration::from_secs(60)).unwrap();
        assert_ne!(first.serial, second.serial);
        assert!(Arc::ptr_eq(&read.identity().unwrap(), &read.identity().unwrap()));
    }
}
