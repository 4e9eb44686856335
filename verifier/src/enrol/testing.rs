//! Endorsement keys for tests.

use aws_lc_rs::{encoding::AsDer as _, rsa::PublicEncryptingKey};
pub(crate) use onequote_evidence::tpm::write::tpm2b;
use onequote_evidence::tpm::{Curve, write::endorsement_public};

fn words(words: &[u16]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_be_bytes()).collect()
}

/// `TPM2B_PUBLIC` after template L-2 or H-3, with this point (x and y).
pub(crate) fn ecc_ek(curve: Curve, point: &[u8]) -> Vec<u8> {
    let (x, y) = point.split_at(curve.size());
    endorsement_public(curve, x, y)
}

/// `TPM2B_PUBLIC` after template L-1.
pub(crate) fn rsa_ek(modulus: &[u8]) -> Vec<u8> {
    let area = [
        words(&[0x0001, 0x000b]),
        0x0003_00b2_u32.to_be_bytes().to_vec(),
        tpm2b(&[7; 32]),
        words(&[0x0006, 128, 0x0043, 0x0010, 2048]),
        0_u32.to_be_bytes().to_vec(),
        tpm2b(modulus),
    ];
    tpm2b(&area.concat())
}

/// The modulus of a 2048-bit key: what stands before the exponent 65537 at the end of its encoding.
pub(crate) fn rsa_modulus(key: &PublicEncryptingKey) -> Vec<u8> {
    let der = key.as_der().unwrap();
    let der: &[u8] = der.as_ref();
    assert_eq!(der[der.len() - 5..], [2, 3, 1, 0, 1]);
    der[der.len() - 5 - 256..der.len() - 5].to_vec()
}
