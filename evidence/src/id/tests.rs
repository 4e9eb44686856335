//! Text and CBOR forms: what is written is read, and nothing else.

use proptest::prelude::*;

use super::*;
use crate::{
    cbor,
    digest::{FileDigest, FileDigestAlg, HashAlg},
};

fn text_round_trip<T: fmt::Display + FromStr + PartialEq + fmt::Debug>(value: &T) -> bool {
    value.to_string().parse::<T>().is_ok_and(|read| &read == value)
}

fn cbor_round_trip<T: for<'b> Decode<'b, ()> + Encode<()> + PartialEq>(value: &T) -> bool {
    cbor::decode::<T>("value", &cbor::encode(value), 1000).is_ok_and(|read| &read == value)
}

proptest! {
    #[test]
    fn fixed_sizes(a in any::<[u8; 32]>(), b in any::<[u8; 16]>(), c in any::<[u8; 8]>()) {
        prop_assert!(text_round_trip(&Sha256(a)) && cbor_round_trip(&Sha256(a)));
        prop_assert!(text_round_trip(&EpochId(b)) && cbor_round_trip(&EpochId(b)));
        prop_assert!(text_round_trip(&BootId(b)) && cbor_round_trip(&BootId(b)));
        prop_assert!(text_round_trip(&SessionId(c)) && cbor_round_trip(&SessionId(c)));
        let vm = VmId(uuid::Uuid::from_bytes(b));
        prop_assert!(text_round_trip(&vm) && cbor_round_trip(&vm));
        for alg in [FileDigestAlg::Sha256, FileDigestAlg::FsVerity] {
            let digest = FileDigest { alg, value: Sha256(a) };
            prop_assert!(text_round_trip(&digest) && cbor_round_trip(&digest));
        }
    }

    #[test]
    fn blobs(bytes in prop::collection::vec(any::<u8>(), 0..100)) {
        prop_assert!(text_round_trip(&Blob(bytes.clone())) && cbor_round_trip(&Blob(bytes)));
    }

    #[test]
    fn nonces(bytes in prop::collection::vec(any::<u8>(), 0..80)) {
        let len = bytes.len();
        let nonce = Nonce::new(bytes);
        prop_assert_eq!(nonce.is_some(), (Nonce::MIN..=Nonce::MAX).contains(&len));
        if let Some(nonce) = nonce {
            prop_assert!(text_round_trip(&nonce));
        }
    }

    #[test]
    fn host_ids(text in "[a-zA-Z0-9._ -]{0,70}") {
        if let Ok(id) = text.parse::<HostId>() {
            prop_assert_eq!(id.as_str(), &text);
            prop_assert!(text_round_trip(&id) && cbor_round_trip(&id));
        }
        // CBOR takes exactly what the text form takes.
        let from_cbor = cbor::decode::<HostId>("host id", &cbor::encode(&text), 1000);
        prop_assert_eq!(from_cbor.is_ok(), text.parse::<HostId>().is_ok());
    }

    #[test]
    fn text_is_never_a_panic(text in any::<String>()) {
        let _ = text.parse::<Sha256>();
        let _ = text.parse::<FileDigest>();
        let _ = text.parse::<HashAlg>();
        let _ = text.parse::<VmId>();
        let _ = text.parse::<Nonce>();
        let _ = text.parse::<HostId>();
        let _ = text.parse::<Blob>();
        let _ = BootId::from_kernel(&text);
    }
}

#[test]
fn host_id_examples() {
    let long = "a".repeat(63);
    for good in ["a", "host-1", "h1.example.org", "0", &long] {
        assert!(good.parse::<HostId>().is_ok(), "{good}");
    }
    let long = "a".repeat(64);
    for bad in ["", "-a", "a-", ".a", "a.", "a..b", "a.-b", "a-.b", "A", "a b", "a_b", "ä", "a/b", "..", &long] {
        assert!(bad.parse::<HostId>().is_err(), "{bad}");
    }
}

#[test]
fn wrong_sizes_are_refused() {
    assert!(cbor::decode::<Sha256>("value", &cbor::encode(&Blob(vec![0; 31])), 1000).is_err());
    assert!(cbor::decode::<Sha256>("value", &cbor::encode(&Blob(vec![0; 33])), 1000).is_err());
    assert!("00".repeat(31).parse::<Sha256>().is_err());
    assert!("sha512:00".parse::<FileDigest>().is_err());
    assert!(format!("sha256:{}", "00".repeat(33)).parse::<FileDigest>().is_err());
    assert!("sha256".parse::<FileDigest>().is_err());
}

#[test]
fn algorithms_by_name_and_number() {
    for alg in HashAlg::ALL {
        assert!(text_round_trip(&alg) && cbor_round_trip(&alg));
        assert_eq!(HashAlg::from_tpm(alg.tpm_id()), Some(alg));
        assert_eq!(alg.hash(b"").len(), alg.size());
        assert_eq!(alg.hash(b"onequote"), alg.hash_parts(&[b"one", b"", b"quote"]));
    }
    assert_eq!(HashAlg::from_tpm(0x12), None);
    assert!(HashAlg::ALL.is_sorted());
    assert!("SHA256".parse::<HashAlg>().is_err());
}

#[test]
fn sessions_differ_by_every_part() {
    let one = SessionId::of_process(BootId([1; 16]), 2, 3);
    assert_eq!(one, SessionId::of_process(BootId([1; 16]), 2, 3));
    assert_ne!(one, SessionId::of_process(BootId([2; 16]), 2, 3));
    assert_ne!(one, SessionId::of_process(BootId([1; 16]), 3, 3));
    assert_ne!(one, SessionId::of_process(BootId([1; 16]), 2, 4));
}

#[test]
fn derived_uuids() {
    let (a, b) = ("host-a".parse().unwrap(), "host-b".parse().unwrap());
    let id = VmId::from_name(&a, "web");
    assert_eq!(id.0.get_version_num(), 8);
    assert_eq!(id, VmId::from_name(&a, "web"));
    assert_ne!(id, VmId::from_name(&b, "web"));
    assert_ne!(id, VmId::from_name(&a, "web2"));
}

#[test]
fn kernel_boot_id() {
    let id = BootId::from_kernel("12345678-9abc-def0-1234-56789abcdef0\n").unwrap();
    assert_eq!(id.to_string(), "123456789abcdef0123456789abcdef0");
    assert_eq!(BootId::from_kernel("none"), None);
}

#[cfg(feature = "json")]
#[test]
fn json_is_the_text_form() {
    let digest = FileDigest::sha256(Sha256([0xab; 32]));
    let json = serde_json::to_string(&digest).unwrap();
    assert_eq!(json, format!("\"{digest}\""));
    assert_eq!(serde_json::from_str::<FileDigest>(&json).unwrap(), digest);
    assert!(serde_json::from_str::<HostId>("\"Not a host\"").is_err());
    assert!(serde_json::from_str::<Nonce>("\"00\"").is_err());
}
