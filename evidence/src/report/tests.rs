//! Frames in both directions: round trip, truncation, mutation, limits.

use proptest::prelude::*;

use super::*;
use crate::{
    id::{SessionId, VmId},
    stream::{Known, KnownGuest, MAX_KNOWN_GUESTS},
};

fn sha256() -> impl Strategy<Value = Sha256> {
    any::<[u8; 32]>().prop_map(Sha256)
}

fn nonce() -> impl Strategy<Value = Blob> {
    prop::collection::vec(any::<u8>(), Nonce::MIN..=Nonce::MAX).prop_map(Blob)
}

fn cause() -> impl Strategy<Value = Cause> {
    prop::sample::select(vec![Cause::Period, Cause::Change, Cause::Asked, Cause::First])
}

fn proxy_frame() -> impl Strategy<Value = ProxyFrame> {
    prop_oneof![
        "[a-z][a-z0-9]{0,20}".prop_map(|host| ProxyFrame::Hello { version: VERSION, host: host.parse().unwrap() }),
        Just(ProxyFrame::NeedHave),
        (nonce(), cause(), 1..=MAX_REPORT).prop_map(|(nonce, cause, size)| ProxyFrame::Begin { nonce, cause, size }),
        prop::collection::vec(any::<u8>(), 1..500).prop_map(|bytes| ProxyFrame::Chunk { bytes: Blob(bytes) }),
        "[ -~]{0,100}".prop_map(|why| ProxyFrame::Unable { why }),
    ]
}

fn ask() -> impl Strategy<Value = Ask> {
    let rest = any::<(u64, u64, u64, bool)>();
    (nonce(), prop::option::of(sha256()), rest).prop_map(|(nonce, statement, (expires_ms, period_ms, gap_ms, now))| {
        Ask { nonce, statement, expires_ms, period_ms, gap_ms, now }
    })
}

fn known() -> impl Strategy<Value = Known> {
    (any::<u64>(), sha256()).prop_map(|(len, digest)| Known { len, digest })
}

fn have() -> impl Strategy<Value = Have> {
    let guest = (any::<[u8; 16]>(), any::<[u8; 8]>(), any::<u32>(), known()).prop_map(|(vm, session, boot, known)| {
        KnownGuest { vm: VmId(uuid::Uuid::from_bytes(vm)), session: SessionId(session), boot, known }
    });
    let log = || prop::option::of(known());
    (prop::option::of(sha256()), log(), log(), log(), log(), prop::collection::vec(guest, 0..4)).prop_map(
        |(statement, firmware, host_ima, records, dictionary, guests)| Have {
            statement,
            firmware,
            host_ima,
            records,
            dictionary,
            guests,
        },
    )
}

fn verifier_frame() -> impl Strategy<Value = VerifierFrame> {
    prop_oneof![
        ask().prop_map(VerifierFrame::Ask),
        have().prop_map(VerifierFrame::Details),
        Just(VerifierFrame::Go),
        (any::<bool>(), "[a-z-]{0,20}", ask()).prop_map(|(accepted, state, next)| VerifierFrame::Taken {
            accepted,
            state,
            next
        }),
        any::<u64>().prop_map(|after_ms| VerifierFrame::Later { after_ms }),
        ("[a-z-]{0,20}", "[ -~]{0,100}").prop_map(|(code, error)| VerifierFrame::Refused { code, error }),
    ]
}

/// A frame's body, its length checked as a reader does.
fn body<F: Frame>(wire: &[u8]) -> &[u8] {
    let (prefix, body) = wire.split_first_chunk::<4>().unwrap();
    assert_eq!(F::body_len(*prefix).unwrap(), body.len());
    body
}

fn holds<F: Frame + Encode<()> + PartialEq + std::fmt::Debug>(
    frame: &F,
    cut: prop::sample::Index,
    at: prop::sample::Index,
    bit: u8,
) {
    let wire = to_wire(frame);
    let body = body::<F>(&wire);
    assert_eq!(F::parse(body).as_ref(), Ok(frame));
    assert!(F::parse(&body[..cut.index(body.len())]).is_err());
    assert!(F::parse(&[body, &[0]].concat()).is_err());
    let mut changed = body.to_vec();
    changed[at.index(body.len())] ^= 1 << bit;
    if let Ok(changed) = F::parse(&changed) {
        assert_ne!(&changed, frame);
    }
}

proptest! {
    #[test]
    fn proxy_frames(
        frame in proxy_frame(), cut in any::<prop::sample::Index>(), at in any::<prop::sample::Index>(), bit in 0_u8..8,
    ) {
        holds(&frame, cut, at, bit);
    }

    #[test]
    fn verifier_frames(
        frame in verifier_frame(), cut in any::<prop::sample::Index>(), at in any::<prop::sample::Index>(), bit in 0_u8..8,
    ) {
        holds(&frame, cut, at, bit);
    }

    #[test]
    fn rubbish_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        if let Ok(frame) = ProxyFrame::parse(&bytes) {
            prop_assert_eq!(cbor::encode(&frame), bytes.clone());
        }
        if let Ok(frame) = VerifierFrame::parse(&bytes) {
            prop_assert_eq!(cbor::encode(&frame), bytes);
        }
    }
}

#[test]
fn lengths_are_checked_before_anything_is_read() {
    fn check<F: Frame + std::fmt::Debug>() {
        let len = |len: usize| F::body_len((len as u32).to_le_bytes());
        assert!(len(0).is_err() && len(F::MAX + 1).is_err() && F::body_len([0xff; 4]).is_err());
        assert_eq!(len(F::MAX).unwrap(), F::MAX);
        assert!(F::parse(&vec![0; F::MAX + 1]).is_err());
    }
    check::<ProxyFrame>();
    check::<VerifierFrame>();
}

