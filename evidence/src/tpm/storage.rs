//! `TPM2B_PUBLIC` of storage keys, the kind that endorsement keys are (TPM 2.0 Part 2, section 12.2; TCG EK Credential
//! Profile for TPM Family 2.0, annex B).

use super::{
    Attributes, RsaPublic,
    area::{self, ALG_NULL, Head, Kind},
};
use crate::{Malformed, digest::HashAlg, reader::Reader};

const WHAT: &str = "TPM2B_PUBLIC (storage key)";

const ALG_AES: u16 = 0x0006;
const ALG_CFB: u16 = 0x0043;

/// A NIST curve of storage keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Curve {
    /// `TPM_ECC_NIST_P256`.
    P256,
    /// `TPM_ECC_NIST_P384`.
    P384,
}

impl Curve {
    /// Bytes of a coordinate.
    #[must_use]
    pub fn size(self) -> usize {
        match self {
            Self::P256 => 32,
            Self::P384 => 48,
        }
    }
}

/// A storage key's kind and public value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StorageParameters {
    /// `TPM_ALG_RSA`.
    Rsa(RsaPublic),
    /// `TPM_ALG_ECC`: coordinates, big-endian, each with all the bytes that the curve has.
    Ecc {
        /// The curve.
        curve: Curve,
        /// The x coordinate.
        x: Vec<u8>,
        /// The y coordinate.
        y: Vec<u8>,
    },
}

/// The public area of a restricted decryption key with AES-CFB. Nothing ties it to a TPM but the caller's own
/// knowledge: for an endorsement key, its certificate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StorageKey {
    /// Hash of the key's name, and of the key derivations and HMACs under it.
    pub name_alg: HashAlg,
    /// Its attributes.
    pub attributes: Attributes,
    /// Bits of the AES keys that it protects with: 128 or 256.
    pub aes_bits: u16,
    /// Kind and value.
    pub key: StorageParameters,
    /// The whole `TPMT_PUBLIC`.
    area: Vec<u8>,
}

impl StorageKey {
    /// Reads a `TPM2B_PUBLIC` that fills `bytes`.
    ///
    /// # Errors
    /// [`Malformed`], also for a key that signs, is not one of AES-CFB, or is on another curve.
    pub fn parse(bytes: &[u8]) -> Result<Self, Malformed> {
        let area = area::open(WHAT, bytes)?;
        let (Head { kind, name_alg, attributes }, mut r) = area::head(area)?;
        if r.u16_be()? != ALG_AES {
            return Err(r.invalid("a storage key's symmetric algorithm is AES"));
        }
        let aes_bits = r.u16_be()?;
        if !matches!(aes_bits, 128 | 256) || r.u16_be()? != ALG_CFB {
            return Err(r.invalid("a storage key's AES has 128 or 256 bits and the mode CFB"));
        }
        if r.u16_be()? != ALG_NULL {
            return Err(r.invalid("a storage key has no scheme"));
        }
        let key = match kind {
            Kind::Rsa => StorageParameters::Rsa(area::rsa(&mut r)?),
            Kind::Ecc => ecc(&mut r)?,
        };
        r.end()?;
        Ok(Self { name_alg, attributes, aes_bits, key, area: area.to_vec() })
    }

    /// The key's name; see [`super::Public::name`].
    #[must_use]
    pub fn name(&self) -> Vec<u8> {
        area::name(self.name_alg, &self.area)
    }
}

