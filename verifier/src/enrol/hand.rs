//! Enrolment by hand: the operator names a host, its attestation key, its proxy's certificate and its address.
//!
//! Both sides of a connection have a self-signed certificate and know the other's: that one certificate is the only
//! trust anchor. The verifier's own is made by `init` and given to each proxy's configuration.

use std::{
    fs,
    io::Write as _,
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
};

use rustls::pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _};

use onequote_evidence::{Malformed, id::HostId, tpm::Public};

use crate::{appraise::signature, store::Enrolment};

/// Key and certificate of the verifier, in one PEM file that only its owner reads.
pub const IDENTITY_FILE: &str = "identity.pem";

/// The certificate alone, to be given to proxies.
pub const CERTIFICATE_FILE: &str = "certificate.pem";

/// The name in the verifier's certificate.
const SUBJECT: &str = "onequote-verifier";

/// An enrolment that cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum EnrolError {
    /// A file cannot be read or written.
    #[error("{doing} {path}")]
    File {
        /// What was tried.
        doing: &'static str,
        /// The file.
        path: PathBuf,
        /// Why it failed.
        source: std::io::Error,
    },
    /// A file is not PEM, or has not what it must have.
    #[error("{path} does not hold a usable PEM {what}")]
    Pem {
        /// The file.
        path: PathBuf,
        /// What it should hold.
        what: &'static str,
        /// Why it was not found.
        source: rustls::pki_types::pem::Error,
    },
    /// The key file is not a public area.
    #[error("{path} is not an attestation key as TPM2B_PUBLIC (the proxy's init command writes it as ak.pub)")]
    Key {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: Malformed,
    },
    /// The key is not one that may attest.
    #[error("{path} holds a key that cannot attest: {why}")]
    NotAnAk {
        /// The file.
        path: PathBuf,
        /// Why.
        why: String,
    },
    /// The URL is not one of a proxy.
    #[error("{url:?} is not a URL of the form https://ADDRESS:PORT")]
    Url {
        /// As given.
        url: String,
    },
    /// The verifier has no identity.
    #[error("{path} is not there: run onequote-verifier --state {state} init first")]
    NoIdentity {
        /// The identity's file.
        path: PathBuf,
        /// The state folder.
        state: PathBuf,
    },
    /// There is an identity already.
    #[error("{path} is there already; it is not replaced, since proxies know it")]
    IdentityExists {
        /// The identity's file.
        path: PathBuf,
    },
    /// A key pair or certificate cannot be made.
    #[error("cannot make a certificate")]
    Certificate {
        /// Why.
        source: rcgen::Error,
    },
}

/// The verifier's own certificate and key.
#[derive(Debug)]
pub struct Identity {
    /// The certificate.
    pub certificate: CertificateDer<'static>,
    /// Its private key.
    pub key: PrivateKeyDer<'static>,
}

impl Identity {
    /// Makes an identity in the state folder, which it makes too. Gives the path of the certificate.
    ///
    /// # Errors
    /// [`EnrolError`], also when there is one.
    pub fn create(state: &Path) -> Result<PathBuf, EnrolError> {
        let file = |doing, path: &Path| {
            let path = path.to_owned();
            move |source| EnrolError::File { doing, path, source }
        };
        let builder = fs::DirBuilder::new().recursive(true).mode(0o700).create(state);
        builder.map_err(file("cannot make the folder", state))?;
        let identity = state.join(IDENTITY_FILE);
        if identity.exists() {
            return Err(EnrolError::IdentityExists { path: identity });
        }
        let (certificate, key) = self_signed(SUBJECT).map_err(|source| EnrolError::Certificate { source })?;
        let path = state.join(CERTIFICATE_FILE);
        fs::write(&path, &certificate).map_err(file("cannot write", &path))?;
        write_private(&identity, format!("{key}{certificate}").as_bytes())?;
        Ok(path)
    }

    /// Reads the identity from the state folder.
    ///
    /// # Errors
    /// [`EnrolError`].
    pub fn load(state: &Path) -> Result<Self, EnrolError> {
        let path = state.join(IDENTITY_FILE);
        if !path.exists() {
            return Err(EnrolError::NoIdentity { path, state: state.to_owned() });
        }
        Self::read(&path)
    }

