//! VMs without libvirt: launched from a description, listed, stopped, killed, tried again.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs;
use std::process::Command;
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, Result, anyhow, ensure};
use onequote_evidence::event::{Depth, Event, EventBody, Role, StopCause, VmDelete};
use onequote_tests::lab::{Bare, Process, World, wait};
use serde_json::Value;

const LIMIT: Duration = Duration::from_secs(90);

/// Exit codes as the manual has them.
const NO_VM: i32 = 3;
const NO_PROXY: i32 = 4;
const NOT_NOW: i32 = 5;
const TIMEOUT: i32 = 6;

/// A firmware that waits for the power button and then turns the machine off, in 16 bits: PMBASE of q35's LPC bridge
/// (device 1f.0, registers 40₁₆ and 44₁₆) set to 600₁₆ and on; PWRBTN_EN in PM1_EN; PM1_STS read until PWRBTN_STS is
/// set; SLP_EN with sleep type 0, which is S5 in QEMU, into PM1_CNT (ACPI 6.5, section 4.8.3; QEMU `hw/acpi/core.c`).
const POWER_BUTTON: [u8; 63] = [
    0xfa, 0xba, 0xf8, 0x0c, 0x66, 0xb8, 0x40, 0xf8, 0x00, 0x80, 0x66, 0xef, 0xb2, 0xfc, 0x66, 0xb8, 0x01, 0x06, 0x00,
    0x00, 0x66, 0xef, 0xb2, 0xf8, 0x66, 0xb8, 0x44, 0xf8, 0x00, 0x80, 0x66, 0xef, 0xb2, 0xfc, 0xb0, 0x80, 0xee, 0xba,
    0x02, 0x06, 0xb8, 0x00, 0x01, 0xef, 0xba, 0x00, 0x06, 0xed, 0xf6, 0xc4, 0x01, 0x74, 0xfa, 0xba, 0x04, 0x06, 0xb8,
    0x00, 0x20, 0xef, 0xf4, 0xeb, 0xfd,
];

const UUID: &str = "6f0c3a52-93ad-4e4c-8f3e-55ad1e3cbb10";

fn wait_stage(world: &mut World, bare: &mut Bare, stage: &str) -> Result<Value> {
    let name = bare.name().to_owned();
    world.wait_until(&format!("{name} to be {stage}"), LIMIT, |world| {
        bare.qemu.check_alive()?;
        let vm = world.vm_status(&name)?;
        Ok((vm["stage"] == stage).then_some(vm))
    })
}

fn wait_runs(world: &mut World, bare: &mut Bare) -> Result<()> {
    wait_stage(world, bare, "watched")?;
    wait::for_true("the VM to run", LIMIT, || Ok(bare.run_state()? == "running"))
}

/// Runs a command of the proxy that must end with this code and say these words.
fn run(world: &World, arguments: &[&str], code: i32, words: &[&str]) -> Result<String> {
    let run = world.proxy_command(arguments)?;
    let said = format!("{}{}", run.output, run.errors);
    eprintln!("{}: {}\n{said}", arguments.join(" "), run.code);
    ensure!(run.code == code, "{arguments:?} ended with {} instead of {code}: {said}", run.code);
    for word in words {
        ensure!(said.contains(word), "{arguments:?} does not say {word:?}: {said}");
    }
    Ok(said)
}

fn events(world: &World) -> Result<Vec<Event>> {
    world.read_log()?.events()
}

fn kinds(world: &World) -> Result<Vec<String>> {
    let of_vm = |event: &Event| event.vm.map(|_| event.body.kind().to_owned());
    Ok(events(world)?.iter().filter_map(of_vm).collect())
}

fn stop_cause(world: &World) -> Result<StopCause> {
    let cause = events(world)?.into_iter().rev().find_map(|event| match event.body {
        EventBody::VmStop(stop) => Some(stop.cause),
        _ => None,
    });
    cause.context("no vm-stop in the log")
}

/// What the firmware has to start with, behind the firmware that halts.
fn write_firmware(bare_folder: &std::path::Path, program: &[u8]) -> Result<()> {
    let path = bare_folder.join("halt.bin");
    let mut firmware = fs::read(&path)?;
    let (at, end) = (firmware.len() - 256, firmware.len() - 16);
    firmware[at..at + program.len()].copy_from_slice(program);
    // jmp, 240 bytes back.
    firmware[end..end + 3].copy_from_slice(&[0xe9, 0x0d, 0xff]);
    Ok(fs::write(path, firmware)?)
}

