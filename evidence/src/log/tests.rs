//! The log against every kind of change to it.

use proptest::prelude::*;

use super::*;
use crate::{
    digest::FileDigest,
    event::{GuestEntries, Image, LogSegment, Role, VmPause, VmRef, VmStart},
    id::{BootId, Epoch, EpochId, SessionId, Sha256, TimeMs, VmId},
    pcr::RegisterValue,
};

pub(crate) const BANKS: [HashAlg; 2] = [HashAlg::Sha1, HashAlg::Sha256];

pub(crate) fn start_event(banks: &[HashAlg]) -> Event {
    let history = banks
        .iter()
        .flat_map(|&bank| [12, 13].map(|pcr| RegisterValue { bank, pcr, value: vec![0; bank.size()].into() }))
        .collect();
    let body = ProxyStart {
        host: "host-1".parse().unwrap(),
        epoch: Epoch { number: 1, id: EpochId([7; 16]) },
        boot_id: BootId([3; 16]),
        version: "0.1.0".into(),
        binary: None,
        history,
        pcr_vm: 12,
        pcr_guest: 13,
        reset_count: 4,
        restart_count: 0,
        path: None,
    };
    Event { time: TimeMs(1), vm: None, body: body.into() }
}

fn vm() -> VmRef {
    VmRef { vm: VmId(uuid::Uuid::from_bytes([9; 16])), session: SessionId([1; 8]) }
}

fn any_event() -> impl Strategy<Value = Event> {
    let body = prop_oneof![
        "[a-z]{1,12}".prop_map(|run_state| EventBody::from(VmPause { run_state })),
        (any::<u32>(), any::<u64>(), any::<[u8; 32]>()).prop_map(|(boot, first, value)| {
            GuestEntries { boot, first, count: 3, aggregate: Sha256(value) }.into()
        }),
        (any::<[u8; 32]>(), "[ -~]{0,30}", any::<u64>()).prop_map(|(value, text, size)| {
            let digest = FileDigest::sha256(Sha256(value));
            let component = crate::event::Component {
                role: Role::KernelCmdline,
                path: String::new(),
                size,
                digest,
                text: Some(text.clone()),
                memory: None,
            };
            let image =
                Image { slot: "disk0/1".into(), path: text, format: "qcow2".into(), read_only: true, size, digest };
            VmStart { components: vec![component], images: vec![image] }.into()
        }),
        Just(EventBody::Unknown { kind: "vm-levitate".into(), body: vec![0xa1, 0x00, 0x01].into() }),
    ];
    (any::<u64>(), body).prop_map(|(time, body)| Event { time: TimeMs(time), vm: Some(vm()), body })
}

fn any_log() -> impl Strategy<Value = Vec<Record>> {
    prop::collection::vec((prop::bool::ANY, prop::collection::vec(any_event(), 1..4)), 0..12).prop_map(|records| {
        let mut log = vec![Record::new(0, 12, &BANKS, &[start_event(&BANKS)])];
        for (guest, events) in records {
            log.push(Record::new(log.len() as u64, if guest { 13 } else { 12 }, &BANKS, &events));
        }
        log
    })
}

pub(crate) fn replay(bytes: &[u8]) -> Result<Replay, LogError> {
    let mut replay: Option<Replay> = None;
    for record in LogReader::new(bytes, 0) {
        let record = record?;
        match &mut replay {
            None => replay = Some(Replay::begin(&record)?),
            Some(replay) => replay.apply(&record)?,
        }
    }
    Ok(replay.expect("a log has a record"))
}

fn bytes(log: &[Record]) -> Vec<u8> {
    log.iter().flat_map(Record::to_bytes).collect()
}

