//! **What regular looks cost**: one VM in which nothing happens is looked at many times. CPU time a look, of QEMU and of
//! the proxy, times the looks that the proxy gives in a second to all VMs together, however many there are: the share of
//! one processor that looking takes on a host full of VMs.

use std::fs;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result};
use onequote_tests::lab::monitor_double::TRACE;
use onequote_tests::lab::{Options, Process, World, wait};

use crate::numbers::Numbers;
use crate::starts::{LIMIT, server};

/// Looks that are measured.
const LOOKS: usize = 200;

/// Looks in a second over all VMs, unless the configuration says otherwise (`vms.looks_per_second`).
const PER_SECOND: f64 = 20.0;

/// A question that is asked once in each look.
const QUESTION: &str = "\"query-named-block-nodes\"";

pub(crate) fn cost(numbers: &mut Numbers) -> Result<()> {
    let mut world = World::with(Options { no_count: true, ..Options::default() })?;
    world.settings().tables = "\n[vms]\nlook_ms = 50\n".to_owned();
    world.start_proxy_alone()?;
    let folder = world.prepare_bare("looked")?;
    let trace = folder.join("trace");
    let mut command = Command::new("qemu-system-x86_64");
    command
        .args(["-machine", "q35,accel=tcg", "-m", "32", "-nodefaults", "-no-user-config", "-display", "none"])
        .args(["-name", "looked", "-bios", "halt.bin", "-S"])
        .args([
            "-drive",
            "file=disk.img,format=raw,if=virtio,id=root",
            "-device",
            "ide-cd,id=cd",
            "-netdev",
            "user,id=n",
        ])
        .args(TRACE)
        .arg(&trace)
        .args(["-qmp", &server(&world.monitors().join("looked.qmp"))])
        .current_dir(&folder);
    let qemu = Process::spawn("QEMU of looked", &command, &folder.join("qemu.log"), false)?;
    world.wait_running("looked")?;
    let looks = || Ok::<_, anyhow::Error>(fs::read_to_string(&trace)?.matches(QUESTION).count());
    let cpu =
        |world: &mut World| Ok::<_, anyhow::Error>((looks()?, cpu_time(qemu.id())?, cpu_time(world.proxy()?.id())?));
    let first = looks()?;
    wait::for_true("the first look", LIMIT, || Ok(looks()? > first))?;
    let before = cpu(&mut world)?;
    wait::for_true("the looks", LIMIT, || Ok(looks()? >= before.0 + LOOKS))?;
    let after = cpu(&mut world)?;
    let each = |spent: Duration| spent.as_secs_f64() / (after.0 - before.0) as f64;
    let (qemu, proxy) = (each(after.1 - before.1), each(after.2 - before.2));
    numbers.known("CPU time a look, QEMU", qemu * 1000.0, "ms");
    numbers.known("CPU time a look, proxy", proxy * 1000.0, "ms");
    numbers.at_most("looks, any number of VMs, of one CPU", (qemu + proxy) * PER_SECOND * 100.0, "%", 20.0);
    Ok(())
}

/// What a process has run so far: fields 14 and 15 of `/proc/PID/stat`, in hundredths of seconds (proc(5)).
fn cpu_time(pid: u32) -> Result<Duration> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let (_, fields) = stat.rsplit_once(") ").context("no process state")?;
    let ticks = fields.split(' ').skip(11).take(2).map(str::parse::<u64>).sum::<Result<u64, _>>()?;
    Ok(Duration::from_millis(ticks * 10))
}
