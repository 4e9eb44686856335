//! The host's TLS identities, and which verifiers are let in.
//!
//! Verifiers of the configuration pin one certificate, which is signed by its own key and is the only trust anchor at the
//! other end: nothing but the possession of this key counts. It is in `identity.pem` of the state folder, readable by its
//! owner only. A verifier that the host has joined issued a certificate of its own ([`crate::join`]); which one is
//! shown follows from the authority that the verifier names in its first message. The other way round a verifier is
//! let in by its pinned certificate, or by one of its authority *with the verifier's name*: the other hosts have
//! certificates of that authority, too.

use std::{
    fs, io,
    io::Write as _,
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    sync::{Arc, PoisonError, RwLock},
};

use onequote_evidence::{id::HostId, join::VERIFIER_NAME};
use rcgen::{CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, KeyPair};
use rustls::{
    RootCertStore, ServerConfig,
    client::verify_server_name,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime, pem::PemObject as _},
    server::{ClientHello, ParsedCertificate, ResolvesServerCert, WebPkiClientVerifier, danger::ClientCertVerifier},
    sign::CertifiedKey,
};

use crate::{config::Verifier, join::Membership};

/// Key and certificate.
pub struct Identity {
    certificate: CertificateDer<'static>,
    key: PrivateKeyDer<'static>,
}

/// Which certificate we show to whom, and whom we let in.
#[derive(Debug)]
pub struct Trust {
    own: Arc<CertifiedKey>,
    /// Names and certificates (DER) of the configuration's verifiers.
    pinned: Vec<(String, Vec<u8>)>,
    members: Vec<Member>,
}

/// A verifier that was joined.
#[derive(Debug)]
struct Member {
    name: String,
    /// The authority's encoded name.
    authority: Vec<u8>,
    clients: Arc<dyn ClientCertVerifier>,
    shown: Arc<CertifiedKey>,
}

/// Who is let in as of now. Changes when a verifier is joined and when a certificate is renewed; a connection goes on as it
/// was made.
#[derive(Debug, Default)]
pub struct Access(RwLock<Option<(Arc<ServerConfig>, Arc<Trust>)>>);

impl Access {
    /// How new connections are made, and who may make them; none when nobody may.
    #[must_use]
    pub fn now(&self) -> Option<(Arc<ServerConfig>, Arc<Trust>)> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn replace(&self, by: (Arc<ServerConfig>, Arc<Trust>)) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = Some(by);
    }
}

impl Trust {
    /// The verifier that showed this certificate; none when it is nobody's.
    #[must_use]
    pub fn verifier(&self, certificate: &CertificateDer<'_>) -> Option<&str> {
        if let Some((name, _)) = self.pinned.iter().find(|(_, der)| der.as_slice() == certificate.as_ref()) {
            return Some(name);
        }
        let name = ServerName::try_from(VERIFIER_NAME).ok()?;
        let parsed = ParsedCertificate::try_from(certificate).ok()?;
        verify_server_name(&parsed, &name).ok()?;
        let of = |member: &&Member| member.clients.verify_client_cert(certificate, &[], UnixTime::now()).is_ok();
        self.members.iter().find(of).map(|member| member.name.as_str())
    }
}

impl ResolvesServerCert for Trust {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let named = hello.certificate_authorities().unwrap_or_default();
        let member = self.members.iter().find(|member| named.iter().any(|name| name.as_ref() == member.authority));
        Some(match member {
            Some(member) => Arc::clone(&member.shown),
            None => Arc::clone(&self.own),
        })
    }
}

fn certified(
    certificate: &CertificateDer<'static>,
    key: &PrivateKeyDer<'static>,
) -> Result<Arc<CertifiedKey>, IdentityError> {
    let provider = rustls::crypto::aws_lc_rs::default_provider();
    let certified = CertifiedKey::from_der(vec![certificate.clone()], key.clone_key(), &provider);
    certified.map(Arc::new).map_err(|e| IdentityError::Tls(e.to_string()))
}

/// The identity cannot be made, read or used.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// Of the file system.
    #[error("{path}: {error}")]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// A file that is not what it should be.
    #[error("{path}: {why}")]
    Content {
        /// The file.
        path: PathBuf,
        /// Why.
        why: String,
    },
    /// The key could not be made.
    #[error("cannot make a certificate: {0}")]
    Make(#[from] rcgen::Error),
    /// TLS refuses them.
    #[error("cannot set up TLS: {0}")]
    Tls(String),
}

