//! Proposes rules about the host's boot from its firmware's event log.

use std::fmt::Write as _;

use onequote_evidence::{
    digest::{HashAlg, sha256},
    firmware::{Event, Guid, Meaning, wide_text},
    id::{Blob, Sha256},
    pcr::{QUOTED_PCRS, Register},
};

use super::{comment, quote};
use crate::{
    appraise::{
        Facts,
        firmware::{BANK, Boot, judge},
        found::Notes,
    },
    policy::{FirmwareRule, PlainDigest, StubDigest},
};

const SECURE_BOOT_PCR: u8 = 7;
const IMAGES_PCR: u8 = 4;
const FILES_PCR: u8 = 9;
const COMMANDS_PCR: u8 = 8;

/// Writes `[host.firmware]`, if the log explains anything.
pub(super) fn propose(out: &mut String, facts: &Facts) {
    let Some(boot) = facts.boot() else { return };
    let _ = writeln!(
        out,
        "\n# What the firmware's event log shows of the boot. With these rules values of PCR 4, 7, 8 and 9 under\n\
         # host.registers may be left out; they change with each update of the kernel or the boot loader.\n[host.firmware]"
    );
    let ours = [facts.log.start().pcr_vm, facts.log.start().pcr_guest, super::IMA_PCR];
    let missing = QUOTED_PCRS.iter().filter(|pcr| !ours.contains(pcr) && !boot.explained().contains(pcr));
    let missing: Vec<String> = missing.map(|pcr| format!("\"{pcr}\"")).collect();
    if !missing.is_empty() {
        let _ = writeln!(
            out,
            "# The log does not give what these registers hold. If this firmware is known to omit events, write:\n\
             # unexplained = [{}]",
            missing.join(", ")
        );
    }
    variables(out, &boot);
    let separators = FirmwareRule { separators: true, ..FirmwareRule::default() };
    if judge(&separators, Some(&boot), &mut Notes::default()).is_empty() {
        let _ = writeln!(out, "separators = true");
    }
    started(out, &boot);
    stub(out, facts, &boot);
}

fn variables(out: &mut String, boot: &Boot<'_>) {
    let own: Vec<&Event<'_>> = (boot.extends(SECURE_BOOT_PCR).unwrap_or_default().into_iter())
        .take_while(|event| event.separator(BANK).is_none())
        .collect();
    for (key, guid, name) in [
        ("secure_boot", Guid::GLOBAL, "SecureBoot"),
        ("pk", Guid::GLOBAL, "PK"),
        ("kek", Guid::GLOBAL, "KEK"),
        ("db", Guid::IMAGE_SECURITY, "db"),
        ("dbx", Guid::IMAGE_SECURITY, "dbx"),
    ] {
        let found = own.iter().find_map(|event| event.variable(BANK).filter(|v| v.is(guid, name)).map(|v| (event, v)));
        let Some((event, variable)) = found else { continue };
        match (key, variable.data) {
            ("secure_boot", [on]) => {
                let _ = writeln!(out, "secure_boot = {}", *on == 1);
            }
            ("secure_boot", _) => {}
            _ => {
                let _ = writeln!(out, "# {}", comment(&boot.log().describe(event, BANK)));
                let _ = writeln!(out, "{key} = {{ content = [\"{}\"] }}", PlainDigest(sha256(&[variable.data])));
            }
        }
    }
}