#[test]
fn a_described_vm_is_measured_listed_and_killed() {
    World::test(|world| {
        world.start_proxy_alone()?;
        let file = world.describe_bare("web1", &format!("uuid = {UUID:?}\n"), "")?;
        let began = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?.as_millis();
        let mut bare = world.launch_bare(&file)?;
        wait_runs(world, &mut bare)?;

        // Measured before it ran, from what the description names.
        let folder = bare.folder().display().to_string();
        let events = events(world)?;
        let create = events.iter().find_map(|e| match &e.body {
            EventBody::VmCreate(create) => Some(create.clone()),
            _ => None,
        });
        let create = create.context("no vm-create")?;
        ensure!((create.name.as_str(), create.depth, create.uuid_given) == ("web1", Depth::Gate, true), "{create:?}");
        ensure!(create.memory == 32 << 20 && create.cpus == 1 && create.accelerator == "tcg", "{create:?}");
        let start = events.iter().find_map(|e| match &e.body {
            EventBody::VmStart(start) => Some(start.clone()),
            _ => None,
        });
        let start = start.context("no vm-start")?;
        let firmware = start.components.iter().find(|c| c.role == Role::Firmware).context("no firmware")?;
        ensure!(firmware.path == format!("{folder}/halt.bin"), "{firmware:?}");
        let images: Vec<_> =
            start.images.iter().map(|i| (i.slot.as_str(), i.path.as_str(), i.format.as_str())).collect();
        ensure!(images == [("disk0", format!("{folder}/disk.img").as_str(), "raw")], "{images:?}");

        let pid = bare.qemu.id().to_string();
        // What the arguments name beyond our keys is relative to the description, too.
        ensure!(fs::read_link(format!("/proc/{pid}/cwd"))? == bare.folder(), "QEMU was started elsewhere");
        run(world, &["list"], 0, &["NAME", "SINCE", "web1", UUID, "watched", "running", "gate", &pid])?;
        let list = world.proxy_command(&["list", "--json"])?.success()?.json()?;
        let vm = &list[0];
        ensure!(vm["name"] == "web1" && vm["pid"] == bare.qemu.id() && vm["stage"] == "watched", "{list:#}");
        let since = u128::from(vm["since"].as_u64().context("no time")?);
        // The kernel tells a process' start to the hundredth of a second.
        ensure!(since + 50 >= began && since < began + 60_000, "started {began}, listed {since}");

        // It does not hear the power button.
        let said = run(world, &["stop", "web1", "--timeout", "1"], TIMEOUT, &["still running", "kill web1"])?;
        ensure!(said.contains("web1: running"), "no progress: {said}");
        bare.qemu.check_alive()?;
        // A second one of that name is not even started.
        let again = world.launch_bare(&file)?.qemu.wait(LIMIT)?;
        ensure!(again.code() == Some(1), "{again}");
        let log = fs::read_to_string(bare.folder().join("qemu.log"))?;
        ensure!(log.contains("a VM named web1 is running"), "{log}");
        ensure!(bare.run_state()? == "running", "the launch of a second one hurt the first");

        run(world, &["kill", UUID], 0, &["web1", "its end is logged"])?;
        ensure!(bare.qemu.wait(LIMIT)?.success(), "QEMU did not end well");
        ensure!(stop_cause(world)? == StopCause::HostShutdown);
        let list = run(world, &["list", "--json"], 0, &[])?;
        ensure!(list.trim() == "[]", "{list}");
        for command in ["stop", "kill", "retry"] {
            run(world, &[command, "web1"], NO_VM, &["no VM web1", "onequote-proxy list"])?;
            run(world, &[command, "../x"], NO_VM, &["../x"])?;
        }

        ensure!(world.proxy()?.terminate()?.success(), "the proxy does not end well");
        for arguments in [&["list"][..], &["stop", "web1"], &["kill", "web1"], &["retry", "web1"]] {
            run(world, arguments, NO_PROXY, &["no proxy answers", "onequote-proxy run"])?;
        }
        world.bound_log()?;
        Ok(())
    });
}

