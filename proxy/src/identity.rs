//! The host's TLS identity: a key and a certificate that verifiers pin.
//!
//! The certificate is signed by its own key and is the only trust anchor at the other end, so nothing but the
//! possession of this key counts. The key is in `identity.pem` of the state folder, readable by its owner only.

use std::{
    fs, io,
    io::Write as _,
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    sync::Arc,
};

use onequote_evidence::id::HostId;
use rcgen::{CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, KeyPair};
use rustls::{
    RootCertStore, ServerConfig,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
    server::WebPkiClientVerifier,
};

use crate::config::Verifier;

/// Key and certificate.
pub struct Identity {
    certificate: CertificateDer<'static>,
    key: PrivateKeyDer<'static>,
}

/// Verifiers' names and certificates (DER).
pub type KnownVerifiers = Vec<(String, Vec<u8>)>;

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

    /// TLS 1.3 for these verifiers and nobody else.
    ///
    /// # Errors
    /// [`IdentityError`], naming the certificate that cannot be used.
    pub fn server(&self, verifiers: &[Verifier]) -> Result<(Arc<ServerConfig>, KnownVerifiers), IdentityError> {
        let tls = |e: &dyn std::fmt::Display| IdentityError::Tls(e.to_string());
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let mut roots = RootCertStore::empty();
        let mut known = Vec::new();
        for verifier in verifiers {
            let path = &verifier.certificate;
            let pem = fs::read(path).map_err(|error| IdentityError::File { path: path.clone(), error })?;
            let bad = |why: String| IdentityError::Content { path: path.clone(), why };
            let certificate = CertificateDer::from_pem_slice(&pem).map_err(|e| bad(e.to_string()))?;
            known.push((verifier.name.clone(), certificate.to_vec()));
            roots.add(certificate).map_err(|e| bad(e.to_string()))?;
        }
        let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|e| tls(&e))?;
        let clients =
            WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider).build().map_err(|e| tls(&e))?;
        let mut config = builder
            .with_client_cert_verifier(clients)
            .with_single_cert(vec![self.certificate.clone()], self.key.clone_key())
            .map_err(|e| tls(&e))?;
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok((Arc::new(config), known))
    }
}

fn write(path: &Path, bytes: &[u8], mode: u32) -> Result<(), IdentityError> {
    let error = |error| IdentityError::File { path: path.to_owned(), error };
    let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(mode).open(path).map_err(error)?;
    file.write_all(bytes).and_then(|()| file.sync_all()).map_err(error)
}
