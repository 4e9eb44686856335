//! `TPM2_MakeCredential` in software (TPM 2.0 Part 1, section 24, with annexes B.10.4 and C.7.4): a secret that only one
//! TPM can open, and only while it holds the named key.
//!
//! The blob is encrypted to an endorsement key, and its integrity value covers the name of the attestation key. A TPM
//! gives the secret out by `TPM2_ActivateCredential` only if both keys are loaded in it. Whoever shows the secret
//! has therefore shown that attestation key and endorsement key are in one TPM, provided that the endorsement key's
//! attributes keep it there: check that first.

use aws_lc_rs::{
    agreement::{self, ECDH_P256, ECDH_P384, PrivateKey, UnparsedPublicKey},
    cipher::{AES_128, AES_256, EncryptingKey, EncryptionContext, UnboundCipherKey},
    error::Unspecified,
    hmac,
    iv::FixedLength,
    rsa::{
        OAEP_SHA1_MGF1SHA1, OAEP_SHA256_MGF1SHA256, OAEP_SHA384_MGF1SHA384, OAEP_SHA512_MGF1SHA512,
        OaepPublicEncryptingKey, PublicEncryptingKey,
    },
    signature::RsaPublicKeyComponents,
};
use onequote_evidence::{
    digest::HashAlg,
    tpm::{Curve, RsaPublic, StorageKey, StorageParameters},
};

use crate::source::Source;

/// The label of the seed's protection (Part 1, section 24.4), with its terminating zero.
const IDENTITY: &[u8] = b"IDENTITY\0";

/// A credential for one TPM, as `TPM2_ActivateCredential` takes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Credential {
    /// `TPM2B_ID_OBJECT`.
    pub blob: Vec<u8>,
    /// `TPM2B_ENCRYPTED_SECRET`.
    pub encrypted_seed: Vec<u8>,
}

/// No credential can be made for this endorsement key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum CredentialError {
    /// Its public value is not one of its kind: not on its curve, or no RSA modulus.
    #[error("the endorsement key's public value is not usable")]
    Key,
    /// The secret is longer than the hash of the key's name.
    #[error("the secret is longer than a digest of the endorsement key's hash")]
    Secret,
}

/// Makes a credential: `secret`, readable by the TPM that has `ek`'s private part, if it also holds the key named `name`
/// (`TPM2B_NAME` without its size). The caller has checked `ek`'s certificate and attributes.
///
/// # Errors
/// [`CredentialError`].
pub fn make(ek: &StorageKey, name: &[u8], secret: &[u8], source: &dyn Source) -> Result<Credential, CredentialError> {
    let hash = ek.name_alg;
    if secret.len() > hash.size() {
        return Err(CredentialError::Secret);
    }
    let (seed, encrypted_seed) = match &ek.key {
        StorageParameters::Rsa(key) => rsa_seed(key, hash, source),
        StorageParameters::Ecc { curve, x, y } => ecc_seed(*curve, x, y, hash),
    }
    .map_err(|Unspecified| CredentialError::Key)?;
    let mut identity = tpm2b(secret);
    let key = kdfa(hash, &seed, b"STORAGE", name, u32::from(ek.aes_bits));
    cfb_encrypt(&key, &mut identity).map_err(|Unspecified| CredentialError::Key)?;
    let integrity_key = kdfa(hash, &seed, b"INTEGRITY", &[], bits(hash));
    let integrity = mac(hash, &integrity_key, &[&identity, name]);
    Ok(Credential { blob: tpm2b(&[tpm2b(&integrity), identity].concat()), encrypted_seed: tpm2b(&encrypted_seed) })
}

/// Part 1, annex B.10.4: a random seed under OAEP.
fn rsa_seed(key: &RsaPublic, hash: HashAlg, source: &dyn Source) -> Result<(Vec<u8>, Vec<u8>), Unspecified> {
    let mut seed = vec![0; hash.size()];
    source.fill(&mut seed);
    let exponent = key.exponent.to_be_bytes();
    let zeros = exponent.iter().take_while(|&&byte| byte == 0).count();
    let parts = RsaPublicKeyComponents { n: key.modulus.as_slice(), e: &exponent[zeros..] };
    let public: PublicEncryptingKey = parts.try_into()?;
    let public = OaepPublicEncryptingKey::new(public)?;
    let algorithm = match hash {
        HashAlg::Sha1 => &OAEP_SHA1_MGF1SHA1,
        HashAlg::Sha256 => &OAEP_SHA256_MGF1SHA256,
        HashAlg::Sha384 => &OAEP_SHA384_MGF1SHA384,
        HashAlg::Sha512 => &OAEP_SHA512_MGF1SHA512,
    };
    let mut encrypted = vec![0; public.ciphertext_size()];
    let length = public.encrypt(algorithm, &seed, &mut encrypted, Some(IDENTITY))?.len();
    encrypted.truncate(length);
    Ok((seed, encrypted))
}

