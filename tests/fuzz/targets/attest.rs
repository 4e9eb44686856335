//! Quotes: what was read, written again, reads the same.
#![no_main]

use libfuzzer_sys::fuzz_target;
use onequote_evidence::{pcr::Registers, tpm::Attest};

fuzz_target!(|data: &[u8]| {
    let Ok(attest) = Attest::parse(data) else { return };
    let mut out = data[..6].to_vec();
    tpm2b(&mut out, &attest.qualified_signer);
    tpm2b(&mut out, &attest.extra_data);
    out.extend_from_slice(&attest.clock.clock.to_be_bytes());
    out.extend_from_slice(&attest.clock.reset_count.to_be_bytes());
    out.extend_from_slice(&attest.clock.restart_count.to_be_bytes());
    out.push(attest.clock.safe.into());
    out.extend_from_slice(&attest.firmware_version.to_be_bytes());
    out.extend_from_slice(&(attest.selection.banks.len() as u32).to_be_bytes());
    for (alg, pcrs) in &attest.selection.banks {
        out.extend_from_slice(&alg.to_be_bytes());
        out.push(4);
        let bits = pcrs.iter().fold(0_u32, |bits, pcr| bits | 1 << pcr);
        out.extend_from_slice(&bits.to_le_bytes());
    }
    tpm2b(&mut out, &attest.pcr_digest);
    // Not byte-equal: a selection of fewer registers may be written in fewer bytes.
    assert_eq!(Attest::parse(&out), Ok(attest.clone()));
    assert!(out.len() >= data.len());
    let _ = attest.selection.digest_sha256(&Registers::new());
});

fn tpm2b(out: &mut Vec<u8>, bytes: &[u8]) {
    out.extend_from_slice(&(bytes.len() as u16).to_be_bytes());
    out.extend_from_slice(bytes);
}
