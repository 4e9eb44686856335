//! Signatures of files: what was read is the input.
#![no_main]

use libfuzzer_sys::fuzz_target;
use onequote_evidence::ima::{FileSignature, SignatureKind};

fuzz_target!(|data: &[u8]| {
    let Ok(read) = FileSignature::parse(data) else { return };
    let kind = match read.kind {
        SignatureKind::File => 3,
        SignatureKind::Metadata => 5,
        SignatureKind::Verity => 6,
    };
    let size = u16::try_from(read.signature.len()).expect("a bounded size").to_be_bytes();
    let again = [&[kind, read.version, read.algorithm], &read.key.0[..], &size, read.signature].concat();
    assert_eq!(again, data);
});
