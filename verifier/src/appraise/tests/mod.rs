//! Attacks: one for each code, tried on evidence that is true but for one thing.

mod authenticity;
mod changes;
mod epochs;
mod firmware;
mod folds;
mod history;
mod ima;
mod policy;
mod programs;
mod segments;

use super::{Appraisal, testing::*};
use crate::{
    finding::{Code, Finding},
    result::State,
};

/// Codes of the host's findings.
fn host_codes(appraisal: &Appraisal) -> Vec<Code> {
    appraisal.verdict.host.findings.iter().map(|f| f.code).collect()
}

/// Findings of a VM.
fn vm_findings<'a>(appraisal: &'a Appraisal, name: &str) -> &'a [Finding] {
    let vm = appraisal.verdict.vms.iter().find(|vm| vm.name == name);
    &vm.unwrap_or_else(|| panic!("no VM {name}")).findings
}

fn vm_codes(appraisal: &Appraisal, name: &str) -> Vec<Code> {
    vm_findings(appraisal, name).iter().map(|f| f.code).collect()
}

fn vm_state(appraisal: &Appraisal, name: &str) -> State {
    appraisal.verdict.vms.iter().find(|vm| vm.name == name).unwrap().state
}

/// The one finding that the host has.
#[track_caller]
fn only(appraisal: &Appraisal) -> &Finding {
    let findings = &appraisal.verdict.host.findings;
    assert_eq!(findings.len(), 1, "{findings:#?}");
    assert_ne!(appraisal.verdict.host.state, State::Trusted);
    assert!(appraisal.verdict.vms.iter().all(|vm| vm.state != State::Trusted), "a VM is better than its host");
    &findings[0]
}

#[test]
fn the_true_host_is_trusted() {
    let mut world = World::with_two_vms();
    let appraisal = world.round();
    assert!(appraisal.verdict.all_trusted(), "{:#?}", appraisal.verdict);
    let entries: Vec<u64> = appraisal.verdict.vms.iter().map(|vm| vm.entries).collect();
    assert_eq!(entries, [2, 3]);
    assert!(appraisal.verdict.host.software_tpm);
    assert!(appraisal.verdict.limits.contains("compromised"));
    let skipped: Vec<&str> = appraisal.verdict.skipped.iter().map(|s| s.check.as_str()).collect();
    assert_eq!(skipped, ["firmware-log", "host-ima"]);
    // Nothing new, and something new: both stay trusted.
    assert!(world.round().verdict.all_trusted());
    world.entries(1, 1, &[ima_entry("/bin/sh", 2)]);
    assert!(world.round().verdict.all_trusted());
    let json = serde_json::to_value(&appraisal.verdict).unwrap();
    assert_eq!(json["vms"][0]["name"], "web");
    assert_eq!(json["quote"]["reset_count"], 5);
}

#[test]
fn without_a_policy_nothing_is_trusted() {
    let mut world = World::with_two_vms();
    world.policy = None;
    let appraisal = world.round();
    assert_eq!(only(&appraisal).code, Code::HostWithoutPolicy);
    assert_eq!(appraisal.verdict.host.state, State::Unmeasured);
    assert_eq!(vm_codes(&appraisal, "web"), [Code::VmWithoutPolicy]);
    assert_eq!(vm_state(&appraisal, "web"), State::Unmeasured);
    assert!(appraisal.state.is_some() && appraisal.facts.is_some());
}

#[test]
fn what_is_learned_is_trusted() {
    let mut world = World::with_two_vms();
    world.policy = None;
    let facts = world.round().facts.unwrap();
    world.policy = Some(crate::policy::learn::propose(&facts));
    let appraisal = world.round();
    assert!(appraisal.verdict.all_trusted(), "{}\n{:#?}", world.policy.unwrap(), appraisal.verdict);
    assert!(world.policy.unwrap().contains("continuity = true"));
}
