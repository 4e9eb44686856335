//! Streams: round trip, gaps, truncation, bombs.

use proptest::prelude::*;

use super::*;
use crate::{digest::HashAlg, id::Sha256};

fn head() -> Head {
    Head {
        version: VERSION,
        statement: vec![1; 40].into(),
        attest: vec![2; 100].into(),
        signature: vec![3; 70].into(),
        path: vec![Step { from_left: true, hash: Sha256([4; 32]) }],
        registers: vec![RegisterValue { bank: HashAlg::Sha256, pcr: 10, value: vec![0; 32].into() }],
        nonce: vec![5; 16].into(),
        binding: vec![6; 32].into(),
    }
}

fn guest(boot: u32, first: u64, entries: Vec<u32>) -> Guest {
    Guest { vm: VmId(uuid::Uuid::from_bytes([1; 16])), session: SessionId([2; 8]), boot, first, entries }
}

fn any_stream() -> impl Strategy<Value = (Evidence, Vec<u8>)> {
    (
        prop::collection::vec(any::<u8>(), 0..2000),
        prop::collection::vec(any::<u8>(), 0..PIECE_TARGET * 2),
        prop::collection::vec(prop::collection::vec(any::<u8>(), 1..60), 0..20),
        prop::collection::vec(any::<u32>(), 0..50),
    )
        .prop_map(|(records, host_ima, dictionary, refs)| {
            let dictionary: Vec<Blob> = dictionary.into_iter().map(Blob).collect();
            let mut w = Pieces::default();
            w.push_log(Item::Records, 0, &records);
            w.push_log(Item::HostIma, 0, &host_ima);
            let half = dictionary.len() / 2;
            w.push(&Item::Dictionary(Dictionary { first: 0, entries: dictionary[..half].to_vec() }));
            w.push(&Item::Dictionary(Dictionary { first: half as u64, entries: dictionary[half..].to_vec() }));
            let half = refs.len() / 2;
            w.push(&Item::Guest(guest(0, 0, refs[..half].to_vec())));
            w.push(&Item::Guest(guest(0, half as u64, refs[half..].to_vec())));
            w.push(&Item::Guest(guest(1, 0, vec![1])));
            let evidence = Evidence {
                head: head(),
                firmware: Vec::new(),
                host_ima,
                records,
                dictionary,
                guests: vec![guest(0, 0, refs), guest(1, 0, vec![1])],
            };
            (evidence, w.stream(head()))
        })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn round_trip((evidence, bytes) in any_stream()) {
        let packed = compress(&bytes).unwrap();
        prop_assert_eq!(Evidence::parse(&expand(&packed, MAX_EXPANDED).unwrap()).unwrap(), evidence);
    }

    #[test]
    fn truncation_is_refused((_, bytes) in any_stream(), cut in any::<prop::sample::Index>()) {
        prop_assert!(Evidence::parse(&bytes[..cut.index(bytes.len())]).is_err());
        let packed = compress(&bytes).unwrap();
        prop_assert!(expand(&packed[..cut.index(packed.len())], MAX_EXPANDED).is_err());
    }

    #[test]
    fn any_change_is_seen((evidence, mut bytes) in any_stream(), at in any::<prop::sample::Index>(), bit in 0_u8..8) {
        let at = at.index(bytes.len());
        bytes[at] ^= 1 << bit;
        if let Ok(changed) = Evidence::parse(&bytes) {
            prop_assert_ne!(changed, evidence);
        }
    }

    #[test]
    fn rubbish_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        let _ = Evidence::parse(&bytes);
        let _ = expand(&bytes, 1000);
    }
}

#[test]
fn a_bomb_is_refused_at_the_limit() {
    let packed = compress(&vec![0; 10_000_000]).unwrap();
    assert!(packed.len() < 2000);
    assert_eq!(expand(&packed, 1_000_000).unwrap_err().kind, MalformedKind::TooLarge { limit: 1_000_000 });
}

#[test]
fn what_follows_the_frame_is_refused() {
    let packed = compress(b"evidence").unwrap();
    let doubled = [packed.as_slice(), &packed].concat();
    assert_eq!(expand(&doubled, 1000).unwrap_err().kind, MalformedKind::Trailing);
}

#[test]
fn gaps_doubles_and_second_heads_are_refused() {
    let items: [&[Item]; 5] = [
        &[Item::Records(Piece { offset: 1, bytes: vec![1].into() })],
        &[Item::Dictionary(Dictionary { first: 1, entries: vec![] })],
        &[Item::Guest(guest(0, 3, vec![1]))],
        &[Item::Guest(guest(0, 0, vec![1])), Item::Guest(guest(1, 0, vec![])), Item::Guest(guest(0, 0, vec![1]))],
        &[Item::Head(head())],
    ];
    for items in items {
        let mut w = Pieces::default();
        items.iter().for_each(|item| w.push(item));
        assert!(Evidence::parse(&w.stream(head())).is_err(), "{items:?}");
    }
}
