//! Frames in both directions: round trip, truncation, mutation, limits.

use proptest::prelude::*;

use super::*;

fn sha256() -> impl Strategy<Value = Sha256> {
    any::<[u8; 32]>().prop_map(Sha256)
}

fn guest_frame() -> impl Strategy<Value = GuestFrame> {
    prop_oneof![
        (any::<[u8; 16]>(), prop::sample::select(vec![20_u32, 32, 48, 64]), any::<u64>()).prop_map(
            |(id, hash_size, count)| GuestFrame::Hello { version: VERSION, boot_id: BootId(id), hash_size, count }
        ),
        (any::<u64>(), sha256()).prop_map(|(count, aggregate)| GuestFrame::Resume { count, aggregate }),
        (any::<u64>(), prop::collection::vec(any::<u8>(), 1..500))
            .prop_map(|(first, entries)| GuestFrame::Entries { first, entries: Blob(entries) }),
        any::<u64>().prop_map(|count| GuestFrame::Heartbeat { count }),
        any::<(u64, u64)>().prop_map(|(id, count)| GuestFrame::Collected { id, count }),
    ]
}

fn host_frame() -> impl Strategy<Value = HostFrame> {
    prop_oneof![
        (any::<u64>(), sha256()).prop_map(|(count, aggregate)| HostFrame::Have { count, aggregate }),
        any::<u64>().prop_map(|id| HostFrame::Collect { id }),
    ]
}

/// A frame's body, its length checked as a reader does.
fn body(wire: &[u8]) -> &[u8] {
    let (prefix, body) = wire.split_first_chunk::<4>().unwrap();
    assert_eq!(body_len(*prefix).unwrap(), body.len());
    body
}

proptest! {
    #[test]
    fn guest_round_trip(frame in guest_frame(), cut in any::<prop::sample::Index>()) {
        let wire = to_wire(&frame);
        let body = body(&wire);
        prop_assert_eq!(GuestFrame::parse(body).unwrap(), frame);
        prop_assert!(GuestFrame::parse(&body[..cut.index(body.len())]).is_err());
        prop_assert!(GuestFrame::parse(&[body, &[0]].concat()).is_err());
    }

    #[test]
    fn host_round_trip(frame in host_frame(), cut in any::<prop::sample::Index>()) {
        let wire = to_wire(&frame);
        let body = body(&wire);
        prop_assert_eq!(HostFrame::parse(body).unwrap(), frame);
        prop_assert!(HostFrame::parse(&body[..cut.index(body.len())]).is_err());
        prop_assert!(HostFrame::parse(&[body, &[0]].concat()).is_err());
    }

    #[test]
    fn any_change_is_seen(
        guest in guest_frame(), host in host_frame(), at in any::<prop::sample::Index>(), bit in 0_u8..8,
    ) {
        let mut bytes = cbor::encode(&guest);
        let i = at.index(bytes.len());
        bytes[i] ^= 1 << bit;
        if let Ok(changed) = GuestFrame::parse(&bytes) {
            prop_assert_ne!(changed, guest);
        }
        let mut bytes = cbor::encode(&host);
        let i = at.index(bytes.len());
        bytes[i] ^= 1 << bit;
        if let Ok(changed) = HostFrame::parse(&bytes) {
            prop_assert_ne!(changed, host);
        }
    }

    #[test]
    fn rubbish_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        if let Ok(frame) = GuestFrame::parse(&bytes) {
            prop_assert_eq!(cbor::encode(&frame), bytes.clone());
        }
        if let Ok(frame) = HostFrame::parse(&bytes) {
            prop_assert_eq!(cbor::encode(&frame), bytes);
        }
    }
}

#[test]
fn lengths_are_checked_before_anything_is_read() {
    assert!(body_len([0; 4]).is_err());
    assert_eq!(body_len((MAX_FRAME as u32).to_le_bytes()).unwrap(), MAX_FRAME);
    assert!(body_len((MAX_FRAME as u32 + 1).to_le_bytes()).is_err());
    assert!(body_len([0xff; 4]).is_err());
    assert!(GuestFrame::parse(&vec![0; MAX_FRAME + 1]).is_err());
}

#[test]
fn the_largest_entry_fits_a_frame() {
    let frame = GuestFrame::Entries { first: u64::MAX, entries: Blob(vec![7; ima::MAX_ENTRY]) };
    let wire = to_wire(&frame);
    assert_eq!(GuestFrame::parse(body(&wire)).unwrap(), frame);
}

#[test]
fn what_no_guest_sends_is_refused() {
    let hello = GuestFrame::Hello { version: 1, boot_id: BootId([1; 16]), hash_size: 21, count: 0 };
    assert!(GuestFrame::parse(&cbor::encode(&hello)).is_err());
    let empty = GuestFrame::Entries { first: 0, entries: Blob(Vec::new()) };
    assert!(GuestFrame::parse(&cbor::encode(&empty)).is_err());
    // A frame number that is not there.
    assert!(GuestFrame::parse(&[0x82, 0x05, 0x80]).is_err());
    assert!(HostFrame::parse(&[0x82, 0x02, 0x80]).is_err());
}

#[test]
fn entries_are_found_without_a_copy_in_what_is_canonical_and_in_nothing_else() {
    for first in [0, 23, 24, 255, 256, 1 << 20, u64::MAX] {
        for len in [1, 23, 24, 255, 256, 70_000] {
            let blob = Blob(vec![7; len]);
            let body = to_wire(&GuestFrame::Entries { first, entries: blob.clone() })[4..].to_vec();
            assert_eq!(entries(&body), Some((first, blob.0.as_slice())));
            assert_eq!(entries(&body[..body.len() - 1]), None, "truncated");
            assert_eq!(entries(&[body.as_slice(), &[0]].concat()), None, "trailing");
        }
    }
    // The same frame with a longer form of each number, which a strict reader refuses.
    let short = [0x82, 0x02, 0x82, 0x05, 0x41, 0xaa];
    assert!(GuestFrame::parse(&short).is_ok() && entries(&short) == Some((5, &[0xaa][..])));
    for long in [
        &[0x98, 0x02, 0x02, 0x82, 0x05, 0x41, 0xaa][..],
        &[0x82, 0x18, 0x02, 0x82, 0x05, 0x41, 0xaa],
        &[0x82, 0x02, 0x98, 0x02, 0x05, 0x41, 0xaa],
        &[0x82, 0x02, 0x82, 0x18, 0x05, 0x41, 0xaa],
        &[0x82, 0x02, 0x82, 0x05, 0x58, 0x01, 0xaa],
    ] {
        assert!(GuestFrame::parse(long).is_err() && entries(long).is_none(), "{long:02x?}");
    }
    for other in [
        GuestFrame::Entries { first: 0, entries: Blob(Vec::new()) },
        GuestFrame::Heartbeat { count: 5 },
        GuestFrame::Collected { id: 1, count: 2 },
    ] {
        assert_eq!(entries(&to_wire(&other)[4..]), None, "{other:?}");
    }
    assert_eq!(entries(&vec![0; MAX_FRAME + 1]), None);
}
