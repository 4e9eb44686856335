//! Attacks over time: images changed while nobody looked, gaps, hidden and unwatched VMs.

use onequote_evidence::{
    event::{
        ConfigChange, EventBody, GapReason, GuestOverflow, GuestRewind, LogGap, RefuseCause, Role, StopCause, VmAttach,
        VmRefuse, VmReset, VmStart,
    },
    id::{Blob, BootId, Sha256},
    pcr::RegisterValue,
    statement::{GuestBoot, Unmanaged},
    stream::Guest,
};

use super::*;

/// `web` alone, with a writable disk that is `[5; 32]`.
pub(super) fn web() -> World {
    let mut world = World::new();
    world.policy = Some(POLICY.into());
    start(&mut world, 1, 5);
    world
}

pub(super) fn start(world: &mut World, session: u8, disk: u8) {
    world.start("web", 1, session, vec![image("disk0", disk, false), image("disk0/1", 6, true)]);
    world.entries(1, session, &[ima_entry("/bin/init", 1)]);
}

pub(super) fn stop(world: &mut World, session: u8, disk: u8) {
    world.stop(1, session, StopCause::GuestShutdown, vec![image("disk0", disk, false)]);
}

#[test]
fn an_image_goes_on_as_it_was_left() {
    let mut world = web();
    stop(&mut world, 1, 50);
    start(&mut world, 2, 50);
    assert!(world.round().verdict.all_trusted());
    // Over a reboot of the host too, and after rounds that saw it stopped.
    stop(&mut world, 2, 51);
    assert!(world.round().verdict.all_trusted());
    world.reboot();
    assert!(world.round().verdict.all_trusted());
    start(&mut world, 3, 51);
    assert!(world.round().verdict.all_trusted(), "{:#?}", world.state);
}

#[test]
fn an_image_changed_while_off_is_found_and_not_forgotten() {
    let mut world = web();
    stop(&mut world, 1, 50);
    world.round();
    start(&mut world, 2, 66);
    let appraisal = world.round();
    let finding = &vm_findings(&appraisal, "web")[0];
    assert_eq!(finding.code, Code::ImageDiscontinuity);
    assert!(finding.item.contains("disk0"));
    assert_eq!(finding.expected, Some(digest(50).to_string()));
    assert_eq!(finding.actual, Some(digest(66).to_string()));
    // Starting it once more does not launder the change, nor does a reboot of the host.
    stop(&mut world, 2, 67);
    start(&mut world, 3, 67);
    assert_eq!(vm_codes(&world.round(), "web"), [Code::ImageDiscontinuity]);
    stop(&mut world, 3, 68);
    world.round();
    world.reboot();
    start(&mut world, 4, 68);
    assert_eq!(vm_codes(&world.round(), "web"), [Code::ImageDiscontinuity]);
    // Going back to what it was is fine, and so is what the operator accepts, once.
    world.state.accept_image(vm_id(1), "disk0", digest(68));
    assert!(world.round().verdict.all_trusted());
    stop(&mut world, 4, 69);
    start(&mut world, 5, 68);
    assert_eq!(vm_codes(&world.round(), "web"), [Code::ImageDiscontinuity]);
}

#[test]
fn a_backing_file_is_held_against_the_policy() {
    let mut world = World::new();
    world.policy = Some(POLICY.into());
    world.start("web", 1, 1, vec![image("disk0", 5, false), image("disk0/1", 7, true), image("cd", 1, true)]);
    world.entries(1, 1, &[ima_entry("/bin/init", 1)]);
    assert_eq!(vm_codes(&world.round(), "web"), [Code::ImageMismatch, Code::ImageUnlisted]);
    let mut world = World::new();
    world.policy = Some(POLICY.into());
    world.start("web", 1, 1, vec![image("disk0", 9, false)]);
    world.entries(1, 1, &[ima_entry("/bin/init", 1)]);
    assert_eq!(vm_codes(&world.round(), "web"), [Code::ImageMismatch, Code::ImageMissing]);
}

#[test]
fn an_end_that_nobody_saw() {
    let mut world = web();
    world.stop(1, 1, StopCause::Unwatched, vec![image("disk0", 50, false)]);
    start(&mut world, 2, 50);
    assert_eq!(vm_codes(&world.round(), "web"), [Code::ImageUnwatched]);
    // The host lost power while the VM ran.
    let mut world = web();
    world.round();
    world.reboot();
    start(&mut world, 2, 50);
    assert_eq!(vm_codes(&world.round(), "web"), [Code::ImageUnwatched]);
    // The image could not be read when the VM ended.
    let mut world = web();
    world.stop(1, 1, StopCause::GuestShutdown, vec![]);
    start(&mut world, 2, 50);
    assert_eq!(vm_codes(&world.round(), "web"), [Code::ImageUnwatched]);
}

