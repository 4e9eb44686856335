//! The keys of a TPM that is a program: an attestation key that signs, an endorsement key that opens credentials. For
//! tests, benches and the fleet simulator; nothing that is deployed uses it (feature `software`).
//!
//! The TPM's side of credential activation is written here a second time, from the specification and not from the
//! verifier's code, so that each is a check of the other.

use aws_lc_rs::{
    agreement::{self, ECDH_P256, PrivateKey, UnparsedPublicKey},
    cipher::{AES_128, DecryptingKey, DecryptionContext, UnboundCipherKey},
    error::Unspecified,
    hmac,
    iv::FixedLength,
    rand::SystemRandom,
    signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair as _},
};

use super::{
    Attributes, Curve,
    write::{ecdsa_signature, endorsement_public, signing_public},
};
use crate::{digest::sha256, reader::Reader};

/// Attributes of an attestation key: restricted, signs, was made in its TPM and stays there.
pub const AK_ATTRIBUTES: u32 = Attributes::FIXED_TPM
    | Attributes::FIXED_PARENT
    | Attributes::SENSITIVE_DATA_ORIGIN
    | Attributes::RESTRICTED
    | Attributes::SIGN
    | 1 << 6;

/// A P-256 attestation key.
pub struct Ak(EcdsaKeyPair);

impl Ak {
    /// A new one.
    ///
    /// # Errors
    /// The random generator fails.
    pub fn generate() -> Result<Self, Unspecified> {
        EcdsaKeyPair::generate(&ECDSA_P256_SHA256_FIXED_SIGNING).map(Self)
    }

    /// Its `TPM2B_PUBLIC`.
    #[must_use]
    pub fn public(&self) -> Vec<u8> {
        self.public_with(AK_ATTRIBUTES)
    }

    /// The same with other attributes.
    #[must_use]
    pub fn public_with(&self, attributes: u32) -> Vec<u8> {
        let point = self.0.public_key().as_ref();
        signing_public(attributes, &point[1..33], &point[33..])
    }

    /// A `TPMT_SIGNATURE` over `message`.
    ///
    /// # Errors
    /// The random generator fails.
    pub fn sign(&self, message: &[u8]) -> Result<Vec<u8>, Unspecified> {
        let signature = self.0.sign(&SystemRandom::new(), message)?;
        let (r, s) = signature.as_ref().split_at(32);
        Ok(ecdsa_signature(r, s))
    }
}

/// A P-256 endorsement key.
pub struct Ek {
    key: PrivateKey,
    x: Vec<u8>,
    y: Vec<u8>,
}

impl Ek {
    /// A new one.
    ///
    /// # Errors
    /// The random generator fails.
    pub fn generate() -> Result<Self, Unspecified> {
        let key = PrivateKey::generate(&ECDH_P256)?;
        let public = key.compute_public_key()?;
        let (x, y) = public.as_ref().get(1..).and_then(|point| point.split_at_checked(32)).ok_or(Unspecified)?;
        let (x, y) = (x.to_vec(), y.to_vec());
        Ok(Self { key, x, y })
    }

    /// Its `TPM2B_PUBLIC`.
    #[must_use]
    pub fn public(&self) -> Vec<u8> {
        endorsement_public(Curve::P256, &self.x, &self.y)
    }

    /// `TPM2_ActivateCredential` (TPM 2.0 Part 3, section 12.5): the secret in `blob` (`TPM2B_ID_OBJECT`) under
    /// `encrypted_seed` (`TPM2B_ENCRYPTED_SECRET`), if both were made for this key and for the key named `name`.
    ///
    /// # Errors
    /// They were not, or are not of the right form.
    pub fn activate(&self, name: &[u8], blob: &[u8], encrypted_seed: &[u8]) -> Result<Vec<u8>, Unspecified> {
        let seed = self.seed(encrypted_seed)?;
        let mut outer = Reader::new("TPM2B_ID_OBJECT", blob);
        let object = outer.tpm2b(1024).map_err(|_| Unspecified)?;
        let mut reader = Reader::new("TPMS_ID_OBJECT", object);
        let integrity = reader.tpm2b(64).map_err(|_| Unspecified)?;
        let mut identity = object[2 + integrity.len()..].to_vec();
        let key = kdfa(&seed, b"INTEGRITY", &[], 256);
        hmac::verify(&hmac::Key::new(hmac::HMAC_SHA256, &key), &[identity.as_slice(), name].concat(), integrity)?;
        let key = kdfa(&seed, b"STORAGE", name, 128);
        let key = DecryptingKey::cfb128(UnboundCipherKey::new(&AES_128, &key)?)?;
        key.decrypt(&mut identity, DecryptionContext::Iv128(FixedLength::from([0; 16])))?;
        let mut reader = Reader::new("TPM2B_DIGEST", &identity);
        let secret = reader.tpm2b(64).map_err(|_| Unspecified)?.to_vec();
        reader.end().map_err(|_| Unspecified)?;
        Ok(secret)
    }

    /// Part 1, annex C.7.4: the seed that both sides compute by ECDH and `KDFe`.
    fn seed(&self, encrypted: &[u8]) -> Result<Vec<u8>, Unspecified> {
        let mut outer = Reader::new("TPM2B_ENCRYPTED_SECRET", encrypted);
        let mut point = Reader::new("TPMS_ECC_POINT", outer.tpm2b(256).map_err(|_| Unspecified)?);
        let x = point.tpm2b(32).map_err(|_| Unspecified)?;
        let y = point.tpm2b(32).map_err(|_| Unspecified)?;
        let theirs = UnparsedPublicKey::new(&ECDH_P256, [&[4], x, y].concat());
        agreement::agree(&self.key, theirs, Unspecified, |shared| {
            Ok(sha256(&[&1_u32.to_be_bytes(), shared, b"IDENTITY\0", x, &self.x]).0.to_vec())
        })
    }
}

/// `KDFa` with HMAC-SHA-256 (Part 1, section 11.4.10.2), for at most 256 bits: one block.
fn kdfa(key: &[u8], label: &[u8], context: &[u8], bits: u32) -> Vec<u8> {
    let message = [&1_u32.to_be_bytes(), label, &[0], context, &bits.to_be_bytes()].concat();
    let tag = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, key), &message);
    tag.as_ref()[..bits as usize / 8].to_vec()
}
