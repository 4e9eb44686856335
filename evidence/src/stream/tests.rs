//! Streams: round trip, gaps, truncation, bombs.

use proptest::prelude::*;

use std::io::Write as _;

use super::*;
use crate::{MalformedKind, digest::HashAlg, id::Sha256};

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

    #[test]
    fn compression((evidence, bytes) in any_stream(), cut in any::<prop::sample::Index>()) {
        let packed = compress(&bytes).unwrap();
        let cut = &packed[..cut.index(packed.len())];
        prop_assert_eq!(expand(&packed, MAX_EXPANDED).unwrap(), bytes);
        prop_assert!(expand(cut, MAX_EXPANDED).is_err());
        let read = |packed: &[u8]| Reader::open(packed).and_then(|reader| Evidence::read(reader, None));
        prop_assert_eq!(read(&packed).unwrap(), evidence.clone());
        prop_assert!(matches!(read(cut), Err(ReadError::Malformed(e)) if e.is_truncated()));
        prop_assert_eq!(read(&evidence.to_bytes().unwrap()).unwrap(), evidence);
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
        let _ = Reader::open(bytes.as_slice()).map(|reader| reader.count());
        let _ = Reader::open(behind_an_answer(&packed(&bytes)).as_slice()).map(|reader| reader.count());
    }
}

/// A stream whose second frame is this.
fn behind_an_answer(frame: &[u8]) -> Vec<u8> {
    [head().split().0.to_frame().as_slice(), frame].concat()
}

fn packed(bytes: &[u8]) -> Vec<u8> {
    let mut packer = Packer::new(Vec::new());
    packer.write_all(bytes).unwrap();
    packer.finish().unwrap()
}

#[test]
fn a_bomb_is_refused_at_the_limit() {
    let stream = behind_an_answer(&packed(&vec![0; 10_000_000]));
    assert!(stream.len() < 2000);
    assert_eq!(expand(&stream, 1_000_000).unwrap_err().kind, MalformedKind::TooLarge { limit: 1_000_000 });
    // As a first frame it may be no longer than an answer.
    let limit = MAX_ANSWER_ITEM;
    assert_eq!(expand(&packed(&[0; 2000]), 1_000_000).unwrap_err().kind, MalformedKind::TooLarge { limit });
    let mut pieces = Pieces::begin(Packer::new(head().split().0.to_frame()), &head().split().1);
    (0..2 * MAX_EXPANDED / PIECE_TARGET)
        .for_each(|n| pieces.push_log(Item::Records, (n * PIECE_TARGET) as u64, &[0; PIECE_TARGET]));
    let stream = pieces.finish().unwrap().finish().unwrap();
    assert!(stream.len() < 1_000_000);
    let mut reader = Reader::open(stream.as_slice()).unwrap();
    let refused = reader.by_ref().find_map(Result::err).unwrap();
    let ReadError::Malformed(refused) = refused else { panic!("{refused}") };
    assert_eq!(refused.kind, MalformedKind::TooLarge { limit: MAX_EXPANDED });
    assert!(reader.next().is_none());
}

#[test]
fn a_frame_that_wants_a_large_window_is_refused() {
    // Magic, descriptor without size and checksum, window descriptor, one empty last raw block.
    let frame = |window_log: u8| [0x28, 0xb5, 0x2f, 0xfd, 0x00, (window_log - 10) << 3, 0x01, 0x00, 0x00];
    let expanded = |window_log| expand(&behind_an_answer(&frame(window_log)), 1000);
    assert_eq!(expanded(23).unwrap(), cbor::encode(&Item::Answer(head().split().0)));
    assert!(expanded(24).is_err());
}

#[test]
fn a_large_stream_compresses_within_the_window() {
    let noise: Vec<u8> = (0_u32..10_000_000).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    let expanded = [cbor::encode(&Item::Answer(head().split().0)), noise].concat();
    assert_eq!(expand(&compress(&expanded).unwrap(), expanded.len()).unwrap(), expanded);
}

