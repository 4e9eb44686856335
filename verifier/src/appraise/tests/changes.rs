//! Changes to VMs that were measured: which are findings, and which words of the policy allow them.

use onequote_evidence::{
    digest::FileDigestAlg,
    event::{
        CommandOutcome, ConfigChange, CrashCause, EventBody, MediumChange, MigrateIn, MigrateOut, MigrationStatus,
        MonitorCommand, RefuseCause, SnapshotLoad, SnapshotSave, VmAttach, VmCrash, VmDelete, VmRefuse,
    },
    id::Sha256,
};

use super::{
    history::{start, stop, web},
    *,
};

/// `POLICY` with another line in the rule of `web`.
fn with(line: &str) -> Option<String> {
    Some(POLICY.replacen("runtime =", &format!("{line}\nruntime ="), 1))
}

/// What an event makes of `web`, by this policy.
fn after(policy: Option<String>, body: impl Into<EventBody>) -> (Vec<Code>, Vec<String>) {
    let mut world = web();
    world.policy = policy;
    world.log(12, Some(vm_ref(1, 1)), body);
    let appraisal = world.round();
    (vm_codes(&appraisal, "web"), appraisal.verdict.notes)
}

#[test]
fn each_kind_of_change_has_its_code_and_its_consent() {
    let plain = || Some(POLICY.to_owned());
    let medium = || MediumChange {
        slot: "cd0".into(),
        before: String::new(),
        after: "cd0: /iso (raw, read-only)".into(),
        images: vec![],
    };
    assert_eq!(after(plain(), medium()).0, [Code::MediumChange]);
    assert_eq!(after(with("changes = [\"medium-*\"]"), medium()).0, []);
    assert_eq!(after(with("changes = [\"device\"]"), medium()).0, [Code::MediumChange]);
    let save = || SnapshotSave { tag: "s1".into(), images: vec![] };
    assert_eq!(after(plain(), save()).0, [Code::ConfigChange]);
    assert_eq!(after(with("changes = [\"snapshot-save\"]"), save()).0, []);
    let load = || SnapshotLoad { tag: "s1".into(), images: vec![image("disk0", 5, false)] };
    assert_eq!(after(with("changes = \"allowed\""), load()).0, [Code::SnapshotLoad], "rollback has a word of its own");
    assert_eq!(after(with("rollback = \"allowed\""), load()).0, []);
    let migrated = |status| MigrateIn { status, source: "tcp:a:1".into() };
    assert_eq!(after(plain(), migrated(MigrationStatus::Started)).0, []);
    assert_eq!(after(plain(), migrated(MigrationStatus::Completed)).0, [Code::MigratedIn]);
    assert_eq!(after(with("migration = \"allowed\""), migrated(MigrationStatus::Completed)).0, []);
    let (codes, notes) = after(plain(), VmCrash { cause: CrashCause::GuestPanic, detail: "pause".into() });
    assert!(codes.is_empty() && notes.iter().any(|note| note.contains("panicked")), "{notes:?}");
}

#[test]
fn commands_of_management_tools() {
    let command = |name: &str, outcome| MonitorCommand {
        client: "client 1, pid 9".into(),
        command: name.into(),
        arguments: "{}".into(),
        digest: Sha256::ZERO,
        outcome,
        detail: String::new(),
        files: vec![],
    };
    let plain = || Some(POLICY.to_owned());
    assert_eq!(after(plain(), command("human-monitor-command", CommandOutcome::Forwarded)).0, [Code::MonitorCommand]);
    assert_eq!(after(plain(), command("system_powerdown", CommandOutcome::Forwarded)).0, []);
    let allowed = with("commands = [\"block*\"]");
    assert_eq!(after(allowed.clone(), command("block_resize", CommandOutcome::Forwarded)).0, []);
    assert_eq!(after(allowed, command("cont", CommandOutcome::Forwarded)).0, [Code::MonitorCommand]);
    for outcome in [CommandOutcome::Refused, CommandOutcome::Unmeasurable] {
        let (codes, notes) = after(plain(), command("human-monitor-command", outcome));
        assert!(codes.is_empty() && notes.iter().any(|note| note.contains("not carried out")), "{notes:?}");
    }
}

