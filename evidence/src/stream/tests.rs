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
        prop::collection::vec(prop::collection::vec(any::<u8>(), ima::MIN_ENTRY..60), 0..20),
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
        prop_assert_eq!(Evidence::parse(&bytes).unwrap(), evidence);
    }

    #[test]
    fn truncation_is_refused((_, bytes) in any_stream(), cut in any::<prop::sample::Index>()) {
        prop_assert!(Evidence::parse(&bytes[..cut.index(bytes.len())]).unwrap_err().is_truncated());
    }

    #[cfg(feature = "zstd")]
    #[test]
    fn compression((_, bytes) in any_stream(), cut in any::<prop::sample::Index>()) {
        let packed = compress(&bytes).unwrap();
        prop_assert_eq!(expand(&packed, MAX_EXPANDED).unwrap(), bytes);
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
        #[cfg(feature = "zstd")]
        let _ = expand(&bytes, 1000);
    }
}

#[cfg(feature = "zstd")]
#[test]
fn a_bomb_is_refused_at_the_limit() {
    let packed = compress(&vec![0; 10_000_000]).unwrap();
    assert!(packed.len() < 2000);
    assert_eq!(expand(&packed, 1_000_000).unwrap_err().kind, MalformedKind::TooLarge { limit: 1_000_000 });
}

#[cfg(feature = "zstd")]
#[test]
fn a_frame_that_wants_a_large_window_is_refused() {
    // Magic, descriptor without size and checksum, window descriptor, one empty last raw block.
    let frame = |window_log: u8| [0x28, 0xb5, 0x2f, 0xfd, 0x00, (window_log - 10) << 3, 0x01, 0x00, 0x00];
    assert_eq!(expand(&frame(23), 10).unwrap(), b"");
    assert!(expand(&frame(24), 10).is_err());
}

#[cfg(feature = "zstd")]
#[test]
fn a_large_stream_compresses_within_the_window() {
    let noise: Vec<u8> = (0_u32..10_000_000).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    assert_eq!(expand(&compress(&noise).unwrap(), noise.len()).unwrap(), noise);
}

#[cfg(feature = "zstd")]
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

#[test]
fn long_lists_are_cut_into_parts_and_put_together() {
    let dictionary: Vec<Blob> = (0_u32..9000).map(|i| Blob([i.to_le_bytes().as_slice(), &[7; 100]].concat())).collect();
    let refs: Vec<u32> = (0..200_000).map(|i| i % 9000).collect();
    let mut w = Pieces::default();
    w.push_dictionary(0, dictionary.clone());
    w.push_guest(&guest(0, 0, refs.clone()));
    w.push_guest(&guest(1, 0, vec![]));
    let bytes = w.stream(head());
    let (parts, items) = (Items { bytes: &bytes, offset: 0, count: 0, ended: false }, &mut Vec::new());
    items.extend(parts.map(|item| cbor::encode(&item.unwrap()).len()));
    assert!(items.len() > 8 && items.iter().all(|&len| len < 2 * PIECE_TARGET), "{items:?}");
    let read = Evidence::parse(&bytes).unwrap();
    assert_eq!(read.dictionary, dictionary);
    assert_eq!(read.guests, [guest(0, 0, refs), guest(1, 0, vec![])]);
}

#[test]
fn an_item_over_the_limit_is_refused() {
    let mut w = Pieces::default();
    w.push(&Item::Records(Piece { offset: 0, bytes: vec![0; MAX_ITEM].into() }));
    assert_eq!(Evidence::parse(&w.stream(head())).unwrap_err().kind, MalformedKind::TooLarge { limit: MAX_ITEM });
}

#[test]
fn what_cannot_be_an_entry_costs_no_memory() {
    for len in [0, ima::MIN_ENTRY - 1, ima::MAX_ENTRY + 1] {
        let mut w = Pieces::default();
        w.push(&Item::Dictionary(Dictionary { first: 0, entries: vec![vec![0; len].into()] }));
        assert!(Evidence::parse(&w.stream(head())).is_err());
    }
}

#[test]
fn nonce_and_binding_have_their_sizes() {
    for (nonce, binding, good) in
        [(16, 32, true), (32, 0, true), (15, 32, false), (33, 0, false), (16, 31, false), (16, 33, false)]
    {
        let head = Head { nonce: vec![1; nonce].into(), binding: vec![2; binding].into(), ..head() };
        assert_eq!(Evidence::parse(&Pieces::default().stream(head)).is_ok(), good, "{nonce} {binding}");
    }
}

#[test]
fn many_guests_are_read_in_little_time() {
    let mut w = Pieces::default();
    (0..50_000).for_each(|boot| w.push(&Item::Guest(guest(boot, 0, vec![]))));
    assert_eq!(Evidence::parse(&w.stream(head())).unwrap().guests.len(), 50_000);
}

#[test]
fn more_items_than_there_can_be_are_refused() {
    let piece = cbor::encode(&Item::Records(Piece { offset: 0, bytes: Blob::default() }));
    let mut bytes = cbor::encode(&Item::Head(head()));
    bytes.extend(piece.iter().copied().cycle().take(piece.len() * MAX_ITEMS as usize));
    assert_eq!(Evidence::parse(&bytes).unwrap_err().kind, MalformedKind::TooLarge { limit: MAX_ITEMS as usize });
}
