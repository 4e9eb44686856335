//! Evidence streams: what was read, written again, reads the same; what expands keeps to its limit.
#![no_main]

use libfuzzer_sys::fuzz_target;
use onequote_evidence::stream::{Evidence, Item, Pieces, compress, expand};

const LIMIT: usize = 1 << 20;

// The first byte chooses between a compressed and an expanded stream.
fuzz_target!(|data: &[u8]| {
    let Some((&choice, data)) = data.split_first() else { return };
    if choice % 2 == 1 {
        if let Ok(expanded) = expand(data, LIMIT) {
            assert!(expanded.len() <= LIMIT);
            let _ = Evidence::parse(&expanded);
        }
        return;
    }
    let Ok(evidence) = Evidence::parse(data) else { return };
    let mut pieces = Pieces::default();
    pieces.push_log(Item::Firmware, 0, &evidence.firmware);
    pieces.push_log(Item::HostIma, 0, &evidence.host_ima);
    pieces.push_log(Item::Records, 0, &evidence.records);
    pieces.push_dictionary(0, evidence.dictionary.clone());
    evidence.guests.iter().for_each(|guest| pieces.push_guest(guest));
    let again = pieces.stream(evidence.head.clone());
    assert_eq!(Evidence::parse(&again), Ok(evidence));
    let packed = compress(&again).expect("memory");
    assert_eq!(expand(&packed, again.len()), Ok(again));
});
