//! Events whose kind this version does not know.

use super::*;
use crate::cbor;

/// An event of the host with this kind and this body.
fn event(kind: &str, body: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0xa3, 0x00];
    bytes.extend_from_slice(&cbor::encode(&kind));
    bytes.extend_from_slice(&[0x01, 0x05, 0x04]);
    bytes.extend_from_slice(body);
    bytes
}

fn decode(bytes: &[u8]) -> Result<Event, crate::Malformed> {
    cbor::decode("event", bytes, 1000)
}

#[test]
fn an_unknown_kind_is_kept_with_its_bytes() {
    let body = [0xa1, 0x00, 0x82, 0x01, 0x41, 0xff];
    let read = decode(&event("vm-levitate", &body)).unwrap();
    assert_eq!(read.body, EventBody::Unknown { kind: "vm-levitate".into(), body: body.to_vec().into() });
    assert_eq!(read.body.kind(), "vm-levitate");
}

#[test]
fn an_unknown_body_is_a_canonical_map() {
    for body in [&[0x80][..], &[0x00], &[0xa1, 0x00, 0xff], &[0xa1, 0x18, 0x00, 0x00], &[0xbf, 0xff], &[0xa1, 0x00]] {
        assert!(decode(&event("x", body)).is_err(), "{body:02x?}");
    }
    assert!(decode(&event("x", &[0xa0])).is_ok());
}

#[test]
fn a_kind_is_a_word() {
    for kind in ["", "Vm-Start", "vm start", "vm\n", "\u{1b}[2J", &"x".repeat(MAX_KIND + 1)] {
        assert!(decode(&event(kind, &[0xa0])).is_err(), "{kind:?}");
    }
    assert!(decode(&event(&"x".repeat(MAX_KIND), &[0xa0])).is_ok());
}

#[test]
fn a_known_kind_with_unknown_keys_is_refused() {
    // vm-pause has one field, text under key 0.
    assert!(decode(&event("vm-pause", &[0xa1, 0x00, 0x60])).is_ok());
    assert!(decode(&event("vm-pause", &[0xa2, 0x00, 0x60, 0x01, 0x00])).is_err());
    assert!(decode(&event("vm-pause", &[0xa0])).is_err());
}

#[test]
fn vm_and_session_stand_together() {
    let half = [0xa4, 0x00, 0x61, b'x', 0x01, 0x05, 0x03, 0x48, 1, 2, 3, 4, 5, 6, 7, 8, 0x04, 0xa0];
    assert!(decode(&half).is_err());
}