#[test]
fn a_guest_that_hears_the_power_button_is_stopped() {
    World::test(|world| {
        world.start_proxy_alone()?;
        let file = world.describe_bare("web1", "", "")?;
        write_firmware(file.parent().context("a folder")?, &POWER_BUTTON)?;
        let mut bare = world.launch_bare(&file)?;
        wait_runs(world, &mut bare)?;
        // The firmware may not have come to listen yet: then nobody hears the button, and it is pressed again.
        wait::for_true("the guest to power down", LIMIT, || {
            Ok(world.proxy_command(&["stop", "web1", "--timeout", "2"])?.code == 0)
        })?;
        ensure!(bare.qemu.wait(LIMIT)?.success(), "QEMU did not end well");
        ensure!(stop_cause(world)? == StopCause::GuestShutdown);

        // Not waiting is possible, too.
        let mut bare = world.launch_bare(&file)?;
        wait_runs(world, &mut bare)?;
        run(world, &["kill", "web1", "--timeout", "0"], 0, &["told to end"])?;
        ensure!(bare.qemu.wait(LIMIT)?.success(), "QEMU did not end well");
        world.wait_gone("web1")?;
        ensure!(world.proxy()?.terminate()?.success(), "the proxy does not end well");
        world.bound_log()?;
        Ok(())
    });
}

#[test]
fn a_refused_vm_is_tried_again_once_its_file_is_back() {
    World::test(|world| {
        world.write_proxy_config()?;
        let file = world.describe_bare("web1", "", "")?;
        let mut bare = world.launch_bare(&file)?;
        bare.monitor()?;
        let (disk, away) = (bare.folder().join("disk.img"), bare.folder().join("away.img"));
        fs::rename(&disk, &away)?;
        world.start_proxy_alone()?;
        wait_stage(world, &mut bare, "refused")?;
        run(world, &["list"], 0, &["web1", "refused", "prelaunch", "disk.img"])?;
        // A guest that does not run cannot power down.
        run(world, &["stop", "web1"], NOT_NOW, &["prelaunch", "kill web1"])?;
        run(world, &["retry", "web1"], NOT_NOW, &["web1 is not let run", "disk0", "disk.img"])?;
        ensure!(bare.run_state()? == "prelaunch", "a refused VM runs");

        fs::rename(&away, &disk)?;
        run(world, &["retry", "web1"], 0, &["let run"])?;
        wait_runs(world, &mut bare)?;
        ensure!(world.vm_status("web1")?["error"].is_null(), "{}", world.vm_status("web1")?);
        let expected = ["vm-create", "vm-refuse", "vm-refuse", "vm-start", "vm-resume"];
        world.wait_until("the start to be logged", LIMIT, |world| {
            let kinds = kinds(world)?;
            Ok((kinds == expected).then_some(()))
        })?;
        run(world, &["retry", "web1"], NOT_NOW, &["web1 was not refused", "watched"])?;
        run(world, &["kill", "web1"], 0, &["its end is logged"])?;
        ensure!(world.proxy()?.terminate()?.success(), "the proxy does not end well");
        world.bound_log()?;
        Ok(())
    });
}

fn deletions(world: &World) -> Result<Vec<VmDelete>> {
    let deletion = |event: Event| match event.body {
        EventBody::VmDelete(delete) => Some(delete),
        _ => None,
    };
    Ok(events(world)?.into_iter().filter_map(deletion).collect())
}

#[test]
fn a_vm_that_will_not_come_back_is_deleted() {
    World::test(|world| {
        world.start_enrolled()?;
        run(world, &["delete", "web1"], NO_VM, &["no VM web1", "logs"])?;
        let file = world.describe_bare("web1", "", "")?;
        let mut bare = world.launch_bare(&file)?;
        wait_runs(world, &mut bare)?;
        run(world, &["delete", "web1"], NOT_NOW, &["web1 is there", "stop web1"])?;
        run(world, &["kill", "web1"], 0, &["its end is logged"])?;

        // What the image is now counts, not what it was.
        let disk = bare.folder().join("disk.img");
        fs::write(&disk, vec![0xa5; 4096])?;
        run(world, &["delete", "web1"], 0, &["web1: deleted", "disk0", "disk.img"])?;
        let [deleted] = deletions(world)?.try_into().map_err(|all| anyhow!("{all:?}"))?;
        ensure!(deleted.name == "web1" && deleted.unmeasured.is_empty(), "{deleted:?}");
        let measured = world.proxy_command(&["measure", "--json", &disk.display().to_string()])?.success()?.output;
        let digest = deleted.images[0].digest.value.to_string();
        ensure!(
            deleted.images.len() == 1 && deleted.images[0].size == 4096 && measured.contains(&digest),
            "{deleted:?}"
        );
        run(world, &["delete", "web1"], NOT_NOW, &["web1 was deleted already"])?;
        ensure!(deletions(world)?.len() == 1, "deleted twice");

        // It came back against all words; this time its disk is gone with it. The proxy knows of it from its log alone.
        let mut bare = world.launch_bare(&file)?;
        wait_runs(world, &mut bare)?;
        run(world, &["kill", "web1"], 0, &["its end is logged"])?;
        fs::remove_file(&disk)?;
        ensure!(world.proxy()?.terminate()?.success(), "the proxy does not end well");
        world.start_proxy()?;
        run(world, &["delete", "web1"], 0, &["web1: deleted", "not measured: disk0"])?;
        let last = deletions(world)?.pop().context("no deletion")?;
        ensure!(last.images.is_empty() && last.unmeasured.len() == 1, "{last:?}");

        let verdict = world.verifier(&["attest", World::HOST])?;
        ensure!(!verdict.output.contains("unknown-event"), "{}", verdict.output);
        ensure!(world.proxy()?.terminate()?.success(), "the proxy does not end well");
        world.bound_log()?;
        Ok(())
    });
}