#[test]
fn continuity_counts_without_a_policy_too() {
    let mut world = web();
    world.policy = Some("[host]\n".into());
    stop(&mut world, 1, 50);
    start(&mut world, 2, 66);
    let appraisal = world.round();
    assert_eq!(vm_codes(&appraisal, "web"), [Code::VmWithoutPolicy, Code::ImageDiscontinuity]);
    assert_eq!(vm_state(&appraisal, "web"), State::Untrusted);
}

fn attach(again: bool, kernel: u8) -> VmAttach {
    let mut components = components();
    components[1].digest = digest(kernel);
    VmAttach { components, images: vec![image("disk0", 5, false), image("disk0/1", 6, true)], again }
}

#[test]
fn measured_too_late() {
    let mut world = World::new();
    world.policy = Some(POLICY.into());
    world.create("web", 1, 1);
    let appraisal = world.round();
    assert_eq!(vm_codes(&appraisal, "web"), [Code::VmUnmeasured, Code::RuntimeMissing]);
    world.log(12, Some(vm_ref(1, 1)), attach(false, 1));
    world.entries(1, 1, &[ima_entry("/bin/init", 1)]);
    assert_eq!(vm_codes(&world.round(), "web"), [Code::AttachedWhileRunning]);
    world.policy = Some(POLICY.replacen("runtime =", "attach = \"allowed\"\nruntime =", 1));
    assert!(world.round().verdict.all_trusted());
}

#[test]
fn measured_again_after_a_restart_of_the_proxy() {
    let mut world = web();
    world.log(12, Some(vm_ref(1, 1)), attach(true, 1));
    assert!(world.round().verdict.all_trusted());
    world.log(12, Some(vm_ref(1, 1)), attach(true, 99));
    let appraisal = world.round();
    let finding = &vm_findings(&appraisal, "web")[0];
    assert_eq!(finding.code, Code::ComponentChanged);
    assert!(finding.item.contains("kernel"), "{}", finding.item);
}

#[test]
fn a_session_goes_on_over_epochs() {
    let mut world = web();
    world.round();
    // The log was damaged: a new epoch on the same boot, which begins with what the registers hold.
    let before = world.state.accepted.clone().unwrap().registers;
    world.statement.epoch.number = 2;
    world.statement.epoch.id.0[0] = 9;
    world.begin(before);
    world.create("web", 1, 1);
    world.log(12, Some(vm_ref(1, 1)), attach(true, 1));
    world.guests.clear();
    world.entries(1, 1, &[ima_entry("/bin/init", 1)]);
    let appraisal = world.round();
    assert!(appraisal.verdict.all_trusted(), "{:#?}", appraisal.verdict);
    assert!(world.round().verdict.all_trusted(), "and in the next round");
    stop(&mut world, 1, 50);
    start(&mut world, 2, 51);
    assert_eq!(vm_codes(&world.round(), "web"), [Code::ImageDiscontinuity]);
}

#[test]
fn registers_that_were_not_empty() {
    let history = |n: u8| -> Vec<RegisterValue> {
        let value = |(bank, pcr): (onequote_evidence::digest::HashAlg, u8)| RegisterValue {
            bank,
            pcr,
            value: Blob(vec![if pcr == 12 { n } else { 0 }; bank.size()]),
        };
        BANKS.into_iter().flat_map(|bank| [(bank, 12), (bank, 13)]).map(value).collect()
    };
    let mut world = World::with_history(history(1));
    assert_eq!(only(&world.round()).code, Code::LogHistory);
    assert_eq!(only(&world.round()).code, Code::LogHistory, "it is not accepted by being seen twice");
    world.policy = Some(format!("[host]\nhistory = {{ \"12\" = \"{}\" }}\n", "01".repeat(32)));
    assert!(world.round().verdict.all_trusted());
}

