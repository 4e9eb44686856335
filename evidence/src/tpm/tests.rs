//! Round trips against writers of the specification's layout, truncation and mutation.

use proptest::prelude::*;

use super::{
    write::{ecdsa_signature, signing_public},
    *,
};
use crate::{
    digest::HashAlg,
    pcr::{Register, Registers},
};

fn any_attest() -> impl Strategy<Value = Attest> {
    (
        prop::collection::vec(any::<u8>(), 34),
        prop::collection::vec(any::<u8>(), 0..=64),
        any::<(u64, u32, u32, bool, u64)>(),
        prop::collection::btree_set(0_u8..24, 0..24),
        prop::collection::vec(any::<u8>(), 32),
    )
        .prop_map(
            |(qualified_signer, extra_data, (clock, reset_count, restart_count, safe, fw), pcrs, pcr_digest)| Attest {
                qualified_signer,
                extra_data,
                clock: ClockInfo { clock, reset_count, restart_count, safe },
                firmware_version: fw,
                selection: PcrSelection { banks: vec![(0x000b, pcrs)] },
                pcr_digest,
            },
        )
}

proptest! {
    #[test]
    fn attest_round_trip(attest in any_attest(), cut in any::<prop::sample::Index>()) {
        let bytes = attest.to_bytes();
        prop_assert_eq!(&Attest::parse(&bytes).unwrap(), &attest);
        prop_assert!(Attest::parse(&bytes[..cut.index(bytes.len())]).is_err());
        let longer = [bytes.as_slice(), &[0]].concat();
        prop_assert!(Attest::parse(&longer).is_err());
    }

    #[test]
    fn attest_any_change_is_seen(attest in any_attest(), at in any::<prop::sample::Index>(), bit in 0_u8..8) {
        let mut bytes = attest.to_bytes();
        let at = at.index(bytes.len());
        bytes[at] ^= 1 << bit;
        if let Ok(changed) = Attest::parse(&bytes) {
            prop_assert_ne!(changed, attest);
        }
    }

    #[test]
    fn rubbish_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = Attest::parse(&bytes);
        let _ = Signature::parse(&bytes);
        let _ = Public::parse(&bytes);
    }

    #[test]
    fn signature_round_trip(r in prop::collection::vec(any::<u8>(), 1..=32), s in prop::collection::vec(any::<u8>(), 1..=32)) {
        let bytes = ecdsa_signature(&r, &s);
        prop_assert_eq!(Signature::parse(&bytes).unwrap(), Signature::Ecdsa { hash: HashAlg::Sha256, r, s });
        prop_assert!(Signature::parse(&bytes[..bytes.len() - 1]).is_err());
    }
}

#[test]
fn public_of_an_ak() {
    let bytes = signing_public(0x0005_0072, &[1; 31], &[2; 32]);
    let public = Public::parse(&bytes).unwrap();
    let KeyParameters::Ecc(point) = &public.key else { panic!("an ECC key") };
    assert_eq!((point.x[0], point.x[1], point.y[0]), (0, 1, 2));
    assert_eq!(public.attributes.ak_defect(), None);
    assert_eq!(public.name(), [&[0, 0x0b][..], &HashAlg::Sha256.hash(&bytes[2..])].concat());
    for (bit, why) in
        [(1, "fixedTPM"), (4, "fixedParent"), (5, "sensitiveDataOrigin"), (16, "restricted"), (18, "sign")]
    {
        let defect = Attributes(0x0005_0072 & !(1 << bit)).ak_defect().unwrap();
        assert!(defect.starts_with(why), "{defect}");
    }
    assert!(Attributes(0x0007_0072).ak_defect().unwrap().starts_with("decrypt"));
}

#[test]
fn the_selection_must_be_exact() {
    let selection = PcrSelection::of(HashAlg::Sha256, &[0, 10, 12, 13]);
    let expected = |pcrs: &[u8]| pcrs.iter().map(|&pcr| Register { bank: HashAlg::Sha256, pcr }).collect();
    assert!(selection.is_exactly(&expected(&[0, 10, 12, 13])));
    assert!(!selection.is_exactly(&expected(&[0, 10, 12])));
    assert!(!selection.is_exactly(&expected(&[0, 10, 12, 13, 14])));
    assert!(!PcrSelection::of(HashAlg::Sha1, &[0, 10, 12, 13]).is_exactly(&expected(&[0, 10, 12, 13])));
    assert!(PcrSelection::of(HashAlg::Sha1, &[]).is_exactly(&expected(&[])));
}

#[test]
fn the_digest_covers_every_value_in_order() {
    let selection = PcrSelection::of(HashAlg::Sha256, &[0, 12]);
    let mut values = Registers::new();
    values.insert(Register { bank: HashAlg::Sha256, pcr: 0 }, vec![1; 32]);
    assert_eq!(selection.digest_sha256(&values), None);
    values.insert(Register { bank: HashAlg::Sha256, pcr: 12 }, vec![2; 32]);
    let whole = [[1; 32], [2; 32]].concat();
    assert_eq!(selection.digest_sha256(&values).unwrap().0.to_vec(), HashAlg::Sha256.hash(&whole));
}
