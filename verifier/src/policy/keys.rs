//! Keys that may sign files: read from PEM, found by their id in a signature.

use aws_lc_rs::{
    digest,
    signature::{
        ECDSA_P256_SHA256_ASN1, ECDSA_P256_SHA384_ASN1, ECDSA_P256_SHA512_ASN1, ECDSA_P384_SHA256_ASN1,
        ECDSA_P384_SHA384_ASN1, ECDSA_P384_SHA512_ASN1, ParsedPublicKey, RSA_PKCS1_2048_8192_SHA256,
        RSA_PKCS1_2048_8192_SHA384, RSA_PKCS1_2048_8192_SHA512, UnparsedPublicKey, VerificationAlgorithm,
    },
};
use rustls::pki_types::{CertificateDer, SubjectPublicKeyInfoDer, pem::PemObject as _};
use serde::{Deserialize, Deserializer};
use x509_cert::{
    Certificate,
    der::{Decode as _, Encode as _, oid::ObjectIdentifier},
    ext::pkix::SubjectKeyIdentifier,
    spki::SubjectPublicKeyInfoOwned,
};

use onequote_evidence::{
    digest::HashAlg,
    ima::{FileSignature, KeyId},
};

const RSA: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.113549.1.1.1");
const EC: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.10045.2.1");
const P256: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.10045.3.1.7");
const P384: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.3.132.0.34");

/// The shortest modulus of RSA in bytes.
const MIN_RSA: usize = 2048 / 8;

/// How a PEM text begins.
const PEM: &str = "-----BEGIN ";

/// A key that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// It is not PEM.
    #[error("not a public key or certificate in PEM")]
    Pem,
    /// What is in the PEM cannot be read.
    #[error("not a public key or certificate that can be read: {0}")]
    Der(#[from] x509_cert::der::Error),
    /// It is another kind of key.
    #[error("neither RSA of 2048 to 8192 bits, nor ECDSA on P-256 or P-384")]
    Kind,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Rsa,
    P256,
    P384,
}

/// A key that may sign.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SigningKey {
    kind: Kind,
    /// `SubjectPublicKeyInfo`, DER.
    info: Vec<u8>,
    ids: Vec<KeyId>,
}

impl SigningKey {
    /// Reads `PUBLIC KEY` or `CERTIFICATE` in PEM. Of a certificate only the key counts: its dates, its issuer and its
    /// purpose are for whoever trusts it to look at.
    ///
    /// # Errors
    /// [`KeyError`].
    pub fn from_pem(text: &str) -> Result<Self, KeyError> {
        if let Ok(der) = SubjectPublicKeyInfoDer::from_pem_slice(text.as_bytes()) {
            return Self::from_der(&der);
        }
        let der = CertificateDer::from_pem_slice(text.as_bytes()).map_err(|_| KeyError::Pem)?;
        let certificate = Certificate::from_der(&der)?;
        let certificate = certificate.tbs_certificate();
        let mut key = Self::from_der(&certificate.subject_public_key_info().to_der()?)?;
        // Signing tools and kernel go by the certificate's own identifier where it has one.
        let identifier = certificate.get_extension::<SubjectKeyIdentifier>()?;
        let id = identifier.and_then(|(_, identifier)| KeyId::of_identifier(identifier.0.as_bytes()));
        key.ids.extend(id.filter(|id| !key.ids.contains(id)));
        Ok(key)
    }

    /// Reads a `SubjectPublicKeyInfo` in DER.
    ///
    /// # Errors
    /// [`KeyError`].
    pub fn from_der(der: &[u8]) -> Result<Self, KeyError> {
        let info = SubjectPublicKeyInfoOwned::from_der(der)?;
        let curve = || info.algorithm.parameters.as_ref()?.decode_as::<ObjectIdentifier>().ok();
        let kind = match info.algorithm.oid {
            // A shorter key is not taken for any signature: say so now, by the modulus that is nearly all of it.
            RSA if info.subject_public_key.raw_bytes().len() > MIN_RSA => Kind::Rsa,
            EC if curve() == Some(P256) => Kind::P256,
            EC if curve() == Some(P384) => Kind::P384,
            _ => return Err(KeyError::Kind),
        };
        let ids = vec![KeyId::of(info.subject_public_key.raw_bytes())];
        let key = Self { kind, info: der.to_vec(), ids };
        key.parsed(HashAlg::Sha256).ok_or(KeyError::Kind)?;
        Ok(key)
    }

    /// The ids by which signatures name it.
    #[must_use]
    pub fn ids(&self) -> &[KeyId] {
        &self.ids
    }

    /// The key as PEM.
    #[must_use]
    pub fn pem(&self) -> String {
        use base64::{Engine as _, engine::general_purpose::STANDARD};
        let text = STANDARD.encode(&self.info);
        let lines: Vec<&str> = text.as_bytes().chunks(64).filter_map(|line| std::str::from_utf8(line).ok()).collect();
        format!("-----BEGIN PUBLIC KEY-----\n{}\n-----END PUBLIC KEY-----\n", lines.join("\n"))
    }

