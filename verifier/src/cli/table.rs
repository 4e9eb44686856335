//! Verdicts for people: a table, then every finding in words with what to do.
//!
//! Names, paths and reasons can be chosen by a guest: whatever is not printable is escaped before it is shown.

use std::fmt::Write as _;

use comfy_table::{
    ContentArrangement, Table,
    presets::{NOTHING, UTF8_HORIZONTAL_ONLY},
};

use onequote_evidence::{digest::HashAlg, firmware::FirmwareLog};

use crate::{
    expectation::{Expected, HostTree},
    finding::Finding,
    result::Verdict,
    store::{
        Host,
        enrol::{AuditEntry, Standing},
    },
};

/// A verdict.
pub(super) fn verdict(verdict: &Verdict) -> String {
    let host = &verdict.host;
    let mut out = String::new();
    let tpm = if host.software_tpm { "  ·  SOFTWARE TPM: no root of trust" } else { "" };
    let _ = writeln!(out, "Host {}: {}{tpm}", host.id, host.state);
    if let Some(quote) = &verdict.quote {
        let policy = host.policy.map_or_else(|| "none".to_owned(), |version| version.to_string());
        let _ = writeln!(
            out,
            "One quote: epoch {}, {} records, TPM resets {}, restarts {}, clock {} s; policy version {policy}",
            quote.epoch.number,
            quote.records,
            quote.clock.reset_count,
            quote.clock.restart_count,
            quote.clock.clock / 1000
        );
    }
    if verdict.vms.is_empty() {
        out.push_str("No VMs.\n");
    } else {
        let mut table = new_table();
        table.set_header(["VM", "state", "run state", "entries", "session", "UUID", "first finding"]);
        for vm in &verdict.vms {
            let first = vm.findings.first().map_or_else(String::new, |f| format!("{}: {}", f.code, printable(&f.item)));
            let more = match vm.findings.len() as u64 + vm.findings_omitted {
                0 | 1 => String::new(),
                n => format!(" (+{})", n - 1),
            };
            table.add_row([
                printable(&vm.name),
                vm.state.to_string(),
                printable(&vm.run_state),
                vm.entries.to_string(),
                vm.session.to_string(),
                vm.uuid.to_string(),
                first + &more,
            ]);
        }
        let _ = writeln!(out, "{table}");
    }
    findings(&mut out, &format!("Host {}", host.id), &host.findings, host.findings_omitted);
    for vm in &verdict.vms {
        findings(&mut out, &format!("VM {}", printable(&vm.name)), &vm.findings, vm.findings_omitted);
    }
    if !verdict.notes.is_empty() {
        out.push_str("\nNotes:\n");
        for note in &verdict.notes {
            let _ = writeln!(out, "  - {}", printable(note));
        }
    }
    if !verdict.skipped.is_empty() {
        out.push_str("\nNot checked:\n");
        for skipped in &verdict.skipped {
            let _ = writeln!(out, "  - {}: {}", skipped.check, printable(&skipped.reason));
        }
    }
    let _ = writeln!(out, "\n{}", verdict.limits);
    out
}

/// One finding in words.
pub(super) fn finding(finding: &Finding) -> String {
    let mut out = format!("  {}: {}\n    {}", finding.code, printable(&finding.item), finding.code.meaning());
    for (word, value) in [("expected", &finding.expected), ("found", &finding.actual)] {
        if let Some(value) = value {
            let _ = write!(out, "\n    {word:<8}  {}", printable(value));
        }
    }
    let _ = write!(out, "\n    → {}", finding.code.advice());
    out
}

/// What images are expected to be.
pub(super) fn expectations(hosts: &[HostTree]) -> String {
    let mut table = new_table();
    table.set_header(["host", "VM", "image", "origin", "expected"]);
    for host in hosts {
        for vm in &host.vms {
            for image in &vm.images {
                let text = match &image.expected {
                    Expected::Policy { digests } => {
                        digests.iter().map(ToString::to_string).collect::<Vec<_>>().join(" or ")
                    }
                    Expected::Continuity { digest, by: Some(by) } => format!("{digest}, by {by}"),
                    Expected::Continuity { digest, by: None } => digest.to_string(),
                    Expected::InUse { broken: false } => "as this run will leave it".to_owned(),
                    Expected::InUse { broken: true } => "what this run's start already broke".to_owned(),
                    Expected::Unknown { why } => why.clone(),
                    Expected::Nothing => "taken as it is when it is seen first".to_owned(),
                    Expected::Absence => "the policy has no such image".to_owned(),
                };
                let origin = image.expected.word().to_owned();
                let host = host.id.to_string();
                table.add_row([host, printable(&vm.name), printable(&image.slot), origin, printable(&text)]);
            }
        }
    }
    if table.is_empty() { "No image was seen yet.\n".to_owned() } else { format!("{table}\n") }
}

