//! A log in several files: begun, dropped, damaged, and every death in between.

use onequote_evidence::event::{Depth, VmCreate, VmRef, VmStart, VmStop};
use onequote_evidence::id::{SessionId, VmId};

use super::*;
use crate::{inventory::Inventory, log::LogPlace};

/// So short that a few records fill a segment.
const LIMIT: u64 = 4096;

fn start(world: &World) -> Result<(Journal, Arc<std::sync::RwLock<Inventory>>), RecorderError> {
    let chip = world.chip.clone();
    let boot_id = BootId([world.boot.load(Ordering::Relaxed); 16]);
    let config = RecorderConfig { boot_id, segment_bytes: LIMIT, ..config() };
    let inventory = Arc::clone(&config.inventory);
    Journal::start(config, world.disk.store(), Box::new(move || chip.connect())).map(|journal| (journal, inventory))
}

fn started(world: &World) -> (Journal, Arc<std::sync::RwLock<Inventory>>) {
    world.plan(None, false);
    start(world).unwrap()
}

fn vm() -> VmRef {
    VmRef { vm: VmId(uuid::Uuid::from_bytes([9; 16])), session: SessionId([1; 8]) }
}

fn about(body: impl Into<EventBody>) -> Event {
    Event { time: TimeMs(7), vm: Some(vm()), body: body.into() }
}

fn created() -> Vec<Event> {
    let create = VmCreate {
        name: "web".into(),
        pid: 1,
        depth: Depth::Gate,
        uuid_given: true,
        qemu: "7.2.0".into(),
        machine: "q35".into(),
        memory: 1,
        cpus: 1,
        accelerator: "tcg".into(),
        guest_cid: None,
        devices: vec![],
        monitors: vec![],
    };
    vec![about(create), about(VmStart { components: vec![], images: vec![] })]
}

/// Appends long events until the log has so many segments.
fn fill(journal: &mut Journal, segments: usize) -> Result<(), RecorderError> {
    for n in 0..1000 {
        if journal.segments().len() >= segments {
            return Ok(());
        }
        append(journal, PcrRole::Vm, &format!("{n:0>500}"))?;
    }
    panic!("no segment begins");
}

fn place(journal: &Journal) -> LogPlace {
    journal.subscribe().borrow().as_ref().unwrap().head.place()
}

/// All records that are on disk, replayed from the oldest of them.
fn replayed(world: &World, epoch: u64) -> Replay {
    let bytes = &world.disk.logs()[&epoch];
    let mut records = LogReader::anywhere(bytes).map(Result::unwrap);
    let mut replay = Replay::begin(&records.next().unwrap()).unwrap();
    records.for_each(|record| replay.apply(&record).unwrap());
    replay
}

fn names(inventory: &std::sync::RwLock<Inventory>) -> Vec<String> {
    inventory.read().unwrap().vms().map(|(_, vm)| vm.name.clone()).collect()
}

#[test]
fn a_long_log_goes_on_in_segments_and_its_beginning_can_go() {
    let world = World::new();
    let (mut journal, _) = started(&world);
    let now = epoch(&journal);
    journal.append(now, PcrRole::Vm, &created()).unwrap();
    fill(&mut journal, 3).unwrap();
    append(&mut journal, PcrRole::Guest, "last").unwrap();
    let starts = journal.segments();
    assert_eq!(starts.iter().map(|start| start.bytes).collect::<Vec<_>>(), world.disk.starts(1));
    assert_eq!((replayed(&world, 1).registers(), replayed(&world, 1).segment()), (&world.registers(), 2));
    let whole = world.disk.logs()[&1].clone();

    // Acknowledged in the middle of a segment: that one stays.
    journal.drop_before(LogPlace { bytes: starts[2].bytes - 1, ..starts[1] }).unwrap();
    assert_eq!(journal.segments(), starts[1..]);
    assert_eq!(world.disk.starts(1), [starts[1].bytes, starts[2].bytes]);
    assert_eq!(world.disk.logs()[&1], whole[starts[1].bytes as usize..]);
    let replay = replayed(&world, 1);
    assert_eq!((replay.first(), replay.registers()), (starts[1].records, &world.registers()));
    // All of it acknowledged: the newest segment stays.
    let end = place(&journal);
    journal.drop_before(end).unwrap();
    assert_eq!(journal.segments(), starts[2..]);
    drop(journal);

    // A start knows from the snapshot what was dropped.
    let (mut journal, inventory) = started(&world);
    assert_eq!((epoch(&journal), names(&inventory)), (now, vec!["web".to_owned()]));
    assert_eq!(place(&journal).records, end.records + 1, "one more proxy-start, numbers go on");
    assert_eq!(journal.segments(), starts[2..]);
    fill(&mut journal, 3).unwrap();
    assert_eq!(replayed(&world, 1).registers(), &world.registers());
    assert_eq!((replayed(&world, 1).segment(), world.disk.aside().len()), (4, 0));
}