#[test]
fn gaps_are_findings_unless_the_policy_says_otherwise() {
    let gap = |reason| LogGap { reason, detail: "two minutes".into() };
    let mut world = web();
    world.log(12, None, gap(GapReason::ProxyDown));
    assert_eq!(only(&world.round()).code, Code::LogGap);
    world.policy = Some(POLICY.replacen("[host]", "[host]\naccept_gaps = [\"proxy-down\"]", 1));
    let appraisal = world.round();
    assert!(appraisal.verdict.all_trusted() && appraisal.verdict.notes.iter().any(|n| n.contains("proxy-down")));
    world.log(12, None, gap(GapReason::ForeignExtend));
    assert_eq!(only(&world.round()).code, Code::ForeignExtend);
    let mut world = World::with_two_vms();
    world.log(12, Some(vm_ref(1, 1)), gap(GapReason::MonitorLost));
    let appraisal = world.round();
    assert_eq!(vm_codes(&appraisal, "web"), [Code::LogGap]);
    assert_eq!(vm_state(&appraisal, "db"), State::Trusted);
}

#[test]
fn unmanaged_processes() {
    let mut world = web();
    world.statement.unmanaged = vec![Unmanaged { pid: 9, program: "/usr/bin/qemu".into() }];
    let finding = only(&world.round()).clone();
    assert_eq!(finding.code, Code::UnmanagedVm);
    assert!(finding.item.contains("/usr/bin/qemu"));
    world.policy = Some(POLICY.replacen("[host]", "[host]\nunmanaged = \"allowed\"", 1));
    assert!(world.round().verdict.all_trusted());
}

#[test]
fn refused_and_waiting_vms() {
    let mut world = web();
    stop(&mut world, 1, 5);
    world.create("web", 1, 2);
    world.statement.vms[0].run_state = "prelaunch".into();
    let appraisal = world.round();
    assert_eq!(vm_codes(&appraisal, "web"), [Code::VmNotStarted]);
    assert_eq!(vm_state(&appraisal, "web"), State::Unmeasured);
    let refuse = VmRefuse {
        reason: "the kernel is not in the references".into(),
        item: "kernel".into(),
        cause: RefuseCause::Reference,
    };
    world.log(12, Some(vm_ref(1, 2)), refuse);
    let appraisal = world.round();
    assert!(vm_codes(&appraisal, "web").contains(&Code::VmRefused));
    assert_eq!(vm_state(&appraisal, "web"), State::Untrusted);
}

#[test]
fn guests_that_claim_another_past() {
    let mut world = World::with_two_vms();
    let rewind = GuestRewind {
        boot: 0,
        count: 2,
        aggregate: Sha256::ZERO,
        claimed_count: 1,
        claimed: Sha256([1; 32]),
        boot_id: BootId([1; 16]),
    };
    world.log(13, Some(vm_ref(1, 1)), rewind);
    let appraisal = world.round();
    assert_eq!(vm_codes(&appraisal, "web"), [Code::GuestRewind]);
    assert_eq!(vm_state(&appraisal, "db"), State::Trusted);
    world.log(13, Some(vm_ref(2, 2)), GuestOverflow { boot: 0, count: 3, limit: "1 MiB".into() });
    assert_eq!(vm_codes(&world.round(), "db"), [Code::GuestOverflow]);
}

#[test]
fn a_second_list_needs_a_reset() {
    let mut world = World::with_two_vms();
    let empty = GuestBoot { boot: 1, count: 0, aggregate: Sha256::ZERO };
    world.statement.vms[0].boots.push(empty);
    world.guests.push(Guest { boot: 1, entries: vec![], ..world.guests[0].clone() });
    assert_eq!(vm_codes(&world.round(), "web"), [Code::GuestRewind]);
    world.log(12, Some(vm_ref(1, 1)), VmReset { by_guest: true, reason: "guest-reset".into() });
    assert!(world.round().verdict.all_trusted());
}

#[test]
fn a_start_that_is_measured_twice_is_the_last_one() {
    let mut world = web();
    let mut start =
        VmStart { components: components(), images: vec![image("disk0", 5, false), image("disk0/1", 6, true)] };
    start.components.retain(|part| part.role != Role::Initrd);
    world.log(12, Some(vm_ref(1, 1)), start);
    assert_eq!(vm_codes(&world.round(), "web"), [Code::ComponentInitrd]);
}