    /// Whether `signature` is this key's over `digest`. SHA-1 is not taken: whoever finds two files with one digest has
    /// one signature for both.
    #[must_use]
    pub fn signed(&self, alg: HashAlg, digest: &[u8], signature: &[u8]) -> bool {
        let engine = match alg {
            HashAlg::Sha1 => return false,
            HashAlg::Sha256 => &digest::SHA256,
            HashAlg::Sha384 => &digest::SHA384,
            HashAlg::Sha512 => &digest::SHA512,
        };
        // The digest comes from a measurement list that replays to a quoted register.
        let Ok(digest) = digest::Digest::import_less_safe(digest, engine) else { return false };
        self.parsed(alg).is_some_and(|key| key.verify_digest_sig(&digest, signature).is_ok())
    }

    /// Whether `signature` is this key's over the SHA-256 of `message`.
    #[must_use]
    pub fn signed_message(&self, message: &[u8], signature: &[u8]) -> bool {
        self.parsed(HashAlg::Sha256).is_some_and(|key| key.verify_sig(message, signature).is_ok())
    }

    fn parsed(&self, alg: HashAlg) -> Option<ParsedPublicKey> {
        let algorithm: &'static dyn VerificationAlgorithm = match (self.kind, alg) {
            (_, HashAlg::Sha1) => return None,
            (Kind::Rsa, HashAlg::Sha256) => &RSA_PKCS1_2048_8192_SHA256,
            (Kind::Rsa, HashAlg::Sha384) => &RSA_PKCS1_2048_8192_SHA384,
            (Kind::Rsa, HashAlg::Sha512) => &RSA_PKCS1_2048_8192_SHA512,
            (Kind::P256, HashAlg::Sha256) => &ECDSA_P256_SHA256_ASN1,
            (Kind::P256, HashAlg::Sha384) => &ECDSA_P256_SHA384_ASN1,
            (Kind::P256, HashAlg::Sha512) => &ECDSA_P256_SHA512_ASN1,
            (Kind::P384, HashAlg::Sha256) => &ECDSA_P384_SHA256_ASN1,
            (Kind::P384, HashAlg::Sha384) => &ECDSA_P384_SHA384_ASN1,
            (Kind::P384, HashAlg::Sha512) => &ECDSA_P384_SHA512_ASN1,
        };
        UnparsedPublicKey::new(algorithm, &self.info).parse().ok()
    }
}

/// A key of a rule: itself, or the file that it is in until the policy was loaded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KeyEntry {
    /// The name of a PEM file, relative to the policy's.
    File(String),
    /// The key.
    Key(SigningKey),
}

impl KeyEntry {
    /// The key, if it was loaded.
    #[must_use]
    pub fn key(&self) -> Option<&SigningKey> {
        match self {
            Self::File(_) => None,
            Self::Key(key) => Some(key),
        }
    }

    /// Whether a text is a key and not the name of a file.
    #[must_use]
    pub fn is_pem(text: &str) -> bool {
        text.trim_start().starts_with(PEM)
    }
}

impl<'de> Deserialize<'de> for KeyEntry {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged, expecting = "a PEM file's name, or a table of key and id")]
        enum Form {
            Plain(String),
            WithId(WithId),
        }
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct WithId {
            key: String,
            id: String,
        }
        let (text, id) = match Form::deserialize(d)? {
            Form::Plain(text) => (text, None),
            Form::WithId(WithId { key, id }) => {
                let mut bytes = [0; 4];
                hex::decode_to_slice(&id, &mut bytes).map_err(|_| {
                    serde::de::Error::custom(format_args!("{id:?} is not a key's id: eight hexadecimal digits"))
                })?;
                (key, Some(KeyId(bytes)))
            }
        };
        if !Self::is_pem(&text) {
            return Ok(Self::File(text));
        }
        let mut key = SigningKey::from_pem(&text).map_err(serde::de::Error::custom)?;
        key.ids.extend(id.filter(|id| !key.ids.contains(id)));
        Ok(Self::Key(key))
    }
}

/// What became of a file's signature.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Signed {
    /// It is a configured key's.
    Good,
    /// There is none.
    Missing,
    /// It cannot be checked from what a list has: of metadata.
    Uncheckable,
    /// It is by a key that is not configured.
    UnknownKey(KeyId),
    /// It is not that of the file by the key that it names, or not one at all: why.
    Bad(String),
}

/// Checks the signature of an entry against keys.
#[must_use]
pub fn check(keys: &[KeyEntry], fields: &onequote_evidence::ima::Fields<'_>) -> Signed {
    use onequote_evidence::ima::SignatureKind;
    if fields.signature.is_empty() {
        return Signed::Missing;
    }
    let signature = match FileSignature::parse(fields.signature) {
        Ok(signature) => signature,
        Err(e) => return Signed::Bad(e.to_string()),
    };
    if signature.kind == SignatureKind::Metadata {
        return Signed::Uncheckable;
    }
    let mut named = keys.iter().filter_map(KeyEntry::key).filter(|key| key.ids.contains(&signature.key)).peekable();
    if named.peek().is_none() {
        return Signed::UnknownKey(signature.key);
    }
    let Some((alg, digest)) = signature.signed_digest(fields) else {
        return Signed::Bad(format!("it is not over a {} digest of this kind", fields.digest_alg));
    };
    if alg == HashAlg::Sha1 {
        return Signed::Bad("it is over a SHA-1 digest".into());
    }
    // An id has four bytes only: two keys can share one.
    if named.any(|key| key.signed(alg, &digest, signature.signature)) {
        return Signed::Good;
    }
    Signed::Bad(format!("key {} did not sign this digest", signature.key))
}
