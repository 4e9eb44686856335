//! A log in segments, whose beginning the host may have dropped.

use onequote_evidence::{
    event::{LogSegment, VmStart},
    log::{LogReader, Replay},
    pcr,
    record::Record,
};

use super::*;
use crate::appraise::{Received, logs::Logs};

/// The log goes on in a new file; gives the number of its first record.
fn segment(world: &mut World, number: u64) -> usize {
    segment_with(world, number, |_| {})
}

fn segment_with(world: &mut World, number: u64, forge: impl FnOnce(&mut LogSegment)) -> usize {
    let mut replay = Replay::begin(&world.records[0]).unwrap();
    world.records[1..].iter().for_each(|record| replay.apply(record).unwrap());
    let mut body = LogSegment {
        number,
        start: replay.start().clone(),
        registers: pcr::to_list(replay.registers()),
        snapshot: digest(9).value,
    };
    forge(&mut body);
    world.log(12, None, body);
    world.records.len() - 1
}

fn bytes(records: &[Record]) -> Vec<u8> {
    records.iter().flat_map(Record::to_bytes).collect()
}

/// Evidence of an honest proxy that has dropped the records before that one.
fn cut(world: &mut World, first: usize) -> Appraisal {
    world.clock.clock += 1;
    let mut parts = world.quote(&nonce(1), |_, _| {});
    parts.records = bytes(&world.records[first..]);
    world.judge(&parts)
}

fn allowed() -> String {
    POLICY.replacen("[host]", "[host]\ndropped_records = \"allowed\"", 1)
}

/// The usual host, whose log goes on in a second segment with a third VM.
fn two_segments() -> (World, usize) {
    let mut world = World::with_two_vms();
    let first = segment(&mut world, 1);
    world.start("db3", 3, 3, vec![]);
    world.entries(3, 3, &[ima_entry("/bin/init", 1)]);
    world.entries(2, 2, &[ima_entry("/bin/sh", 2)]);
    (world, first)
}

#[test]
fn who_has_the_whole_log_sees_segments_without_a_finding() {
    let (mut world, _) = two_segments();
    let appraisal = world.round();
    assert!(appraisal.verdict.all_trusted(), "{:#?}", appraisal.verdict);
    segment(&mut world, 2);
    assert!(world.round().verdict.all_trusted());
}

#[test]
fn who_is_new_is_told_what_is_missing() {
    let (mut world, first) = two_segments();
    let appraisal = cut(&mut world, first);
    let finding = only(&appraisal);
    assert_eq!((finding.code, finding.item.as_str()), (Code::LogSegmentStart, &*format!("records 0 to {}", first - 1)));
    assert!(appraisal.state.is_some(), "what is there is authentic");

    world.policy = Some(allowed());
    let appraisal = cut(&mut world, first);
    assert_eq!(host_codes(&appraisal), []);
    assert_eq!(appraisal.verdict.host.state, State::Trusted, "{:#?}", appraisal.verdict);
    assert!(appraisal.verdict.notes.iter().any(|note| note.contains(&format!("begins with record {first}"))));
    assert_ne!(vm_state(&appraisal, "web"), State::Trusted, "its start was dropped, and all its records");
    assert_ne!(vm_state(&appraisal, "db"), State::Trusted, "its start was dropped, and some of its records");
    assert_eq!(vm_state(&appraisal, "db3"), State::Trusted, "it began behind that");
    for name in ["web", "db"] {
        assert!(vm_codes(&appraisal, name).contains(&Code::VmUnmeasured), "{:?}", vm_codes(&appraisal, name));
        assert_eq!(vm_codes(&appraisal, name).len(), 1, "{:?}", vm_findings(&appraisal, name));
    }
}

#[test]
fn a_list_whose_records_were_dropped_is_held_against_the_statement() {
    let (mut world, first) = two_segments();
    world.policy = Some(allowed());
    let mut parts = world.quote(&nonce(1), |_, _| {});
    parts.records = bytes(&world.records[first..]);
    let web = parts.guests.iter_mut().find(|guest| guest.vm == vm_id(1)).unwrap();
    web.entries.swap(0, 1);
    assert!(vm_codes(&world.judge(&parts), "web").contains(&Code::GuestListAggregate));
}

#[test]
fn records_that_this_verifier_had_not_accepted_must_not_be_gone() {
    let mut world = World::with_two_vms();
    assert!(world.round().verdict.all_trusted());
    world.start("db3", 3, 3, vec![]);
    let first = segment(&mut world, 1);
    world.policy = Some(allowed());
    let appraisal = cut(&mut world, first);
    assert_eq!(only(&appraisal).code, Code::LogDropped, "no policy allows that");
    assert!(appraisal.state.is_none());
    // The whole log is still good.
    assert!(world.round().verdict.all_trusted());
}

