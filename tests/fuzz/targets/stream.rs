//! Evidence streams: what was read, written again, reads the same; what expands keeps to its limit.
#![no_main]

use libfuzzer_sys::fuzz_target;
use onequote_evidence::stream::{Evidence, Item, Pieces, Reader, compress, expand};

const LIMIT: usize = 1 << 20;

// The first byte chooses between a compressed and an expanded stream; an expanded one may also be two, the second onto the first.
fuzz_target!(|data: &[u8]| {
    let Some((&choice, data)) = data.split_first() else { return };
    if choice % 2 == 1 {
        compressed(data);
        return;
    }
    onto_what_came_before(data);
    let Ok(evidence) = Evidence::parse(data) else { return };
    let mut pieces = Pieces::default();
    pieces.push_log(Item::Firmware, 0, &evidence.firmware);
    pieces.push_log(Item::HostIma, 0, &evidence.host_ima);
    pieces.push_log(Item::Records, 0, &evidence.records);
    pieces.push_dictionary(0, evidence.dictionary.clone());
    evidence.guests.iter().for_each(|guest| pieces.push_guest(guest));
    let again = pieces.stream(evidence.head.clone());
    assert_eq!(Evidence::parse(&again).as_ref(), Ok(&evidence));
    let packed = compress(&again).expect("memory");
    assert_eq!(expand(&packed, again.len()), Ok(again));
    assert_eq!(Evidence::read(Reader::open(packed.as_slice()).expect("a head"), None).expect("a stream"), evidence);
});

/// Both ways of reading a compressed stream see the same.
fn compressed(data: &[u8]) {
    let read = Reader::open(data).and_then(|reader| Evidence::read(reader, None)).ok();
    if let Ok(expanded) = expand(data, LIMIT) {
        assert!(expanded.len() <= LIMIT);
        assert_eq!(Evidence::parse(&expanded).ok(), read);
    }
}

/// A stream that goes on where another ended: whatever it says, what comes of it is whole.
fn onto_what_came_before(data: &[u8]) {
    let Some(cut) = data.first().map(|&cut| usize::from(cut)) else { return };
    let Some((first, second)) = data[1..].split_at_checked(cut * data.len() / 256) else { return };
    let Ok(before) = Evidence::parse(first) else { return };
    if let Ok(whole) = Evidence::parse_onto(second, &before) {
        assert_eq!(Evidence::parse(&whole.stream()), Ok(whole));
    }
}