/// Part 1, annex C.7.4: a key of our own for this one time, and the seed from both by KDFe.
fn ecc_seed(curve: Curve, x: &[u8], y: &[u8], hash: HashAlg) -> Result<(Vec<u8>, Vec<u8>), Unspecified> {
    let algorithm = match curve {
        Curve::P256 => &ECDH_P256,
        Curve::P384 => &ECDH_P384,
    };
    let own = PrivateKey::generate(algorithm)?;
    let public = own.compute_public_key()?;
    // 04 ‖ x ‖ y.
    let (own_x, own_y) = public.as_ref().get(1..).and_then(|p| p.split_at_checked(curve.size())).ok_or(Unspecified)?;
    let theirs = UnparsedPublicKey::new(algorithm, [&[4], x, y].concat());
    let seed = agreement::agree(&own, theirs, Unspecified, |shared| Ok(kdfe(hash, shared, own_x, x)))?;
    Ok((seed, [tpm2b(own_x), tpm2b(own_y)].concat()))
}

/// KDFa (Part 1, section 11.4.10.2) with an empty `contextV`.
fn kdfa(hash: HashAlg, key: &[u8], label: &[u8], context: &[u8], bits: u32) -> Vec<u8> {
    derive(bits, |counter| mac(hash, key, &[&counter, label, &[0], context, &bits.to_be_bytes()]))
}

/// KDFe (Part 1, section 11.4.10.3) for as many bits as the hash has.
fn kdfe(hash: HashAlg, shared_x: &[u8], party_u: &[u8], party_v: &[u8]) -> Vec<u8> {
    derive(bits(hash), |counter| hash.hash_parts(&[&counter, shared_x, IDENTITY, party_u, party_v]))
}

fn derive(bits: u32, block: impl Fn([u8; 4]) -> Vec<u8>) -> Vec<u8> {
    let size = bits as usize / 8;
    let mut out = Vec::with_capacity(size + 64);
    for counter in 1_u32.. {
        if out.len() >= size {
            break;
        }
        out.extend(block(counter.to_be_bytes()));
    }
    out.truncate(size);
    out
}

fn bits(hash: HashAlg) -> u32 {
    // A digest has at most 64 bytes.
    hash.size() as u32 * 8
}

fn mac(hash: HashAlg, key: &[u8], parts: &[&[u8]]) -> Vec<u8> {
    let algorithm = match hash {
        HashAlg::Sha1 => hmac::HMAC_SHA1_FOR_LEGACY_USE_ONLY,
        HashAlg::Sha256 => hmac::HMAC_SHA256,
        HashAlg::Sha384 => hmac::HMAC_SHA384,
        HashAlg::Sha512 => hmac::HMAC_SHA512,
    };
    let mut mac = hmac::Context::with_key(&hmac::Key::new(algorithm, key));
    parts.iter().for_each(|part| mac.update(part));
    mac.sign().as_ref().to_vec()
}

/// AES-CFB with an initialisation vector of zeros: each seed, and with it each key, is used once.
fn cfb_encrypt(key: &[u8], in_out: &mut [u8]) -> Result<(), Unspecified> {
    let algorithm = if key.len() == 32 { &AES_256 } else { &AES_128 };
    let key = EncryptingKey::cfb128(UnboundCipherKey::new(algorithm, key)?)?;
    key.less_safe_encrypt(in_out, EncryptionContext::Iv128(FixedLength::from([0; 16])))?;
    Ok(())
}

