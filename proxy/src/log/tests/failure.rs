//! A step fails, and the process goes on.

use super::*;

/// Runs the work on one journal, going on after errors.
fn work_on(world: &World, journal: &mut Journal, work: &mut Work) -> Vec<RecorderError> {
    let mut errors = Vec::new();
    work.round += 1;
    for (role, tags) in
        [(PcrRole::Vm, &["a"][..]), (PcrRole::Guest, &["b", "c"]), (PcrRole::Guest, &["d"]), (PcrRole::Vm, &["e"])]
    {
        errors.extend(work.append(journal, role, tags).err());
        if let Err(error) = journal.quote(|head| {
            assert_eq!(head.registers, world.registers());
            sha256(&[b"x"])
        }) {
            errors.push(error);
        }
    }
    errors
}

#[test]
fn one_failure_anywhere_is_survived() {
    let world = World::new();
    let mut journal = world.start_well();
    assert!(work_on(&world, &mut journal, &mut Work::default()).is_empty());
    let all = world.steps().done.clone();
    let after_start = {
        let world = World::new();
        drop(world.start_well());
        world.steps().done.len()
    };
    let (mut disk_errors, mut runs) = (0, 0);
    for (at, &(name, bytes)) in all.iter().enumerate().skip(after_start) {
        let torn = [1, bytes / 2, bytes.saturating_sub(1)].into_iter().filter(|&part| part > 0 && part < bytes);
        for happens in [Happens::Before, Happens::After].into_iter().chain(torn.map(Happens::Torn)) {
            let world = World::new();
            world.plan(Some((at, happens)), false);
            let mut journal = world.start().unwrap();
            let mut work = Work::default();
            let errors = work_on(&world, &mut journal, &mut work);
            let case = format!("step {at} ({name}) {happens:?}: {errors:?}");
            let disk = matches!(name, "append" | "sync");
            // The disk's failure is told; the TPM's is made up for by opening it anew.
            assert_eq!(errors.len(), usize::from(disk), "{case}");
            assert!(errors.iter().all(|error| matches!(error, RecorderError::Disk(_))), "{case}");
            disk_errors += errors.len();
            let logs = world.disk.logs();
            assert_eq!(logs.len(), 1, "{case}");
            let told = told(&logs[&1]);
            assert_eq!(told.registers, world.registers(), "{case}");
            assert_eq!(told.tags, work.acknowledged, "{case}: what failed is not there");
            runs += 1;
        }
    }
    println!("{runs} runs, {disk_errors} appends failed");
}

#[test]
fn a_failed_append_that_can_not_be_cut_off_is_recovered() {
    for part in [0, 1, 50, 10_000] {
        let world = World::new();
        let mut journal = world.start_well();
        let mut work = Work::default();
        let mut failing = 2;
        world.disk.set_fault(move |name, _| match name {
            "append" if failing == 2 => {
                failing = 1;
                DiskFault::Torn(part)
            }
            "cut" if failing == 1 => {
                failing = 0;
                DiskFault::Before
            }
            _ => DiskFault::None,
        });
        let errors = work_on(&world, &mut journal, &mut work);
        assert_eq!(errors.len(), 1, "{errors:?}");
        let told = told(&world.disk.logs()[&1]);
        assert_eq!(told.registers, world.registers());
        assert!(told.gaps.is_empty());
        assert_tells(&told, &work.acknowledged, &work.attempted);
        assert_eq!(world.disk.kept().len(), usize::from(part == 1 || part == 50), "the torn bytes are kept");
    }
}

#[test]
fn a_full_disk_fails_every_append_until_there_is_room() {
    let world = World::new();
    let mut journal = world.start_well();
    world.disk.set_fault(|name, bytes| if name == "append" { DiskFault::Torn(bytes / 2) } else { DiskFault::None });
    for _ in 0..5 {
        let error = append(&mut journal, PcrRole::Vm, "x").unwrap_err();
        assert!(matches!(error, RecorderError::Disk(_)), "{error}");
        let failure = journal.subscribe().borrow().as_ref().unwrap().failure.clone();
        assert!(matches!(failure, Some(RecorderError::Disk(_))));
    }
    journal.quote(|_| sha256(&[])).unwrap();
    world.disk.clear_fault();
    append(&mut journal, PcrRole::Vm, "y").unwrap();
    assert!(journal.subscribe().borrow().as_ref().unwrap().failure.is_none());
    let told = told(&world.disk.logs()[&1]);
    assert_eq!(told.tags, ["y"]);
    assert_eq!(told.registers, world.registers());
}