impl Identity {
    /// Reads the identity of the state folder; makes it when there is none.
    ///
    /// # Errors
    /// [`IdentityError`].
    pub fn open(state_dir: &Path, host: &HostId) -> Result<Self, IdentityError> {
        let path = state_dir.join("identity.pem");
        match fs::read(&path) {
            Ok(pem) => Self::parse(&path, &pem),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Self::make(&path, state_dir, host),
            Err(error) => Err(IdentityError::File { path, error }),
        }
    }

    fn parse(path: &Path, pem: &[u8]) -> Result<Self, IdentityError> {
        let bad = |why: rustls::pki_types::pem::Error| IdentityError::Content {
            path: path.to_owned(),
            why: format!("{why}; move it away to have a new one made"),
        };
        let certificate = CertificateDer::from_pem_slice(pem).map_err(bad)?;
        let key = PrivateKeyDer::from_pem_slice(pem).map_err(bad)?;
        Ok(Self { certificate, key })
    }

    fn make(path: &Path, state_dir: &Path, host: &HostId) -> Result<Self, IdentityError> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::new(vec![host.as_str().to_owned()])?;
        let mut name = DistinguishedName::new();
        name.push(DnType::CommonName, format!("onequote host {host}"));
        params.distinguished_name = name;
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let certificate = params.self_signed(&key)?;
        let both = format!("{}{}", certificate.pem(), key.serialize_pem());
        write(path, both.as_bytes(), 0o600)?;
        write(&state_dir.join("certificate.pem"), certificate.pem().as_bytes(), 0o644)?;
        Self::parse(path, both.as_bytes())
    }

    /// Lets in these verifiers and nobody else from now on, by TLS 1.3.
    ///
    /// # Errors
    /// [`IdentityError`], naming the certificate that cannot be used; all stays as it was then.
    pub fn admit(
        &self,
        access: &Access,
        verifiers: &[Verifier],
        memberships: &[Membership],
    ) -> Result<(), IdentityError> {
        if !verifiers.is_empty() || !memberships.is_empty() {
            access.replace(self.server(verifiers, memberships)?);
        }
        Ok(())
    }

    fn server(
        &self,
        verifiers: &[Verifier],
        memberships: &[Membership],
    ) -> Result<(Arc<ServerConfig>, Arc<Trust>), IdentityError> {
        let tls = |e: &dyn std::fmt::Display| IdentityError::Tls(e.to_string());
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let clients = |roots: RootCertStore| {
            let clients = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider)).build();
            clients.map_err(|e| tls(&e))
        };
        let mut roots = RootCertStore::empty();
        let mut pinned = Vec::new();
        for verifier in verifiers {
            let path = &verifier.certificate;
            let pem = fs::read(path).map_err(|error| IdentityError::File { path: path.clone(), error })?;
            let bad = |why: String| IdentityError::Content { path: path.clone(), why };
            let certificate = CertificateDer::from_pem_slice(&pem).map_err(|e| bad(e.to_string()))?;
            pinned.push((verifier.name.clone(), certificate.to_vec()));
            roots.add(certificate).map_err(|e| bad(e.to_string()))?;
        }
        let mut members = Vec::new();
        for membership in memberships {
            let mut alone = RootCertStore::empty();
            alone.add(membership.authority.clone()).map_err(|e| tls(&e))?;
            roots.add(membership.authority.clone()).map_err(|e| tls(&e))?;
            let authority =
                alone.subjects().pop().ok_or_else(|| tls(&"an authority without a name"))?.as_ref().to_vec();
            members.push(Member {
                name: membership.name.clone(),
                authority,
                clients: clients(alone)?,
                shown: certified(&membership.certificate, &membership.key)?,
            });
        }
        let trust = Arc::new(Trust { own: certified(&self.certificate, &self.key)?, pinned, members });
        let all = clients(roots)?;
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|e| tls(&e))?
            .with_client_cert_verifier(all)
            .with_cert_resolver(Arc::clone(&trust) as _);
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok((Arc::new(config), trust))
    }
}

fn write(path: &Path, bytes: &[u8], mode: u32) -> Result<(), IdentityError> {
    let error = |error| IdentityError::File { path: path.to_owned(), error };
    let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(mode).open(path).map_err(error)?;
    file.write_all(bytes).and_then(|()| file.sync_all()).map_err(error)
}
