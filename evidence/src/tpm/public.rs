//! `TPM2B_PUBLIC` of signing keys (TPM 2.0 Part 2, sections 12.2.4 and 12.2.5).

use super::area::{self, ALG_NULL, Head, Kind};
use crate::{Malformed, digest::HashAlg, reader::Reader};

const WHAT: &str = "TPM2B_PUBLIC";

const ECC_NIST_P256: u16 = 0x0003;

/// `TPMA_OBJECT` (TPM 2.0 Part 2, section 8.3), as far as an AK must have or must not have them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attributes(pub u32);

impl Attributes {
    /// The key never leaves its TPM.
    pub const FIXED_TPM: u32 = 1 << 1;
    /// The key never gets another parent.
    pub const FIXED_PARENT: u32 = 1 << 4;
    /// The TPM made the key itself.
    pub const SENSITIVE_DATA_ORIGIN: u32 = 1 << 5;
    /// The key signs only what the TPM made.
    pub const RESTRICTED: u32 = 1 << 16;
    /// The key decrypts.
    pub const DECRYPT: u32 = 1 << 17;
    /// The key signs.
    pub const SIGN: u32 = 1 << 18;

    /// What an endorsement key lacks or has too much: `None` when it is a restricted decryption key that the TPM made
    /// and that stays in it.
    #[must_use]
    pub fn ek_defect(self) -> Option<&'static str> {
        if self.0 & Self::SIGN != 0 {
            return Some("sign is set");
        }
        let last = [(Self::RESTRICTED, "restricted is not set"), (Self::DECRYPT, "decrypt is not set")];
        self.lacks(&Self::STAYS).or_else(|| self.lacks(&last))
    }

    /// What an AK lacks or has too much to be believed: `None` when it is a restricted signing key that the TPM made
    /// and that stays in it.
    #[must_use]
    pub fn ak_defect(self) -> Option<&'static str> {
        if self.0 & Self::DECRYPT != 0 {
            return Some("decrypt is set");
        }
        let last = [(Self::RESTRICTED, "restricted is not set"), (Self::SIGN, "sign is not set")];
        self.lacks(&Self::STAYS).or_else(|| self.lacks(&last))
    }

    /// What a key has that its TPM made and that never leaves it.
    const STAYS: [(u32, &'static str); 3] = [
        (Self::FIXED_TPM, "fixedTPM is not set"),
        (Self::FIXED_PARENT, "fixedParent is not set"),
        (Self::SENSITIVE_DATA_ORIGIN, "sensitiveDataOrigin is not set"),
    ];

    fn lacks(self, must: &[(u32, &'static str)]) -> Option<&'static str> {
        must.iter().find(|(bit, _)| self.0 & bit == 0).map(|(_, why)| *why)
    }
}

/// A signing scheme with its hash.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SigScheme {
    /// `TPM_ALG_ECDSA`.
    Ecdsa(HashAlg),
    /// `TPM_ALG_RSASSA`.
    RsaSsa(HashAlg),
    /// `TPM_ALG_RSAPSS`.
    RsaPss(HashAlg),
}

/// A key's kind and public value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KeyParameters {
    /// `TPM_ALG_ECC` on NIST P-256.
    Ecc(EccPublic),
    /// `TPM_ALG_RSA`.
    Rsa(RsaPublic),
}

/// A P-256 point, big-endian coordinates of 32 bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EccPublic {
    /// The x coordinate.
    pub x: [u8; 32],
    /// The y coordinate.
    pub y: [u8; 32],
}

/// An RSA key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RsaPublic {
    /// The modulus, big-endian.
    pub modulus: Vec<u8>,
    /// The public exponent; never 0 (the TPM's 0 is read as 65537).
    pub exponent: u32,
}

/// A signing key's public area. Nothing ties it to a TPM but the caller's own knowledge.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Public {
    /// Hash of the key's name.
    pub name_alg: HashAlg,
    /// Its attributes.
    pub attributes: Attributes,
    /// The scheme that it must sign with.
    pub scheme: SigScheme,
    /// Kind and value.
    pub key: KeyParameters,
    /// The whole `TPMT_PUBLIC`.
    area: Vec<u8>,
}

impl Public {
    /// Reads a `TPM2B_PUBLIC` (u16 size, then the area) that fills `bytes`, as `tpm2_readpublic -f tss` writes it.
    ///
    /// # Errors
    /// [`Malformed`], also for a key that has no signing scheme or is of another kind.
    pub fn parse(bytes: &[u8]) -> Result<Self, Malformed> {
        let area = area::open(WHAT, bytes)?;
        let (Head { kind, name_alg, attributes }, mut r) = area::head(area)?;
        if r.u16_be()? != ALG_NULL {
            return Err(r.invalid("a signing key has no symmetric algorithm"));
        }
        let scheme = match r.u16_be()? {
            0x0018 => SigScheme::Ecdsa(area::hash(&mut r)?),
            0x0014 => SigScheme::RsaSsa(area::hash(&mut r)?),
            0x0016 => SigScheme::RsaPss(area::hash(&mut r)?),
            _ => return Err(r.invalid("unknown signing scheme, or none")),
        };
        let key = match kind {
            Kind::Ecc => KeyParameters::Ecc(ecc(&mut r)?),
            Kind::Rsa => KeyParameters::Rsa(area::rsa(&mut r)?),
        };
        r.end()?;
        if matches!(key, KeyParameters::Ecc(_)) != matches!(scheme, SigScheme::Ecdsa(_)) {
            return Err(Malformed::invalid("TPMT_PUBLIC", 0, "the scheme is not one of the key's kind"));
        }
        Ok(Self { name_alg, attributes, scheme, key, area: area.to_vec() })
    }

    /// The key's name: algorithm, big-endian, and digest of the public area (TPM 2.0 Part 1, section 16).
    #[must_use]
    pub fn name(&self) -> Vec<u8> {
        area::name(self.name_alg, &self.area)
    }
}

fn ecc(r: &mut Reader<'_>) -> Result<EccPublic, Malformed> {
    if r.u16_be()? != ECC_NIST_P256 {
        return Err(r.invalid("the curve is not NIST P-256"));
    }
    let [x, y] = area::point(r)?;
    Ok(EccPublic { x, y })
}
