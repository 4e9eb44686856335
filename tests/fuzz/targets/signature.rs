//! Signatures: what was read, written again, is the input.
#![no_main]

use libfuzzer_sys::fuzz_target;
use onequote_evidence::tpm::Signature;

fuzz_target!(|data: &[u8]| {
    let Ok(signature) = Signature::parse(data) else { return };
    let (scheme, hash, parts) = match &signature {
        Signature::Ecdsa { hash, r, s } => (0x0018_u16, hash, vec![r, s]),
        Signature::RsaSsa { hash, sig } => (0x0014, hash, vec![sig]),
        Signature::RsaPss { hash, sig } => (0x0016, hash, vec![sig]),
    };
    let mut out = [scheme.to_be_bytes(), hash.tpm_id().to_be_bytes()].concat();
    for part in parts {
        out.extend_from_slice(&(part.len() as u16).to_be_bytes());
        out.extend_from_slice(part);
    }
    assert_eq!(out, data);
});
