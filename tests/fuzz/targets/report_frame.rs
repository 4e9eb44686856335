//! Frames of reports, from both ends: what was read, written again, is the input, however it arrives.
#![no_main]

use libfuzzer_sys::fuzz_target;
use onequote_evidence::report::{Frame, Incoming, ProxyFrame, VerifierFrame, to_wire};

fuzz_target!(|data: &[u8]| {
    let Some((step, data)) = data.split_first() else { return };
    if let Ok(frame) = ProxyFrame::parse(data) {
        assert_eq!(to_wire(&frame)[4..], *data);
    }
    if let Ok(frame) = VerifierFrame::parse(data) {
        assert_eq!(to_wire(&frame)[4..], *data);
    }
    let (mut incoming, mut rest, mut read) = (Incoming::<ProxyFrame>::default(), data, Vec::new());
    while !rest.is_empty() {
        let space = incoming.space();
        let len = space.len().min(usize::from(*step).max(1)).min(rest.len());
        space[..len].copy_from_slice(&rest[..len]);
        rest = &rest[len..];
        match incoming.filled(len) {
            Ok(frame) => read.extend(frame.iter().flat_map(to_wire)),
            Err(_) => break,
        }
    }
    assert!(data.starts_with(&read));
});
