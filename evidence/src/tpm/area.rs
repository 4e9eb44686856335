//! What public areas of every kind have alike (TPM 2.0 Part 2, sections 12.2.4 and 12.2.5).

use super::{Attributes, RsaPublic};
use crate::{Malformed, digest::HashAlg, reader::Reader};

/// The longest public area that is read.
const MAX_PUBLIC: usize = 1024;

pub(super) const ALG_NULL: u16 = 0x0010;

/// Kind of a key.
#[derive(Debug, Clone, Copy)]
pub(super) enum Kind {
    /// `TPM_ALG_RSA`.
    Rsa,
    /// `TPM_ALG_ECC`.
    Ecc,
}

/// The beginning of a `TPMT_PUBLIC`, up to the policy.
pub(super) struct Head {
    pub(super) kind: Kind,
    pub(super) name_alg: HashAlg,
    pub(super) attributes: Attributes,
}

/// The area of a `TPM2B_PUBLIC` that fills `bytes`.
pub(super) fn open<'b>(what: &'static str, bytes: &'b [u8]) -> Result<&'b [u8], Malformed> {
    let mut outer = Reader::new(what, bytes);
    let area = outer.tpm2b(MAX_PUBLIC)?;
    outer.end()?;
    Ok(area)
}

/// Reads an area's head; what follows depends on what the key is for.
pub(super) fn head(area: &[u8]) -> Result<(Head, Reader<'_>), Malformed> {
    let mut r = Reader::new("TPMT_PUBLIC", area);
    let kind = match r.u16_be()? {
        0x0001 => Kind::Rsa,
        0x0023 => Kind::Ecc,
        _ => return Err(r.invalid("neither an ECC nor an RSA key")),
    };
    let name_alg = hash(&mut r)?;
    let attributes = Attributes(r.u32_be()?);
    r.tpm2b(64)?; // authPolicy
    Ok((Head { kind, name_alg, attributes }, r))
}

/// A key's name: algorithm, big-endian, and digest of the public area (TPM 2.0 Part 1, section 16).
pub(super) fn name(alg: HashAlg, area: &[u8]) -> Vec<u8> {
    [alg.tpm_id().to_be_bytes().as_slice(), &alg.hash(area)].concat()
}

pub(super) fn hash(r: &mut Reader<'_>) -> Result<HashAlg, Malformed> {
    HashAlg::from_tpm(r.u16_be()?).ok_or_else(|| r.invalid("unknown hash algorithm"))
}

pub(super) fn rsa(r: &mut Reader<'_>) -> Result<RsaPublic, Malformed> {
    let bits = r.u16_be()?;
    let exponent = match r.u32_be()? {
        0 => 65537,
        other => other,
    };
    let modulus = r.tpm2b(512)?.to_vec();
    if !matches!(bits, 2048 | 3072 | 4096) || modulus.len() != usize::from(bits / 8) {
        return Err(r.invalid("RSA modulus is not 2048, 3072 or 4096 bits"));
    }
    Ok(RsaPublic { modulus, exponent })
}

/// A point on a curve whose coordinates have `N` bytes: no KDF, and both coordinates.
pub(super) fn point<const N: usize>(r: &mut Reader<'_>) -> Result<[[u8; N]; 2], Malformed> {
    if r.u16_be()? != ALG_NULL {
        return Err(r.invalid("the key has a KDF"));
    }
    Ok([coordinate(r)?, coordinate(r)?])
}

/// A coordinate, whose leading zeros a TPM may leave out.
fn coordinate<const N: usize>(r: &mut Reader<'_>) -> Result<[u8; N], Malformed> {
    let bytes = r.tpm2b(N)?;
    let mut out = [0; N];
    out[N - bytes.len()..].copy_from_slice(bytes);
    Ok(out)
}