#[test]
fn a_new_uuid_does_not_make_a_changed_image_a_first_start() {
    let rule = "{ continuity = true }";
    let mut world = web();
    let from = POLICY.find("disk0 = ").unwrap() + "disk0 = ".len();
    let to = from + POLICY[from..].find('\n').unwrap();
    world.policy = Some(format!("{}{rule}{}", &POLICY[..from], &POLICY[to..]));
    let appraisal = world.round();
    assert!(appraisal.verdict.all_trusted(), "{:#?}", appraisal.verdict);
    assert!(appraisal.verdict.notes.iter().any(|n| n.contains("for the first time")), "the operator is told");
    stop(&mut world, 1, 50);
    for session in [2, 3] {
        world.start("web", 9, session, vec![image("disk0", 66, false), image("disk0/1", 6, true)]);
        world.entries(9, session, &[ima_entry("/bin/init", 1)]);
        let appraisal = world.round();
        assert_eq!(vm_codes(&appraisal, "web"), [Code::ImageUnwatched], "nor does starting it once more");
        world.stop(9, session, StopCause::GuestShutdown, vec![image("disk0", 66, false)]);
    }
    world.state.accept_image(vm_id(9), "disk0", digest(66));
    world.start("web", 9, 4, vec![image("disk0", 66, false), image("disk0/1", 6, true)]);
    world.entries(9, 4, &[ima_entry("/bin/init", 1)]);
    assert!(world.round().verdict.all_trusted());
}

#[test]
fn a_new_epoch_does_not_forget_what_was_found() {
    let mut world = web();
    stop(&mut world, 1, 50);
    start(&mut world, 2, 66);
    assert_eq!(vm_codes(&world.round(), "web"), [Code::ImageDiscontinuity]);
    for number in [2, 3] {
        let before = world.state.accepted.clone().unwrap().registers;
        world.statement.epoch.number = number;
        world.statement.epoch.id.0[0] = 9 + number as u8;
        world.begin(before);
        world.create("web", 1, 2);
        world.log(12, Some(vm_ref(1, 2)), attach(true, 1));
        world.guests.clear();
        world.entries(1, 2, &[ima_entry("/bin/init", 1)]);
        assert_eq!(vm_codes(&world.round(), "web"), [Code::ImageDiscontinuity]);
    }
}

#[test]
fn what_changed_in_a_gap() {
    let with = |images: Vec<onequote_evidence::event::Image>| {
        let mut world = web();
        world.log(12, Some(vm_ref(1, 1)), VmAttach { images, ..attach(true, 1) });
        vm_codes(&world.round(), "web")
    };
    let (disk, base) = (image("disk0", 77, false), image("disk0/1", 6, true));
    assert_eq!(with(vec![disk.clone(), base.clone()]), [], "the VM writes it");
    let other = onequote_evidence::event::Image { path: "/vm/other.img".into(), ..disk.clone() };
    assert_eq!(with(vec![other.clone(), base.clone()]), [Code::ComponentChanged]);
    let mut world = web();
    world.log(12, Some(vm_ref(1, 1)), VmAttach { images: vec![other, base.clone()], ..attach(true, 1) });
    stop(&mut world, 1, 77);
    start(&mut world, 2, 77);
    assert_eq!(vm_codes(&world.round(), "web"), [Code::ImageUnwatched], "nor is it what the next start expects");
    assert_eq!(with(vec![disk.clone(), base.clone(), image("usb0", 1, false)]), [Code::ComponentChanged]);
    assert_eq!(with(vec![disk, image("disk0/1", 6, false)]), [Code::ComponentChanged]);
}

#[test]
fn an_image_exchanged_in_a_running_vm_is_not_what_the_next_start_expects() {
    let mut world = web();
    let images = vec![image("disk0", 66, false)];
    let change = ConfigChange { what: "image".into(), before: "a".into(), after: "b".into(), images };
    world.log(12, Some(vm_ref(1, 1)), change);
    assert_eq!(vm_codes(&world.round(), "web"), [Code::ConfigChange]);
    stop(&mut world, 1, 66);
    start(&mut world, 2, 66);
    assert_eq!(vm_codes(&world.round(), "web"), [Code::ImageUnwatched]);
}

#[test]
fn a_vm_that_a_new_proxy_has_not_looked_at() {
    let mut world = World::with_two_vms();
    let EventBody::ProxyStart(again) = world.records[0].events().unwrap()[0].body.clone() else { panic!() };
    world.log(12, None, again);
    let appraisal = world.round();
    assert_eq!(vm_codes(&appraisal, "web"), [Code::VmUnmeasured]);
    assert_eq!(vm_codes(&appraisal, "db"), [Code::VmUnmeasured]);
    world.log(12, Some(vm_ref(1, 1)), attach(true, 1));
    let appraisal = world.round();
    assert_eq!((vm_state(&appraisal, "web"), vm_state(&appraisal, "db")), (State::Trusted, State::Untrusted));
}