#[test]
fn a_dead_tpm_fails_appends_and_its_return_makes_up_for_one() {
    let world = World::new();
    let mut journal = world.start_well();
    append(&mut journal, PcrRole::Vm, "a").unwrap();
    let (extends, _) = world.chip.counts();
    world.chip.set_fault(|_| Fault::Before);
    for tag in ["b", "c", "d"] {
        let error = append(&mut journal, PcrRole::Vm, tag).unwrap_err();
        assert!(matches!(error, RecorderError::Tpm(_)), "{error}");
    }
    assert!(journal.quote(|_| sha256(&[])).is_err());
    world.chip.clear_fault();
    append(&mut journal, PcrRole::Vm, "e").unwrap();
    let told = told(&world.disk.logs()[&1]);
    // b was on disk when the TPM failed; c and d found it gone and were not written.
    assert_eq!(told.tags, ["a", "b", "e"]);
    assert_eq!(told.registers, world.registers());
    assert_eq!(told.starts, 1);
    assert_eq!(world.chip.counts().0, extends + 2);
}

#[test]
fn a_reset_while_running_fails_what_was_made_for_the_old_epoch() {
    let world = World::new();
    let mut journal = world.start_well();
    append(&mut journal, PcrRole::Vm, "a").unwrap();
    let old = epoch(&journal);
    world.chip.reset();
    // A reset breaks the connection.
    let mut first = true;
    world.chip.set_fault(move |_| if std::mem::take(&mut first) { Fault::Before } else { Fault::None });
    for tag in ["b", "c"] {
        let error = journal.append(old, PcrRole::Vm, &[event(tag)]).unwrap_err();
        assert!(matches!(error, RecorderError::NewEpoch { asked: 1, now: 2 }), "{error}");
    }
    assert_eq!(epoch(&journal).number, 2);
    assert_eq!(append(&mut journal, PcrRole::Vm, "d").unwrap().recnum, 1);
    let logs = world.disk.logs();
    let (old, new) = (told(&logs[&1]), told(&logs[&2]));
    assert_eq!(new.tags, ["d"]);
    assert_eq!((new.starts, new.gaps.as_slice()), (1, &[GapReason::TpmReset][..]));
    assert_eq!(new.registers, world.registers());
    assert_eq!(old.tags, ["a", "b"], "b was on disk before the TPM was found to have been reset");
}

#[test]
fn a_foreign_extend_is_found_at_the_next_quote() {
    let world = World::new();
    let mut journal = world.start_well();
    append(&mut journal, PcrRole::Guest, "a").unwrap();
    world.chip.foreign_extend(13);
    let quoted = journal.quote(|_| sha256(&[])).unwrap();
    assert_eq!((quoted.head.epoch.number, quoted.head.log_len), (2, 1));
    let told = told(&world.disk.logs()[&2]);
    assert_eq!(told.gaps, [GapReason::ForeignExtend]);
    assert_eq!(told.registers, world.registers());
    assert_eq!(quoted.head.registers, world.registers());
    assert!(world.disk.aside().contains_key(&1));
    let position = append(&mut journal, PcrRole::Guest, "b").unwrap();
    assert_eq!(position.epoch, quoted.head.epoch);
}

#[test]
fn registers_that_move_between_read_and_quote_are_read_again() {
    // PCR 10 moves, as IMA moves it: the same head, one more quote.
    let world = World::new();
    let mut journal = world.start_well();
    let chip = world.chip.clone();
    let moves = Arc::new(Mutex::new(0));
    let moved = Arc::clone(&moves);
    let quoted = {
        let mut prepared = 0;
        let quoted = journal.quote(|_| {
            prepared += 1;
            *moved.lock().unwrap() = 1;
            chip.foreign_extend(10);
            sha256(&[b"x"])
        });
        assert_eq!(prepared, 1);
        quoted.unwrap()
    };
    assert_eq!(world.chip.counts().1, 2);
    assert_eq!(*moves.lock().unwrap(), 1);
    let now = world.chip.registers(&[10]);
    assert!(now.iter().all(|(register, value)| quoted.pcr_values.get(register) == Some(value)));

    // One of ours moves: what was prepared is for a log that is over.
    let chip = world.chip.clone();
    let error = journal
        .quote(|_| {
            chip.foreign_extend(12);
            sha256(&[b"x"])
        })
        .unwrap_err();
    assert!(matches!(error, RecorderError::HeadMoved), "{error}");
    assert_eq!(journal.quote(|_| sha256(&[])).unwrap().head.epoch.number, 2);
}