/// At most 64 KiB: everything here is far shorter.
fn tpm2b(bytes: &[u8]) -> Vec<u8> {
    [&(bytes.len() as u16).to_be_bytes(), bytes].concat()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use aws_lc_rs::{
        cipher::{DecryptingKey, DecryptionContext},
        rsa::{KeySize, OaepPrivateDecryptingKey, PrivateDecryptingKey},
    };

    use onequote_evidence::tpm::software::Ek;

    use super::*;
    use crate::{enrol::testing, source::System};

    /// What a TPM does from the seed on: checks the integrity value, decrypts.
    fn open(ek: &StorageKey, seed: &[u8], name: &[u8], credential: &Credential) -> Option<Vec<u8>> {
        let hash = ek.name_alg;
        let (integrity, encrypted) = credential.blob[4..].split_at(hash.size());
        let key = kdfa(hash, seed, b"INTEGRITY", &[], bits(hash));
        (mac(hash, &key, &[encrypted, name]) == integrity).then(|| {
            let key = kdfa(hash, seed, b"STORAGE", name, ek.aes_bits.into());
            let algorithm = if key.len() == 32 { &AES_256 } else { &AES_128 };
            let key = DecryptingKey::cfb128(UnboundCipherKey::new(algorithm, &key).unwrap()).unwrap();
            let mut text = encrypted.to_vec();
            let zeros = DecryptionContext::Iv128(FixedLength::from([0; 16]));
            key.decrypt(&mut text, zeros).unwrap();
            assert_eq!(usize::from(u16::from_be_bytes([text[0], text[1]])), text.len() - 2);
            text.split_off(2)
        })
    }

    #[test]
    fn an_ecc_key_opens_its_credential_for_this_name_only() {
        for (curve, algorithm, hash) in
            [(Curve::P256, &ECDH_P256, HashAlg::Sha256), (Curve::P384, &ECDH_P384, HashAlg::Sha384)]
        {
            let private = PrivateKey::generate(algorithm).unwrap();
            let public = private.compute_public_key().unwrap();
            let ek = StorageKey::parse(&testing::ecc_ek(curve, &public.as_ref()[1..])).unwrap();
            assert_eq!(ek.name_alg, hash);
            let credential = make(&ek, b"the AK", &[7; 32], &System).unwrap();
            let (x, rest) = credential.encrypted_seed[4..].split_at(curve.size());
            let point = [&[4], x, &rest[2..]].concat();
            let StorageParameters::Ecc { x: own, .. } = &ek.key else { panic!() };
            let theirs = UnparsedPublicKey::new(algorithm, point);
            let seed = agreement::agree(&private, theirs, (), |shared| Ok(kdfe(hash, shared, x, own))).unwrap();
            assert_eq!(open(&ek, &seed, b"the AK", &credential).unwrap(), [7; 32]);
            assert_eq!(open(&ek, &seed, b"another AK", &credential), None);
        }
    }

    /// The TPM's side, written for itself.
    #[test]
    fn a_software_tpm_opens_its_credential() {
        let (own, other) = (Ek::generate().unwrap(), Ek::generate().unwrap());
        let ek = StorageKey::parse(&own.public()).unwrap();
        assert_eq!(ek.attributes.ek_defect(), None);
        let made = make(&ek, b"the AK", &[7; 32], &System).unwrap();
        assert_eq!(own.activate(b"the AK", &made.blob, &made.encrypted_seed).unwrap(), [7; 32]);
        assert!(own.activate(b"the aK", &made.blob, &made.encrypted_seed).is_err());
        assert!(other.activate(b"the AK", &made.blob, &made.encrypted_seed).is_err());
    }

    #[test]
    fn an_rsa_key_opens_its_credential() {
        let private = PrivateDecryptingKey::generate(KeySize::Rsa2048).unwrap();
        let ek = StorageKey::parse(&testing::rsa_ek(&testing::rsa_modulus(&private.public_key()))).unwrap();
        let credential = make(&ek, b"the AK", &[9; 20], &System).unwrap();
        let private = OaepPrivateDecryptingKey::new(private).unwrap();
        let mut seed = vec![0; private.min_output_size()];
        let encrypted = &credential.encrypted_seed[2..];
        let seed = private.decrypt(&OAEP_SHA256_MGF1SHA256, encrypted, &mut seed, Some(IDENTITY)).unwrap();
        assert_eq!(open(&ek, seed, b"the AK", &credential).unwrap(), [9; 20]);
        assert_eq!(open(&ek, seed, b"the aK", &credential), None);
    }

    #[test]
    fn what_cannot_be() {
        let ek = StorageKey::parse(&testing::ecc_ek(Curve::P256, &[1; 64])).unwrap();
        assert_eq!(make(&ek, b"x", &[0; 32], &System), Err(CredentialError::Key), "not on the curve");
        assert_eq!(make(&ek, b"x", &[0; 33], &System), Err(CredentialError::Secret));
    }
}
