//! Step 11: policy. Host first, then each VM. Whatever comes in here was shown to be what the host measured.

use std::collections::BTreeMap;

use onequote_evidence::{
    event::{Component, RefuseCause, Role, VmStart},
    id::Sha256,
    statement::VmState,
};

use super::{inventory::Present, registers::QuotedRegisters, sessions::Session};
use crate::{
    finding::{Code, Finding},
    policy::{Allowed, Consent, HostRule, Runtime, VmRule},
    result::Skipped,
};

/// Judges the host's registers. The caller must trust their values.
#[must_use]
pub fn host(rule: &HostRule, quoted: &QuotedRegisters, software_tpm: bool, skipped: &mut Vec<Skipped>) -> Vec<Finding> {
    let mut findings = Vec::new();
    if software_tpm && rule.software_tpm == Some(false) {
        findings.push(Finding::new(Code::SoftwareTpm, "TPM"));
    }
    if rule.registers.is_empty() {
        skipped.push(Skipped::new("host-registers", "the policy names no register values"));
    }
    for (pcr, allowed) in &rule.registers {
        let actual = quoted.sha256(pcr.0);
        if actual.is_some_and(|actual| allowed.as_slice().contains(&actual)) {
            continue;
        }
        let values: Vec<String> = allowed.as_slice().iter().map(Sha256::to_string).collect();
        let finding = Finding::new(Code::HostRegister, format!("PCR {}", pcr.0)).expected(values.join(" or "));
        findings.push(finding.actual(actual.map_or_else(|| "not quoted".to_owned(), |value| value.to_string())));
    }
    findings
}

/// Judges what a VM was started from and how it is watched; its guest's lists are for [`super::ima`].
#[must_use]
pub fn vm(present: &Present<'_>, rule: Option<&VmRule>) -> Vec<Finding> {
    let mut findings = Vec::new();
    let session = present.session;
    if let Some(refused) = session.and_then(|s| s.refused.as_ref()) {
        let item = if refused.item.is_empty() { "VM".to_owned() } else { refused.item.clone() };
        let code = match refused.cause {
            RefuseCause::LoadedDiffers => Code::LoadedDiffers,
            RefuseCause::Continued => Code::VmContinued,
            RefuseCause::Impostor => Code::MonitorImpostor,
            _ => Code::VmRefused,
        };
        findings.push(Finding::new(code, item).actual(&refused.reason));
    }
    findings.extend(measured(present, rule));
    let Some(rule) = rule else {
        findings.push(Finding::new(Code::VmWithoutPolicy, &present.name));
        return findings;
    };
    if let Some(start) = session.and_then(|s| s.start.as_ref()) {
        findings.extend(components(start, rule));
    }
    findings.extend(runtime(present, rule));
    findings
}

/// Whether the VM was measured, and before it ran.
fn measured(present: &Present<'_>, rule: Option<&VmRule>) -> Option<Finding> {
    let waits = present.stated.is_some_and(|s| matches!(s.run_state.as_str(), "prelaunch" | "inmigrate"));
    match present.session {
        // Until the proxy has looked at it again, nobody knows what happened to it meanwhile.
        Some(Session { unseen_since: Some(record), start: Some(_), refused: None, .. }) => {
            let item = format!("{} since record {record}", present.name);
            Some(Finding::new(Code::VmUnmeasured, item).actual("not measured since the proxy was started again"))
        }
        Some(Session { before: true, .. }) => None,
        Some(Session { start: Some(_), .. }) => {
            let allowed = rule.is_some_and(|rule| rule.attach == Consent::Allowed);
            (!allowed).then(|| Finding::new(Code::AttachedWhileRunning, &present.name))
        }
        _ if waits => Some(Finding::new(Code::VmNotStarted, &present.name)),
        _ => Some(Finding::new(Code::VmUnmeasured, &present.name)),
    }
}

fn components(start: &VmStart, rule: &VmRule) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut seen: BTreeMap<Role, u32> = BTreeMap::new();
    for component in &start.components {
        *seen.entry(component.role).or_default() += 1;
        let allowed = rule.allowed(component.role);
        let Allowed::Digests(list) = allowed else { continue };
        if !list.iter().any(|reference| reference.digest == component.digest) {
            let item = [component.role.word(), &component.path].join(" ").trim_end().to_owned();
            findings.push(Finding::new(code(component.role), item).expected(allowed).actual(shown(component)));
        }
    }
    let demanded = [Role::QemuBinary, Role::Arguments, Role::Kernel, Role::Initrd, Role::KernelCmdline, Role::Firmware];
    for role in demanded.into_iter().filter(|role| !seen.contains_key(role)) {
        let allowed = rule.allowed(role);
        if matches!(allowed, Allowed::Digests(list) if !list.is_empty()) {
            findings.push(Finding::new(code(role), role.word()).expected(allowed).actual("none"));
        }
    }
    findings
}

/// The text of a part where it is the measured one, else its digest.
fn shown(component: &Component) -> String {
    match &component.text {
        Some(text) if component.role == Role::KernelCmdline => format!("{text} ({})", component.digest),
        _ => component.digest.to_string(),
    }
}

fn code(role: Role) -> Code {
    match role {
        Role::QemuBinary => Code::ComponentQemuBinary,
        Role::Arguments => Code::ComponentArguments,
        Role::ArgumentFile => Code::ComponentArgumentFile,
        Role::Kernel => Code::ComponentKernel,
        Role::Initrd => Code::ComponentInitrd,
        Role::KernelCmdline => Code::ComponentKernelCmdline,
        Role::Firmware => Code::ComponentFirmware,
    }
}

/// Whether the guest's list is there and goes on, as far as the rule wants it.
fn runtime(present: &Present<'_>, rule: &VmRule) -> Option<Finding> {
    let stated: &VmState = present.stated?;
    if rule.runtime == Runtime::Optional || stated.run_state == "prelaunch" {
        return None;
    }
    if stated.boots.iter().all(|boot| boot.count == 0) {
        return Some(Finding::new(Code::RuntimeMissing, &present.name));
    }
    // A VM that is stopped cannot speak; what it has measured stands.
    if stated.run_state != "running" {
        return None;
    }
    let limit = rule.max_silence.saturating_mul(1000);
    let silent = match stated.last_contact {
        Some(age) if age <= limit => return None,
        Some(age) => format!("silent for {} s", age / 1000),
        None => "not heard of in this boot".to_owned(),
    };
    let finding = Finding::new(Code::RuntimeStale, &present.name);
    Some(finding.expected(format!("a word every {} s", rule.max_silence)).actual(silent))
}
