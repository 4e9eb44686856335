//! Logs: the records are the log, their events are their content, and replay takes or refuses each.
#![no_main]

use libfuzzer_sys::fuzz_target;
use onequote_evidence::{
    log::{LogReader, Replay},
    record::{Record, MAX_EVENTS},
};

fuzz_target!(|data: &[u8]| {
    let mut reader = LogReader::new(data, 0);
    let mut whole = Vec::new();
    let mut replay: Option<Replay> = None;
    for record in reader.by_ref().map_while(Result::ok) {
        whole.extend_from_slice(&record.to_bytes());
        let banks: Vec<_> = record.digests.keys().copied().collect();
        if let Ok(events) = record.events() {
            assert!((1..=MAX_EVENTS).contains(&events.len()));
            assert_eq!(Record::fitting(&events), events.len());
            let again = Record::new(record.recnum, record.pcr, &banks, &events);
            assert_eq!(again.content, record.content);
            assert_eq!(again == record, record.digests_match() || banks.is_empty());
            assert!(record.to_json().is_ok());
        }
        match &mut replay {
            None => replay = Replay::begin(&record).ok(),
            Some(replay) => {
                let before = replay.clone();
                match replay.apply(&record) {
                    Ok(()) => assert_ne!(replay.registers(), before.registers()),
                    Err(_) => assert_eq!(*replay, before),
                }
            }
        }
    }
    assert_eq!(reader.offset(), whole.len());
    assert_eq!(data[..whole.len()], whole);
});
