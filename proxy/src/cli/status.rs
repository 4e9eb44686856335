//! `status` and `export-ima`: asked of the running proxy.

use std::{
    io::{self, Write},
    path::Path,
};

use serde_json::Value;

use super::printable::printable;
use crate::serve::{ask, tell};

/// Prints in how many files the log is, and which verifiers hold them.
fn print_segments(status: &Value, out: &mut dyn Write) -> io::Result<()> {
    let segments = status["segments"].as_array().map_or(&[][..], Vec::as_slice);
    let first = segments.first().map_or(&Value::Null, |oldest| &oldest["records"]);
    writeln!(out, "         {} files, from record {first} on; {} bytes", segments.len(), status["log_bytes"])?;
    for verifier in status["verifiers"].as_array().into_iter().flatten() {
        let name = printable(verifier["verifier"].as_str().unwrap_or_default());
        let waited = if verifier["waited_for"] == true { "" } else { "; nobody waits for it" };
        writeln!(out, "         {name} has accepted {} records{waited}", verifier["records"])?;
    }
    Ok(())
}

/// Tells the running proxy that the log is not kept for a verifier.
///
/// # Errors
/// When no proxy answers, or no such verifier is enrolled.
pub async fn release(socket: &Path, verifier: &str, out: &mut dyn Write) -> io::Result<()> {
    // It becomes part of a path.
    if verifier.is_empty() || !verifier.bytes().all(|c| c.is_ascii_alphanumeric() || b"-_.:".contains(&c)) {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("{verifier:?} is no verifier's name")));
    }
    let _: Value = tell(socket, &format!("/v1/verifiers/{verifier}/release")).await?;
    writeln!(out, "{verifier}: the log is not kept for it until it asks again")
}

/// Prints what the running proxy watches.
///
/// # Errors
/// When no proxy answers.
pub async fn print_status(socket: &Path, json: bool, out: &mut dyn Write) -> io::Result<()> {
    let body = ask(socket, "/v1/status").await?;
    let status: Value = serde_json::from_slice(&body).map_err(io::Error::from)?;
    if json {
        return writeln!(out, "{status:#}");
    }
    let text = |v: &Value| match v {
        Value::Null => "–".to_owned(),
        Value::String(s) => printable(s).into_owned(),
        other => other.to_string(),
    };
    writeln!(out, "host     {}", text(&status["host"]))?;
    writeln!(out, "version  {}", text(&status["version"]))?;
    let software = if status["software_tpm"] == true { "  (software: no root of trust)" } else { "" };
    writeln!(out, "TPM      {}{software}", text(&status["tpm"]))?;
    writeln!(out, "log      epoch {}, {} records", text(&status["epoch"]["number"]), text(&status["log_len"]))?;
    print_segments(&status, out)?;
    for (heading, key) in [("log or TPM fails", "failure"), ("monitor sockets in trouble", "sockets")] {
        match &status[key] {
            Value::String(why) => writeln!(out, "\n{heading}: {}", printable(why))?,
            Value::Array(list) if !list.is_empty() => {
                writeln!(out, "\n{heading}:")?;
                for item in list {
                    writeln!(out, "  {}: {}", text(&item["path"]), text(&item["error"]))?;
                }
            }
            _ => {}
        }
    }
    writeln!(out, "\n{:<20} {:<36} {:<12} {:<9} {:>5} {:>8}", "VM", "UUID", "state", "depth", "boots", "entries")?;
    for vm in status["vms"].as_array().into_iter().flatten() {
        writeln!(
            out,
            "{:<20} {:<36} {:<12} {:<9} {:>5} {:>8}",
            text(&vm["name"]),
            text(&vm["uuid"]),
            text(&vm["run_state"]),
            text(&vm["depth"]),
            text(&vm["boots"]),
            text(&vm["entries"])
        )?;
        let monitor = &vm["monitor"];
        if monitor.is_object() {
            let [socket, clients, commands, refused] =
                ["socket", "clients", "commands", "refused"].map(|key| text(&monitor[key]));
            writeln!(out, "    monitor {socket}: clients {clients}, commands {commands}, refused {refused}")?;
        }
        if let Some(error) = vm["error"].as_str() {
            writeln!(out, "    {}", printable(error))?;
        }
    }
    for file in status["measuring"].as_array().into_iter().flatten() {
        let (done, size) = (file["done"].as_u64().unwrap_or(0), file["size"].as_u64().unwrap_or(0));
        let percent = u128::from(done) * 100 / u128::from(size.max(1));
        let (path, waiting) = (text(&file["path"]), text(&file["waiting"]));
        writeln!(out, "measuring: {path}: {percent} % of {} MiB, {waiting} waiting", size >> 20)?;
    }
    for report in status["reports"].as_array().into_iter().flatten() {
        let [verifier, reports, last] = [&report["verifier"], &report["reports"], &report["last"]].map(text);
        let told = match report["last"].is_object() {
            true => format!("the last: {} ({})", text(&report["last"]["state"]), text(&report["last"]["cause"])),
            false => last,
        };
        let connected = if report["connected"].is_null() { "not connected" } else { "connected" };
        writeln!(out, "reports to {verifier}: {connected}, {reports} taken, {told}")?;
        if let Some(why) = report["failure"].as_str() {
            writeln!(out, "    {}", printable(why))?;
        }
    }
    for process in status["unmanaged"].as_array().into_iter().flatten() {
        writeln!(out, "unmanaged: pid {} {}", text(&process["pid"]), text(&process["program"]))?;
    }
    Ok(())
}

/// Writes a guest's list, as logged, in the kernel's binary format.
///
/// # Errors
/// When no proxy answers, or it has no such list.
pub async fn export_ima(socket: &Path, vm: &str, boot: Option<u32>, out: &mut dyn Write) -> io::Result<()> {
    if !vm.bytes().all(|c| c.is_ascii_alphanumeric() || b"-_.".contains(&c)) {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("{vm:?} is no VM's name or UUID")));
    }
    let query = boot.map(|boot| format!("?boot={boot}")).unwrap_or_default();
    out.write_all(&ask(socket, &format!("/v1/guests/{vm}/ima{query}")).await?)
}
