//! What the host keeps of a verifier that it has joined, in `verifiers/NAME/` of the state folder.
//!
//! `identity.pem` has the host's key and certificate for this verifier, `authority.pem` the verifier's authority,
//! `membership.json` the rest. All are replaced whole, the identity in one step.

use std::{
    fs, io,
    io::Write as _,
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
};

use onequote_evidence::{
    id::{Blob, HostId, TimeMs},
    join::Certified,
};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _};
use serde::{Deserialize, Serialize};

use crate::{folder, vm::is_valid_name};

/// The folder of all memberships in the state folder.
const FOLDER: &str = "verifiers";

/// What is kept beside keys and certificates.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Details {
    /// Where the verifier is.
    pub url: String,
    /// The host's id there.
    pub host: HostId,
    /// The name of the attestation key that joined.
    pub ak: Blob,
    /// Where the proxy is, if the operator said so.
    pub own_url: Option<String>,
    /// When the certificate came, by the host's clock.
    pub received: TimeMs,
    /// How long it holds from then on, in milliseconds.
    pub lifetime: u64,
}

/// A verifier that the host has joined.
#[derive(Debug)]
pub struct Membership {
    /// Its name with us.
    pub name: String,
    /// What is kept beside keys and certificates.
    pub details: Details,
    /// The verifier's authority.
    pub authority: CertificateDer<'static>,
    /// Our certificate.
    pub certificate: CertificateDer<'static>,
    /// Its key.
    pub key: PrivateKeyDer<'static>,
    folder: PathBuf,
}

impl Membership {
    /// All memberships of the state folder, by name.
    ///
    /// # Errors
    /// One of them cannot be read; the message names it.
    pub fn all(state: &Path) -> io::Result<Vec<Self>> {
        let folder = state.join(FOLDER);
        let entries = match fs::read_dir(&folder) {
            Ok(entries) => entries,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(e) => return Err(named(&folder, &e)),
        };
        let mut all = Vec::new();
        for entry in entries {
            let entry = entry.map_err(|e| named(&folder, &e))?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if is_valid_name(&name) {
                all.push(Self::read(name, entry.path())?);
            }
        }
        all.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(all)
    }

    /// A membership that is kept nowhere, for a proxy in memory. It cannot be renewed.
    #[must_use]
    pub fn in_memory(
        name: &str,
        details: Details,
        authority: CertificateDer<'static>,
        certificate: CertificateDer<'static>,
        key: PrivateKeyDer<'static>,
    ) -> Self {
        Self { name: name.to_owned(), details, authority, certificate, key, folder: PathBuf::new() }
    }

    fn read(name: String, folder: PathBuf) -> io::Result<Self> {
        let details = folder.join("membership.json");
        let text = fs::read(&details).map_err(|e| named(&details, &e))?;
        let details = serde_json::from_slice(&text).map_err(|e| named(&details, &io::Error::other(e)))?;
        let (certificate, key) = identity(&folder)?;
        let authority = folder.join("authority.pem");
        let pem = fs::read(&authority).map_err(|e| named(&authority, &e))?;
        let authority = CertificateDer::from_pem_slice(&pem).map_err(|e| named(&authority, &io::Error::other(e)))?;
        Ok(Self { name, details, authority, certificate, key, folder })
    }

    /// Keeps what a join gave, in place of an earlier membership of that name.
    ///
    /// # Errors
    /// Of the file system.
    pub fn create(
        state: &Path,
        name: &str,
        details: &Details,
        certified: &Certified,
        key: &rcgen::KeyPair,
    ) -> io::Result<PathBuf> {
        folder::private(&state.join(FOLDER))?;
        let path = state.join(FOLDER).join(name);
        folder::private(&path)?;
        replace(&path.join("authority.pem"), pem("CERTIFICATE", &certified.authority.0).as_bytes())?;
        keep_details(&path, details)?;
        keep_identity(&path, certified, key)?;
        Ok(path)
    }

    /// The names of earlier memberships that one of this name, with this authority, takes the place of: a verifier has one
    /// certificate of a host in force, whatever the host calls it.
    ///
    /// # Errors
    /// As [`Self::all`].
    pub fn replaced_by(state: &Path, name: &str, authority: &[u8]) -> io::Result<Vec<String>> {
        let of = |earlier: &Self| earlier.name == name || earlier.authority.as_ref() == authority;
        Ok(Self::all(state)?.into_iter().filter(of).map(|earlier| earlier.name).collect())
    }

