//! What was done to a VM after it had been measured, and whether its rule allows that.
//!
//! A change that is allowed becomes a note, any other a finding. Whoever changes an image of a running VM takes away
//! what was known of it: the next start finds it unwatched unless the policy names its digest.

use onequote_evidence::event::{
    CommandOutcome, ConfigChange, CrashCause, EventBody, Image, MediumChange, MigrateIn, MigrateOut, MigrationStatus,
    MonitorCommand, SnapshotLoad, SnapshotSave, VmCrash,
};

use super::{
    found::Notes,
    images,
    sessions::Session,
    state::{Place, VmExpectation},
};
use crate::{
    finding::{Code, Finding},
    policy::{Consent, VmRule},
};

/// What a change says it is about when the proxy could not measure what came of it.
const UNMEASURED: &str = "unmeasured image";

/// What a change says it is about when it is another way to command QEMU.
const MONITOR: &str = "monitor";

/// Takes in an event about a change. Tells whether it is one.
pub(super) fn take(
    session: &mut Session,
    tree: &mut VmExpectation,
    body: &EventBody,
    rule: Option<&VmRule>,
    by: &Place,
    notes: &mut Notes,
) -> bool {
    let mut change = Change { session, tree, rule, by, notes };
    match body {
        EventBody::ConfigChange(ConfigChange { what, before, after, images }) => match what.as_str() {
            MONITOR if after.is_empty() => change.note(&format!("monitor {before} is gone")),
            MONITOR => monitor(change.session, after, rule, by, change.notes),
            _ => change.judge(Code::ConfigChange, what, what, (before, after), images),
        },
        EventBody::MediumChange(MediumChange { slot, before, after, images }) => {
            change.judge(Code::MediumChange, "medium-change", slot, (before, after), images);
        }
        EventBody::SnapshotSave(SnapshotSave { tag, images }) => {
            change.judge(Code::ConfigChange, "snapshot-save", "snapshot-save", ("", tag), images);
        }
        EventBody::SnapshotLoad(load) => change.snapshot_load(load),
        EventBody::MigrateOut(out) => change.migrate_out(out),
        EventBody::MigrateIn(migrated) => change.migrate_in(migrated),
        EventBody::MonitorCommand(command) => change.command(command),
        EventBody::VmCrash(crash) => change.crash(crash),
        _ => return false,
    }
    true
}

/// Judges another way to command QEMU.
pub(super) fn monitor(session: &mut Session, monitor: &str, rule: Option<&VmRule>, by: &Place, notes: &mut Notes) {
    if rule.is_some_and(|rule| rule.monitors == Consent::Allowed) {
        notes.push(format!("{}: can also be commanded by {monitor}, as allowed", session.name));
    } else {
        let item = format!("{monitor} (record {})", by.record);
        session.findings.push(Finding::new(Code::SecondMonitor, item));
    }
}

struct Change<'a> {
    session: &'a mut Session,
    tree: &'a mut VmExpectation,
    rule: Option<&'a VmRule>,
    by: &'a Place,
    notes: &'a mut Notes,
}

impl Change<'_> {
    /// Judges a change that the rule may allow by its `word`.
    fn judge(&mut self, code: Code, word: &str, item: &str, (before, after): (&str, &str), images: &[Image]) {
        // What was not measured is not known to be allowed.
        if word != UNMEASURED && self.rule.is_some_and(|rule| rule.changes.allow(word)) {
            self.note(&format!("{item} changed: {before} → {after}"));
            if after.is_empty() {
                images::gone(self.tree, images, self.by);
            } else {
                self.session.findings.extend(images::changed(self.tree, images, self.rule, self.by));
            }
            return;
        }
        images::forget(self.tree, images, "it was changed while the VM ran", self.by);
        let none_if_empty = |text: &str| if text.is_empty() { "nothing".to_owned() } else { text.to_owned() };
        let finding = self.finding(code, item).expected(none_if_empty(before));
        self.session.findings.push(finding.actual(none_if_empty(after)));
    }

    fn snapshot_load(&mut self, SnapshotLoad { tag, images }: &SnapshotLoad) {
        // Its guest goes on from another past than the one it told.
        self.session.reboots += 1;
        images::forget(self.tree, images, "the VM was put back to a state saved before", self.by);
        let tag = if tag.is_empty() { "unknown" } else { tag };
        if self.rule.is_some_and(|rule| rule.rollback == Consent::Allowed) {
            self.note(&format!("went back to snapshot {tag}, as allowed"));
        } else {
            let finding = self.finding(Code::SnapshotLoad, &format!("snapshot {tag}"));
            self.session.findings.push(finding);
        }
    }

    fn migrate_out(&mut self, out: &MigrateOut) {
        if out.status == MigrationStatus::Completed {
            images::migrated_out(self.tree, out, self.rule, self.by);
        }
        self.note(&format!("migration to {}: {}", shown(&out.target), out.status));
    }

    fn migrate_in(&mut self, MigrateIn { status, source }: &MigrateIn) {
        let source = shown(source);
        if *status == MigrationStatus::Completed {
            self.session.reboots += 1;
            if self.rule.is_none_or(|rule| rule.migration == Consent::Refused) {
                let finding = self.finding(Code::MigratedIn, source);
                self.session.findings.push(finding);
            }
        }
        self.note(&format!("migration from {source}: {status}"));
    }

    fn command(&mut self, given: &MonitorCommand) {
        let MonitorCommand { client, command, arguments, outcome, detail, .. } = given;
        let allowed = self.rule.is_some_and(|rule| rule.commands.iter().any(|pattern| pattern.fits(command)));
        match outcome {
            CommandOutcome::Forwarded if allowed => self.note(&format!("{command} by {client}, as allowed")),
            CommandOutcome::Forwarded => {
                let finding = self.finding(Code::MonitorCommand, command).actual(format!("{arguments} by {client}"));
                self.session.findings.push(finding);
            }
            // It changed nothing.
            CommandOutcome::Refused | CommandOutcome::Unmeasurable => {
                self.note(&format!("{command} by {client} was not carried out: {detail}"));
            }
        }
    }

    fn crash(&mut self, VmCrash { cause, detail }: &VmCrash) {
        let what = match cause {
            CrashCause::GuestPanic => "its guest panicked",
            CrashCause::Watchdog => "its guest did not serve the watchdog",
            CrashCause::InternalError => "QEMU stopped it over an error",
            CrashCause::MemoryFailure => "memory under it failed",
        };
        self.note(&format!("{what}: {detail}"));
    }

    fn finding(&self, code: Code, item: &str) -> Finding {
        Finding::new(code, format!("{item} (record {})", self.by.record))
    }

    fn note(&mut self, what: &str) {
        self.notes.push(format!("record {}: {}: {what}", self.by.record, self.session.name));
    }
}

fn shown(place: &str) -> &str {
    if place.is_empty() { "an unknown place" } else { place }
}