#[test]
fn another_monitor_is_found_at_the_start_and_later() {
    let mut world = web();
    stop(&mut world, 1, 50);
    world.monitors = vec!["-qmp unix:/tmp/own".into()];
    start(&mut world, 2, 50);
    let appraisal = world.round();
    assert_eq!(vm_codes(&appraisal, "web"), [Code::SecondMonitor]);
    assert!(vm_findings(&appraisal, "web")[0].item.contains("/tmp/own"));
    world.policy = with("monitors = \"allowed\"");
    assert!(world.round().verdict.all_trusted());
    let gdb = |before: &str, after: &str| ConfigChange {
        what: "monitor".into(),
        before: before.into(),
        after: after.into(),
        images: vec![],
    };
    assert_eq!(after(Some(POLICY.into()), gdb("", "gdb")).0, [Code::SecondMonitor]);
    assert_eq!(after(Some(POLICY.into()), gdb("gdb", "")).0, []);
    assert_eq!(after(with("monitors = \"allowed\""), gdb("", "gdb")).0, []);
}

#[test]
fn why_a_vm_was_refused_is_told_apart() {
    for (cause, code) in [
        (RefuseCause::LoadedDiffers, Code::LoadedDiffers),
        (RefuseCause::Continued, Code::VmContinued),
        (RefuseCause::Impostor, Code::MonitorImpostor),
        (RefuseCause::Unmeasurable, Code::VmRefused),
        (RefuseCause::Changed, Code::VmRefused),
    ] {
        let mut world = web();
        stop(&mut world, 1, 5);
        world.create("web", 1, 2);
        world.log(12, Some(vm_ref(1, 2)), VmRefuse { reason: "why".into(), item: "firmware".into(), cause });
        let appraisal = world.round();
        assert!(vm_codes(&appraisal, "web").contains(&code), "{cause}");
        assert_eq!(vm_state(&appraisal, "web"), State::Untrusted);
    }
}

#[test]
fn a_vm_that_went_elsewhere_or_was_deleted_comes_back_unknown() {
    let out = || MigrateOut {
        status: MigrationStatus::Completed,
        target: "tcp:b:1".into(),
        images: vec![image("disk0", 50, false)],
        unmeasured: vec![],
    };
    let mut world = web();
    world.log(12, Some(vm_ref(1, 1)), out());
    stop(&mut world, 1, 51);
    start(&mut world, 2, 51);
    assert_eq!(vm_codes(&world.round(), "web"), [Code::ImageUnwatched]);
    // Where migration is allowed, it goes on as this host left it.
    for (disk, codes) in [(50, vec![]), (66, vec![Code::ImageDiscontinuity])] {
        let mut world = web();
        world.policy = with("migration = \"allowed\"");
        world.log(12, Some(vm_ref(1, 1)), out());
        stop(&mut world, 1, disk);
        start(&mut world, 2, disk);
        assert_eq!(vm_codes(&world.round(), "web"), codes);
    }
    // Deleted in a later epoch than it ran in.
    let mut world = web();
    stop(&mut world, 1, 50);
    world.round();
    world.reboot();
    let delete = VmDelete { name: "web".into(), images: vec![image("disk0", 50, false)], unmeasured: vec![] };
    world.log(12, Some(vm_ref(1, 1)), delete.clone());
    assert!(world.round().verdict.all_trusted());
    start(&mut world, 2, 50);
    assert_eq!(vm_codes(&world.round(), "web"), [Code::ImageUnwatched]);
    // A host cannot make a VM that runs disappear so.
    let mut world = web();
    world.log(12, Some(vm_ref(1, 1)), delete);
    assert_eq!(host_codes(&world.round()), [Code::VmNotInLog]);
}

