//! `cargo xtask nested`: a whole host in a VM, attested from outside with its guests.
#![allow(clippy::print_stdout)]

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context as _, Result};
use clap::Parser;
use onequote_tests::lab::{NestedHost, Verdict, World};
use serde_json::json;

/// Boots a host with UEFI firmware, TPM and IMA in a VM, VMs in it, and attests all of it from outside by one TPM quote.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask nested")]
struct Cli {
    /// Leave everything running at the end, and say how to log in and attest.
    #[arg(long)]
    keep: bool,
    /// Write the outcome as JSON.
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
    /// Name of a VM in the host; can be given more than once.
    #[arg(long = "guest", value_name = "NAME", default_values = ["one", "two"])]
    guests: Vec<String>,
}

fn main() -> Result<ExitCode> {
    let cli = Cli::parse();
    let start = Instant::now();
    let say = |text: &str| println!("[{:6.1} s] {text}", start.elapsed().as_secs_f32());
    say("preparing the host's disks (made of Debian packages the first time: some minutes; then kept)");
    let mut world = NestedHost::world(cli.keep)?;
    let outcome = play(&mut world, &cli, &say);
    if outcome.is_err() {
        world.print_logs();
    }
    let (mut host, good) = outcome?;
    if cli.keep {
        look_around(&mut world, &mut host)?;
    }
    drop(host);
    drop(world);
    say(if good { "all as it should be" } else { "not all as it should be" });
    Ok(if good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn play(world: &mut World, cli: &Cli, say: &dyn Fn(&str)) -> Result<(NestedHost, bool)> {
    let guests: Vec<&str> = cli.guests.iter().map(String::as_str).collect();
    let mut host = NestedHost::install(world, &guests)?;
    say(&format!("turning the host on, by {} (TPM: software, no root of trust)", host.accelerator()));
    let on = Instant::now();
    host.boot(say)?;
    let up = on.elapsed();
    world.join_nested(&mut host)?;
    say("it has joined over its network, with a token; the verifier has checked the certificate of its TPM");
    let first = world.wait_served()?;
    world.set_nested_policy(&host)?;
    say("the policy: its disk's files, its firmware's events and its VMs as they are now");
    let before = host.quotes()?;
    let (verdict, second) = world.attest_counted()?;
    let quotes = host.quotes()? - before;
    println!();
    print!("{}", table(&verdict, &cli.guests));
    println!("   from {quotes} TPM quote; {first} bytes of evidence the first time, {second} now\n");
    let good = verdict.host().state() == "trusted" && cli.guests.iter().all(|vm| verdict.vm(vm).state() == "trusted");
    if let Some(file) = &cli.report {
        let report = json!({
            "accelerator": host.accelerator(),
            "tpm": "software",
            "ready_ms": u64::try_from(up.as_millis()).unwrap_or(u64::MAX),
            "quotes": quotes,
            "bytes": { "first": first, "second": second },
            "host": verdict.host().state(),
            "vms": cli.guests.iter().map(|vm| json!({"name": vm, "state": verdict.vm(vm).state()})).collect::<Vec<_>>(),
        });
        fs::write(file, format!("{report:#}\n")).with_context(|| format!("cannot write {}", file.display()))?;
    }
    Ok((host, good))
}

fn table(verdict: &Verdict, guests: &[String]) -> String {
    let mut lines = vec![("host", World::HOST, verdict.host())];
    lines.extend(guests.iter().map(|vm| ("VM", vm.as_str(), verdict.vm(vm))));
    let line = |(kind, name, judged): (&str, &str, onequote_tests::lab::Judged<'_>)| {
        let findings: Vec<String> =
            judged.findings().iter().map(|f| f.chars().flat_map(char::escape_default).collect()).collect();
        format!("   {kind:<5} {name:<10} {:<12} {}\n", judged.state(), findings.join("; "))
    };
    lines.into_iter().map(line).collect()
}

fn look_around(world: &mut World, host: &mut NestedHost) -> Result<()> {
    let folder = world.folder().display().to_string();
    let ids = host.process_ids().into_iter().chain(world.process_ids());
    let ids: Vec<String> = ids.map(|id| format!("-{id}")).collect();
    let stop = world.folder().join("stop.sh");
    fs::write(&stop, format!("#!/bin/sh\nkill -s TERM -- {}\nsleep 1\nrm -rf {folder}\n", ids.join(" ")))?;
    fs::set_permissions(&stop, fs::Permissions::from_mode(0o755))?;
    let verifier = format!("{} --state {}", world.assets().verifier.display(), world.verifier_state().display());
    println!("Everything is still running, in {folder}");
    println!("   attest the host again   {verifier} attest {}", World::HOST);
    println!(
        "   a root shell on it      socat -,rawer,escape=0x1d UNIX:{folder}/host/console.sock     (Ctrl-] leaves)"
    );
    println!(
        "   what it is doing there  onequote-proxy status; journalctl -u onequote-proxy; systemctl status onequote-vm@*"
    );
    println!("   the policy in force     {folder}/policy.toml, {folder}/host-files.toml");
    println!("   end it all              {}", stop.display());
    Ok(())
}