fn ecc(r: &mut Reader<'_>) -> Result<StorageParameters, Malformed> {
    let (curve, [x, y]) = match r.u16_be()? {
        0x0003 => (Curve::P256, area::point::<32>(r)?.map(Vec::from)),
        0x0004 => (Curve::P384, area::point::<48>(r)?.map(Vec::from)),
        _ => return Err(r.invalid("the curve is neither NIST P-256 nor P-384")),
    };
    Ok(StorageParameters::Ecc { curve, x, y })
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const ALG_RSA: u16 = 0x0001;
    const ALG_ECC: u16 = 0x0023;

    fn tpm2b(bytes: &[u8]) -> Vec<u8> {
        [&(bytes.len() as u16).to_be_bytes(), bytes].concat()
    }

    fn words(words: &[u16]) -> Vec<u8> {
        words.iter().flat_map(|word| word.to_be_bytes()).collect()
    }

    /// As template L-2 or H-3 has it.
    fn ecc_key(curve: u16, aes: u16, x: &[u8], y: &[u8]) -> Vec<u8> {
        let area = [
            words(&[ALG_ECC, 0x000b]),
            0x0003_00b2_u32.to_be_bytes().to_vec(),
            tpm2b(&[7; 32]),
            words(&[ALG_AES, aes, ALG_CFB, ALG_NULL, curve, ALG_NULL]),
            tpm2b(x),
            tpm2b(y),
        ];
        tpm2b(&area.concat())
    }

    fn rsa_key(modulus: &[u8]) -> Vec<u8> {
        let area = [
            words(&[ALG_RSA, 0x000b]),
            0x0003_00b2_u32.to_be_bytes().to_vec(),
            tpm2b(&[7; 32]),
            words(&[ALG_AES, 128, ALG_CFB, ALG_NULL, 2048]),
            0_u32.to_be_bytes().to_vec(),
            tpm2b(modulus),
        ];
        tpm2b(&area.concat())
    }

    #[test]
    fn keys_of_the_profile() {
        let bytes = ecc_key(4, 256, &[1; 47], &[2; 48]);
        let key = StorageKey::parse(&bytes).unwrap();
        let StorageParameters::Ecc { curve: Curve::P384, x, y } = &key.key else { panic!("{key:?}") };
        assert_eq!((x.len(), x[0], x[1], y.len()), (48, 0, 1, 48));
        assert_eq!((key.aes_bits, key.attributes.ek_defect()), (256, None));
        assert_eq!(key.name(), [&[0, 0x0b][..], &HashAlg::Sha256.hash(&bytes[2..])].concat());
        let key = StorageKey::parse(&rsa_key(&[9; 256])).unwrap();
        assert!(matches!(key.key, StorageParameters::Rsa(RsaPublic { exponent: 65537, .. })));
    }

    #[test]
    fn other_keys_are_refused() {
        for bytes in [
            ecc_key(5, 128, &[1; 32], &[1; 32]),
            ecc_key(3, 192, &[1; 32], &[1; 32]),
            ecc_key(3, 128, &[1; 33], &[1; 32]),
            rsa_key(&[9; 255]),
            rsa_key(&[9; 256])[..200].to_vec(),
            [rsa_key(&[9; 256]), vec![0]].concat(),
        ] {
            assert!(StorageKey::parse(&bytes).is_err(), "{bytes:02x?}");
        }
        for (bit, why) in [(1, "fixedTPM"), (4, "fixedParent"), (5, "sensitive"), (16, "restricted"), (17, "decrypt")] {
            let defect = Attributes(0x0003_00b2 & !(1 << bit)).ek_defect().unwrap();
            assert!(defect.starts_with(why), "{defect}");
        }
        assert_eq!(Attributes(0x0007_00b2).ek_defect(), Some("sign is set"));
    }

    proptest! {
        #[test]
        fn rubbish_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
            let _ = StorageKey::parse(&bytes);
        }

        #[test]
        fn any_change_is_seen(at in any::<prop::sample::Index>(), bit in 0_u8..8) {
            let whole = ecc_key(3, 128, &[1; 32], &[2; 32]);
            let mut changed = whole.clone();
            let at = at.index(changed.len());
            changed[at] ^= 1 << bit;
            if let Ok(key) = StorageKey::parse(&changed) {
                prop_assert_ne!(key.name(), StorageKey::parse(&whole).unwrap().name());
            }
        }
    }
}
