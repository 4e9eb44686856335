//! What became of host and TPM between two pieces of evidence: each is told apart, none is accepted in silence, and none
//! that is harmless is an alarm.

use onequote_evidence::{
    event::{GapReason, LogGap},
    pcr::RegisterValue,
};

use super::*;

fn trusted(world: &mut World) {
    let appraisal = world.round();
    assert!(appraisal.verdict.all_trusted(), "{:#?}", appraisal.verdict);
}

fn gap(reason: GapReason) -> LogGap {
    LogGap { reason, detail: "as the proxy saw it".into() }
}

/// The log's registers as last accepted.
fn registers(world: &World) -> Vec<RegisterValue> {
    world.state.accepted.clone().unwrap().registers
}

fn accepting(reasons: &str) -> String {
    POLICY.replacen("[host]", &format!("[host]\naccept_gaps = [{reasons}]"), 1)
}

#[test]
fn a_reboot_is_no_alarm_however_it_came() {
    let mut world = World::with_two_vms();
    trusted(&mut world);
    world.reboot();
    trusted(&mut world);
    // Power was lost: the clock may have been set back, and says so.
    world.reboot();
    (world.clock.clock, world.clock.safe) = (1, false);
    let appraisal = world.round();
    assert!(appraisal.verdict.all_trusted());
    assert!(appraisal.verdict.notes.iter().any(|note| note.contains("set back")));
    // After TPM2_Shutdown(STATE) a boot counts as a restart of the TPM.
    world.boot += 1;
    (world.clock.clock, world.clock.restart_count) = (5000, world.clock.restart_count + 1);
    world.next_epoch(World::empty());
    trusted(&mut world);
    trusted(&mut world);
}

#[test]
fn a_clock_that_is_set_back_needs_a_reset_that_lost_it() {
    let mut world = World::with_two_vms();
    trusted(&mut world);
    world.reboot();
    world.clock.clock = 1;
    assert_eq!(only(&world.round()).code, Code::ClockRegression);
    world.clock.safe = false;
    trusted(&mut world);
    // A restart keeps the time: not being safe does not explain it.
    world.boot += 1;
    (world.clock.clock, world.clock.restart_count) = (0, world.clock.restart_count + 1);
    world.next_epoch(World::empty());
    world.clock.clock = 0;
    world.state.accepted.as_mut().unwrap().clock.clock = 900;
    assert_eq!(only(&world.round()).code, Code::ClockRegression);
}

#[test]
fn a_suspend_is_no_alarm() {
    let mut world = World::with_two_vms();
    trusted(&mut world);
    let told = |appraisal: &Appraisal| appraisal.verdict.notes.iter().any(|note| note.contains("was suspended"));
    assert!(!told(&world.round()));
    world.clock.restart_count += 1;
    let appraisal = world.round();
    assert!(appraisal.verdict.all_trusted() && told(&appraisal));
    assert!(!told(&world.round()), "told once");
    // With a restart of the proxy in it.
    let now = registers(&world);
    world.proxy_start(now);
    world.log(12, Some(vm_ref(2, 2)), onequote_evidence::event::VmPause { run_state: "paused".into() });
    let appraisal = world.round();
    assert!(host_codes(&appraisal).is_empty(), "{:#?}", appraisal.verdict.host);
    world.clock.restart_count -= 1;
    assert_eq!(only(&world.round()).code, Code::RestartCountRegression);
}

#[test]
fn a_tpm_reset_under_a_running_kernel_is_found_until_the_host_is_rebooted() {
    // As the proxy tells it, and from a proxy whose log was taken away, so that it knows nothing.
    for told in [true, false] {
        let mut world = World::with_two_vms();
        trusted(&mut world);
        (world.statement.vms, world.guests) = (Vec::new(), Vec::new());
        world.reset_tpm();
        if told {
            world.log(12, None, gap(GapReason::TpmReset));
        }
        for round in 0..3 {
            let appraisal = world.round();
            assert_eq!(only(&appraisal).code, Code::TpmReset, "{told} {round}");
            assert!(appraisal.state.is_some());
        }
        // A further new log does not make it forgotten.
        let now = registers(&world);
        world.next_epoch(now);
        assert_eq!(only(&world.round()).code, Code::TpmReset, "{told}");
        assert_eq!(only(&world.round()).code, Code::TpmReset, "{told}");
        // The operator may know better, and the host may be rebooted.
        let strict = world.policy.replace(accepting("\"tpm-reset\""));
        trusted(&mut world);
        world.policy = strict;
        world.reboot();
        trusted(&mut world);
    }
}

