//! `TPMT_SIGNATURE` (TPM 2.0 Part 2, section 11.3.4).

use crate::{Malformed, digest::HashAlg, reader::Reader};

const WHAT: &str = "TPMT_SIGNATURE";

/// The longest RSA signature or ECC scalar that is read: RSA-4096.
const MAX_INTEGER: usize = 512;

/// A signature with the algorithms that it claims. They must be those of the key; see the verifier's check.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Signature {
    /// `TPM_ALG_ECDSA`: `r` and `s`, big-endian, as the TPM gave them (leading zeros may be missing).
    Ecdsa {
        /// Hash of the scheme.
        hash: HashAlg,
        /// The signature's r.
        r: Vec<u8>,
        /// The signature's s.
        s: Vec<u8>,
    },
    /// `TPM_ALG_RSASSA` (PKCS #1 v1.5).
    RsaSsa {
        /// Hash of the scheme.
        hash: HashAlg,
        /// The signature.
        sig: Vec<u8>,
    },
    /// `TPM_ALG_RSAPSS`.
    RsaPss {
        /// Hash of the scheme.
        hash: HashAlg,
        /// The signature.
        sig: Vec<u8>,
    },
}

impl Signature {
    /// Reads a signature that fills `bytes`.
    ///
    /// # Errors
    /// [`Malformed`], also for a scheme or hash that is not one of ours.
    pub fn parse(bytes: &[u8]) -> Result<Self, Malformed> {
        let mut r = Reader::new(WHAT, bytes);
        let scheme = r.u16_be()?;
        let Some(hash) = HashAlg::from_tpm(r.u16_be()?) else {
            return Err(r.invalid("unknown hash algorithm"));
        };
        let signature = match scheme {
            0x0018 => Self::Ecdsa { hash, r: r.tpm2b(MAX_INTEGER)?.to_vec(), s: r.tpm2b(MAX_INTEGER)?.to_vec() },
            0x0014 => Self::RsaSsa { hash, sig: r.tpm2b(MAX_INTEGER)?.to_vec() },
            0x0016 => Self::RsaPss { hash, sig: r.tpm2b(MAX_INTEGER)?.to_vec() },
            _ => return Err(Malformed::invalid(WHAT, 0, "unknown signature scheme")),
        };
        r.end()?;
        Ok(signature)
    }
}