#[test]
fn a_refused_vm_can_be_killed() {
    World::test(|world| {
        world.write_proxy_config()?;
        let file = world.describe_bare("web1", "", "")?;
        let mut bare = world.launch_bare(&file)?;
        bare.monitor()?;
        fs::remove_file(bare.folder().join("disk.img"))?;
        world.start_proxy_alone()?;
        wait_stage(world, &mut bare, "refused")?;
        run(world, &["kill", "web1"], 0, &["its end is logged"])?;
        ensure!(bare.qemu.wait(LIMIT)?.success(), "QEMU did not end well");
        Ok(())
    });
}

#[test]
fn a_bad_description_starts_nothing() {
    World::test(|world| {
        world.write_proxy_config()?;
        let second = "[[disk]]\nid = \"disk0\"\npath = \"halt.bin\"\nformat = \"raw\"\n";
        for (keys, tables, words) in [
            ("kernle = \"vmlinux\"\n", "", ["line 4", "kernle"]),
            ("kernel = \"vmlinux\"\n", "", ["kernel", "vmlinux is not there"]),
            ("name = \"a b\"\n", "", ["name", "a b"]),
            ("", second, ["disk.id", "\"disk0\" is the id of two disks"]),
        ] {
            let file = world.describe_bare("web1", keys, tables)?;
            let file = file.display().to_string();
            for arguments in [&["launch", &file][..], &["launch", "--dry-run", &file]] {
                run(world, arguments, 1, &[&["web1.toml"][..], &words].concat())?;
            }
        }
        ensure!(!world.monitors().join("web1.qmp").exists(), "a QEMU was started");
        Ok(())
    });
}

#[test]
fn a_monitor_named_in_the_configuration_is_watched() {
    World::test(|world| {
        world.write_proxy_config()?;
        let socket = world.folder().join("elsewhere.qmp");
        let table = format!("\n[[monitor]]\nname = \"db\"\nsocket = {socket:?}\n");
        world.settings().tables = table;
        world.start_proxy_alone()?;
        let folder = world.prepare_bare("db")?;
        let mut command = Command::new("qemu-system-x86_64");
        let monitor = format!("unix:{},server=on,wait=off", socket.display());
        command.args(["-machine", "q35,accel=tcg", "-m", "32", "-nodefaults", "-display", "none", "-bios", "halt.bin"]);
        command.args(["-S", "-qmp", &monitor]).current_dir(&folder);
        // QEMU is started after the proxy, and again: the monitor is met each time that it is made.
        for _ in 0..2 {
            let mut qemu = Process::spawn("QEMU of db", &command, &folder.join("qemu.log"), false)?;
            world.wait_running("db")?;
            qemu.kill()?;
            world.wait_gone("db")?;
        }
        // Nobody can take the name by a socket in the folder.
        let bare = world.start_bare("db", &[])?;
        world.wait_until("the trouble with the socket", LIMIT, |world| {
            let status = world.proxy_status()?;
            let error = status["sockets"][0]["error"].as_str().unwrap_or_default();
            Ok((error.contains("configuration") && error.contains("elsewhere.qmp")).then_some(()))
        })?;
        ensure!(bare.run_state()? == "prelaunch" && world.vm_status("db")?.is_null(), "it was met");
        run(world, &["kill", "db"], NO_VM, &["no VM db", "elsewhere.qmp"])?;
        Ok(())
    });
}
