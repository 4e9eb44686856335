//! Proposes a policy from evidence that was whole: what was measured, written down as what is wanted.
//!
//! A proposal says what is, not what should be: the operator reads it before it is put in force. It names every
//! register, part, image and file that the evidence shows, and says in comments what was left out.

use std::{collections::BTreeMap, fmt::Write as _};

use onequote_evidence::{
    event::{Image, Role, VmStart},
    ima::{DigestKind, Entry, SHA1_HASH_SIZE},
    pcr::{DEFAULT_PCR_GUEST, DEFAULT_PCR_VM, QUOTED_PCRS},
    statement::VmState,
};

mod firmware;

use super::{
    VERITY, is_keyring,
    text::{comment, quote},
};
use crate::appraise::{Facts, sessions::Session};

/// IMA's own register is judged by the list that it was replayed from.
const IMA_PCR: u8 = 10;

/// Allowed digests by path or name.
type Table = BTreeMap<String, Vec<String>>;

/// What measurement lists hold.
#[derive(Default)]
struct Measured {
    files: Table,
    buffers: Table,
    keyrings: Table,
}

/// Writes a policy as TOML.
#[must_use]
pub fn propose(facts: &Facts) -> String {
    let mut out = String::new();
    let statement = &facts.statement;
    let _ = writeln!(
        out,
        "# Proposed from the evidence of host {}: epoch {}, {} records, {} VMs.\n\
         # It says what was measured, not what is right: read it before you put it in force with policy set.\n",
        statement.host,
        statement.epoch.number,
        statement.log_len,
        statement.vms.len()
    );
    host(&mut out, facts);
    for vm in &statement.vms {
        match facts.sessions.by_id.get(&vm.session) {
            Some(session) if session.start.is_some() => rule(&mut out, facts, vm, session),
            _ => {
                let _ = writeln!(out, "\n# {}: left out, nothing of it was measured.", comment(&vm.name));
            }
        }
    }
    out
}

fn host(out: &mut String, facts: &Facts) {
    let start = facts.log.start();
    let _ = writeln!(out, "[host]");
    if (start.pcr_vm, start.pcr_guest) != (DEFAULT_PCR_VM, DEFAULT_PCR_GUEST) {
        let _ = writeln!(out, "pcr_vm = {}\npcr_guest = {}", start.pcr_vm, start.pcr_guest);
    }
    match start.binary {
        Some(binary) => {
            let path = start.path.as_deref().unwrap_or_default();
            let _ = writeln!(out, "proxy = [{}] # {}", quote(&binary.to_string()), comment(path));
        }
        None => out.push_str("# The proxy did not measure its own program.\n"),
    }
    let history = start.history.iter().filter(|item| item.bank == onequote_evidence::digest::HashAlg::Sha256);
    let history: Vec<String> = (history.filter(|item| item.value.0.iter().any(|&byte| byte != 0)))
        .filter(|item| !firmware::explains(facts, item.pcr, &item.value))
        .map(|item| format!("\"{}\" = \"{}\"", item.pcr, item.value))
        .collect();
    if !history.is_empty() {
        let _ = writeln!(
            out,
            "# What the boot loader left in the log's registers.\nhistory = {{ {} }}",
            history.join(", ")
        );
    }
    let measured = measured(facts.host_entries.iter().map(|raw| (SHA1_HASH_SIZE, raw.as_slice())), out);
    let _ = writeln!(out, "\n[host.registers]");
    for pcr in QUOTED_PCRS {
        let ours = [start.pcr_vm, start.pcr_guest, IMA_PCR].contains(&pcr);
        if let Some(value) = facts.registers.sha256(pcr).filter(|_| !ours) {
            let _ = writeln!(out, "\"{pcr}\" = \"{value}\"");
        }
    }
    firmware::propose(out, facts);
    tables(out, "host", &measured);
}

