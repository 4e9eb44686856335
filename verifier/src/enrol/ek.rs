//! Whether an endorsement key's certificate is to be believed (TCG EK Credential Profile for TPM Family 2.0).
//!
//! The chain leads from the certificate, through intermediates that came with it or that the operator has, to a root
//! that the operator has chosen for TPM vendors: anchors are trusted by subject and key alone. Nothing is fetched, and
//! revocation lists are not asked for. The certificate's public key must be the endorsement key itself. What
//! deviates from X.509's rules and is taken nevertheless is in docs/operations.md, "Certificates of TPM vendors".

use std::path::{Path, PathBuf};

use onequote_evidence::{
    id::TimeMs,
    tpm::{StorageKey, StorageParameters},
};
use rustls::pki_types::{CertificateDer, pem::PemObject as _};

use super::x509::{ANY_USAGE, Certificate, EK_CERTIFICATE, TpmModel, X509Error};

/// Intermediates that may come with a certificate.
pub const MAX_CHAIN: usize = 8;

/// Intermediates between a certificate and its root.
const MAX_DEPTH: usize = 6;

/// Signatures that are checked for one certificate at most: names can be made to fit each other at will.
const MAX_SIGNATURES: u32 = 32;

/// The operator's certificates cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RootsError {
    /// A file or folder.
    #[error("cannot read {path}: {source}")]
    File {
        /// It.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A file that is no certificate.
    #[error("{path}: {why}")]
    Content {
        /// It.
        path: PathBuf,
        /// Why.
        why: String,
    },
}

/// Why a certificate is not believed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EkError {
    /// There is none.
    #[error("the TPM has no certificate for its endorsement key")]
    Missing,
    /// One of the certificates has not the form of one.
    #[error("{whose}: {source}")]
    Form {
        /// Which.
        whose: String,
        /// What is wrong.
        source: X509Error,
    },
    /// It is for another key.
    #[error("the certificate is for another key than the endorsement key that was sent")]
    OtherKey,
    /// A certificate out of its time.
    #[error("the certificate of {whose} holds only from {time}")]
    Time {
        /// Which.
        whose: String,
        /// Its time.
        time: String,
    },
    /// A certificate that is not one for this use.
    #[error("the certificate of {whose} is not one for an endorsement key: {why}")]
    Usage {
        /// Which.
        whose: String,
        /// Why.
        why: &'static str,
    },
    /// A signature that does not verify, by every certificate that has the issuer's name.
    #[error("the certificate of {whose} was not signed by {issuer}")]
    Signature {
        /// Whose.
        whose: String,
        /// The issuer that it names.
        issuer: String,
    },
    /// Nobody that the operator trusts is at the end.
    #[error("no certificate of {issuer}, which issued the one of {whose}, is among the roots and intermediates")]
    Untrusted {
        /// Whose certificate.
        whose: String,
        /// Its issuer.
        issuer: String,
    },
    /// Too much work.
    #[error("there are too many certificates to look through")]
    TooMany,
}

/// Whose word a root's is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Device,
    Software,
}

/// What the operator trusts for endorsement keys.
#[derive(Debug, Clone, Default)]
pub struct Roots {
    anchors: Vec<(Kind, Certificate)>,
    intermediates: Vec<Certificate>,
}

/// A certificate that is believed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Vouched {
    /// The root, in words.
    pub root: String,
    /// Whether the TPM is a program: by the root that was chosen for such, or because its own certificate says so.
    pub software: bool,
    /// What the certificate says of the TPM.
    pub model: TpmModel,
}

impl Roots {
    /// Reads PEM or DER files, or all files `*.pem`, `*.crt`, `*.cer`, `*.der` of folders: roots of makers of TPMs, roots
    /// for software TPMs, and intermediates.
    ///
    /// # Errors
    /// [`RootsError`], naming the file.
    pub fn load(device: &[PathBuf], software: &[PathBuf], intermediates: &[PathBuf]) -> Result<Self, RootsError> {
        let mut roots = Self::default();
        for (kind, paths) in [(Kind::Device, device), (Kind::Software, software)] {
            for path in paths {
                roots.anchors.extend(read(path)?.into_iter().map(|root| (kind, root)));
            }
        }
        for path in intermediates {
            roots.intermediates.extend(read(path)?);
        }
        Ok(roots)
    }

