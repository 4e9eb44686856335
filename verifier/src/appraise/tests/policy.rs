//! Step 11: what was truly measured, but is not what the operator wants.

use onequote_evidence::{
    event::{Component, Role},
    id::{Blob, Sha256},
};

use super::*;

/// `web` with other components, and with these entries.
fn web(change: impl FnOnce(&mut Vec<Component>), entries: &[Blob]) -> Appraisal {
    let mut world = World::new();
    world.policy = Some(POLICY.into());
    world.create("web", 1, 1);
    let mut parts = components();
    change(&mut parts);
    let images = vec![image("disk0", 5, false), image("disk0/1", 6, true)];
    world.log(12, Some(vm_ref(1, 1)), onequote_evidence::event::VmStart { components: parts, images });
    world.entries(1, 1, entries);
    world.round()
}

fn init() -> Vec<Blob> {
    vec![ima_entry("/bin/init", 1)]
}

#[test]
fn every_component_has_its_code() {
    let codes = [
        (Role::QemuBinary, Code::ComponentQemuBinary),
        (Role::Kernel, Code::ComponentKernel),
        (Role::Initrd, Code::ComponentInitrd),
        (Role::KernelCmdline, Code::ComponentKernelCmdline),
        (Role::Firmware, Code::ComponentFirmware),
    ];
    for (i, (role, code)) in codes.into_iter().enumerate() {
        let appraisal = web(|parts| parts[i].digest = digest(77), &init());
        let finding = &vm_findings(&appraisal, "web")[0];
        assert_eq!(finding.code, code);
        assert!(finding.item.starts_with(role.word()) && finding.expected.is_some(), "{finding:?}");
        let appraisal = web(|parts| drop(parts.remove(i)), &init());
        assert_eq!(vm_codes(&appraisal, "web"), [code], "missing");
    }
    let appraisal = web(|parts| parts.push(component(Role::ArgumentFile, 8)), &init());
    assert_eq!(vm_codes(&appraisal, "web"), [Code::ComponentArgumentFile]);
    // Arguments are judged only where the policy names them.
    assert!(web(|parts| parts.push(component(Role::Arguments, 8)), &init()).verdict.all_trusted());
}

#[test]
fn arguments_are_judged_when_named() {
    let mut world = World::with_two_vms();
    world.policy = Some(
        POLICY
            .replacen("runtime =", "arguments = [\"sha256:08\"]\nruntime =", 1)
            .replace("sha256:08\"", &format!("sha256:{}\"", "08".repeat(32))),
    );
    assert_eq!(vm_codes(&world.round(), "web"), [Code::ComponentArguments]);
}

#[test]
fn an_unknown_program_in_one_guest() {
    let mut world = World::with_two_vms();
    assert!(world.round().verdict.all_trusted());
    world.entries(1, 1, &[ima_entry("/tmp/evil", 66)]);
    let appraisal = world.round();
    let finding = &vm_findings(&appraisal, "web")[0];
    assert_eq!((finding.code, finding.item.as_str()), (Code::ImaUnknownFile, "/tmp/evil"));
    assert_eq!(vm_state(&appraisal, "web"), State::Untrusted);
    assert_eq!(vm_state(&appraisal, "db"), State::Trusted);
    assert_eq!(appraisal.verdict.host.state, State::Trusted);
    assert!(!appraisal.verdict.all_trusted());
}