#[test]
fn a_vm_that_ended_in_what_is_dropped_is_remembered() {
    let world = World::new();
    let (mut journal, _) = started(&world);
    let now = epoch(&journal);
    journal.append(now, PcrRole::Vm, &created()).unwrap();
    let cause = onequote_evidence::event::StopCause::Lost;
    let stop = VmStop { cause, images: vec![], unmeasured: vec![], read: vec![] };
    journal.append(now, PcrRole::Vm, &[about(stop)]).unwrap();
    fill(&mut journal, 2).unwrap();
    let end = place(&journal);
    journal.drop_before(end).unwrap();
    drop(journal);
    let (_journal, inventory) = started(&world);
    let inventory = inventory.read().unwrap();
    assert_eq!(inventory.ended().map(|ended| ended.name.as_str()).collect::<Vec<_>>(), ["web"]);
    assert_eq!(inventory.vms().count(), 0);
}

/// Fills segments, drops, fills again: every kind of step there is. True when it got to the end.
fn work(world: &World) -> Result<(), RecorderError> {
    let (mut journal, _) = start(world)?;
    let now = epoch(&journal);
    journal.append(now, PcrRole::Vm, &created())?;
    fill(&mut journal, 3)?;
    let end = place(&journal);
    journal.drop_before(end)?;
    append(&mut journal, PcrRole::Vm, "end").map(drop)
}