    /// How many roots there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.anchors.len()
    }

    /// Whether there is no root: no certificate is believed then.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.anchors.is_empty()
    }

    /// Checks the certificate of `ek`, with intermediates that came along.
    ///
    /// # Errors
    /// [`EkError`].
    pub fn check(
        &self,
        ek: &StorageKey,
        certificate: Option<&[u8]>,
        chain: &[Vec<u8>],
        now: TimeMs,
    ) -> Result<Vouched, EkError> {
        let form = |whose: &str| {
            let whose = whose.to_owned();
            |source| EkError::Form { whose, source }
        };
        let leaf = Certificate::parse(certificate.ok_or(EkError::Missing)?).map_err(form("the EK certificate"))?;
        if !leaf.is_for(&ek.key) {
            return Err(EkError::OtherKey);
        }
        check_leaf(&leaf, &ek.key, now)?;
        if chain.len() > MAX_CHAIN {
            return Err(EkError::TooMany);
        }
        let mut others = Vec::new();
        for der in chain {
            others.push(Certificate::parse(der).map_err(form("an intermediate that came with it"))?);
        }
        let mut search = Search { roots: self, others: &others, now, signatures: 0, failure: None };
        match search.climb(&leaf, 0) {
            Some((kind, root)) => {
                let model = leaf.model().map_err(form("the EK certificate"))?;
                let software = kind == Kind::Software || model.is_software();
                Ok(Vouched { root: root.subject_words(), software, model })
            }
            None if search.signatures >= MAX_SIGNATURES => Err(EkError::TooMany),
            None => Err(search.failure.unwrap_or_else(|| untrusted(&leaf))),
        }
    }
}

fn untrusted(certificate: &Certificate) -> EkError {
    EkError::Untrusted { whose: certificate.subject_words(), issuer: certificate.issuer_words() }
}

/// The search for a way from a certificate to a root.
struct Search<'a> {
    roots: &'a Roots,
    others: &'a [Certificate],
    now: TimeMs,
    signatures: u32,
    /// What was wrong with the way that led furthest.
    failure: Option<EkError>,
}

impl<'a> Search<'a> {
    /// The root that vouches for `certificate`, below which there are `depth` intermediates.
    fn climb(&mut self, certificate: &Certificate, depth: usize) -> Option<(Kind, &'a Certificate)> {
        let roots = self.roots;
        for (kind, root) in &roots.anchors {
            if root.subject == certificate.issuer && self.signed(certificate, root) {
                return Some((*kind, root));
            }
        }
        if depth >= MAX_DEPTH {
            return None;
        }
        let mut found = false;
        for issuer in self.others.iter().chain(&roots.intermediates) {
            if issuer.subject != certificate.issuer || issuer.subject == issuer.issuer {
                continue;
            }
            found = true;
            if !self.signed(certificate, issuer) {
                continue;
            }
            if let Err(failure) = check_issuer(issuer, depth, self.now) {
                self.failure = Some(failure);
                continue;
            }
            if let Some(root) = self.climb(issuer, depth + 1) {
                return Some(root);
            }
        }
        if !found && !matches!(self.failure, Some(EkError::Signature { .. })) {
            self.failure = Some(untrusted(certificate));
        }
        None
    }

    fn signed(&mut self, certificate: &Certificate, issuer: &Certificate) -> bool {
        if self.signatures >= MAX_SIGNATURES {
            return false;
        }
        self.signatures += 1;
        let signed = certificate.is_signed_by(issuer);
        if !signed {
            let (whose, issuer) = (certificate.subject_words(), issuer.subject_words());
            self.failure = Some(EkError::Signature { whose, issuer });
        }
        signed
    }
}