#[test]
fn files_that_are_not_what_they_were() {
    let appraisal = web(|_| {}, &[ima_entry("/bin/init", 9)]);
    let finding = &vm_findings(&appraisal, "web")[0];
    assert_eq!(finding.code, Code::ImaWrongDigest);
    assert!(finding.expected.as_ref().unwrap().contains("0101"));
    let appraisal = web(|_| {}, &[ima_entry("/opt/init", 1)]);
    let finding = &vm_findings(&appraisal, "web")[0];
    assert_eq!(finding.code, Code::ImaUnknownFile);
    assert!(finding.expected.as_ref().unwrap().contains("/bin/init"));
    let appraisal = web(|_| {}, &[ima_entry_of("/var/log/x", &[0; 32], true)]);
    assert_eq!(vm_codes(&appraisal, "web"), [Code::ImaViolation]);
    let mut bad = ima_entry("/bin/init", 1);
    bad.0[5] ^= 1;
    assert_eq!(vm_codes(&web(|_| {}, &[bad]), "web"), [Code::ImaMalformed]);
    let mut other = ima_entry("/bin/init", 1);
    other.0[0] = 11;
    assert_eq!(vm_codes(&web(|_| {}, &[other]), "web"), [Code::ImaMalformed]);
    let aggregate = ima_entry_of("boot_aggregate", &[0; 32], false);
    assert!(web(|_| {}, &[aggregate, ima_entry("/bin/init", 1)]).verdict.all_trusted());
}

#[test]
fn ignored_paths_are_not_judged() {
    let mut world = World::with_two_vms();
    world.entries(1, 1, &[ima_entry("/var/cache/x", 66), ima_entry_of("/var/log/x", &[0; 32], true)]);
    assert_eq!(vm_codes(&world.round(), "web"), [Code::ImaViolation, Code::ImaUnknownFile]);
    world.policy = Some(POLICY.replacen("runtime =", "ima_ignore = [\"/var/*\"]\nruntime =", 1));
    assert!(world.round().verdict.all_trusted());
}

#[test]
fn every_boot_of_the_session_counts() {
    let mut world = World::with_two_vms();
    world.entries(1, 1, &[ima_entry("/tmp/evil", 66)]);
    let vm = vm_ref(1, 1);
    let reset = onequote_evidence::event::VmReset { by_guest: true, reason: "guest-reset".into() };
    world.log(12, Some(vm), reset);
    world.statement.vms[0].boots.push(onequote_evidence::statement::GuestBoot {
        boot: 1,
        count: 0,
        aggregate: Sha256::ZERO,
    });
    assert_eq!(vm_codes(&world.round(), "web"), [Code::ImaUnknownFile]);
}

#[test]
fn silent_guests() {
    let mut world = World::with_two_vms();
    world.statement.vms[0].last_contact = Some(61_000);
    let appraisal = world.round();
    assert_eq!(vm_codes(&appraisal, "web"), [Code::RuntimeStale]);
    assert_eq!(vm_state(&appraisal, "web"), State::Stale);
    world.statement.vms[0].run_state = "paused".into();
    assert!(world.round().verdict.all_trusted());
    let mut world = World::new();
    world.policy = Some(POLICY.into());
    world.start("web", 1, 1, vec![image("disk0", 5, false), image("disk0/1", 6, true)]);
    assert_eq!(vm_codes(&world.round(), "web"), [Code::RuntimeMissing]);
}

#[test]
fn the_host_comes_first() {
    let mut world = World::with_two_vms();
    world.policy = Some(format!("{POLICY}{NO_FIRMWARE_LOG}"));
    world.pcrs.insert(0, Sha256([1; 32]));
    let finding = only(&world.round()).clone();
    assert_eq!((finding.code, finding.item.as_str()), (Code::HostRegister, "PCR 0"));
    let mut world = World::with_two_vms();
    world.policy = Some(POLICY.replacen("[host]", "[host]\nsoftware_tpm = false", 1));
    assert_eq!(only(&world.round()).code, Code::SoftwareTpm);
}

#[test]
fn findings_are_bounded() {
    let mut world = World::with_two_vms();
    let many: Vec<Blob> = (0..300).map(|i| ima_entry(&format!("/tmp/{i}"), 9)).collect();
    world.entries(1, 1, &many);
    let appraisal = world.round();
    let vm = &appraisal.verdict.vms[0];
    assert_eq!((vm.findings.len(), vm.findings_omitted), (200, 100));
}