#[test]
fn what_is_there_of_what_was_accepted_must_be_the_same() {
    let (mut world, first) = two_segments();
    assert!(world.round().verdict.all_trusted());
    // Another second segment than the one that was accepted, which replays to the quote.
    world.records.truncate(first + 1);
    for _ in 0..20 {
        world.log(12, Some(vm_ref(1, 1)), onequote_evidence::event::VmPause { run_state: "paused".into() });
    }
    assert_eq!(only(&cut(&mut world, first)).code, Code::LogRollback);
}

#[test]
fn a_segment_that_does_not_follow_is_found() {
    type Forge = fn(&mut LogSegment);
    let forged: [(&str, Forge); 4] = [
        ("number", |body| body.number = 2),
        ("registers", |body| body.registers[0].value.0[0] ^= 1),
        ("start", |body| body.start.reset_count += 1),
        ("a register less", |body| drop(body.registers.pop())),
    ];
    for (what, forge) in forged {
        let mut world = World::with_two_vms();
        let mut parts = world.quote(&nonce(1), |_, _| {});
        segment_with(&mut world, 1, forge);
        parts.records = bytes(&world.records);
        assert_eq!(only(&world.judge(&parts)).code, Code::LogStart, "{what}");
    }
    // In a record with others it says nothing.
    let mut world = World::with_two_vms();
    let mut parts = world.quote(&nonce(1), |_, _| {});
    segment(&mut world, 1);
    let record = world.records.pop().unwrap();
    let events = [record.events().unwrap(), world.records[1].events().unwrap()].concat();
    world.records.push(Record::new(record.recnum, 12, &BANKS, &events));
    parts.records = bytes(&world.records);
    assert_eq!(only(&world.judge(&parts)).code, Code::LogStart);
}

#[test]
fn a_log_begins_with_a_start_or_a_segment() {
    let (mut world, first) = two_segments();
    world.policy = Some(allowed());
    for other in [first - 1, first + 1] {
        assert_eq!(only(&cut(&mut world, other)).code, Code::LogOrder, "record {other}");
    }
    // A segment with registers that never were does not replay to the quote.
    let mut parts = world.quote(&nonce(1), |_, _| {});
    let mut lying = world.records[first].events().unwrap();
    if let onequote_evidence::event::EventBody::LogSegment(body) = &mut lying[0].body {
        body.registers[2].value.0[0] ^= 1;
    }
    let mut records = world.records[first..].to_vec();
    records[0] = Record::new(first as u64, 12, &BANKS, &lying);
    parts.records = bytes(&records);
    assert_eq!(only(&world.judge(&parts)).code, Code::LogReplay);
}

/// As a proxy sends it that has dropped what was before: from the segment's place on.
fn sent(world: &World, first: usize) -> Logs {
    let mut logs = Received::parse(&world.quote(&nonce(1), |_, _| {}).stream()).unwrap().logs;
    logs.records.first = bytes(&world.records[..first]).len() as u64;
    logs.records.items.drain(..logs.records.first as usize);
    logs
}

#[test]
fn what_is_sent_from_a_segment_on_is_put_behind_what_is_there() {
    let (mut world, first) = two_segments();
    let before = Received::parse(&world.quote(&nonce(1), |_, _| {}).stream()).unwrap().logs;
    world.start("db4", 4, 4, vec![]);
    let whole = bytes(&world.records);
    let mut joined = before.clone();
    joined.append(sent(&world, first)).unwrap();
    assert_eq!((joined.records.first, &joined.records.items), (0, &whole), "whole again");

    // What lies in between is missing: the rest is taken for what it is.
    let mut short = before.clone();
    short.records.items.truncate(40);
    short.append(sent(&world, first)).unwrap();
    assert_eq!(short.records, sent(&world, first).records);
    assert!(short.begin() && !short.are_whole());

    // Another epoch's log has nothing to do with it.
    let mut other = World::with_two_vms();
    other.next_epoch(World::empty());
    other.start("web", 1, 1, vec![]);
    let mut old = Received::parse(&other.quote(&nonce(1), |_, _| {}).stream()).unwrap().logs;
    old.append(sent(&world, first)).unwrap();
    assert_eq!(old.records, sent(&world, first).records);

    // What goes on from elsewhere than a segment leaves a gap.
    let mut gap = sent(&world, first + 1);
    assert!(!gap.begin());
    gap.records.first += 100_000;
    assert!(before.clone().append(gap).is_err());
    assert!(LogReader::anywhere(&joined.records.items).all(|record| record.is_ok()));
}

#[test]
fn a_vm_that_starts_again_behind_the_cut_is_measured() {
    let (mut world, first) = two_segments();
    world.policy = Some(allowed());
    world.stop(2, 2, onequote_evidence::event::StopCause::Lost, vec![]);
    world.create("db", 2, 7);
    world.log(12, Some(vm_ref(2, 7)), VmStart { components: components(), images: vec![] });
    let appraisal = cut(&mut world, first);
    assert_eq!(host_codes(&appraisal), []);
    assert!(!vm_codes(&appraisal, "db").contains(&Code::VmUnmeasured), "{:?}", vm_codes(&appraisal, "db"));
}
