//! Public areas, of signing keys and of storage keys: the name is over all of the area.
#![no_main]

use libfuzzer_sys::fuzz_target;
use onequote_evidence::tpm::{KeyParameters, Public, SigScheme, StorageKey};

fuzz_target!(|data: &[u8]| {
    if let Ok(key) = StorageKey::parse(data) {
        let name = [key.name_alg.tpm_id().to_be_bytes().as_slice(), &key.name_alg.hash(&data[2..])].concat();
        assert_eq!(key.name(), name);
        assert!(matches!(key.aes_bits, 128 | 256));
        let _ = key.attributes.ek_defect();
    }
    let Ok(public) = Public::parse(data) else { return };
    assert_eq!(usize::from(u16::from_be_bytes([data[0], data[1]])), data.len() - 2);
    let name = [public.name_alg.tpm_id().to_be_bytes().as_slice(), &public.name_alg.hash(&data[2..])].concat();
    assert_eq!(public.name(), name);
    assert_eq!(data[6..10], public.attributes.0.to_be_bytes());
    match &public.key {
        KeyParameters::Ecc(_) => assert!(matches!(public.scheme, SigScheme::Ecdsa(_))),
        KeyParameters::Rsa(rsa) => {
            assert!(rsa.exponent != 0 && rsa.modulus.len() >= 256);
            assert!(!matches!(public.scheme, SigScheme::Ecdsa(_)));
        }
    }
    let _ = public.attributes.ak_defect();
});