#[test]
fn what_follows_the_frames_is_refused() {
    let stream = Pieces::default().stream(head());
    let good = compress(&stream).unwrap();
    assert!(Evidence::read(Reader::open(good.as_slice()).unwrap(), None).is_ok());
    for more in [&[0][..], &good, &packed(b"")] {
        let bytes = [&good, more].concat();
        assert_eq!(expand(&bytes, 1000).unwrap_err().kind, MalformedKind::Trailing);
        let read = Evidence::read(Reader::open(bytes.as_slice()).unwrap(), None);
        let Err(ReadError::Malformed(e)) = read else { panic!("{read:?}") };
        assert_eq!(e.kind, MalformedKind::Trailing);
    }
    // In a frame: behind the end, behind the answer.
    let (answer, quote) = head().split();
    let (answer, quote) = (cbor::encode(&Item::Answer(answer)), cbor::encode(&Item::Quote(quote)));
    let end = cbor::encode(&Item::End(1));
    let frames = |first: &[&[u8]], second: &[&[u8]]| {
        let bytes = [packed(&first.concat()), packed(&second.concat())].concat();
        let reader = Reader::open(bytes.as_slice())?;
        Evidence::read(reader, None)
    };
    assert!(frames(&[&answer], &[&quote, &end]).is_ok());
    assert!(frames(&[&answer], &[&quote, &end, &[0]]).is_err());
    assert!(frames(&[&answer, &[0]], &[&quote, &end]).is_err());
    assert!(frames(&[&answer, &quote], &[&end]).is_err());
    assert!(frames(&[&answer], &[&answer, &quote, &end]).is_err());
    assert!(frames(&[&quote], &[&answer, &end]).is_err());
    assert!(frames(&[], &[&answer, &quote, &end]).is_err());
    assert!(frames(&[&answer], &[]).is_err());
}

/// Bytes that cannot be compressed.
fn noise(len: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()[3]
    };
    (0..len).map(|_| next()).collect()
}

/// A source that gives one byte at a time, and tells how many it gave.
struct Dribble<'a>(&'a [u8], &'a std::cell::Cell<usize>);

impl std::io::Read for Dribble<'_> {
    fn read(&mut self, out: &mut [u8]) -> std::io::Result<usize> {
        let Some((first, rest)) = self.0.split_first() else { return Ok(0) };
        out[0] = *first;
        self.0 = rest;
        self.1.set(self.1.get() + 1);
        Ok(1)
    }
}

#[test]
fn the_head_is_known_before_the_rest_is_taken() {
    let mut pieces = Pieces::default();
    let noise = noise(3_000_000);
    pieces.push_log(Item::Records, 0, &noise);
    let expanded = pieces.stream(head());
    let stream = compress(&expanded).unwrap();
    let given = std::cell::Cell::new(0);
    let reader = Reader::open(Dribble(&stream, &given)).unwrap();
    assert_eq!(*reader.head(), head());
    assert!(given.get() < 300_000, "one block of the frame, not {} bytes", given.get());
    assert_eq!(Evidence::read(reader, None).unwrap(), Evidence::parse(&expanded).unwrap());
    // Rubbish is seen early, and a source that fails is no malformed evidence.
    given.set(0);
    assert!(Reader::open(Dribble(&noise, &given)).is_err_and(|e| matches!(e, ReadError::Malformed(_))));
    assert!(given.get() < 100, "{}", given.get());
    struct Cut<'a>(&'a [u8]);
    impl std::io::Read for Cut<'_> {
        fn read(&mut self, out: &mut [u8]) -> std::io::Result<usize> {
            match self.0.read(out)? {
                0 => Err(std::io::ErrorKind::ConnectionReset.into()),
                len => Ok(len),
            }
        }
    }
    for len in [0, 10, 200, 200_000] {
        let read = Reader::open(Cut(&stream[..len])).and_then(|reader| Evidence::read(reader, None));
        assert!(matches!(read, Err(ReadError::Source(_))), "{len}");
    }
}

#[test]
fn a_writer_that_fails_makes_no_frame() {
    struct Full(usize);
    impl std::io::Write for Full {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0 = self.0.checked_sub(bytes.len()).ok_or(std::io::ErrorKind::StorageFull)?;
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let noise = noise(3_000_000);
    let made = |room| {
        let mut pieces = Pieces::begin(Packer::new(Full(room)), &head().split().1);
        pieces.push_log(Item::Records, 0, &noise);
        pieces.finish().and_then(Packer::finish)
    };
    assert!(made(0).is_err());
    assert!(made(1_000_000).is_err());
    assert!(made(4_000_000).is_ok());
}

#[test]
fn gaps_doubles_and_second_heads_are_refused() {
    let items: [&[Item]; 6] = [
        &[Item::Records(Piece { offset: 1, bytes: vec![1].into() })],
        &[Item::Dictionary(Dictionary { first: 1, entries: vec![] })],
        &[Item::Guest(guest(0, 3, vec![1]))],
        &[Item::Guest(guest(0, 0, vec![1])), Item::Guest(guest(1, 0, vec![])), Item::Guest(guest(0, 0, vec![1]))],
        &[Item::Answer(head().split().0)],
        &[Item::Quote(head().split().1)],
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
    let items = &mut Vec::new();
    let packed = compress(&bytes).unwrap();
    items.extend(Reader::open(packed.as_slice()).unwrap().map(|item| cbor::encode(&item.unwrap()).len()));
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
    let (answer, quote) = head().split();
    let mut bytes = [cbor::encode(&Item::Answer(answer)), cbor::encode(&Item::Quote(quote))].concat();
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
