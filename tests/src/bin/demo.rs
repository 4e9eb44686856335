//! `cargo xtask demo`: three VMs, one quote, two attacks.
#![allow(clippy::print_stdout)]

use std::fmt::Write as _;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use clap::Parser;
use onequote_tests::lab::{Assets, Machine, Options, VmSpec, World};
use serde_json::{Value, json};

/// Boots three VMs, shows the verdict for host and VMs from one TPM quote, then plays two attacks.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask demo")]
struct Cli {
    /// Use this TPM (`/dev/tpmrm0`) instead of a software TPM. Its PCRs 12 and 13 are extended.
    #[arg(long, value_name = "DEVICE")]
    tpm: Option<PathBuf>,
    /// Root certificates of the makers of TPMs, for the one of `--tpm` to join with; without them it is enrolled by hand.
    #[arg(long, value_name = "FOLDER", requires = "tpm")]
    ek_roots: Option<PathBuf>,
    /// Leave everything running at the end, and say how to look around.
    #[arg(long)]
    keep: bool,
    /// Write the outcome as JSON.
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
}

const BOOT_LIMIT: Duration = Duration::from_secs(300);
const DETECTION_LIMIT: Duration = Duration::from_secs(60);

/// The VM whose disk is changed, and the one in which an unknown program runs.
const CHANGED: &str = "q35";
const INTRUDED: &str = "microvm";
const PROGRAM: &str = "/disk/bin/miner";

