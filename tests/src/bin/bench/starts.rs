//! **What the gate costs**: a hundred QEMUs of the machine `microvm` start one after the other, with a firmware that halts and no
//! disk. QEMU's own trace tells when its monitor gave its first answer and when its processors were let run; in between the
//! proxy asks, measures program, arguments and firmware, logs, extends and lets go. The TPM's time for the extends is
//! measured at a relay and taken off.
//!
//! **A thousand VMs at once** behind a TPM that takes 10 ms for an extend: twenty real QEMUs, and doubles for the others
//! (processes of their own that answer at their monitors what a real QEMU did). Counted: extends, and VMs that run.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use onequote_tests::lab::monitor_double::{Recording, TRACE};
use onequote_tests::lab::{Bare, Options, Process, Qmp, TpmCommand, TpmRelay, World, wait};
use serde_json::json;

use crate::numbers::Numbers;

pub(crate) const LIMIT: Duration = Duration::from_secs(60);

/// Starts that are timed.
const STARTS: usize = 100;

/// Commands to QEMU that one start may take: about 0.4 ms each, QEMU's own cost.
const COMMANDS: f64 = 33.0;

/// VMs that start at once, and how many of them are real.
const MANY: usize = 1000;
const REAL: usize = 20;

/// What an extend takes in a discrete TPM.
const EXTEND: Duration = Duration::from_millis(10);

/// Far below a thousand: a tenth.
const EXTENDS: f64 = 100.0;

pub(crate) fn gate(numbers: &mut Numbers) -> Result<()> {
    let mut world = World::with(Options { no_count: true, ..Options::default() })?;
    let relay = TpmRelay::start(&mut world)?;
    world.start_proxy_alone()?;
    let mut times = Vec::new();
    let mut commands = 0;
    let cpu = ticks(world.proxy()?.id())?;
    for number in 0..STARTS {
        let start = one_start(&mut world, &relay, &format!("gate{number}"))?;
        times.push(start.took);
        commands = commands.max(start.commands);
    }
    let cpu = ticks(world.proxy()?.id())? - cpu;
    times.sort_unstable();
    let at = |share: f64| times[((times.len() - 1) as f64 * share).round() as usize].as_secs_f64() * 1000.0;
    numbers.known("gate, from -S to cont, without TPM, median", at(0.5), "ms");
    numbers.below("gate, from -S to cont, without TPM, p99", at(0.99), "ms", 50.0);
    numbers.at_most("gate-qmp-commands, the most of a start", commands as f64, "commands", COMMANDS);
    // A tick is a hundredth of a second.
    numbers.known("gate, proxy's CPU time, from a VM's start to its end", cpu as f64 * 10.0 / STARTS as f64, "ms");
    Ok(())
}

/// What one start took.
struct Start {
    took: Duration,
    /// Commands that the proxy gave to QEMU.
    commands: usize,
}

/// Starts a VM and gives the time between the monitor's first word and the guest's, without the TPM's extends.
fn one_start(world: &mut World, relay: &TpmRelay, name: &str) -> Result<Start> {
    let folder = world.prepare_bare(name)?;
    let trace = folder.join("trace");
    let own = folder.join("own.qmp");
    let mut command = Command::new("qemu-system-x86_64");
    command
        .args(["-machine", "microvm,accel=tcg", "-m", "32", "-nodefaults", "-no-user-config", "-display", "none"])
        .args(["-name", name, "-bios", "halt.bin", "-S"])
        .args(["-trace", "runstate_set"])
        .args(TRACE)
        .arg(&trace)
        .args(["-qmp", &server(&own), "-qmp", &server(&world.monitors().join(format!("{name}.qmp")))])
        .current_dir(&folder);
    let _ = relay.take_spent();
    let qemu = Process::spawn(&format!("QEMU of {name}"), &command, &folder.join("qemu.log"), false)?;
    wait::for_true("QEMU's own monitor", LIMIT, || wait::listens(&own))?;
    // Connected before QEMU serves anybody, so that it greets as soon as it can.
    let mut monitor = Qmp::connect(&own)?;
    wait::for_true("the VM to run", LIMIT, || Ok(monitor.execute("query-status", &json!({}))?["running"] == true))?;
    let spent = relay.take_spent();
    let extends = spent.get(&TpmCommand::PCR_EXTEND).copied().unwrap_or_default();
    drop(monitor);
    drop(qemu);
    world.wait_gone(name)?;
    let trace = fs::read_to_string(&trace)?;
    let first = |what: &str| trace.lines().find(|line| line.contains(what)).and_then(time_of);
    // The greeting comes from a thread of its own, before QEMU is ready to do anything.
    let ready = first("resp: {\"return\"").context("QEMU never answered")?;
    let resumed = first("\"RESUME\"").context("QEMU never ran")?;
    let took = resumed.saturating_sub(ready).saturating_sub(extends.1);
    Ok(Start { took, commands: commands(&trace).context("the proxy never let it run")? })
}

/// Commands that came by the monitor by which `cont` came, up to that.
fn commands(trace: &str) -> Option<usize> {
    let requests: Vec<(&str, &str)> =
        trace.lines().filter_map(|line| line.split_once("handle_qmp_command mon ")?.1.split_once(" req: ")).collect();
    let cont = requests.iter().position(|(_, request)| request.contains("\"cont\""))?;
    let monitor = requests[cont].0;
    Some(requests[..=cont].iter().filter(|(other, _)| *other == monitor).count())
}

