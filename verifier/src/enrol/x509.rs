//! One certificate as TPM vendors make them: read strictly as DER, leniently as X.509 where vendors are known to deviate.
//!
//! The signed part is kept as it came, byte for byte, since some vendors' encodings would not survive being written again.
//! Nothing in here trusts anything; [`super::ek`] decides.

use std::fmt::Write as _;

use aws_lc_rs::signature::{self, UnparsedPublicKey, VerificationAlgorithm};
use onequote_evidence::{
    id::TimeMs,
    tpm::{Curve, StorageParameters},
};
use x509_cert::{
    Version,
    certificate::{Raw, TbsCertificateInner},
    der::{
        Any, Decode as _, Encode as _, Reader as _, SliceReader, Tag, Tagged as _,
        asn1::{BitString, ObjectIdentifier},
        oid::AssociatedOid,
    },
    ext::pkix::{BasicConstraints, ExtendedKeyUsage, KeyUsage, SubjectAltName, name::GeneralName},
    name::Name,
    spki::{AlgorithmIdentifierOwned, SubjectPublicKeyInfoOwned},
};

const fn oid(text: &str) -> ObjectIdentifier {
    ObjectIdentifier::new_unwrap(text)
}

const RSA_ENCRYPTION: ObjectIdentifier = oid("1.2.840.113549.1.1.1");
const RSAES_OAEP: ObjectIdentifier = oid("1.2.840.113549.1.1.7");
const RSASSA_PSS: ObjectIdentifier = oid("1.2.840.113549.1.1.10");
const EC_PUBLIC_KEY: ObjectIdentifier = oid("1.2.840.10045.2.1");
const P256: ObjectIdentifier = oid("1.2.840.10045.3.1.7");
const P384: ObjectIdentifier = oid("1.3.132.0.34");
const P521: ObjectIdentifier = oid("1.3.132.0.35");

/// `tcg-at-tpmManufacturer`, `-Model`, `-Version` (TCG EK Credential Profile, section 3.1.2).
const TPM_MANUFACTURER: ObjectIdentifier = oid("2.23.133.2.1");
const TPM_MODEL: ObjectIdentifier = oid("2.23.133.2.2");
const TPM_VERSION: ObjectIdentifier = oid("2.23.133.2.3");

/// `tcg-kp-EKCertificate`.
pub(super) const EK_CERTIFICATE: ObjectIdentifier = oid("2.23.133.8.1");
/// `anyExtendedKeyUsage`.
pub(super) const ANY_USAGE: ObjectIdentifier = oid("2.5.29.37.0");

/// Critical extensions that are understood, or known from vendors and of no consequence for what an EK certificate
/// says; every other critical extension is refused.
const KNOWN_CRITICAL: [ObjectIdentifier; 8] = [
    BasicConstraints::OID,
    KeyUsage::OID,
    ExtendedKeyUsage::OID,
    SubjectAltName::OID,
    oid("2.5.29.9"),  // subjectDirectoryAttributes: the TPM's specification
    oid("2.5.29.32"), // certificatePolicies: none is required here
    oid("2.5.29.35"), // authorityKeyIdentifier
    oid("2.5.29.14"), // subjectKeyIdentifier
];

/// The most bytes of a certificate.
pub(super) const MAX_CERTIFICATE: usize = 8192;

/// What is wrong with the form of a certificate.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum X509Error {
    /// Not DER, not X.509, or too large.
    #[error("it is not an X.509 certificate: {0}")]
    Malformed(String),
    /// A critical extension that nobody here understands.
    #[error("it has the critical extension {0}, which is not known here")]
    Critical(String),
    /// An extension that is there twice.
    #[error("it has the extension {0} twice")]
    Twice(String),
}

/// A certificate, read.
#[derive(Debug, Clone)]
pub(super) struct Certificate {
    /// As it was signed.
    tbs_bytes: Vec<u8>,
    tbs: TbsCertificateInner<Raw>,
    algorithm: AlgorithmIdentifierOwned,
    signature: Vec<u8>,
    /// Encoded names: compared as bytes.
    pub(super) issuer: Vec<u8>,
    pub(super) subject: Vec<u8>,
}