#[test]
fn digests_of_two_kinds_are_not_held_against_each_other() {
    let mut world = web();
    stop(&mut world, 1, 50);
    let mut other = image("disk0", 50, false);
    other.digest.alg = FileDigestAlg::FsVerity;
    world.start("web", 1, 2, vec![other, image("disk0/1", 6, true)]);
    world.entries(1, 2, &[ima_entry("/bin/init", 1)]);
    assert_eq!(vm_codes(&world.round(), "web"), [Code::ImageUnwatched]);
}

#[test]
fn notes_are_bounded() {
    let mut world = web();
    world.policy = with("monitors = \"allowed\"");
    for n in 0..600 {
        let change =
            ConfigChange { what: "monitor".into(), before: String::new(), after: format!("m{n}"), images: vec![] };
        world.log(12, Some(vm_ref(1, 1)), change);
    }
    let notes = world.round().verdict.notes;
    assert_eq!(notes.len(), crate::result::MAX_NOTES);
    assert!(notes[0].contains("left out") && notes.last().unwrap().contains("m599"), "{notes:?}");
}

#[test]
fn changes_to_a_running_vm() {
    let change = ConfigChange {
        what: "device".into(),
        before: String::new(),
        after: "usb0:usb-storage".into(),
        images: vec![image("usb0", 1, false)],
    };
    let mut world = web();
    world.log(12, Some(vm_ref(1, 1)), change);
    assert_eq!(vm_codes(&world.round(), "web"), [Code::ConfigChange]);
    world.policy = Some(POLICY.replacen("runtime =", "changes = \"allowed\"\nruntime =", 1));
    assert_eq!(vm_codes(&world.round(), "web"), [Code::ImageUnlisted]);
    let change = ConfigChange {
        what: "unmeasured image".into(),
        before: String::new(),
        after: "n: nbd://h (raw, writable)".into(),
        images: vec![],
    };
    world.log(12, Some(vm_ref(1, 1)), change);
    assert_eq!(vm_codes(&world.round(), "web"), [Code::ImageUnlisted, Code::ConfigChange]);
}

#[test]
fn a_fault_that_has_passed_is_over_when_the_vm_was_measured() {
    for (cause, stays) in [
        (RefuseCause::Unmeasurable, false),
        (RefuseCause::Log, false),
        (RefuseCause::Duplicate, false),
        (RefuseCause::Continued, true),
        (RefuseCause::Reference, true),
        (RefuseCause::LoadedDiffers, true),
        (RefuseCause::Impostor, true),
        (RefuseCause::Changed, true),
    ] {
        let mut world = web();
        stop(&mut world, 1, 5);
        world.create("web", 1, 2);
        world.log(12, Some(vm_ref(1, 2)), VmRefuse { reason: "why".into(), item: String::new(), cause });
        let images = vec![image("disk0", 5, false), image("disk0/1", 6, true)];
        world.log(12, Some(vm_ref(1, 2)), VmAttach { components: components(), images, again: false });
        world.entries(1, 2, &[ima_entry("/bin/init", 1)]);
        let codes = vm_codes(&world.round(), "web");
        assert_eq!(codes.len(), 1 + usize::from(stays), "{cause}: {codes:?}");
        assert!(codes.contains(&Code::AttachedWhileRunning), "{cause}: {codes:?}");
    }
}

#[test]
fn an_image_that_went_is_expected_as_it_was_left() {
    let went = || ConfigChange {
        what: "image".into(),
        before: "disk0: /vm/disk0.img (raw, writable)".into(),
        after: String::new(),
        images: vec![image("disk0", 40, false)],
    };
    for (policy, disk, codes) in [
        (with("changes = [\"image\"]"), 40, vec![]),
        (with("changes = [\"image\"]"), 66, vec![Code::ImageDiscontinuity]),
        (Some(POLICY.to_owned()), 40, vec![Code::ImageUnwatched]),
    ] {
        let mut world = web();
        world.policy = policy;
        world.log(12, Some(vm_ref(1, 1)), went());
        stop(&mut world, 1, 66);
        start(&mut world, 2, disk);
        assert_eq!(vm_codes(&world.round(), "web"), codes);
    }
}