#[test]
fn a_tpm_restart_under_a_running_kernel_is_found_too() {
    let mut world = World::with_two_vms();
    trusted(&mut world);
    (world.statement.vms, world.guests) = (Vec::new(), Vec::new());
    world.clock.restart_count += 1;
    world.next_epoch(World::empty());
    assert_eq!(only(&world.round()).code, Code::TpmReset);
    assert_eq!(only(&world.round()).code, Code::TpmReset);
}

#[test]
fn a_gap_is_not_forgotten_over_a_reset_without_a_reboot() {
    let mut world = World::with_two_vms();
    (world.statement.vms, world.guests) = (Vec::new(), Vec::new());
    world.records.truncate(1);
    trusted(&mut world);
    let now = registers(&world);
    world.next_epoch(now);
    world.log(12, None, gap(GapReason::LogDamaged));
    assert_eq!(host_codes(&world.round()), [Code::LogGap]);
    world.reset_tpm();
    assert_eq!(host_codes(&world.round()), [Code::LogGap, Code::TpmReset]);
    // Accepting one does not accept the other.
    world.policy = Some(accepting("\"tpm-reset\""));
    assert_eq!(host_codes(&world.round()), [Code::LogGap]);
    world.reboot();
    trusted(&mut world);
}

#[test]
fn a_kexec_is_found_until_the_host_is_rebooted() {
    // The log goes on, and says so.
    let mut world = World::with_two_vms();
    trusted(&mut world);
    world.boot += 1;
    let now = registers(&world);
    world.proxy_start(now);
    world.log(12, None, gap(GapReason::Kexec));
    (world.statement.vms, world.guests) = (Vec::new(), Vec::new());
    for n in [1, 2] {
        let cause = onequote_evidence::event::StopCause::Unwatched;
        world.stop(n, n, cause, Vec::new());
    }
    assert_eq!(host_codes(&world.round()), [Code::HostKexec]);
    world.policy = Some(accepting("\"kexec\""));
    assert!(host_codes(&world.round()).is_empty());
    world.policy = Some(POLICY.into());
    world.reboot();
    trusted(&mut world);

    // The log was taken away, or damaged: the new one begins where the registers are.
    for suspended in [0, 1] {
        let mut world = World::new();
        trusted(&mut world);
        world.boot += 1;
        world.clock.restart_count += suspended;
        let now = registers(&world);
        world.next_epoch(now);
        assert_eq!(only(&world.round()).code, Code::HostKexec, "{suspended}");
        assert_eq!(only(&world.round()).code, Code::HostKexec, "{suspended}");
        world.reboot();
        trusted(&mut world);
    }
}

#[test]
fn registers_that_go_on_otherwise_are_not_explained_by_a_restart() {
    let mut world = World::new();
    trusted(&mut world);
    world.log(12, None, gap(GapReason::ProxyDown));
    // What this record extended was never shown; the log is replaced, and the TPM was suspended meanwhile.
    let mut hidden = registers(&world);
    for value in &mut hidden {
        value.value.0[0] ^= 1;
    }
    world.clock.restart_count += 1;
    world.next_epoch(hidden);
    assert_eq!(host_codes(&world.round()), [Code::LogHistory, Code::LogHistory]);
}

#[test]
fn gaps_that_are_kept_are_bounded() {
    let mut world = World::new();
    trusted(&mut world);
    for _ in 0..100 {
        let now = registers(&world);
        world.next_epoch(now);
        world.log(12, None, gap(GapReason::LogDamaged));
        world.round();
    }
    let accepted = world.state.accepted.clone().unwrap();
    assert_eq!((accepted.past_gaps.len(), accepted.gaps.len()), (64, 1));
}
