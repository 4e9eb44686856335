//! Step 2 and half of 3: whose word the quote is.
//!
//! The key comes from the enrolment, never from the evidence; scheme and hash come from the key, never from the
//! signature. Only then is the signed structure read.

use aws_lc_rs::signature::{
    ECDSA_P256_SHA256_FIXED, RSA_PKCS1_2048_8192_SHA256, RSA_PSS_2048_8192_SHA256, RsaPublicKeyComponents,
    UnparsedPublicKey,
};

use onequote_evidence::{
    digest::HashAlg,
    tpm::{Attest, KeyParameters, Public, SigScheme, Signature},
};

use crate::finding::{Code, Finding};

/// What the enrolled attestation key signed. Can be had only through [`check`].
#[derive(Debug, Clone)]
pub struct Quoted {
    attest: Attest,
}

impl Quoted {
    /// The TPM's word.
    #[must_use]
    pub fn attest(&self) -> &Attest {
        &self.attest
    }
}

/// Step 1, second half: whether a key can be an attestation key at all. The caller must know by enrolment that the
/// key is this host's.
///
/// # Errors
/// The finding.
pub fn check_key(ak: &Public) -> Result<(), Finding> {
    if let Some(defect) = ak.attributes.ak_defect() {
        return Err(Finding::new(Code::AkAttributes, "attestation key").actual(defect));
    }
    match ak.scheme {
        SigScheme::Ecdsa(HashAlg::Sha256) | SigScheme::RsaSsa(HashAlg::Sha256) | SigScheme::RsaPss(HashAlg::Sha256) => {
            Ok(())
        }
        other => {
            let finding = Finding::new(Code::AkAttributes, "attestation key");
            Err(finding.expected("a scheme with sha256").actual(scheme_name(other)))
        }
    }
}

/// Checks that `ak` signed `attest`, and reads it. The caller must trust `ak` to be this host's.
///
/// # Errors
/// The finding.
pub fn check(ak: &Public, attest: &[u8], signature: &[u8]) -> Result<Quoted, Finding> {
    let signature =
        Signature::parse(signature).map_err(|e| Finding::new(Code::SignatureMalformed, "signature").actual(e))?;
    let claimed = match &signature {
        Signature::Ecdsa { hash, .. } => SigScheme::Ecdsa(*hash),
        Signature::RsaSsa { hash, .. } => SigScheme::RsaSsa(*hash),
        Signature::RsaPss { hash, .. } => SigScheme::RsaPss(*hash),
    };
    if claimed != ak.scheme {
        let finding = Finding::new(Code::SignatureAlgorithm, "signature");
        return Err(finding.expected(scheme_name(ak.scheme)).actual(scheme_name(claimed)));
    }
    if !verifies(ak, attest, &signature) {
        let finding = Finding::new(Code::SignatureInvalid, "signature");
        return Err(finding.expected(format!("signed by the key {}", hex::encode(ak.name()))));
    }
    read(attest)
}

fn verifies(ak: &Public, message: &[u8], signature: &Signature) -> bool {
    match (&ak.key, signature) {
        (KeyParameters::Ecc(point), Signature::Ecdsa { r, s, .. }) => {
            let public = [&[4], point.x.as_slice(), &point.y].concat();
            let (Some(r), Some(s)) = (scalar(r), scalar(s)) else { return false };
            let fixed = [r, s].concat();
            UnparsedPublicKey::new(&ECDSA_P256_SHA256_FIXED, public).verify(message, &fixed).is_ok()
        }
        (KeyParameters::Rsa(key), Signature::RsaSsa { sig, .. }) => {
            let e = key.exponent.to_be_bytes();
            let key = RsaPublicKeyComponents { n: key.modulus.as_slice(), e: without_zeros(&e) };
            key.verify(&RSA_PKCS1_2048_8192_SHA256, message, sig).is_ok()
        }
        (KeyParameters::Rsa(key), Signature::RsaPss { sig, .. }) => {
            let e = key.exponent.to_be_bytes();
            let key = RsaPublicKeyComponents { n: key.modulus.as_slice(), e: without_zeros(&e) };
            key.verify(&RSA_PSS_2048_8192_SHA256, message, sig).is_ok()
        }
        _ => false,
    }
}

/// A scalar of an ECDSA signature in 32 bytes: a TPM may leave leading zeros out.
fn scalar(bytes: &[u8]) -> Option<[u8; 32]> {
    let mut out = [0; 32];
    out[32_usize.checked_sub(bytes.len())?..].copy_from_slice(bytes);
    Some(out)
}

fn without_zeros(bytes: &[u8]) -> &[u8] {
    let zeros = bytes.iter().take_while(|&&byte| byte == 0).count();
    &bytes[zeros..]
}

fn read(attest: &[u8]) -> Result<Quoted, Finding> {
    let item = "TPMS_ATTEST";
    if attest.get(..4).is_some_and(|magic| magic != [0xff, 0x54, 0x43, 0x47]) {
        let finding = Finding::new(Code::AttestMagic, item).expected("ff544347");
        return Err(finding.actual(hex::encode(&attest[..4])));
    }
    if attest.get(4..6).is_some_and(|kind| kind != [0x80, 0x18]) {
        return Err(Finding::new(Code::AttestType, item).expected("8018").actual(hex::encode(&attest[4..6])));
    }
    match Attest::parse(attest) {
        Ok(attest) => Ok(Quoted { attest }),
        Err(e) => Err(Finding::new(Code::AttestMalformed, item).actual(e)),
    }
}

fn scheme_name(scheme: SigScheme) -> String {
    match scheme {
        SigScheme::Ecdsa(hash) => format!("ECDSA with {hash}"),
        SigScheme::RsaSsa(hash) => format!("RSASSA with {hash}"),
        SigScheme::RsaPss(hash) => format!("RSAPSS with {hash}"),
    }
}
