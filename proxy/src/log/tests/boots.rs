//! What can become of host and TPM between two starts of the proxy: each is told apart.

use onequote_evidence::event::ProxyStart;

use super::*;
use crate::tpm::{EsapiTpm, Tpm, swtpm::Startup, swtpm::Swtpm};

fn worked() -> World {
    let world = World::new();
    Work::default().run(&world).unwrap();
    world
}

/// Starts again; the newest epoch, and what its log tells.
fn again(world: &World) -> (u64, Told) {
    drop(world.start_well());
    let logs = world.disk.logs();
    let (newest, bytes) = logs.last_key_value().unwrap();
    let told = told(bytes);
    assert_eq!(told.registers, world.registers());
    (*newest, told)
}

/// Every `proxy-start` of a log.
fn starts(bytes: &[u8]) -> Vec<ProxyStart> {
    let records: Vec<Record> = LogReader::new(bytes, 0).collect::<Result<_, _>>().unwrap();
    let events = records.iter().flat_map(|record| record.events().unwrap());
    let start = |event: Event| match event.body {
        EventBody::ProxyStart(start) => Some(start),
        _ => None,
    };
    events.filter_map(start).collect()
}

#[test]
fn a_suspend_goes_on_without_a_word() {
    let world = worked();
    world.chip.resume();
    let (epoch, told) = again(&world);
    assert_eq!((epoch, told.gaps.len()), (1, 0));
    let counts: Vec<u32> = starts(&world.disk.logs()[&1]).iter().map(|start| start.restart_count).collect();
    assert_eq!(counts, [0, 1]);
    // The registers are then another kernel's after all: told as that, not as a suspend.
    world.chip.resume();
    world.kexec();
    let (epoch, told) = again(&world);
    assert_eq!((epoch, told.gaps), (1, vec![GapReason::Kexec]));
}

#[test]
fn a_kexec_goes_on_and_is_told_once() {
    let world = worked();
    world.kexec();
    let (epoch, told) = again(&world);
    assert_eq!((epoch, told.gaps), (1, vec![GapReason::Kexec]));
    // A restart of the proxy under the new kernel is nothing but that.
    assert_eq!(again(&world).1.gaps, [GapReason::Kexec]);
    world.kexec();
    assert_eq!(again(&world).1.gaps, [GapReason::Kexec, GapReason::Kexec]);
    assert!(world.disk.aside().is_empty());
}

#[test]
fn a_kexec_is_told_wherever_the_proxy_dies() {
    let world = worked();
    world.kexec();
    world.plan(None, false);
    drop(world.start().unwrap());
    let steps = world.steps().done.len();
    for at in 0..steps {
        for happens in [Happens::Before, Happens::After, Happens::Torn(3)] {
            let world = worked();
            world.kexec();
            world.plan(Some((at, happens)), true);
            assert!(world.start().is_err());
            assert_eq!(again(&world).1.gaps, [GapReason::Kexec], "{at} {happens:?}");
        }
    }
}

#[test]
fn an_extend_by_the_kernel_before_is_a_foreign_extend() {
    let world = worked();
    world.kexec();
    world.chip.foreign_extend(12);
    let (epoch, told) = again(&world);
    assert_eq!((epoch, told.gaps), (2, vec![GapReason::ForeignExtend]));
}

#[test]
fn a_restart_of_the_tpm_is_a_reboot_only_under_another_kernel() {
    let world = worked();
    world.chip.restart();
    world.kexec();
    let (epoch, told) = again(&world);
    assert_eq!((epoch, told.gaps.len()), (2, 0));
    // The boot stub may have extended before the proxy: what the registers held is in the history.
    world.chip.restart();
    world.kexec();
    world.chip.foreign_extend(12);
    let held = world.registers();
    let (epoch, told) = again(&world);
    assert_eq!((epoch, told.gaps.len()), (3, 0));
    assert_eq!(onequote_evidence::pcr::from_list(&starts(&world.disk.logs()[&3])[0].history), Some(held));
    // Under the same kernel it is no boot.
    world.chip.restart();
    let (epoch, told) = again(&world);
    assert_eq!((epoch, told.gaps), (4, vec![GapReason::TpmReset]));
    assert!(world.disk.aside().is_empty(), "every log that ended with its registers is whole");
}

#[test]
fn swtpm_counts_as_this_log_expects() {
    // What is done to the TPM; what it then counts: resets, restarts, registers that stay, a clock that is safe.
    for (shutdown, startup, reset, restart, stay, safe) in [
        (Some(Startup::Clear), Startup::Clear, 1, None, false, true),
        (Some(Startup::State), Startup::Clear, 0, Some(1), false, true),
        (Some(Startup::State), Startup::State, 0, Some(1), true, true),
        (None, Startup::Clear, 1, None, false, false),
    ] {
        let mut swtpm = Swtpm::start();
        let dir = tempfile::tempdir().unwrap();
        let run = |swtpm: &Swtpm, boot: u8| {
            let tcti = swtpm.tcti();
            let open = Box::new(move || EsapiTpm::open(&tcti).map(|tpm| Box::new(tpm) as Box<dyn Tpm>));
            let config = RecorderConfig { boot_id: BootId([boot; 16]), ..config() };
            let store = Box::new(crate::log::FileStore::open(dir.path()).unwrap());
            let mut journal = Journal::start(config, store, open).unwrap();
            append(&mut journal, PcrRole::Vm, "event").unwrap();
            epoch(&journal).number
        };
        let clock = |swtpm: &Swtpm| EsapiTpm::open(&swtpm.tcti()).unwrap().clock().unwrap();
        assert_eq!(run(&swtpm, 1), 1);
        let before = clock(&swtpm);
        swtpm.restart_with(shutdown, startup);
        let after = clock(&swtpm);
        let what = format!("{shutdown:?}, {startup:?}: {before:?} {after:?}");
        assert_eq!(after.reset_count.wrapping_sub(before.reset_count), reset, "{what}");
        if let Some(restart) = restart {
            assert_eq!(after.restart_count.wrapping_sub(before.restart_count), restart, "{what}");
        }
        assert_eq!(after.safe, safe, "{what}");
        // Under another kernel: a reboot is no gap, and where the registers stayed it is a kexec.
        let number = run(&swtpm, 2);
        let bytes = std::fs::read(crate::log::LogFolder::new(dir.path()).path(number, 0)).unwrap();
        let told = told(&bytes);
        assert_eq!((number, told.gaps), if stay { (1, vec![GapReason::Kexec]) } else { (2, vec![]) }, "{what}");
        // Once more under the same kernel.
        swtpm.restart_with(shutdown, startup);
        let next = run(&swtpm, 2);
        let bytes = std::fs::read(crate::log::LogFolder::new(dir.path()).path(next, 0)).unwrap();
        let gaps = super::told(&bytes).gaps;
        let expected = if stay { (1, vec![GapReason::Kexec]) } else { (3, vec![GapReason::TpmReset]) };
        assert_eq!((next, gaps), expected, "{what}");
    }
}
