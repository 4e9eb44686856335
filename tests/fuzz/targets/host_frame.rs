//! Frames from a host: what was read, written again, is the input.
#![no_main]

use libfuzzer_sys::fuzz_target;
use onequote_evidence::guest_frame::{HostFrame, body_len, to_wire};

fuzz_target!(|data: &[u8]| {
    if let Ok(frame) = HostFrame::parse(data) {
        let wire = to_wire(&frame);
        assert_eq!(wire[4..], *data);
        assert_eq!(body_len([wire[0], wire[1], wire[2], wire[3]]), Ok(data.len()));
    }
});
