//! Every kind of event, written and read again.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod samples;

use onequote_evidence::{
    cbor,
    digest::HashAlg,
    event::{Event, EventBody, VmRef},
    id::{SessionId, TimeMs, VmId},
    record::Record,
};
use proptest::prelude::*;
use samples::{Gen, bodies};

fn events(seed: u64) -> Vec<Event> {
    let vm = VmRef { vm: VmId(uuid::Uuid::from_bytes([9; 16])), session: SessionId([1; 8]) };
    bodies(&mut Gen(seed))
        .into_iter()
        .enumerate()
        .map(|(i, body)| Event { time: TimeMs(seed), vm: (i % 2 == 1).then_some(vm), body })
        .collect()
}

#[test]
fn no_kind_is_forgotten() {
    let bodies = bodies(&mut Gen(1));
    let kinds: Vec<_> = bodies.iter().map(EventBody::kind).collect();
    assert_eq!(kinds, EventBody::KINDS);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn round_trip(seed in any::<u64>()) {
        let events = events(seed);
        for event in &events {
            let bytes = cbor::encode(event);
            prop_assert_eq!(&cbor::decode::<Event>("event", &bytes, 10_000).unwrap(), event);
        }
        prop_assert_eq!(Record::fitting(&events), events.len());
        let record = Record::new(0, 12, &HashAlg::ALL, &events);
        prop_assert_eq!(record.events().unwrap(), events);
    }

    #[test]
    fn truncation_is_told_apart(seed in any::<u64>(), cut in any::<prop::sample::Index>()) {
        for event in events(seed) {
            let bytes = cbor::encode(&event);
            let err = cbor::decode::<Event>("event", &bytes[..cut.index(bytes.len())], 10_000).unwrap_err();
            prop_assert!(err.is_truncated(), "{}: {}", event.body.kind(), err);
        }
    }

    #[test]
    fn any_change_is_seen(seed in any::<u64>(), at in any::<prop::sample::Index>(), bit in 0_u8..8) {
        for event in events(seed) {
            let mut bytes = cbor::encode(&event);
            let at = at.index(bytes.len());
            bytes[at] ^= 1 << bit;
            if let Ok(changed) = cbor::decode::<Event>("event", &bytes, 10_000) {
                prop_assert_ne!(&changed, &event);
                prop_assert_eq!(cbor::encode(&changed), bytes);
            }
        }
    }
}

#[cfg(feature = "json")]
#[test]
fn every_kind_has_a_json_form() {
    let events = events(7);
    let json = Record::new(3, 12, &[HashAlg::Sha256], &events).to_json().unwrap();
    let listed = json["content"]["events"].as_array().unwrap();
    for (event, json) in events.iter().zip(listed) {
        assert_eq!(json["event"], event.body.kind());
        assert!(json["body"].is_object(), "{json}");
        assert_eq!(json["vm"].is_string(), event.vm.is_some());
    }
}