/// What an EK certificate says of its TPM.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TpmModel {
    /// `tcg-at-tpmManufacturer`, such as `id:49465800`.
    pub manufacturer: Option<String>,
    /// `tcg-at-tpmModel`.
    pub model: Option<String>,
    /// `tcg-at-tpmVersion`.
    pub version: Option<String>,
}

impl TpmModel {
    /// Whether the certificate itself is one for a software TPM: those that swtpm's own tools make.
    pub(super) fn is_software(&self) -> bool {
        self.model.as_deref().is_some_and(|model| model.to_ascii_lowercase().contains("swtpm"))
    }

    /// In words, for people.
    #[must_use]
    pub fn words(&self) -> String {
        let parts = [&self.manufacturer, &self.model, &self.version];
        let words: Vec<_> = parts.into_iter().flatten().map(String::as_str).collect();
        if words.is_empty() { "unnamed".to_owned() } else { words.join(" ") }
    }
}

fn malformed(e: impl std::fmt::Display) -> X509Error {
    X509Error::Malformed(e.to_string())
}

impl Certificate {
    /// Reads a certificate that fills `der`.
    pub(super) fn parse(der: &[u8]) -> Result<Self, X509Error> {
        if der.len() > MAX_CERTIFICATE {
            return Err(X509Error::Malformed(format!("{} bytes; at most {MAX_CERTIFICATE} are read", der.len())));
        }
        let mut outer = SliceReader::new(der).map_err(malformed)?;
        let (tbs_bytes, algorithm, signature) = outer
            .sequence(|r| {
                let tbs = r.tlv_bytes()?.to_vec();
                let algorithm = AlgorithmIdentifierOwned::decode(r)?;
                Ok::<_, x509_cert::der::Error>((tbs, algorithm, BitString::decode(r)?))
            })
            .map_err(malformed)?;
        outer.finish().map_err(malformed)?;
        let tbs = TbsCertificateInner::<Raw>::from_der(&tbs_bytes).map_err(malformed)?;
        let signature = signature.as_bytes().ok_or_else(|| malformed("a signature of odd bits"))?.to_vec();
        let (issuer, subject) = (tbs.issuer().to_der().map_err(malformed)?, tbs.subject().to_der().map_err(malformed)?);
        let certificate = Self { tbs_bytes, tbs, algorithm, signature, issuer, subject };
        certificate.check_extensions()?;
        Ok(certificate)
    }

    fn check_extensions(&self) -> Result<(), X509Error> {
        let mut seen = Vec::new();
        for extension in self.tbs.extensions().into_iter().flatten() {
            let id = extension.extn_id;
            if seen.contains(&id) {
                return Err(X509Error::Twice(id.to_string()));
            }
            seen.push(id);
            if extension.critical && !KNOWN_CRITICAL.contains(&id) {
                return Err(X509Error::Critical(id.to_string()));
            }
        }
        Ok(())
    }

    fn extension<T: AssociatedOid + for<'a> x509_cert::der::Decode<'a>>(&self) -> Result<Option<T>, X509Error> {
        let extension = self.tbs.extensions().into_iter().flatten().find(|e| e.extn_id == T::OID);
        let Some(extension) = extension else { return Ok(None) };
        let value = T::from_der(extension.extn_value.as_bytes());
        value.map(Some).map_err(|_| malformed(format!("the extension {} cannot be read", T::OID)))
    }

    pub(super) fn basic_constraints(&self) -> Result<Option<BasicConstraints>, X509Error> {
        self.extension()
    }

    pub(super) fn key_usage(&self) -> Result<Option<KeyUsage>, X509Error> {
        self.extension()
    }

    pub(super) fn extended_key_usage(&self) -> Result<Option<ExtendedKeyUsage>, X509Error> {
        self.extension()
    }

    pub(super) fn is_v3(&self) -> bool {
        self.tbs.version() == Version::V3
    }

    /// The TPM's attributes in the subject's alternative name, wherever in it they stand; or in the subject, where some
    /// vendors put them.
    pub(super) fn model(&self) -> Result<TpmModel, X509Error> {
        let mut model = TpmModel::default();
        for name in self.extension::<SubjectAltName>()?.map(|san| san.0).unwrap_or_default() {
            if let GeneralName::DirectoryName(name) = name {
                model.take(&name);
            }
        }
        model.take(self.tbs.subject());
        Ok(model)
    }

