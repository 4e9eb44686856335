//! The templates of our keys. All are primary keys of the endorsement hierarchy: seed and template determine the key.

use tss_esapi::tss2_esys::TPM2B_PUBLIC;

use super::{
    error::Rc,
    esys::unmarshal_template,
    options::{AkKind, EkKind},
};

const ALG_RSA: u16 = 0x0001;
const ALG_AES: u16 = 0x0006;
const ALG_SHA256: u16 = 0x000B;
const ALG_SHA384: u16 = 0x000C;
const ALG_NULL: u16 = 0x0010;
const ALG_RSASSA: u16 = 0x0014;
const ALG_ECDSA: u16 = 0x0018;
const ALG_ECC: u16 = 0x0023;
const ALG_CFB: u16 = 0x0043;
const P256: u16 = 3;
const P384: u16 = 4;

/// fixedTPM, fixedParent, sensitiveDataOrigin, userWithAuth, noDA, restricted, sign.
const AK_ATTRIBUTES: u32 = 0x0005_0472;

/// fixedTPM, fixedParent, sensitiveDataOrigin, adminWithPolicy, restricted, decrypt.
const LOW_ATTRIBUTES: u32 = 0x0003_00B2;

/// The same and userWithAuth.
const HIGH_ATTRIBUTES: u32 = 0x0003_00F2;

/// `userWithAuth`: the empty password authorises the key's use, and no policy is needed.
const USER_WITH_AUTH: u32 = 1 << 6;

/// PolicyA and PolicyB (EK Credential Profile 2.5, B.6.2 to B.6.4).
const POLICY_A_SHA256: &str = "837197674484b3f81a90cc8d46a5d724fd52d76e06520b64f2a1da1b331469aa";
const POLICY_B_SHA256: &str = "ca3d0a99a2b93906f7a3342414efcfb3a385d44cd1fd459089d19b5071c0b7a0";
const POLICY_B_SHA384: &str =
    "b26e7d28d11a50bc53d882bcf5fd3a1a074148bb35d3b4e4cb1c0ad9bde419cacb47ba09699646150f9fc000f3f80e12";

impl EkKind {
    /// Every kind, in the order in which a TPM is asked for a certificate: the quick ones first.
    pub const ALL: [Self; 5] = [Self::EccP256, Self::EccP256High, Self::EccP384, Self::Rsa2048High, Self::Rsa2048];

    /// Where the certificate is in NV.
    pub(super) fn certificate_index(self) -> u32 {
        match self {
            Self::Rsa2048 => 0x01C0_0002,
            Self::EccP256 => 0x01C0_000A,
            Self::Rsa2048High => 0x01C0_0012,
            Self::EccP256High => 0x01C0_0014,
            Self::EccP384 => 0x01C0_0016,
        }
    }

    /// Where a template is in NV if it is not the usual one, and, in the low range, what fills its `unique`.
    pub(super) fn template_indices(self) -> (u32, Option<u32>) {
        match self {
            Self::Rsa2048 => (0x01C0_0004, Some(0x01C0_0003)),
            Self::EccP256 => (0x01C0_000C, Some(0x01C0_000B)),
            Self::Rsa2048High => (0x01C0_0013, None),
            Self::EccP256High => (0x01C0_0015, None),
            Self::EccP384 => (0x01C0_0017, None),
        }
    }

    /// The usual template. `nonce` is what fills its `unique`, from the left, in place of zeros.
    pub(super) fn template(self, nonce: &[u8]) -> Result<TPM2B_PUBLIC, Rc> {
        let hex = |text: &str| hex::decode(text).map_err(|_| Rc(7 << 16 | 17));
        let low = |size: usize| {
            let mut unique = vec![0; size];
            let used = nonce.len().min(size);
            unique[..used].copy_from_slice(&nonce[..used]);
            unique
        };
        let (hash, attributes, policy, aes) = match self {
            Self::Rsa2048 | Self::EccP256 => (ALG_SHA256, LOW_ATTRIBUTES, hex(POLICY_A_SHA256)?, 128),
            Self::Rsa2048High | Self::EccP256High => (ALG_SHA256, HIGH_ATTRIBUTES, hex(POLICY_B_SHA256)?, 128),
            Self::EccP384 => (ALG_SHA384, HIGH_ATTRIBUTES, hex(POLICY_B_SHA384)?, 256),
        };
        let symmetric = words(&[ALG_AES, aes, ALG_CFB]);
        let rest = match self {
            Self::Rsa2048 => rsa(&symmetric, ALG_NULL, None, &low(256)),
            Self::Rsa2048High => rsa(&symmetric, ALG_NULL, None, &[]),
            Self::EccP256 => ecc(&symmetric, ALG_NULL, None, P256, &low(32), &[0; 32]),
            Self::EccP256High => ecc(&symmetric, ALG_NULL, None, P256, &[], &[]),
            Self::EccP384 => ecc(&symmetric, ALG_NULL, None, P384, &[], &[]),
        };
        let kind = if matches!(self, Self::Rsa2048 | Self::Rsa2048High) { ALG_RSA } else { ALG_ECC };
        unmarshal_template(&public(kind, hash, attributes, &policy, &rest))
    }
}