fn check_leaf(leaf: &Certificate, key: &StorageParameters, now: TimeMs) -> Result<(), EkError> {
    let whose = || "the endorsement key".to_owned();
    let form = |source| EkError::Form { whose: "the EK certificate".to_owned(), source };
    let usage = |why| Err(EkError::Usage { whose: whose(), why });
    if !leaf.is_valid_at(now) {
        return Err(EkError::Time { whose: whose(), time: leaf.time() });
    }
    if leaf.basic_constraints().map_err(form)?.is_some_and(|constraints| constraints.ca) {
        return usage("it is one of an authority");
    }
    if let Some(uses) = leaf.key_usage().map_err(form)? {
        let protects = match key {
            StorageParameters::Rsa(_) => uses.key_encipherment() || uses.data_encipherment(),
            StorageParameters::Ecc { .. } => uses.key_agreement() || uses.key_encipherment(),
        };
        if !protects || uses.key_cert_sign() || uses.crl_sign() {
            return usage("its key usage is another");
        }
    }
    let uses = leaf.extended_key_usage().map_err(form)?;
    if uses.is_some_and(|uses| !uses.0.contains(&EK_CERTIFICATE)) {
        return usage("its extended key usage is another");
    }
    Ok(())
}

fn check_issuer(issuer: &Certificate, below: usize, now: TimeMs) -> Result<(), EkError> {
    let whose = || issuer.subject_words();
    let form = |source| EkError::Form { whose: whose(), source };
    let usage = |why| Err(EkError::Usage { whose: whose(), why });
    if !issuer.is_valid_at(now) {
        return Err(EkError::Time { whose: whose(), time: issuer.time() });
    }
    if !issuer.is_v3() {
        return usage("an authority's certificate has version 3");
    }
    match issuer.basic_constraints().map_err(form)? {
        Some(constraints) if constraints.ca => {
            if constraints.path_len_constraint.is_some_and(|most| below > usize::from(most)) {
                return usage("there are more authorities under it than it allows");
            }
        }
        _ => return usage("it is not one of an authority"),
    }
    if issuer.key_usage().map_err(form)?.is_some_and(|uses| !uses.key_cert_sign()) {
        return usage("its key is not one that signs certificates");
    }
    let uses = issuer.extended_key_usage().map_err(form)?;
    if uses.is_some_and(|uses| !uses.0.iter().any(|id| *id == EK_CERTIFICATE || *id == ANY_USAGE)) {
        return usage("it may not issue for endorsement keys");
    }
    Ok(())
}

/// All certificates of a file, or of the certificate files of a folder.
fn read(path: &Path) -> Result<Vec<Certificate>, RootsError> {
    let file = |path: &Path| {
        let path = path.to_owned();
        |source| RootsError::File { path, source }
    };
    if path.is_dir() {
        let mut files = Vec::new();
        for entry in std::fs::read_dir(path).map_err(file(path))? {
            let entry = entry.map_err(file(path))?.path();
            let kind = entry.extension().map(|extension| extension.to_string_lossy().to_ascii_lowercase());
            if kind.is_some_and(|kind| matches!(kind.as_str(), "pem" | "crt" | "cer" | "der")) {
                files.push(entry);
            }
        }
        files.sort();
        let mut all = Vec::new();
        for path in files {
            all.extend(read_file(&path)?);
        }
        return Ok(all);
    }
    read_file(path)
}

fn read_file(path: &Path) -> Result<Vec<Certificate>, RootsError> {
    let content = |why: String| RootsError::Content { path: path.to_owned(), why };
    let bytes = std::fs::read(path).map_err(|source| RootsError::File { path: path.to_owned(), source })?;
    let mut ders = Vec::new();
    if bytes.starts_with(&[0x30]) {
        ders.push(bytes);
    } else {
        for der in CertificateDer::pem_slice_iter(&bytes) {
            ders.push(der.map_err(|e| content(e.to_string()))?.to_vec());
        }
    }
    if ders.is_empty() {
        return Err(content("it has no certificate".to_owned()));
    }
    ders.iter().map(|der| Certificate::parse(der).map_err(|e| content(e.to_string()))).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests;