fn main() -> Result<ExitCode> {
    let cli = Cli::parse();
    let start = Instant::now();
    println!("== Guests");
    println!("   preparing kernel, disk and tools (downloaded and built the first time, then cached)");
    let assets = Assets::prepare()?;
    println!("   Debian's cloud kernel {} [{}]", assets.kernel_version, since(start));

    let tcti = cli.tpm.as_deref().map(|device| format!("device:{}", device.display()));
    let mut world = World::with(Options { keep: cli.keep, tcti, ..Options::default() })?;
    let outcome = play(&mut world, &cli, start);
    match &outcome {
        Ok(_) if cli.keep => look_around(&mut world)?,
        Ok(_) => {}
        Err(_) => world.print_logs(),
    }
    drop(world);
    let good = outcome?;
    println!("\n== {} [{}]", if good { "All as it should be" } else { "Not all as it should be" }, since(start));
    Ok(if good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn play(world: &mut World, cli: &Cli, start: Instant) -> Result<bool> {
    println!("\n== Host");
    match &cli.tpm {
        None => println!(
            "   TPM: software (swtpm). A SOFTWARE TPM IS NO ROOT OF TRUST: whoever is root on this\n   \
             machine can make it say anything. Use --tpm /dev/tpmrm0 for a real one."
        ),
        Some(device) => println!("   TPM: {}", device.display()),
    }
    if cli.tpm.is_some() && cli.ek_roots.is_none() {
        world.start_enrolled()?;
        println!("   proxy listens at {}; enrolled by hand: no --ek-roots [{}]", world.proxy_url()?, since(start));
    } else {
        world.start_proxy()?;
        println!("   proxy listens at {} [{}]", world.proxy_url()?, since(start));
        let door = world.join(cli.ek_roots.as_deref())?;
        println!("   it has joined the verifier at {door}, with a token [{}]", since(start));
        // Its own first question is not to be counted with ours.
        world.wait_served()?;
    }

    println!("\n== Three VMs");
    for machine in Machine::ALL {
        world.add_vm(VmSpec::new(machine.name(), machine))?.start()?;
    }
    watch_boot(world)?;

    println!("\n== Policy");
    world.learn_policy()?;
    println!("   learnt from what runs now (for a demo: an operator reads it before it is put in force);");
    println!("   other QEMU processes on this machine are none of the demo's, and allowed");

    println!("\n== Verdict");
    let before = quotes(world)?;
    let verdict = world.attest()?.json()?;
    let quotes = quotes(world)? - before;
    print!("{}", table(&verdict));
    println!("   from {quotes} TPM quote{}", if quotes == 1 { "" } else { "s" });

    let attacks = [
        attack(world, "a disk image changed while its VM was off", CHANGED, change_disk)?,
        attack(world, "an unknown program run in a guest", INTRUDED, run_unknown)?,
    ];
    println!("\n== Verdict after the attacks");
    print!("{}", table(&world.attest()?.json()?));

    let report = report(cli, quotes, &verdict, &attacks);
    if let Some(file) = &cli.report {
        let mut text = serde_json::to_string_pretty(&report)?;
        text.push('\n');
        fs::write(file, text).with_context(|| format!("cannot write {}", file.display()))?;
        println!("\n   report written to {}", file.display());
    }
    let trusted = |state: &Value| state == "trusted";
    let vms = report["vms"].as_array().map_or(&[][..], Vec::as_slice);
    Ok(trusted(&report["host"]["state"])
        && vms.len() == Machine::ALL.len()
        && vms.iter().all(|vm| trusted(&vm["state"]))
        && quotes == 1
        && attacks.iter().all(|attack| attack.finding.is_some()))
}

/// Says when each VM was measured, when its guest was ready and when its list arrived.
fn watch_boot(world: &mut World) -> Result<()> {
    let start = Instant::now();
    let mut said = [const { [false; 3] }; Machine::ALL.len()];
    let mut heard = start;
    world.wait_until("the three guests", BOOT_LIMIT, |world| {
        let status = world.proxy_status()?;
        for (index, machine) in Machine::ALL.into_iter().enumerate() {
            let name = machine.name();
            world.vm(name)?.qemu()?.check_alive()?;
            let vm = find(&status["vms"], name);
            if let Some(error) = vm["error"].as_str() {
                bail!("VM {name}: {error}");
            }
            let entries = vm["entries"].as_u64().unwrap_or(0);
            let steps = [
                (vm["run_state"] == "running", "measured, logged, extended, let go".to_owned()),
                (world.vm(name)?.is_ready(), "guest is up".to_owned()),
                (entries > 0, format!("guest's measurements arrive ({entries} so far)")),
            ];
            for (step, (reached, text)) in steps.into_iter().enumerate() {
                if reached && !said[index][step] {
                    said[index][step] = true;
                    heard = Instant::now();
                    println!("   {:>6}  {name:<8} {text}", since(start));
                }
            }
        }
        if heard.elapsed() > Duration::from_secs(5) {
            heard = Instant::now();
            println!("   {:>6}  … still booting", since(start));
        }
        Ok(said.as_flattened().iter().all(|done| *done).then_some(()))
    })
}

/// One attack and its detection.
struct Attack {
    name: &'static str,
    finding: Option<String>,
    time: Duration,
}

/// Does something bad, and asks the verifier until `victim` is untrusted. The clock starts when the bad has begun to work:
/// when the changed VM is started, when the program is run.
fn attack(
    world: &mut World,
    name: &'static str,
    victim: &str,
    act: impl FnOnce(&mut World) -> Result<Instant>,
) -> Result<Attack> {
    println!("\n== Attack: {name} ({victim})");
    let start = act(world)?;
    let mut last = Value::Null;
    let detection = world.wait_until("the verifier to notice", DETECTION_LIMIT, |world| {
        let run = world.attest()?;
        let time = start.elapsed();
        // Asked in the middle of a start, the host may have nothing to show yet.
        last = run.json().unwrap_or_default();
        let vm = find(&last["vms"], victim);
        Ok((vm["state"] == "untrusted").then(|| (finding(vm), time)))
    });
    match detection {
        Ok((finding, time)) => {
            println!("   found after {:.2} s: {finding}", time.as_secs_f32());
            Ok(Attack { name, finding: Some(finding), time })
        }
        Err(error) => {
            println!("   NOT FOUND: {error:#}");
            print!("{}", table(&last));
            Ok(Attack { name, finding: None, time: start.elapsed() })
        }
    }
}

fn change_disk(world: &mut World) -> Result<Instant> {
    world.vm(CHANGED)?.power_off()?;
    world.wait_gone(CHANGED)?;
    let vm = world.vm(CHANGED)?;
    println!("   {CHANGED} is off; one byte of disk.img is changed; it is started again");
    vm.flip_byte("disk.img", None)?;
    let start = Instant::now();
    vm.start()?;
    Ok(start)
}

fn run_unknown(world: &mut World) -> Result<Instant> {
    let vm = world.vm(INTRUDED)?;
    vm.write_program(PROGRAM, "exit 0")?;
    println!("   {PROGRAM} is put into the guest and run");
    let start = Instant::now();
    vm.run(PROGRAM)?;
    Ok(start)
}

fn report(cli: &Cli, quotes: u64, verdict: &Value, attacks: &[Attack]) -> Value {
    let vms = verdict["vms"].as_array().map_or(&[][..], Vec::as_slice);
    json!({
        "tpm": if cli.tpm.is_some() { "device" } else { "software" },
        "quotes": quotes,
        "host": { "name": verdict["host"]["id"], "state": verdict["host"]["state"] },
        "vms": vms.iter().map(|vm| json!({
            "name": vm["name"], "uuid": vm["uuid"], "state": vm["state"], "entries": vm["entries"],
        })).collect::<Vec<_>>(),
        "attacks": attacks.iter().map(|attack| json!({
            "name": attack.name,
            "detected": attack.finding.is_some(),
            "finding": attack.finding,
            "ms": u64::try_from(attack.time.as_millis()).unwrap_or(u64::MAX),
        })).collect::<Vec<_>>(),
    })
}

/// Quotes that the TPM made: counted in the software TPM's own log; a real TPM has none, there the proxy's
/// word has to do.
fn quotes(world: &mut World) -> Result<u64> {
    match world.tpm() {
        Ok(tpm) => tpm.quotes(),
        Err(_) => Ok(world.proxy_status()?["quotes"].as_u64().unwrap_or(0)),
    }
}

fn table(verdict: &Value) -> String {
    let mut text = String::new();
    let mut line = |kind: &str, name: &Value, value: &Value| {
        let entries = value["entries"].as_u64().map_or(String::new(), |count| count.to_string());
        let first = if value["findings"][0].is_object() { finding(value) } else { String::new() };
        let _ = writeln!(text, "   {kind:<5} {:<10} {:<12} {entries:>7}  {first}", plain(name), plain(&value["state"]));
    };
    line("host", &verdict["host"]["id"], &verdict["host"]);
    for vm in verdict["vms"].as_array().map_or(&[][..], Vec::as_slice) {
        line("VM", &vm["name"], vm);
    }
    format!("   {:<5} {:<10} {:<12} {:>7}  finding\n{text}", "what", "name", "state", "entries")
}

/// The first finding in one line.
fn finding(value: &Value) -> String {
    let finding = &value["findings"][0];
    format!("{}: {}", plain(&finding["code"]), plain(&finding["item"]))
}

/// A JSON text as it may be shown: what a guest chose must not steer the terminal.
fn plain(value: &Value) -> String {
    value.as_str().unwrap_or("?").chars().flat_map(char::escape_default).collect()
}

fn find<'a>(vms: &'a Value, name: &str) -> &'a Value {
    vms.as_array().and_then(|vms| vms.iter().find(|vm| vm["name"] == name)).unwrap_or(&Value::Null)
}

