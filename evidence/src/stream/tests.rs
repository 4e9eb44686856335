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

/// What a verifier gets who has the beginnings that `before` has.
fn rest(now: &Evidence, before: &Evidence) -> Vec<u8> {
    let have = Have::of(before);
    let mut out = Pieces::default();
    for (kind, log, known) in [
        (Item::Firmware as fn(_) -> Item, &now.firmware, have.firmware),
        (Item::HostIma, &now.host_ima, have.host_ima),
        (Item::Records, &now.records, have.records),
    ] {
        let had = Known::bytes_of(known, log);
        out.push_log(kind, had as u64, &log[had..]);
    }
    let entries: Vec<&[u8]> = now.dictionary.iter().map(|entry| entry.0.as_slice()).collect();
    let had = Known::entries_of(have.dictionary, &entries);
    out.push_dictionary(had as u64, now.dictionary[had..].to_vec());
    for list in &now.guests {
        let known = have.guest(list.vm, list.session, list.boot).filter(|_| had > 0);
        let first = Known::references_of(known, &list.entries);
        out.push_guest(&Guest { first: first as u64, entries: list.entries[first..].to_vec(), ..*list });
    }
    out.stream(now.head.clone())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    /// However much of each log was there before, and whether or not it is the same log.
    #[test]
    fn what_is_new_makes_it_whole(
        (now, _) in any_stream(),
        cuts in prop::array::uniform5(any::<prop::sample::Index>()),
        other in any::<[bool; 5]>(),
    ) {
        let mut before = now.clone();
        before.records.truncate(cuts[0].index(now.records.len() + 1));
        before.host_ima.truncate(cuts[1].index(now.host_ima.len() + 1));
        before.dictionary.truncate(cuts[2].index(now.dictionary.len() + 1));
        let entries = now.guests[0].entries.len();
        before.guests[0].entries.truncate(cuts[3].index(entries + 1));
        before.guests.truncate(cuts[4].index(now.guests.len() + 1));
        for (log, _) in [&mut before.records, &mut before.host_ima].into_iter().zip(other).filter(|(_, other)| *other) {
            log.iter_mut().take(1).for_each(|byte| *byte ^= 1);
        }
        for (entry, _) in before.dictionary.iter_mut().zip([other[2]]).filter(|(_, other)| *other) {
            entry.0[0] ^= 1;
        }
        for (list, _) in before.guests.iter_mut().zip([other[3], other[4]]).filter(|(_, other)| *other) {
            list.entries.iter_mut().take(1).for_each(|reference| *reference ^= 1);
        }
        let sent = rest(&now, &before);
        prop_assert_eq!(Evidence::parse_onto(&sent, &before).unwrap(), now.clone());
        // Who has nothing cannot use it, unless all of it was sent.
        if sent != now.stream() {
            prop_assert!(Evidence::parse(&sent).map_or(true, |read| read == now));
        }
    }
}

#[test]
fn nothing_is_sent_twice() {
    let mut before = Evidence {
        head: head(),
        firmware: vec![1; 50_000],
        host_ima: vec![2; 300_000],
        records: vec![3; 100_000],
        dictionary: (0..3000_u16).map(|n| Blob([&[0; 60][..], &n.to_le_bytes()].concat())).collect(),
        guests: vec![guest(0, 0, (0..3000).collect())],
    };
    let base = before.clone();
    assert!(rest(&base, &base).len() < 700, "{}", rest(&base, &base).len());
    before.host_ima.extend([4; 100]);
    before.dictionary.push(Blob(vec![7; 60]));
    before.guests[0].entries.push(3000);
    let sent = rest(&before, &base);
    assert!(sent.len() < 1000, "{}", sent.len());
    assert_eq!(Evidence::parse_onto(&sent, &base).unwrap(), before);
}

#[test]
fn wrong_offsets_are_refused() {
    let base = Evidence {
        head: head(),
        firmware: Vec::new(),
        host_ima: vec![2; 10],
        records: Vec::new(),
        dictionary: vec![Blob(vec![1; 60])],
        guests: vec![guest(0, 0, vec![0, 0])],
    };
    let read = |fill: &dyn Fn(&mut Pieces)| {
        let mut pieces = Pieces::default();
        fill(&mut pieces);
        Evidence::parse_onto(&pieces.stream(head()), &base)
    };
    for offset in [1, 9, 11, u64::MAX] {
        for bytes in [vec![], vec![1]] {
            let piece = Piece { offset, bytes: Blob(bytes) };
            assert!(read(&|w| w.push(&Item::HostIma(piece.clone()))).is_err(), "{offset}");
        }
    }
    // A log that was not there before has no end to go on from.
    assert!(read(&|w| w.push_log(Item::Records, 10, &[1])).is_err());
    assert!(read(&|w| w.push_dictionary(2, [])).is_err());
    // A log that is not mentioned is not there, whatever was there before.
    assert!(read(&|_| {}).unwrap().host_ima.is_empty());
    // It begins anew, and cannot then go on where the old one ended.
    let again = read(&|w| {
        w.push_log(Item::HostIma, 0, &[1]);
        w.push_log(Item::HostIma, 10, &[1]);
    });
    assert!(again.is_err());
    // A list that goes on means the dictionary that it went with.
    assert!(read(&|w| w.push(&Item::Guest(guest(0, 2, vec![0])))).is_err());
    let whole = read(&|w| {
        w.push_dictionary(1, []);
        w.push(&Item::Guest(guest(0, 2, vec![0])));
    });
    assert_eq!(whole.unwrap().guests, [guest(0, 0, vec![0, 0, 0])]);
    for (boot, first) in [(1, 2), (0, 1), (0, 3)] {
        let other = read(&|w| {
            w.push_dictionary(1, []);
            w.push(&Item::Guest(guest(boot, first, vec![0])));
        });
        assert!(other.is_err(), "boot {boot} from {first}");
    }
}
