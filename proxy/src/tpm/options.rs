//! What the operator can choose of keys and authorisations.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use serde::Deserialize;

/// The kind of the attestation key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
pub enum AkKind {
    /// P-256, ECDSA with SHA-256.
    #[default]
    #[serde(rename = "ecc-p256")]
    EccP256,
    /// RSA with 2048 bits, RSASSA with SHA-256.
    #[serde(rename = "rsa-2048")]
    Rsa2048,
}

/// An endorsement key's template (TCG EK Credential Profile 2.5, annex B).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub enum EkKind {
    /// L-1: RSA 2048, low range.
    #[serde(rename = "rsa-2048")]
    Rsa2048,
    /// L-2: P-256, low range.
    #[serde(rename = "ecc-p256")]
    EccP256,
    /// H-1: RSA 2048, high range.
    #[serde(rename = "rsa-2048-high")]
    Rsa2048High,
    /// H-2: P-256, high range.
    #[serde(rename = "ecc-p256-high")]
    EccP256High,
    /// H-3: P-384, high range.
    #[serde(rename = "ecc-p384")]
    EccP384,
}

/// Authorisation values; empty where the operator has set none.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Authorisations {
    /// Of the owner: needed to make the attestation key persistent.
    pub owner: Vec<u8>,
    /// Of the endorsement hierarchy: needed for every key that the proxy makes.
    pub endorsement: Vec<u8>,
    /// Of lockout: when it is there, the proxy ends a dictionary-attack lock-out that is in its way.
    pub lockout: Option<Vec<u8>>,
}

impl std::fmt::Debug for Authorisations {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Authorisations(secret)")
    }
}

/// How a TPM is opened.
#[derive(Debug, Clone, Default)]
pub struct TpmOptions {
    /// How to reach it, as libtss2-tctildr names it.
    pub tcti: String,
    /// The attestation key's kind.
    pub ak: AkKind,
    /// Where the attestation key is kept in the TPM; made anew at each opening when absent.
    pub ak_handle: Option<u32>,
    /// Authorisations.
    pub auth: Authorisations,
}

impl TpmOptions {
    /// The usual keys, no authorisations.
    #[must_use]
    pub fn new(tcti: &str) -> Self {
        Self { tcti: tcti.to_owned(), ..Self::default() }
    }
}

/// Where authorisation values are read.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AuthFiles {
    /// Of the owner.
    pub owner: Option<PathBuf>,
    /// Of the endorsement hierarchy.
    pub endorsement: Option<PathBuf>,
    /// Of lockout.
    pub lockout: Option<PathBuf>,
}

/// The longest authorisation value in bytes: that of SHA-512.
const MAX_AUTHORISATION: usize = 64;

impl AuthFiles {
    /// Reads the values. Where no file is named, a systemd credential `onequote.tpm-owner`, `…-endorsement` or
    /// `…-lockout` is taken if the service was given one (its folder is `$CREDENTIALS_DIRECTORY`).
    ///
    /// # Errors
    /// A file cannot be read, or has no value of 1 to 64 bytes. The error names the file, never the value.
    pub fn read(&self, credentials: Option<&Path>) -> io::Result<Authorisations> {
        let one = |file: &Option<PathBuf>, name: &str| -> io::Result<Option<Vec<u8>>> {
            let given = credentials.map(|folder| folder.join(format!("onequote.tpm-{name}")));
            match file.clone().or_else(|| given.filter(|path| path.exists())) {
                Some(path) => value(&path).map(Some),
                None => Ok(None),
            }
        };
        Ok(Authorisations {
            owner: one(&self.owner, "owner")?.unwrap_or_default(),
            endorsement: one(&self.endorsement, "endorsement")?.unwrap_or_default(),
            lockout: one(&self.lockout, "lockout")?,
        })
    }
}

/// A value: the file's bytes without a line end, or `hex:` and digits.
fn value(path: &Path) -> io::Result<Vec<u8>> {
    let named = |kind, why: &str| io::Error::new(kind, format!("{}: {why}", path.display()));
    let bytes = fs::read(path).map_err(|e| named(e.kind(), &e.to_string()))?;
    let bytes = bytes.strip_suffix(b"\n").unwrap_or(&bytes);
    let value = match bytes.strip_prefix(b"hex:") {
        Some(digits) => {
            hex::decode(digits).map_err(|_| named(io::ErrorKind::InvalidData, "not hexadecimal after `hex:`"))?
        }
        None => bytes.to_vec(),
    };
    if value.is_empty() || value.len() > MAX_AUTHORISATION {
        return Err(named(io::ErrorKind::InvalidData, "an authorisation value has 1 to 64 bytes"));
    }
    Ok(value)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;

    #[test]
    fn values_come_from_files_or_credentials() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| {
            let path = dir.path().join(name);
            fs::write(&path, text).unwrap();
            path
        };
        let owner = Some(write("owner", "secret\n"));
        write("onequote.tpm-lockout", "hex:00ff");
        write("onequote.tpm-owner", "not this one");
        let files = AuthFiles { owner, ..AuthFiles::default() };
        let read = files.read(Some(dir.path())).unwrap();
        assert_eq!(read.owner, b"secret");
        assert_eq!((read.endorsement.as_slice(), read.lockout.as_deref()), (&[][..], Some(&[0, 255][..])));
        assert_eq!(format!("{read:?}"), "Authorisations(secret)");
        assert_eq!(files.read(None).unwrap().lockout, None);
        for text in ["", "\n", "hex:0", &"x".repeat(65)] {
            let files = AuthFiles { owner: Some(write("bad", text)), ..AuthFiles::default() };
            let e = files.read(None).unwrap_err().to_string();
            assert!(e.contains("bad"), "{e}");
        }
    }
}