    /// Forgets the membership of this name.
    ///
    /// # Errors
    /// Of the file system.
    pub fn forget(state: &Path, name: &str) -> io::Result<()> {
        let path = state.join(FOLDER).join(name);
        fs::remove_dir_all(&path).map_err(|e| named(&path, &e))
    }

    /// Takes a renewed certificate, on disk first.
    ///
    /// # Errors
    /// Of the file system; the earlier certificate is in force then.
    pub fn renew(&mut self, certified: &Certified, key: &rcgen::KeyPair, now: TimeMs) -> io::Result<()> {
        keep_identity(&self.folder, certified, key)?;
        (self.certificate, self.key) = identity(&self.folder)?;
        (self.details.received, self.details.lifetime) = (now, certified.lifetime);
        keep_details(&self.folder, &self.details)
    }
}

fn keep_details(folder: &Path, details: &Details) -> io::Result<()> {
    let text = serde_json::to_vec_pretty(details).map_err(io::Error::other)?;
    replace(&folder.join("membership.json"), &text)
}

fn identity(folder: &Path) -> io::Result<(CertificateDer<'static>, PrivateKeyDer<'static>)> {
    let path = folder.join("identity.pem");
    let bytes = fs::read(&path).map_err(|e| named(&path, &e))?;
    let bad = |e| named(&path, &io::Error::other(e));
    let certificate = CertificateDer::from_pem_slice(&bytes).map_err(bad)?;
    Ok((certificate, PrivateKeyDer::from_pem_slice(&bytes).map_err(bad)?))
}

fn keep_identity(folder: &Path, certified: &Certified, key: &rcgen::KeyPair) -> io::Result<()> {
    let both = format!("{}{}", pem("CERTIFICATE", &certified.certificate.0), key.serialize_pem());
    replace(&folder.join("identity.pem"), both.as_bytes())
}

fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let write = || {
        let new = path.with_extension("new");
        let mut file = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&new, path)?;
        fs::File::open(path.parent().unwrap_or(path))?.sync_all()
    };
    write().map_err(|e| named(path, &e))
}

fn named(path: &Path, e: &io::Error) -> io::Error {
    io::Error::new(e.kind(), format!("{}: {e}", path.display()))
}

fn pem(label: &str, der: &[u8]) -> String {
    let lines = pem::EncodeConfig::new().set_line_ending(pem::LineEnding::LF);
    pem::encode_config(&pem::Pem::new(label, der), lines)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use onequote_evidence::id::TimeMs;

    use super::*;

    #[test]
    fn a_membership_is_kept_and_renewed() {
        let dir = tempfile::tempdir().unwrap();
        assert!(Membership::all(dir.path()).unwrap().is_empty());
        let key = rcgen::KeyPair::generate().unwrap();
        let made = rcgen::CertificateParams::new(vec!["h1".to_owned()]).unwrap().self_signed(&key).unwrap();
        let certified = Certified {
            host: "h1".parse().unwrap(),
            certificate: Blob(made.der().to_vec()),
            authority: Blob(made.der().to_vec()),
            expires: TimeMs(1),
            lifetime: 1,
            software_tpm: true,
        };
        let details = Details {
            url: "https://v:1".into(),
            host: "h1".parse().unwrap(),
            ak: Blob(vec![1, 2]),
            own_url: None,
            received: TimeMs(5),
            lifetime: 1,
        };
        Membership::create(dir.path(), "main", &details, &certified, &key).unwrap();
        let mut all = Membership::all(dir.path()).unwrap();
        assert_eq!((all.len(), &all[0].details), (1, &details));
        assert_eq!(all[0].certificate.as_ref(), made.der().as_ref());
        let other = rcgen::KeyPair::generate().unwrap();
        let renewed = rcgen::CertificateParams::new(vec!["h1".to_owned()]).unwrap().self_signed(&other).unwrap();
        let certified = Certified { certificate: Blob(renewed.der().to_vec()), ..certified };
        all[0].renew(&certified, &other, TimeMs(9)).unwrap();
        let again = Membership::all(dir.path()).unwrap().remove(0);
        assert_eq!((again.certificate.as_ref(), again.details.received), (renewed.der().as_ref(), TimeMs(9)));
        fs::write(dir.path().join("verifiers/main/membership.json"), "{}").unwrap();
        let e = Membership::all(dir.path()).unwrap_err().to_string();
        assert!(e.contains("verifiers/main/membership.json"), "{e}");
    }
}
