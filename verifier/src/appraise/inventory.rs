//! Step 10: that the host's statement names every VM that runs by the log, and no other.

use std::collections::BTreeMap;

use onequote_evidence::{
    event::VmRef,
    id::SessionId,
    statement::{Statement, VmState},
};

use super::{
    found::Notes,
    sessions::{Session, Sessions},
};
use crate::{
    finding::{Code, Finding},
    policy::{Consent, HostRule},
};

/// A VM that is there by log or statement.
#[derive(Debug, Clone)]
pub struct Present<'a> {
    /// Which.
    pub vm: VmRef,
    /// Its name.
    pub name: String,
    /// What the host states.
    pub stated: Option<&'a VmState>,
    /// What the log says.
    pub session: Option<&'a Session>,
}

/// Every VM that is there, and what does not fit together. The caller must trust statement and log.
#[must_use]
pub fn check<'a>(
    statement: &'a Statement,
    sessions: &'a Sessions,
    rule: &HostRule,
    notes: &mut Notes,
) -> (Vec<Present<'a>>, Vec<Finding>) {
    let mut findings = Vec::new();
    let mut present: BTreeMap<(onequote_evidence::id::VmId, SessionId), Present<'a>> = BTreeMap::new();
    for vm in &statement.vms {
        let session = sessions.by_id.get(&vm.session).filter(|s| s.vm == vm.vm).map(|s| &**s);
        if session.is_none() {
            let finding = Finding::new(Code::VmNotInLog, format!("{} ({}), session {}", vm.name, vm.vm, vm.session));
            let seen = sessions.by_id.contains_key(&vm.session) || sessions.ended.contains_key(&vm.session);
            let why = if seen { "ended by the log" } else { "not in the log" };
            findings.push(finding.actual(why));
        }
        let vm_ref = VmRef { vm: vm.vm, session: vm.session };
        present.insert((vm.vm, vm.session), Present { vm: vm_ref, name: vm.name.clone(), stated: Some(vm), session });
    }
    for (id, session) in &sessions.by_id {
        let vm_ref = VmRef { vm: session.vm, session: *id };
        present.entry((session.vm, *id)).or_insert_with(|| {
            let item = format!("{} ({}), session {id}", session.name, session.vm);
            findings.push(Finding::new(Code::VmMissing, item));
            Present { vm: vm_ref, name: session.name.clone(), stated: None, session: Some(session) }
        });
    }
    for other in &statement.unmanaged {
        let item = format!("{} (pid {})", other.program, other.pid);
        match rule.unmanaged {
            Consent::Refused => findings.push(Finding::new(Code::UnmanagedVm, item)),
            Consent::Allowed => notes.push(format!("runs unmanaged, as allowed: {item}")),
        }
    }
    (present.into_values().collect(), findings)
}