    /// Reads a certificate and its key from one PEM file.
    pub(super) fn read(path: &Path) -> Result<Self, EnrolError> {
        let bytes = read(path)?;
        let pem = |what| move |source| EnrolError::Pem { path: path.to_owned(), what, source };
        let certificate = CertificateDer::from_pem_slice(&bytes).map_err(pem("certificate"))?;
        let key = PrivateKeyDer::from_pem_slice(&bytes).map_err(pem("private key"))?;
        Ok(Self { certificate, key })
    }
}

/// A self-signed certificate for a DNS name, and its key, both PEM.
pub(crate) fn self_signed(name: &str) -> Result<(String, String), rcgen::Error> {
    let key = rcgen::KeyPair::generate()?;
    let mut params = rcgen::CertificateParams::new(vec![name.to_owned()])?;
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(rcgen::DnType::CommonName, name);
    Ok((params.self_signed(&key)?.pem(), key.serialize_pem()))
}

/// Reads the files of an enrolment and checks what can be checked without the host.
///
/// # Errors
/// [`EnrolError`].
pub fn read_enrolment(
    id: HostId,
    url: &str,
    ak: &Path,
    certificate: &Path,
    software_tpm: bool,
) -> Result<Enrolment, EnrolError> {
    if crate::client::address(url).is_none() {
        return Err(EnrolError::Url { url: url.to_owned() });
    }
    let (ak, _) = read_ak(ak)?;
    let pem = |source| EnrolError::Pem { path: certificate.to_owned(), what: "certificate", source };
    let der = CertificateDer::from_pem_slice(&read(certificate)?).map_err(pem)?;
    Ok(Enrolment { id, url: url.to_owned(), ak, certificate: der.to_vec(), software_tpm })
}

/// Reads an attestation key: its bytes, and what they say.
///
/// # Errors
/// [`EnrolError`].
pub fn read_ak(path: &Path) -> Result<(Vec<u8>, Public), EnrolError> {
    let bytes = read(path)?;
    let public = Public::parse(&bytes).map_err(|source| EnrolError::Key { path: path.to_owned(), source })?;
    if let Err(finding) = signature::check_key(&public) {
        let why = finding.actual.unwrap_or_else(|| finding.code.meaning().to_owned());
        return Err(EnrolError::NotAnAk { path: path.to_owned(), why });
    }
    Ok((bytes, public))
}

/// Makes a file that only its owner reads; it must not be there yet.
pub(super) fn write_private(path: &Path, bytes: &[u8]) -> Result<(), EnrolError> {
    let open = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
    let written = open.and_then(|mut file| file.write_all(bytes).and_then(|()| file.sync_all()));
    written.map_err(|source| EnrolError::File { doing: "cannot write", path: path.to_owned(), source })
}

fn read(path: &Path) -> Result<Vec<u8>, EnrolError> {
    fs::read(path).map_err(|source| EnrolError::File { doing: "cannot read", path: path.to_owned(), source })
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn an_identity_is_made_once() {
        let dir = tempfile::tempdir().unwrap();
        let state = dir.path().join("state");
        assert!(matches!(Identity::load(&state), Err(EnrolError::NoIdentity { .. })));
        let path = Identity::create(&state).unwrap();
        let identity = Identity::load(&state).unwrap();
        let alone = CertificateDer::from_pem_slice(&fs::read(path).unwrap()).unwrap();
        assert_eq!(identity.certificate, alone);
        let mode = fs::metadata(state.join(IDENTITY_FILE)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert!(matches!(Identity::create(&state), Err(EnrolError::IdentityExists { .. })));
    }

    #[test]
    fn files_of_an_enrolment_are_checked() {
        let dir = tempfile::tempdir().unwrap();
        let (ak, certificate) = (dir.path().join("ak.pub"), dir.path().join("c.pem"));
        fs::write(&ak, b"rubbish").unwrap();
        fs::write(&certificate, b"rubbish").unwrap();
        let id = || "h".parse::<HostId>().unwrap();
        let e = read_enrolment(id(), "http://x", &ak, &certificate, true).unwrap_err();
        assert!(e.to_string().contains("https://ADDRESS:PORT"));
        let e = read_enrolment(id(), "https://127.0.0.1:1", &ak, &certificate, true).unwrap_err();
        assert!(e.to_string().contains("ak.pub"), "{e}");
        fs::write(&ak, crate::appraise::testing::Ak::generate().unwrap().public()).unwrap();
        let e = read_enrolment(id(), "https://127.0.0.1:1", &ak, &certificate, true).unwrap_err();
        assert!(e.to_string().contains("c.pem"), "{e}");
    }
}
