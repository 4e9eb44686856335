//! Frames from a guest: what was read, written again, is the input; entries are found without a copy in the same frames.
#![no_main]

use libfuzzer_sys::fuzz_target;
use onequote_evidence::guest_frame::{self, GuestFrame, body_len, to_wire};

fuzz_target!(|data: &[u8]| {
    let found = guest_frame::entries(data).map(|(first, entries)| (first, entries.to_vec()));
    let read = match GuestFrame::parse(data) {
        Ok(GuestFrame::Entries { first, entries }) => Some((first, entries.0)),
        _ => None,
    };
    assert_eq!(found, read);
    if let Ok(frame) = GuestFrame::parse(data) {
        let wire = to_wire(&frame);
        assert_eq!(wire[4..], *data);
        assert_eq!(body_len([wire[0], wire[1], wire[2], wire[3]]), Ok(data.len()));
    }
});