    /// The serial number as it is encoded.
    pub(super) fn serial(&self) -> &[u8] {
        self.tbs.serial_number().as_bytes()
    }

    /// Whether `now` is in its time.
    pub(super) fn is_valid_at(&self, now: TimeMs) -> bool {
        let millis = |time: x509_cert::time::Time| time.to_unix_duration().as_millis();
        let validity = self.tbs.validity();
        (millis(validity.not_before)..=millis(validity.not_after)).contains(&u128::from(now.0))
    }

    /// Its time in words.
    pub(super) fn time(&self) -> String {
        format!("{} to {}", self.tbs.validity().not_before, self.tbs.validity().not_after)
    }

    /// The subject in words, with nothing that moves a cursor.
    pub(super) fn subject_words(&self) -> String {
        words(self.tbs.subject())
    }

    /// The issuer in words.
    pub(super) fn issuer_words(&self) -> String {
        words(self.tbs.issuer())
    }

    /// Whether its public key is that of `ek`: same kind, same value.
    pub(super) fn is_for(&self, ek: &StorageParameters) -> bool {
        let spki = self.tbs.subject_public_key_info();
        let Some(key) = spki.subject_public_key.as_bytes() else { return false };
        match ek {
            StorageParameters::Rsa(rsa) => {
                let kind = spki.algorithm.oid;
                let Some((modulus, exponent)) = rsa_numbers(key) else { return false };
                // An EK only decrypts by OAEP; some vendors say so in the kind of the key.
                (kind == RSA_ENCRYPTION || kind == RSAES_OAEP)
                    && modulus == rsa.modulus
                    && exponent == without_zeros(&rsa.exponent.to_be_bytes())
            }
            StorageParameters::Ecc { curve, x, y } => {
                let named = match curve {
                    Curve::P256 => P256,
                    Curve::P384 => P384,
                };
                spki.algorithm.oid == EC_PUBLIC_KEY
                    && curve_of(spki) == Some(named)
                    && key == [&[4], x.as_slice(), y].concat()
            }
        }
    }

    /// Whether `issuer`'s key signed this certificate.
    pub(super) fn is_signed_by(&self, issuer: &Self) -> bool {
        // The algorithm stands twice; only one of them is signed.
        let inner = self.tbs.signature();
        if inner.oid != self.algorithm.oid {
            return false;
        }
        let spki = issuer.tbs.subject_public_key_info();
        let Some(algorithm) = algorithm(&self.algorithm, spki) else { return false };
        let Some(key) = spki.subject_public_key.as_bytes() else { return false };
        UnparsedPublicKey::new(algorithm, key).verify(&self.tbs_bytes, &self.signature).is_ok()
    }
}

impl TpmModel {
    fn take(&mut self, name: &Name) {
        for attribute in name.iter() {
            let place = match attribute.oid {
                TPM_MANUFACTURER => &mut self.manufacturer,
                TPM_MODEL => &mut self.model,
                TPM_VERSION => &mut self.version,
                _ => continue,
            };
            place.get_or_insert_with(|| text(&attribute.value));
        }
    }
}

/// A string of any kind as printable ASCII, at most 64 characters of it.
fn text(value: &Any) -> String {
    let character = |&byte: &u8| if byte.is_ascii_graphic() || byte == b' ' { char::from(byte) } else { '?' };
    value.value().iter().take(64).map(character).collect()
}

fn words(name: &Name) -> String {
    let mut out = String::new();
    for attribute in name.iter().take(8) {
        let _ = write!(out, "{}{}", if out.is_empty() { "" } else { ", " }, text(&attribute.value));
    }
    if out.is_empty() { "(empty name)".to_owned() } else { out }
}

fn curve_of(spki: &SubjectPublicKeyInfoOwned) -> Option<ObjectIdentifier> {
    spki.algorithm.parameters.as_ref()?.decode_as().ok()
}