/// Images, files, and which of them is the kernel.
fn started(out: &mut String, boot: &Boot<'_>) {
    let images: Vec<&Event<'_>> = (boot.extends(IMAGES_PCR).unwrap_or_default().into_iter())
        .filter(|event| event.separator(BANK).is_none() && !matches!(event.meaning(BANK), Meaning::Text(_)))
        .collect();
    let files = boot.extends(FILES_PCR).unwrap_or_default();
    // Where GRUB starts a kernel that no image shows, it is the file that the command names.
    let command = boot.extends(COMMANDS_PCR).unwrap_or_default().into_iter().rev().find_map(linux_path);
    let file = command.and_then(|path| files.iter().copied().rev().find(|event| is_labelled(event, path)));
    let kernel = match (images.as_slice(), file) {
        // A boot loader alone.
        ([_], Some(file)) => Some(file),
        _ => images.last().copied(),
    };
    let is_kernel = |event: &&&Event<'_>| kernel.is_some_and(|kernel| kernel.digest(BANK) == event.digest(BANK));
    list(out, boot, "kernel", kernel.iter());
    if kernel.is_some() || !images.is_empty() {
        list(out, boot, "images", images.iter().filter(|event| !is_kernel(event)));
    }
    if !files.is_empty() {
        let _ = writeln!(out, "# Files that differ from boot to boot (GRUB's grubenv) allow no list: files = \"any\"");
        list(out, boot, "files", files.iter().filter(|event| !is_kernel(event)));
    }
}

/// The path in GRUB's command `linux PATH …`, which its digest proves.
fn linux_path<'a>(event: &Event<'a>) -> Option<&'a str> {
    let Meaning::Command { text, .. } = event.meaning(BANK) else { return None };
    let mut words = text.split_whitespace();
    words.next().filter(|word| matches!(*word, "linux" | "linuxefi" | "linux16"))?;
    words.next()
}

fn is_labelled(event: &Event<'_>, path: &str) -> bool {
    event.data.strip_suffix(&[0]).unwrap_or(event.data) == path.as_bytes()
}

fn list<'e, 'a: 'e>(out: &mut String, boot: &Boot<'_>, key: &str, events: impl Iterator<Item = &'e &'e Event<'a>>) {
    let mut digests: Vec<Sha256> = Vec::new();
    let mut lines = String::new();
    for event in events {
        let digest = event.digest(BANK).and_then(|digest| digest.try_into().ok()).map_or(Sha256::ZERO, Sha256);
        if !digests.contains(&digest) {
            let _ = writeln!(
                lines,
                "    \"{}\",   # event {}, {}",
                PlainDigest(digest),
                event.number,
                comment(&boot.log().describe(event, BANK))
            );
            digests.push(digest);
        }
    }
    let _ = if digests.is_empty() { writeln!(out, "{key} = []") } else { writeln!(out, "{key} = [\n{lines}]") };
}

/// The events of the log's own registers before the log, where they explain its history.
pub(super) fn stub_events<'a>(facts: &Facts, boot: &'a Boot<'a>) -> Vec<&'a Event<'a>> {
    let start = facts.log.start();
    let own = |pcr: u8| {
        let item = start.history.iter().find(|item| item.bank == HashAlg::Sha256 && item.pcr == pcr)?;
        boot.history(pcr, &item.value.0)
    };
    [start.pcr_vm, start.pcr_guest].into_iter().filter_map(own).flatten().collect()
}

fn stub(out: &mut String, facts: &Facts, boot: &Boot<'_>) {
    let events = stub_events(facts, boot);
    if events.is_empty() {
        return;
    }
    let _ = writeln!(out, "# What the boot stub measured into the log's registers before the proxy.\nstub = [");
    for event in events {
        let digest = event.digest(BANK).and_then(|digest| digest.try_into().ok()).map_or(Sha256::ZERO, Sha256);
        let text = match event.meaning(BANK) {
            Meaning::Wide(text) => Some(wide_text(text)).filter(|text| StubDigest::of_text(text).digest == digest),
            _ => None,
        };
        let value = text.map_or_else(|| quote(&PlainDigest(digest).to_string()), |text| quote(&text));
        let words = comment(&boot.log().describe(event, BANK));
        let _ = writeln!(out, "    {value},   # PCR {}, event {}, {words}", event.pcr, event.number);
    }
    let _ = writeln!(out, "]");
}

/// Whether what a register of the log held before it is explained by events that the proposal names.
pub(super) fn explains(facts: &Facts, pcr: u8, value: &Blob) -> bool {
    let Some(boot) = facts.boot() else { return false };
    boot.log().value(Register { bank: BANK, pcr }) == Some(&value.0)
}