#[test]
fn what_is_out_of_bounds_is_refused() {
    let begin = |nonce: usize, size| ProxyFrame::Begin { nonce: Blob(vec![1; nonce]), cause: Cause::Period, size };
    let chunk = |size| ProxyFrame::Chunk { bytes: Blob(vec![1; size]) };
    let unable = |size| ProxyFrame::Unable { why: "x".repeat(size) };
    for good in [begin(16, 1), begin(32, MAX_REPORT), chunk(1), chunk(MAX_CHUNK), unable(0), unable(MAX_TEXT)] {
        assert_eq!(ProxyFrame::parse(&cbor::encode(&good)), Ok(good));
    }
    let bad = [begin(15, 1), begin(33, 1), begin(16, 0), begin(16, MAX_REPORT + 1), chunk(0), chunk(MAX_CHUNK + 1)];
    for bad in bad.into_iter().chain([unable(MAX_TEXT + 1)]) {
        assert!(ProxyFrame::parse(&cbor::encode(&bad)).is_err());
    }
    let ask = |nonce: usize| {
        let nonce = Blob(vec![1; nonce]);
        Ask { nonce, statement: None, expires_ms: 1, period_ms: 1, gap_ms: 1, now: false }
    };
    let taken = |nonce, text: usize| VerifierFrame::Taken { accepted: true, state: "x".repeat(text), next: ask(nonce) };
    let refused =
        |code: usize, error: usize| VerifierFrame::Refused { code: "x".repeat(code), error: "y".repeat(error) };
    for good in [taken(16, MAX_TEXT), refused(MAX_TEXT, MAX_TEXT), VerifierFrame::Ask(ask(32))] {
        assert_eq!(VerifierFrame::parse(&cbor::encode(&good)), Ok(good));
    }
    let long = MAX_TEXT + 1;
    for bad in [taken(15, 1), taken(16, long), refused(long, 1), refused(1, long), VerifierFrame::Ask(ask(33))] {
        assert!(VerifierFrame::parse(&cbor::encode(&bad)).is_err());
    }
    // Frames and causes that are not there.
    assert!(ProxyFrame::parse(&[0x82, 0x05, 0x80]).is_err());
    assert!(VerifierFrame::parse(&[0x82, 0x06, 0x80]).is_err());
    let mut cause = cbor::encode(&begin(16, 1));
    let at = cause.len() - 2;
    cause[at] = 4;
    assert!(ProxyFrame::parse(&cause).is_err());
}

#[test]
fn the_largest_frames_fit() {
    let known = Known { len: u64::MAX, digest: Sha256([1; 32]) };
    let vm = VmId(uuid::Uuid::from_bytes([1; 16]));
    let guest = KnownGuest { vm, session: SessionId([1; 8]), boot: u32::MAX, known };
    let all = Some(known);
    let have = Have {
        firmware: all,
        host_ima: all,
        records: all,
        dictionary: all,
        guests: vec![guest; MAX_KNOWN_GUESTS],
        ..Have::default()
    };
    let wire = to_wire(&VerifierFrame::Details(have.clone()));
    assert_eq!(VerifierFrame::parse(body::<VerifierFrame>(&wire)), Ok(VerifierFrame::Details(have.clone())));
    let more = Have { guests: vec![guest; MAX_KNOWN_GUESTS + 1], ..have };
    assert!(VerifierFrame::parse(&cbor::encode(&VerifierFrame::Details(more))).is_err());
    let wire = to_wire(&ProxyFrame::Chunk { bytes: Blob(vec![7; MAX_CHUNK]) });
    assert!(ProxyFrame::parse(body::<ProxyFrame>(&wire)).is_ok());
}

#[test]
fn texts_are_cut_at_a_character() {
    assert_eq!(short("short"), "short");
    let long = "ä".repeat(MAX_TEXT);
    assert_eq!(short(&format!("x{long}")).len(), MAX_TEXT - 1);
    assert_eq!(short(&long).len(), MAX_TEXT);
}

/// Hands over `bytes` in pieces of at most `step`; gives all frames.
fn fed<F: Frame>(bytes: &[u8], step: usize) -> Result<Vec<F>, Malformed> {
    let (mut incoming, mut frames, mut rest) = (Incoming::<F>::default(), Vec::new(), bytes);
    while !rest.is_empty() {
        let space = incoming.space();
        let len = space.len().min(step).min(rest.len());
        space[..len].copy_from_slice(&rest[..len]);
        rest = &rest[len..];
        frames.extend(incoming.filled(len)?);
    }
    assert!(!incoming.begun());
    Ok(frames)
}

#[test]
fn frames_are_read_however_they_arrive() {
    let large = ProxyFrame::Chunk { bytes: Blob(vec![7; MAX_CHUNK]) };
    let frames = [ProxyFrame::NeedHave, large, ProxyFrame::Unable { why: "x".to_owned() }];
    let wire = frames.iter().flat_map(to_wire).collect::<Vec<u8>>();
    for step in [1, 3, 4, 5, 1000, STEP, usize::MAX] {
        assert_eq!(fed::<ProxyFrame>(&wire, step).unwrap(), frames);
    }
    assert!(fed::<ProxyFrame>(&[0; 4], 4).is_err() && fed::<ProxyFrame>(&[0xff; 9], 2).is_err());
}

#[test]
fn an_announced_length_takes_no_memory() {
    let mut incoming = Incoming::<VerifierFrame>::default();
    incoming.space().copy_from_slice(&(MAX_VERIFIER_FRAME as u32).to_le_bytes());
    assert_eq!(incoming.filled(4), Ok(None));
    assert!(incoming.begun() && incoming.space().len() == STEP);
}