/// Time that a process has run, in ticks: fields 14 and 15 of its `stat`.
fn ticks(pid: u32) -> Result<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let (_, fields) = stat.rsplit_once(") ").context("no stat")?;
    Ok(fields.split(' ').skip(11).take(2).map(str::parse::<u64>).sum::<Result<_, _>>()?)
}

/// `PID@SECONDS.MICROSECONDS:…`.
fn time_of(line: &str) -> Option<Duration> {
    let (time, _) = line.split_once('@')?.1.split_once(':')?;
    let (seconds, micros) = time.split_once('.')?;
    Some(Duration::from_secs(seconds.parse().ok()?) + Duration::from_micros(micros.parse().ok()?))
}

pub(crate) fn server(socket: &Path) -> String {
    format!("unix:{},server=on,wait=off", socket.display())
}

pub(crate) fn many(numbers: &mut Numbers) -> Result<()> {
    let mut world = World::with(Options { no_count: true, ..Options::default() })?;
    let relay = TpmRelay::start(&mut world)?;
    world.start_proxy_alone()?;
    let recording = record(&mut world)?;
    relay.delay(TpmCommand::PCR_EXTEND, EXTEND);
    let _ = relay.take_spent();

    let start = Instant::now();
    let mut doubles = Vec::new();
    let mut bares: Vec<Bare> = Vec::new();
    for number in 0..MANY - REAL {
        doubles.push(double(&world, &recording, number)?);
        if number % ((MANY - REAL) / REAL) == 0 && bares.len() < REAL {
            bares.push(world.start_bare(&format!("real{number}"), &[])?);
        }
    }
    let spawned = start.elapsed();
    let all = MANY - REAL + bares.len();
    let running = world.wait_until("all VMs to run", LIMIT * 5, |world| {
        let status = world.proxy_status()?;
        let vms = status["vms"].as_array().map_or(&[][..], Vec::as_slice);
        if let Some(refused) = vms.iter().find(|vm| vm["stage"] == "refused") {
            bail!("{} was refused: {}", refused["name"], refused["error"]);
        }
        let running = vms.iter().filter(|vm| vm["run_state"] == "running" && vm["stage"] == "watched").count();
        Ok((running >= all).then_some(running))
    })?;
    let took = start.elapsed();
    let (extends, _) = relay.take_spent().get(&TpmCommand::PCR_EXTEND).copied().unwrap_or_default();
    let status = world.proxy_status()?;
    let vms = status["vms"].as_array().map_or(&[][..], Vec::as_slice);
    let gated = vms.iter().filter(|vm| vm["stage"] == "watched" && vm["depth"] == "gate").count();
    for bare in &bares {
        ensure!(bare.run_state()? == "running", "{} does not run", bare.name());
    }

    numbers.exactly("VMs started at once that run, measured", running.min(gated) as f64, "VMs", MANY as f64);
    numbers.below("extends for them, 10 ms each", extends as f64, "extends", EXTENDS);
    numbers.known("of them real QEMUs", bares.len() as f64, "VMs");
    numbers.known("from the first process to the last VM running", took.as_secs_f64(), "s");
    numbers.known("the starting of the processes alone", spawned.as_secs_f64(), "s");
    numbers.known("proxy's memory with them (RSS)", rss(world.proxy()?.id())? / 1024.0, "MiB");
    Ok(())
}

/// Lets the proxy meet a real QEMU without a machine, and takes down what was said; its regular looks included.
pub(crate) fn record(world: &mut World) -> Result<(&'static str, PathBuf)> {
    let folder = world.prepare_bare("model")?;
    let trace = folder.join("trace");
    let mut command = Command::new("qemu-system-x86_64");
    command
        .args(no_machine("model", uuid::Uuid::new_v4()))
        .args(TRACE)
        .arg(&trace)
        .args(["-qmp", &server(&world.monitors().join("model.qmp"))])
        .current_dir(&folder);
    let qemu = Process::spawn("QEMU of model", &command, &folder.join("qemu.log"), false)?;
    world.wait_running("model")?;
    // One look at it while it runs; that one is whole when the next begins.
    wait::for_true("two looks at it", LIMIT, || {
        let text = fs::read_to_string(&trace)?;
        let (_, after) = text.split_once("\"RESUME\"").unwrap_or_default();
        Ok(after.matches("query-named-block-nodes").count() >= 2)
    })?;
    let recording = Recording::read(&fs::read_to_string(&trace)?)?;
    drop(qemu);
    world.wait_gone("model")?;
    recording.save(&world.folder().join("recording.json"))
}

fn no_machine(name: &str, uuid: uuid::Uuid) -> Vec<String> {
    let words =
        ["-machine", "none", "-nodefaults", "-no-user-config", "-display", "none", "-S", "-name", name, "-uuid"];
    words.iter().map(|word| (*word).to_owned()).chain([uuid.to_string()]).collect()
}

pub(crate) fn double(world: &World, (variable, recording): &(&'static str, PathBuf), number: usize) -> Result<Process> {
    let name = format!("vm{number}");
    let mut command = Command::new(std::env::current_exe()?);
    command
        .args(no_machine(&name, uuid::Uuid::new_v4()))
        .args(["-qmp", &server(&world.monitors().join(format!("{name}.qmp")))])
        .env(variable, recording)
        .current_dir(world.folder());
    Process::spawn(&format!("double {name}"), &command, &world.folder().join("log/doubles.log"), false)
}

/// Resident memory of a process in KiB.
fn rss(pid: u32) -> Result<f64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
    Ok(line.trim().trim_end_matches(" kB").parse()?)
}