fn rule(out: &mut String, facts: &Facts, vm: &VmState, session: &Session) {
    let Some(start) = &session.start else { return };
    let _ = writeln!(out, "\n[[vm]]\nname = {}", quote(&vm.name));
    let _ = writeln!(out, "# UUID {}; to tell VMs by it, write uuid = instead of name =", vm.vm);
    if !session.before {
        let _ = writeln!(out, "# It was measured while it already ran: what it really started from is not known.");
    }
    for (key, role, default) in [
        ("qemu", Role::QemuBinary, true),
        ("arguments", Role::Arguments, true),
        ("argument_files", Role::ArgumentFile, false),
        ("kernel", Role::Kernel, false),
        ("initrd", Role::Initrd, false),
        ("kernel_cmdline", Role::KernelCmdline, false),
        ("firmware", Role::Firmware, false),
    ] {
        part(out, start, key, role, default);
    }
    for monitor in &session.monitors {
        let _ = writeln!(out, "# QEMU can be commanded past the proxy: {}", comment(monitor));
    }
    if !session.monitors.is_empty() {
        let _ = writeln!(out, "# To allow that: monitors = \"allowed\"");
    }
    let entries = facts.entries.get(&vm.session).map(Vec::as_slice).unwrap_or_default();
    if entries.is_empty() {
        let _ = writeln!(out, "# The guest sent no measurement list; to demand one, write runtime = \"required\"");
    } else {
        let _ = writeln!(out, "runtime = \"required\"");
    }
    let measured = measured(entries.iter().map(|(size, raw)| (*size, raw.as_slice())), out);
    if !start.images.is_empty() {
        let _ = writeln!(out, "\n[vm.images]");
        for one in &start.images {
            image(out, one);
        }
    }
    tables(out, "vm", &measured);
}

fn part(out: &mut String, start: &VmStart, key: &str, role: Role, judged_only_if_named: bool) {
    let parts: Vec<_> = start.components.iter().filter(|part| part.role == role).collect();
    if parts.is_empty() {
        return;
    }
    let mut values = Vec::new();
    for part in &parts {
        let text = part.text.as_ref().filter(|_| role == Role::KernelCmdline);
        // A text is written down only where the digest is truly its own.
        let text = text.filter(|text| super::Reference::parse(text).digest == part.digest);
        if !part.path.is_empty() {
            let _ = writeln!(out, "# {}", comment(&part.path));
        }
        values.push(text.map_or_else(|| quote(&part.digest.to_string()), |text| quote(text)));
    }
    values.sort();
    values.dedup();
    let list = values.join(", ");
    if judged_only_if_named && role == Role::Arguments {
        let _ = writeln!(
            out,
            "# The arguments name sockets and ports, and change often; to judge them:\n# {key} = [{list}]"
        );
    } else {
        let _ = writeln!(out, "{key} = [{list}]");
    }
}

fn image(out: &mut String, image: &Image) {
    let how = if image.read_only { "" } else { ", continuity = true" };
    let _ = writeln!(out, "# {} ({})", comment(&image.path), comment(&image.format));
    let _ = writeln!(out, "{} = {{ digests = [\"{}\"]{how} }}", quote(&image.slot), image.digest);
}

/// What measurement lists hold, and a comment on what was left out.
fn measured<'a>(entries: impl Iterator<Item = (usize, &'a [u8])>, out: &mut String) -> Measured {
    let mut measured = Measured::default();
    for (hash_size, raw) in entries {
        let Ok(entry) = Entry::parse(raw, hash_size) else { continue };
        let fields = entry.fields().ok();
        let path = fields.and_then(|fields| std::str::from_utf8(fields.path).ok());
        let (Some(fields), Some(path)) = (fields, path) else {
            let _ = writeln!(out, "# Left out: an entry of template {}", comment(&String::from_utf8_lossy(entry.name)));
            continue;
        };
        if entry.is_violation() {
            let _ = writeln!(out, "# Left out: {} was written while it was measured; see ima_ignore", comment(path));
            continue;
        }
        if path == "boot_aggregate" && fields.digest.iter().all(|&byte| byte == 0) {
            continue;
        }
        let kind = if fields.digest_kind == DigestKind::Verity { VERITY } else { "" };
        let digest = format!("{kind}{}:{}", fields.digest_alg, hex::encode(fields.digest));
        let table = match (fields.buffer, is_keyring(path)) {
            (None, _) => &mut measured.files,
            (Some(_), false) => &mut measured.buffers,
            (Some(_), true) => &mut measured.keyrings,
        };
        let digests = table.entry(path.to_owned()).or_default();
        if !digests.contains(&digest) {
            digests.push(digest);
        }
    }
    measured
}

fn tables(out: &mut String, rule: &str, measured: &Measured) {
    for (name, table) in
        [("ima", &measured.files), ("ima_buf", &measured.buffers), ("ima_keyrings", &measured.keyrings)]
    {
        if table.is_empty() {
            continue;
        }
        let _ = writeln!(out, "\n[{rule}.{name}]");
        for (path, digests) in table {
            let digests: Vec<String> = digests.iter().map(|digest| quote(digest)).collect();
            let _ = writeln!(out, "{} = [{}]", quote(path), digests.join(", "));
        }
    }
}
