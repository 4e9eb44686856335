//! The TPM's structures as a TPM writes them: for TPMs in software and for tests. A verifier only reads.

use super::{Attest, Curve, PcrSelection};

const TPM_GENERATED: u32 = 0xff54_4347;
const ST_ATTEST_QUOTE: u16 = 0x8018;

/// `TPM2B`: a size of two bytes, then that many. At most 64 KiB: everything here is far shorter.
#[must_use]
pub fn tpm2b(bytes: &[u8]) -> Vec<u8> {
    [&(bytes.len() as u16).to_be_bytes(), bytes].concat()
}

fn words(words: &[u16]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_be_bytes()).collect()
}

impl Attest {
    /// The bytes that a TPM signs.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut out = TPM_GENERATED.to_be_bytes().to_vec();
        out.extend(ST_ATTEST_QUOTE.to_be_bytes());
        out.extend(tpm2b(&self.qualified_signer));
        out.extend(tpm2b(&self.extra_data));
        out.extend(self.clock.clock.to_be_bytes());
        out.extend(self.clock.reset_count.to_be_bytes());
        out.extend(self.clock.restart_count.to_be_bytes());
        out.push(self.clock.safe.into());
        out.extend(self.firmware_version.to_be_bytes());
        self.selection.write(&mut out);
        out.extend(tpm2b(&self.pcr_digest));
        out
    }
}

impl PcrSelection {
    fn write(&self, out: &mut Vec<u8>) {
        out.extend((self.banks.len() as u32).to_be_bytes());
        for (alg, pcrs) in &self.banks {
            out.extend(alg.to_be_bytes());
            let bits = pcrs.iter().fold(0_u32, |bits, pcr| bits | 1 << pcr);
            out.push(3);
            out.extend(&bits.to_le_bytes()[..3]);
        }
    }
}

/// `TPMT_SIGNATURE` of ECDSA with SHA-256.
#[must_use]
pub fn ecdsa_signature(r: &[u8], s: &[u8]) -> Vec<u8> {
    [words(&[0x0018, 0x000b]), tpm2b(r), tpm2b(s)].concat()
}

/// `TPM2B_PUBLIC` of a P-256 key that signs with ECDSA and SHA-256; `attributes` is its `TPMA_OBJECT`.
#[must_use]
pub fn signing_public(attributes: u32, x: &[u8], y: &[u8]) -> Vec<u8> {
    let area = [
        words(&[0x0023, 0x000b]),
        attributes.to_be_bytes().to_vec(),
        tpm2b(&[]),
        words(&[0x0010, 0x0018, 0x000b, 0x0003, 0x0010]),
        tpm2b(x),
        tpm2b(y),
    ];
    tpm2b(&area.concat())
}

/// `TPM2B_PUBLIC` of an endorsement key after template L-2 or H-3 (TCG EK Credential Profile), with a policy digest of
/// our own.
#[must_use]
pub fn endorsement_public(curve: Curve, x: &[u8], y: &[u8]) -> Vec<u8> {
    let (hash, aes, id) = match curve {
        Curve::P256 => (0x000b, 128, 3),
        Curve::P384 => (0x000c, 256, 4),
    };
    let area = [
        words(&[0x0023, hash]),
        0x0003_00b2_u32.to_be_bytes().to_vec(),
        tpm2b(&[7; 32]),
        words(&[0x0006, aes, 0x0043, 0x0010, id, 0x0010]),
        tpm2b(x),
        tpm2b(y),
    ];
    tpm2b(&area.concat())
}