/// The enrolled hosts.
pub(super) fn hosts(hosts: &[Host]) -> String {
    if hosts.is_empty() {
        return "No host is enrolled.\n".to_owned();
    }
    let mut table = new_table();
    table.set_header(["host", "state", "VMs", "policy", "TPM", "URL"]);
    for host in hosts {
        let verdict = host.verdict.as_ref();
        table.add_row([
            host.enrolment.id.to_string(),
            match host.standing {
                Standing::Enrolled => verdict.map_or_else(|| "never asked".to_owned(), |v| v.host.state.to_string()),
                withdrawn => withdrawn.to_string(),
            },
            verdict.map_or_else(String::new, |v| v.vms.len().to_string()),
            host.policy.map_or_else(|| "none".to_owned(), |policy| policy.version.to_string()),
            if host.enrolment.software_tpm { "software".to_owned() } else { "device".to_owned() },
            host.enrolment.url.clone(),
        ]);
    }
    format!("{table}\n")
}

/// The audit log. Details can be chosen by whoever asks to join.
pub(super) fn audit(entries: &[AuditEntry]) -> String {
    if entries.is_empty() {
        return "Nothing was done yet.\n".to_owned();
    }
    let mut table = new_table();
    table.set_header(["time", "who", "what", "host", "result", "detail"]);
    for entry in entries {
        let time = std::time::UNIX_EPOCH + std::time::Duration::from_millis(entry.time.0);
        table.add_row([
            humantime::format_rfc3339_seconds(time).to_string(),
            printable(&entry.who),
            entry.what.clone(),
            entry.host.as_ref().map_or_else(String::new, ToString::to_string),
            entry.result.clone(),
            printable(&entry.detail),
        ]);
    }
    format!("{table}\n")
}

fn findings(out: &mut String, of: &str, findings: &[Finding], omitted: u64) {
    if findings.is_empty() {
        return;
    }
    let _ = writeln!(out, "\n{of}:");
    for one in findings {
        let _ = writeln!(out, "{}", finding(one));
    }
    if omitted > 0 {
        let _ = writeln!(out, "  and {omitted} more");
    }
}

fn new_table() -> Table {
    let mut table = Table::new();
    table.load_preset(UTF8_HORIZONTAL_ONLY).set_content_arrangement(ContentArrangement::Disabled);
    table
}

/// The events of a firmware log, judged by their digests in `bank`.
pub(super) fn firmware(log: &FirmwareLog<'_>, bank: HashAlg) -> String {
    let mut table = new_table();
    table.load_preset(NOTHING);
    table.set_header(["event", "PCR", "type", bank.name(), "what was measured"]);
    for event in log.events() {
        let pcr = if event.is_extended() { event.pcr.to_string() } else { "–".to_owned() };
        let digest = event.digest(bank).filter(|_| event.is_extended()).map(hex::encode).unwrap_or_default();
        let words = printable(&log.describe(event, bank));
        table.add_row([event.number.to_string(), pcr, event.kind.to_string(), digest, words]);
    }
    format!("{table}\n")
}

/// Text that moves no cursor and hides nothing: control and direction characters are escaped.
fn printable(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        let hidden =
            matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{feff}');
        if c.is_control() || hidden { out.extend(c.escape_unicode()) } else { out.push(c) }
    }
    out
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;
    use crate::finding::Code;

    #[test]
    fn a_guest_cannot_draw_on_the_terminal() {
        let shown = finding(&Finding::new(Code::ImaUnknownFile, "/tmp/\u{1b}[2Jgood\u{202e}"));
        assert!(shown.contains("\\u{1b}[2J") && shown.contains("\\u{202e}"), "{shown}");
        assert!(!shown.contains('\u{1b}'));
    }
}