fn since(start: Instant) -> String {
    format!("{:.1} s", start.elapsed().as_secs_f32())
}

/// `--keep`: says how to look around, and leaves a script that ends it all.
fn look_around(world: &mut World) -> Result<()> {
    let folder = world.folder().display().to_string();
    let ids: Vec<String> = world.process_ids().into_iter().map(|id| format!("-{id}")).collect();
    let stop = world.folder().join("stop.sh");
    fs::write(&stop, format!("#!/bin/sh\nkill -s TERM -- {}\nsleep 1\nrm -rf {folder}\n", ids.join(" ")))?;
    fs::set_permissions(&stop, fs::Permissions::from_mode(0o755))?;
    let proxy = format!("{} --config {}", world.assets().proxy.display(), world.proxy_config().display());
    let verifier = format!("{} --state {}", world.assets().verifier.display(), world.verifier_state().display());
    println!("\n== Everything is still running, in {folder}");
    println!("   ask the host again     {verifier} attest {}", World::HOST);
    println!("   what the proxy sees    {proxy} status");
    println!("   the measurement log    {proxy} log");
    println!("   a guest's console      tail -f {folder}/vm/{CHANGED}/console.log");
    println!("   the policy in force    {folder}/policy.toml");
    println!("   logs                   {folder}/log, {folder}/vm/*/*.log");
    println!("   end it all             {}", stop.display());
    Ok(())
}