#[test]
fn nothing_is_lost_wherever_the_process_dies() {
    let world = World::new();
    world.plan(None, false);
    work(&world).unwrap();
    let steps: Vec<(&'static str, usize)> = world.steps().done.clone();
    for wanted in ["keep snapshot", "begin segment", "note what is dropped", "drop"] {
        assert!(steps.iter().any(|(name, _)| *name == wanted), "no step {wanted}");
    }
    // A second death, at each of these steps of the start after the first.
    let mut runs = 0;
    for (at, &(_, bytes)) in steps.iter().enumerate() {
        let torn = [1, bytes / 2].into_iter().filter(|&part| part > 0 && part < bytes).map(Happens::Torn);
        for happens in [Happens::Before, Happens::After].into_iter().chain(torn) {
            for second in [None, Some(3), Some(4), Some(5)] {
                let world = World::new();
                world.plan(Some((at, happens)), true);
                assert!(work(&world).is_err(), "{at} {happens:?} happened");
                if let Some(second) = second {
                    world.plan(Some((second, Happens::After)), true);
                    let _ = start(&world);
                }
                let (mut journal, inventory) = started(&world);
                let what = format!("after {at} {:?} {happens:?} and {second:?}", steps[at]);
                assert_eq!(epoch(&journal).number, 1, "{what}");
                assert!(world.disk.aside().is_empty(), "{what}");
                append(&mut journal, PcrRole::Vm, "after").unwrap();
                let replay = replayed(&world, 1);
                assert_eq!(replay.registers(), &world.registers(), "{what}");
                let starts: Vec<u64> = journal.segments().iter().map(|start| start.bytes).collect();
                assert_eq!(starts, world.disk.starts(1), "{what}");
                // Whatever was reached, what it says is whole.
                let told: Vec<String> = names(&inventory);
                assert!(told.is_empty() || told == ["web"], "{what}: {told:?}");
                if replay.first() > 0 {
                    assert_eq!(told, ["web"], "{what}");
                }
                fill(&mut journal, starts.len() + 1).unwrap();
                runs += 1;
            }
        }
    }
    println!("{runs} runs, {} steps", steps.len());
}

/// A log of which only the last of three segments is left.
fn dropped() -> World {
    let world = World::new();
    let (mut journal, _) = started(&world);
    fill(&mut journal, 3).unwrap();
    let end = place(&journal);
    journal.drop_before(end).unwrap();
    append(&mut journal, PcrRole::Vm, "end").unwrap();
    world
}

fn assert_set_aside(world: &World, what: &str) {
    let (journal, _) = started(world);
    assert_eq!(epoch(&journal).number, 2, "{what}");
    assert_eq!(told(&world.disk.logs()[&2]).gaps, [GapReason::LogDamaged], "{what}");
    assert!(world.disk.aside().contains_key(&1), "{what}");
}

#[test]
fn a_snapshot_that_is_missing_or_changed_makes_a_damaged_log() {
    let world = dropped();
    let oldest = world.disk.starts(1)[0];
    world.disk.edit_snapshot(1, oldest, |_| None);
    assert_set_aside(&world, "missing");

    let len = {
        let (world, mut len) = (dropped(), 0);
        world.disk.edit_snapshot(1, oldest, |bytes| {
            len = bytes.len();
            Some(bytes)
        });
        len
    };
    for at in (0..len).step_by(7) {
        let world = dropped();
        world.disk.edit_snapshot(1, oldest, |mut bytes| {
            bytes[at] ^= 1;
            Some(bytes)
        });
        assert_set_aside(&world, &format!("byte {at}"));
    }
    // One that is whole, of another log.
    let (world, other) = (dropped(), dropped());
    other.disk.edit_snapshot(1, oldest, |bytes| {
        world.disk.edit_snapshot(1, oldest, |_| Some(bytes));
        None
    });
    assert_set_aside(&world, "another log's");
}

#[test]
fn segments_that_nobody_dropped_are_missed() {
    let world = World::new();
    let (mut journal, _) = started(&world);
    fill(&mut journal, 3).unwrap();
    drop(journal);
    let starts = world.disk.starts(1);
    world.disk.lose_before(1, starts[1]);
    assert_set_aside(&world, "one lost");

    let world = dropped();
    let (mut journal, _) = started(&world);
    fill(&mut journal, 2).unwrap();
    drop(journal);
    let starts = world.disk.starts(1);
    world.disk.lose_before(1, starts[1]);
    assert_set_aside(&world, "one more lost than was dropped");
}

#[test]
fn flipped_bytes_in_a_log_without_its_beginning_are_a_gap() {
    let len = dropped().disk.logs()[&1].len();
    for at in (0..len).step_by(5) {
        let world = dropped();
        world.disk.edit(1, |bytes| bytes[at] ^= 1 << (at % 8));
        assert_set_aside(&world, &format!("byte {at} of {len}"));
    }
    for left in [0, 1, len / 2] {
        let world = dropped();
        world.disk.edit(1, |bytes| bytes.truncate(left));
        let (journal, _) = started(&world);
        assert_eq!((epoch(&journal).number, told(&world.disk.logs()[&2]).gaps.len()), (2, 1), "{left} bytes left");
    }
}

#[test]
fn a_segment_whose_snapshot_is_damaged_does_not_become_the_oldest() {
    let world = World::new();
    let (mut journal, _) = started(&world);
    fill(&mut journal, 3).unwrap();
    let (starts, end) = (world.disk.starts(1), place(&journal));
    world.disk.edit_snapshot(1, starts[2], |_| None);
    journal.drop_before(end).unwrap();
    assert_eq!(world.disk.starts(1), starts[1..], "the one before it does");
    drop(journal);
    let (journal, _) = started(&world);
    assert_eq!(epoch(&journal).number, 1);
}

#[test]
fn a_disk_that_takes_no_new_file_fails_nobody() {
    let world = World::new();
    let (mut journal, _) = started(&world);
    for fault in [DiskFault::Before, DiskFault::After] {
        for refused in ["keep snapshot", "begin segment"] {
            world.disk.set_fault(move |name, _| if name == refused { fault } else { DiskFault::None });
            for n in 0..20 {
                append(&mut journal, PcrRole::Vm, &format!("{n:0>500}")).unwrap();
            }
            assert_eq!(world.disk.starts(1), [0], "{refused} {fault:?}");
            assert_eq!(replayed(&world, 1).registers(), &world.registers());
        }
    }
    world.disk.clear_fault();
    fill(&mut journal, 2).unwrap();
}

#[test]
fn no_segment_begins_where_nothing_is_gained() {
    let world = World::new();
    let (mut journal, _) = started(&world);
    let now = epoch(&journal);
    // VMs and hardly anything else: a snapshot of all of them is hardly shorter than the log.
    let of = |n: u8| VmRef { vm: VmId(uuid::Uuid::from_bytes([n; 16])), ..vm() };
    let events =
        (0..100).flat_map(|n| created().into_iter().take(1).map(move |event| Event { vm: Some(of(n)), ..event }));
    journal.append(now, PcrRole::Vm, &events.collect::<Vec<_>>()).unwrap();
    assert!(place(&journal).bytes > 2 * LIMIT);
    append(&mut journal, PcrRole::Vm, "one more").unwrap();
    assert_eq!(journal.segments().len(), 1);
}