/// Modulus and exponent without leading zeros. A modulus whose zero byte in front was left out, which makes it a negative
/// number, is read as the number that was meant: it is only compared with the TPM's own.
fn rsa_numbers(key: &[u8]) -> Option<(Vec<u8>, Vec<u8>)> {
    let mut reader = SliceReader::new(key).ok()?;
    let numbers = reader.sequence(|r| Ok::<_, x509_cert::der::Error>((Any::decode(r)?, Any::decode(r)?))).ok()?;
    reader.finish().ok()?;
    let (n, e) = numbers;
    let integers = n.tag() == Tag::Integer && e.tag() == Tag::Integer;
    integers.then(|| (without_zeros(n.value()).to_vec(), without_zeros(e.value()).to_vec()))
}

fn without_zeros(bytes: &[u8]) -> &[u8] {
    let zeros = bytes.iter().take_while(|&&byte| byte == 0).count();
    &bytes[zeros..]
}

/// The way to check a signature: RSA with SHA-2 (parameters NULL or left out), RSA-PSS, ECDSA with SHA-2. SHA-1 is refused.
fn algorithm(
    algorithm: &AlgorithmIdentifierOwned,
    key: &SubjectPublicKeyInfoOwned,
) -> Option<&'static dyn VerificationAlgorithm> {
    let rsa = key.algorithm.oid == RSA_ENCRYPTION;
    let curve = if key.algorithm.oid == EC_PUBLIC_KEY { curve_of(key) } else { None };
    Some(match algorithm.oid.to_string().as_str() {
        "1.2.840.113549.1.1.11" if rsa => &signature::RSA_PKCS1_2048_8192_SHA256,
        "1.2.840.113549.1.1.12" if rsa => &signature::RSA_PKCS1_2048_8192_SHA384,
        "1.2.840.113549.1.1.13" if rsa => &signature::RSA_PKCS1_2048_8192_SHA512,
        _ if algorithm.oid == RSASSA_PSS && (rsa || key.algorithm.oid == RSASSA_PSS) => {
            match pss_hash(algorithm)?.to_string().as_str() {
                "2.16.840.1.101.3.4.2.1" => &signature::RSA_PSS_2048_8192_SHA256,
                "2.16.840.1.101.3.4.2.2" => &signature::RSA_PSS_2048_8192_SHA384,
                "2.16.840.1.101.3.4.2.3" => &signature::RSA_PSS_2048_8192_SHA512,
                _ => return None,
            }
        }
        "1.2.840.10045.4.3.2" if curve == Some(P256) => &signature::ECDSA_P256_SHA256_ASN1,
        "1.2.840.10045.4.3.2" if curve == Some(P384) => &signature::ECDSA_P384_SHA256_ASN1,
        "1.2.840.10045.4.3.3" if curve == Some(P256) => &signature::ECDSA_P256_SHA384_ASN1,
        "1.2.840.10045.4.3.3" if curve == Some(P384) => &signature::ECDSA_P384_SHA384_ASN1,
        "1.2.840.10045.4.3.3" if curve == Some(P521) => &signature::ECDSA_P521_SHA384_ASN1,
        "1.2.840.10045.4.3.4" if curve == Some(P384) => &signature::ECDSA_P384_SHA512_ASN1,
        "1.2.840.10045.4.3.4" if curve == Some(P521) => &signature::ECDSA_P521_SHA512_ASN1,
        _ => return None,
    })
}

/// The hash of `RSASSA-PSS-params` (RFC 4055, section 3.1). Salt and mask are the library's to check: it takes only a salt
/// as long as the hash, and the same hash for the mask.
fn pss_hash(algorithm: &AlgorithmIdentifierOwned) -> Option<ObjectIdentifier> {
    let parameters = algorithm.parameters.as_ref()?.value();
    let mut reader = SliceReader::new(parameters).ok()?;
    let first = Any::decode(&mut reader).ok()?;
    // hashAlgorithm [0]; left out it is SHA-1.
    if !matches!(first.tag(), Tag::ContextSpecific { number, .. } if number.value() == 0) {
        return None;
    }
    AlgorithmIdentifierOwned::from_der(first.value()).ok().map(|hash| hash.oid)
}
