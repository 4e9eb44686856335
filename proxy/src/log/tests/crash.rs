//! The process dies at every step, and of every append at every byte.

use super::*;

/// Ways in which each of these steps can be the last one: not done, done, and, of an append, each `stride`-th byte.
fn deaths(steps: &[(&'static str, usize)], stride: usize) -> Vec<(usize, Happens)> {
    let mut deaths = Vec::new();
    for (at, &(_, bytes)) in steps.iter().enumerate() {
        deaths.extend([(at, Happens::Before), (at, Happens::After)]);
        deaths.extend((1..bytes).step_by(stride).map(|part| (at, Happens::Torn(part))));
    }
    deaths
}

/// The steps of a run of `work` that nothing disturbs, on a world prepared by `prepare`.
fn steps_of(prepare: impl Fn(&World), work: impl FnOnce(&World)) -> Vec<(&'static str, usize)> {
    let world = World::new();
    prepare(&world);
    world.plan(None, false);
    work(&world);
    let steps = world.steps();
    steps.done.clone()
}

#[test]
fn nothing_is_lost_or_doubled_wherever_the_process_dies() {
    let steps = steps_of(|_| (), |world| Work::default().run(world).unwrap());
    let deaths = deaths(&steps, 1);
    assert!(deaths.len() > 500, "{} deaths in {} steps", deaths.len(), steps.len());
    for &death in &deaths {
        let world = World::new();
        let mut work = Work::default();
        world.plan(Some(death), true);
        assert!(work.run(&world).is_err(), "{death:?} happened");
        world.plan(None, false);
        work.run(&world).unwrap_or_else(|error| panic!("after {death:?}: {error}"));
        let logs = world.disk.logs();
        assert_eq!(logs.keys().collect::<Vec<_>>(), [&1], "after {death:?}");
        let told = told(&logs[&1]);
        assert_eq!(told.registers, world.registers(), "after {death:?}");
        assert!(told.gaps.is_empty() && world.disk.aside().is_empty(), "after {death:?}");
        assert!((1..=2).contains(&told.starts), "after {death:?}");
        assert_tells(&told, &work.acknowledged, &work.attempted);
    }
    println!("{} deaths in {} steps", deaths.len(), steps.len());
}

#[test]
fn a_second_death_while_recovering_from_the_first_changes_nothing() {
    let steps = steps_of(|_| (), |world| Work::default().run(world).unwrap());
    let mut runs = 0;
    for (at, &(_, bytes)) in steps.iter().enumerate() {
        let torn = [1, bytes / 2, bytes.saturating_sub(1)].into_iter().filter(|&part| part > 0 && part < bytes);
        for happens in [Happens::Before, Happens::After].into_iter().chain(torn.map(Happens::Torn)) {
            for second in 0.. {
                let mut ended = false;
                for second_happens in [Happens::Before, Happens::After, Happens::Torn(7)] {
                    let world = World::new();
                    let mut work = Work::default();
                    world.plan(Some((at, happens)), true);
                    assert!(work.run(&world).is_err());
                    world.plan(Some((second, second_happens)), true);
                    ended |= world.start().is_ok();
                    work.round += 1;
                    world.plan(None, false);
                    work.run(&world).unwrap();
                    let logs = world.disk.logs();
                    assert_eq!(logs.keys().collect::<Vec<_>>(), [&1]);
                    let told = told(&logs[&1]);
                    assert_eq!(told.registers, world.registers());
                    assert!(told.gaps.is_empty());
                    assert_tells(&told, &work.acknowledged, &work.attempted);
                    runs += 1;
                }
                if ended {
                    break;
                }
            }
        }
    }
    println!("{runs} runs with two deaths");
    assert!(runs > 1000);
}

/// Checks a beginning of epoch 2, died through at every step, on a world that `change` makes need one.
fn assert_epoch_begins(change: impl Fn(&World), gap: Option<GapReason>) {
    let prepare = |world: &World| {
        Work::default().run(world).unwrap();
        change(world);
    };
    let steps = steps_of(prepare, |world| drop(world.start().unwrap()));
    for death in deaths(&steps, 11) {
        let world = World::new();
        prepare(&world);
        let first = world.disk.logs()[&1].clone();
        world.plan(Some(death), true);
        assert!(world.start().is_err());
        world.plan(None, false);
        let mut work = Work { round: 5, ..Work::default() };
        work.run(&world).unwrap();
        let (logs, aside) = (world.disk.logs(), world.disk.aside());
        let told = told(&logs[&2]);
        assert_eq!(told.registers, world.registers(), "after {death:?}");
        assert_eq!(told.gaps, gap.into_iter().collect::<Vec<_>>(), "after {death:?}");
        assert_tells(&told, &work.acknowledged, &work.attempted);
        if gap.is_some_and(|gap| gap != GapReason::TpmReset) {
            assert_eq!((logs.get(&1), aside.get(&1)), (None, Some(&first)), "after {death:?}");
        } else {
            assert_eq!((logs.get(&1), aside.get(&1)), (Some(&first), None), "after {death:?}");
        }
        assert_eq!(logs.keys().max(), Some(&2));
    }
}

#[test]
fn a_reboot_begins_an_epoch_without_a_gap() {
    assert_epoch_begins(World::reboot, None);
}

#[test]
fn a_tpm_reset_under_a_running_kernel_begins_an_epoch_with_a_gap() {
    assert_epoch_begins(|world| world.chip.reset(), Some(GapReason::TpmReset));
}

#[test]
fn a_foreign_extend_begins_an_epoch_with_a_gap() {
    for pcr in [12, 13] {
        assert_epoch_begins(|world| world.chip.foreign_extend(pcr), Some(GapReason::ForeignExtend));
    }
}

#[test]
fn a_damaged_log_begins_an_epoch_with_a_gap() {
    let flip = |world: &World| world.disk.edit(1, |bytes| bytes[10] ^= 1);
    assert_epoch_begins(flip, Some(GapReason::LogDamaged));
}

#[test]
fn a_reset_before_the_last_extend_was_made_up_begins_an_epoch_too() {
    let steps = steps_of(|_| (), |world| Work::default().run(world).unwrap());
    for death in deaths(&steps, 11) {
        let world = World::new();
        let mut work = Work::default();
        world.plan(Some(death), true);
        assert!(work.run(&world).is_err());
        let whole = world.disk.logs().get(&1).is_some_and(|bytes| Record::parse_first(bytes).is_ok());
        world.reboot();
        let mut work = Work { round: 5, ..Work::default() };
        world.plan(None, false);
        work.run(&world).unwrap();
        let logs = world.disk.logs();
        let newest = *logs.keys().max().unwrap();
        assert_eq!(newest, if whole { 2 } else { 1 }, "after {death:?}");
        let told = told(&logs[&newest]);
        assert_eq!((told.starts, told.gaps.len()), (1, 0), "after {death:?}");
        assert_eq!(told.registers, world.registers(), "after {death:?}");
        assert_tells(&told, &work.acknowledged, &work.attempted);
    }
}