/// A template of the low range (`TPMT_PUBLIC` of an RSA-2048 or P-256 storage key) whose `unique` a nonce fills from the
/// left; none when it is too short to be one.
pub(super) fn with_nonce(template: &[u8], nonce: &[u8]) -> Option<Vec<u8>> {
    let word = |at: usize| Some(u16::from_be_bytes([*template.get(at)?, *template.get(at + 1)?]));
    let is_rsa = word(0)? == ALG_RSA;
    // Kind, hash, attributes, policy; three words of AES, the scheme; and bits and exponent, or curve and KDF.
    let head = 10 + usize::from(word(8)?) + 8 + if is_rsa { 6 } else { 4 };
    let parts: &[usize] = if is_rsa { &[256] } else { &[32, 32] };
    let mut out = template.get(..head)?.to_vec();
    // A point's y stays zeros, as in the usual template.
    for (&size, nonce) in parts.iter().zip([nonce, &[]]) {
        let mut part = nonce[..nonce.len().min(size)].to_vec();
        part.resize(size, 0);
        out.extend(tpm2b(&part));
    }
    Some(out)
}

/// Whether a key is used with its empty password, and without a policy.
pub(super) fn user_with_auth(template: &TPM2B_PUBLIC) -> bool {
    template.publicArea.objectAttributes & USER_WITH_AUTH != 0
}

/// The attestation key: restricted to signing what the TPM itself made.
///
/// `noDA`: its empty password needs no protection against guessing, and without the flag a lock-out that another
/// program caused would stop quotes. Changing anything here changes every host's key.
pub(super) fn attestation_key(kind: AkKind) -> Result<TPM2B_PUBLIC, Rc> {
    let none = words(&[ALG_NULL]);
    let (kind, rest) = match kind {
        AkKind::EccP256 => (ALG_ECC, ecc(&none, ALG_ECDSA, Some(ALG_SHA256), P256, &[], &[])),
        AkKind::Rsa2048 => (ALG_RSA, rsa(&none, ALG_RSASSA, Some(ALG_SHA256), &[])),
    };
    unmarshal_template(&public(kind, ALG_SHA256, AK_ATTRIBUTES, &[], &rest))
}

/// `TPMT_PUBLIC` (TPM 2.0 Part 2, section 12.2.4).
fn public(kind: u16, hash: u16, attributes: u32, policy: &[u8], rest: &[u8]) -> Vec<u8> {
    [words(&[kind, hash]), attributes.to_be_bytes().to_vec(), tpm2b(policy), rest.to_vec()].concat()
}

fn rsa(symmetric: &[u8], scheme: u16, hash: Option<u16>, unique: &[u8]) -> Vec<u8> {
    let scheme = [Some(scheme), hash, Some(2048)].into_iter().flatten().collect::<Vec<_>>();
    [symmetric, &words(&scheme), &0_u32.to_be_bytes(), &tpm2b(unique)].concat()
}

fn ecc(symmetric: &[u8], scheme: u16, hash: Option<u16>, curve: u16, x: &[u8], y: &[u8]) -> Vec<u8> {
    let scheme = [Some(scheme), hash, Some(curve), Some(ALG_NULL)].into_iter().flatten().collect::<Vec<_>>();
    [symmetric, &words(&scheme), &tpm2b(x), &tpm2b(y)].concat()
}

fn words(words: &[u16]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_be_bytes()).collect()
}

/// At most 64 KiB: everything here is far shorter.
fn tpm2b(bytes: &[u8]) -> Vec<u8> {
    [&(bytes.len() as u16).to_be_bytes(), bytes].concat()
}