proptest! {
    #[test]
    fn round_trip(log in any_log()) {
        let whole = bytes(&log);
        let read: Vec<_> = LogReader::new(&whole, 0).collect::<Result<_, _>>().unwrap();
        prop_assert_eq!(&read, &log);
        for record in &read {
            let events = record.events().unwrap();
            prop_assert_eq!(&Record::new(record.recnum, record.pcr, &BANKS, &events), record);
            #[cfg(feature = "json")]
            prop_assert!(record.to_json().is_ok());
        }
        prop_assert_eq!(replay(&whole).unwrap().len(), log.len() as u64);
    }

    #[test]
    fn truncation_is_told_apart(log in any_log(), cut in any::<prop::sample::Index>()) {
        let whole = bytes(&log);
        let cut = cut.index(whole.len());
        let mut at = 0;
        let ends: Vec<usize> = log.iter().map(|r| { at += r.to_bytes().len(); at }).collect();
        let mut reader = LogReader::new(&whole[..cut], 0);
        let read = reader.by_ref().take_while(Result::is_ok).count();
        prop_assert_eq!(read, ends.iter().filter(|&&end| end <= cut).count());
        prop_assert_eq!(reader.offset(), if read == 0 { 0 } else { ends[read - 1] });
        if cut != 0 && !ends.contains(&cut) {
            let last = LogReader::new(&whole[..cut], 0).last().unwrap();
            prop_assert!(last.unwrap_err().is_truncated());
        }
    }

    #[test]
    fn any_changed_bit_is_refused_or_changes_the_registers(
        log in any_log(), at in any::<prop::sample::Index>(), bit in 0_u8..8,
    ) {
        let whole = bytes(&log);
        let before = replay(&whole).unwrap();
        let mut changed = whole.clone();
        let at = at.index(whole.len());
        changed[at] ^= 1 << bit;
        if let Ok(after) = replay(&changed) {
            prop_assert_ne!(after.registers(), before.registers());
        }
    }

    #[test]
    fn dropping_or_swapping_records_is_refused(log in any_log(), at in any::<prop::sample::Index>()) {
        let at = at.index(log.len());
        let mut dropped = log.clone();
        dropped.remove(at);
        if at + 1 < log.len() {
            let err = replay(&bytes(&dropped)).unwrap_err();
            prop_assert_eq!(err.recnum, at as u64);
            let mut swapped = log.clone();
            swapped.swap(at, at + 1);
            prop_assert_eq!(replay(&bytes(&swapped)).unwrap_err().recnum, at as u64);
        }
    }

    #[test]
    fn rubbish_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        for record in LogReader::new(&bytes, 0).flatten() {
            let _ = record.events();
        }
    }
}

#[test]
fn unknown_kinds_are_kept() {
    let event =
        Event { time: TimeMs(5), vm: None, body: EventBody::Unknown { kind: "x".into(), body: vec![0xa0].into() } };
    let record = Record::new(0, 12, &BANKS, std::slice::from_ref(&event));
    assert_eq!(record.events().unwrap(), [event]);
}

#[test]
fn a_history_without_a_bank_is_no_start() {
    let record = Record::new(0, 12, &BANKS, &[start_event(&[HashAlg::Sha256])]);
    assert!(matches!(Replay::begin(&record).unwrap_err().kind, LogErrorKind::NoStart(_)));
}

#[test]
fn events_are_cut_to_what_one_record_holds() {
    let event = |len: usize| Event { time: TimeMs(1), vm: None, body: VmPause { run_state: "x".repeat(len) }.into() };
    let written = |events: &[Event]| Record::new(0, 12, &BANKS, events).events();

    let many = vec![event(1); crate::record::MAX_EVENTS + 1];
    assert_eq!(Record::fitting(&many), crate::record::MAX_EVENTS);
    assert!(written(&many[..many.len() - 1]).is_ok());
    assert!(written(&many).is_err());

    let long = vec![event(100_000); 11];
    let fitting = Record::fitting(&long);
    assert_eq!(fitting, 10);
    assert!(written(&long[..fitting]).is_ok());
    assert!(written(&long).is_err());

    assert_eq!(Record::fitting(&[event(crate::record::MAX_CONTENT), event(1)]), 0);
    assert_eq!(Record::fitting(&[]), 0);
    assert!(written(&[]).is_err());
}

