//! The file is changed while the proxy is away.

use super::*;

fn worked() -> World {
    let world = World::new();
    Work::default().run(&world).unwrap();
    world
}

/// Starts on a changed log and checks that the change is not papered over.
fn assert_gap(world: &World, what: &str) {
    let before = world.registers();
    let changed = world.disk.logs()[&1].clone();
    drop(world.start_well());
    let logs = world.disk.logs();
    assert_eq!(logs.keys().collect::<Vec<_>>(), [&2], "{what}");
    assert_eq!(told(&logs[&2]).gaps.len(), 1, "{what}");
    assert_eq!(told(&logs[&2]).registers, world.registers(), "{what}");
    assert_ne!(before, world.registers(), "{what}");
    assert_eq!(world.disk.aside()[&1], changed, "{what}: the old log is kept as it was found");
}

#[test]
fn every_flipped_byte_is_a_gap() {
    let len = worked().disk.logs()[&1].len();
    for at in 0..len {
        let world = worked();
        world.disk.edit(1, |bytes| bytes[at] ^= 1 << (at % 8));
        let whole = Record::parse_first(&world.disk.logs()[&1]).is_ok();
        let torn = !whole && Record::parse_first(&world.disk.logs()[&1]).unwrap_err().is_truncated();
        if torn {
            // A length in record 0 that reaches past the end: looks like a log that never began. The registers' values
            // stand in the new log's history, where a verifier finds that no reset and no firmware explains them.
            let before = world.registers();
            drop(world.start_well());
            let log = &world.disk.logs()[&1];
            let replay = Replay::begin(&Record::parse_first(log).unwrap().0).unwrap();
            assert_eq!(onequote_evidence::pcr::from_list(&replay.start().history).unwrap(), before);
            assert_eq!(world.disk.kept().len(), 1);
        } else {
            assert_gap(&world, &format!("byte {at}"));
        }
    }
}

#[test]
fn every_truncation_is_a_gap_unless_nothing_whole_is_left() {
    let bytes = worked().disk.logs()[&1].clone();
    let first = Record::parse_first(&bytes).unwrap().1;
    for len in (first..bytes.len()).step_by(3).chain([bytes.len() - 1]) {
        let world = worked();
        world.disk.edit(1, |bytes| bytes.truncate(len));
        assert_gap(&world, &format!("{len} bytes left"));
    }
    for len in [0, 1, first - 1] {
        let world = worked();
        world.disk.edit(1, |bytes| bytes.truncate(len));
        drop(world.start_well());
        assert_eq!(told(&world.disk.logs()[&1]).starts, 1);
    }
}

#[test]
fn dropped_swapped_and_added_records_are_gaps() {
    let bytes = worked().disk.logs()[&1].clone();
    let mut records = Vec::new();
    let mut rest = bytes.as_slice();
    while !rest.is_empty() {
        let len = Record::parse_first(rest).unwrap().1;
        records.push(rest[..len].to_vec());
        rest = &rest[len..];
    }
    for drop in 0..records.len() {
        let world = worked();
        let mut left = records.clone();
        left.remove(drop);
        world.disk.edit(1, |bytes| *bytes = left.concat());
        assert_gap(&world, &format!("record {drop} dropped"));
    }
    for at in 1..records.len() {
        let world = worked();
        let mut swapped = records.clone();
        swapped.swap(at - 1, at);
        world.disk.edit(1, |bytes| *bytes = swapped.concat());
        assert_gap(&world, &format!("records {at} and before swapped"));
    }
    let count = records.len() as u64;
    let forged = |n| Record::new(n, 12, &BANKS, &[event("forged")]).to_bytes();
    let world = worked();
    world.disk.edit(1, |bytes| bytes.extend([forged(count), forged(count + 1)].concat()));
    assert_gap(&world, "two records added");
    let world = worked();
    world.disk.edit(1, |bytes| bytes.push(0xFF));
    assert_gap(&world, "rubbish added");
}

#[test]
fn registers_cannot_be_changed_within_a_boot() {
    let world = worked();
    world.plan(None, false);
    let start = |pcr_vm, pcr_guest| {
        let chip = world.chip.clone();
        let config = RecorderConfig { pcr_vm, pcr_guest, ..config() };
        Journal::start(config, world.disk.store(), Box::new(move || chip.connect())).map(drop)
    };
    let error = start(14, 13).unwrap_err();
    assert!(matches!(error, RecorderError::RegistersChanged { log: (12, 13), configured: (14, 13) }), "{error}");
    assert!(matches!(start(12, 12), Err(RecorderError::BadRegisters(12, 12))));
    assert!(matches!(start(12, 16), Err(RecorderError::BadRegisters(12, 16))));
    world.chip.reset();
    start(14, 13).unwrap();
}