#[test]
fn the_largest_record_can_be_read() {
    let content = crate::id::Blob(vec![7; crate::record::MAX_CONTENT]);
    let digests = HashAlg::ALL.map(|bank| (bank, crate::id::Blob(bank.hash(&content.0)))).into();
    let record = Record { recnum: u64::MAX, pcr: 23, digests, content };
    let bytes = record.to_bytes();
    assert_eq!(Record::parse_first(&bytes).unwrap(), (record, bytes.len()));
}

#[test]
fn a_record_over_the_limit_is_not_taken_for_a_torn_one() {
    let content = crate::id::Blob(vec![7; crate::record::MAX_RECORD]);
    let record = Record { recnum: 0, pcr: 12, digests: Default::default(), content };
    assert!(!Record::parse_first(&record.to_bytes()).unwrap_err().is_truncated());
}

/// A log that goes on in a new segment behind each of these many records; gives where segments begin.
fn in_segments(parts: &[Vec<Record>]) -> (Vec<Record>, Vec<usize>) {
    let (mut log, mut starts) = (vec![Record::new(0, 12, &BANKS, &[start_event(&BANKS)])], vec![0]);
    let add = |log: &mut Vec<Record>, pcr: u8, events: &[Event]| {
        log.push(Record::new(log.len() as u64, pcr, &BANKS, events));
    };
    for (number, part) in (1..).zip(parts) {
        part.iter().for_each(|record| add(&mut log, record.pcr, &record.events().unwrap()));
        let so_far = replay(&bytes(&log)).unwrap();
        let registers = pcr::to_list(so_far.registers());
        let body = LogSegment { number, start: so_far.start().clone(), registers, snapshot: Sha256::ZERO };
        starts.push(log.len());
        add(&mut log, 12, &[Event { time: TimeMs(1), vm: None, body: body.into() }]);
    }
    (log, starts)
}

proptest! {
    #[test]
    fn a_log_replays_from_each_of_its_segments(parts in prop::collection::vec(any_log(), 1..4), flip in any::<(u16, u8)>()) {
        let parts: Vec<Vec<Record>> = parts.into_iter().map(|part| part[1..].to_vec()).collect();
        let (log, starts) = in_segments(&parts);
        let whole = replay(&bytes(&log)).unwrap();
        prop_assert_eq!((whole.first(), whole.segment()), (0, parts.len() as u64));
        for (number, &start) in starts.iter().enumerate().skip(1) {
            let rest = bytes(&log[start..]);
            let mut records = LogReader::anywhere(&rest).map(|record| record.unwrap());
            let mut cut = Replay::begin(&records.next().unwrap()).unwrap();
            prop_assert_eq!((cut.first(), cut.segment()), (start as u64, number as u64));
            records.for_each(|record| cut.apply(&record).unwrap());
            prop_assert_eq!(cut.registers(), whole.registers());
            prop_assert_eq!((cut.len(), cut.start(), cut.segment()), (whole.len(), whole.start(), whole.segment()));

            // A changed bit is refused, or changes what comes out.
            let mut changed = rest.clone();
            let at = usize::from(flip.0) % changed.len();
            changed[at] ^= 1 << (flip.1 % 8);
            let mut records = LogReader::anywhere(&changed);
            let again = records.next().unwrap().and_then(|record| Replay::begin(&record)).and_then(|mut replay| {
                records.try_for_each(|record| replay.apply(&record?))?;
                Ok(replay)
            });
            prop_assert!(again.is_err() || again.unwrap() != cut, "byte {} of the rest from {}", at, start);
        }
        // Nothing else begins a log.
        for at in (1..log.len()).filter(|at| !starts.contains(at)) {
            prop_assert!(Replay::begin(&log[at]).is_err());
        }
    }
}
