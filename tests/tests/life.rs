//! Everything that can happen to a VM, as it stands in the proxy's log. Real QEMUs without a guest: what a guest would do is
//! done by a firmware of a few bytes, what the operator does goes through a second monitor, as he would do it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::Signal;
use onequote_evidence::event::{ConfigChange, EventBody, Image, MediumChange, SnapshotLoad, SnapshotSave, VmRef};
use onequote_evidence::id::Sha256;
use onequote_tests::lab::{Act, Qmp, World, wait};
use serde_json::{Value, json};

const LIMIT: Duration = Duration::from_secs(20);

/// A world whose proxy looks at its VMs ten times a second.
fn begin(world: &mut World) -> Result<()> {
    world.settings().tables += "[vms]\nlook_ms = 100\n";
    world.start_proxy_alone()
}

/// What the log says of the VM called `name`, the newest process of that name.
fn story(world: &World, name: &str) -> Result<Vec<EventBody>> {
    let events = world.read_log()?.events()?;
    let is = |body: &EventBody| matches!(body, EventBody::VmCreate(create) if create.name == name);
    let vm: Option<VmRef> = events.iter().rev().find(|event| is(&event.body)).and_then(|event| event.vm);
    Ok(events.into_iter().filter(|event| vm.is_some() && event.vm == vm).map(|event| event.body).collect())
}

/// An event as tests name it: its kind, and the fields that matter.
fn words(body: &EventBody) -> String {
    let what = match body {
        EventBody::VmCreate(e) => e.depth.word().to_owned(),
        EventBody::VmPause(e) => e.run_state.clone(),
        EventBody::VmReset(e) => e.reason.clone(),
        EventBody::VmStop(e) => e.cause.word().to_owned(),
        EventBody::VmCrash(e) => format!("{} {}", e.cause, e.detail),
        EventBody::VmRefuse(e) => e.cause.word().to_owned(),
        EventBody::ConfigChange(e) => e.what.clone(),
        EventBody::MediumChange(e) => e.slot.clone(),
        EventBody::SnapshotSave(SnapshotSave { tag, .. }) | EventBody::SnapshotLoad(SnapshotLoad { tag, .. }) => {
            tag.clone()
        }
        EventBody::MigrateOut(e) => e.status.word().to_owned(),
        EventBody::MigrateIn(e) => e.status.word().to_owned(),
        _ => String::new(),
    };
    format!("{} {what}", body.kind()).trim_end().to_owned()
}

/// Waits until the log says exactly this of a VM, in this order.
fn expect(world: &mut World, name: &str, expected: &[&str]) -> Result<Vec<EventBody>> {
    let mut seen = Vec::new();
    let what = format!("{name}: {expected:#?}");
    let found = world.wait_until(&what, LIMIT, |world| {
        let story = story(world, name)?;
        seen = story.iter().map(words).collect();
        // More than was expected does not become right by waiting.
        ensure!(seen.len() <= expected.len(), "{name}: {seen:#?} instead of {expected:#?}");
        Ok((seen == expected).then_some(story))
    });
    found.with_context(|| format!("the log has {seen:#?}"))
}

/// Waits for an event about this VM that `which` accepts, and gives what that made of it.
fn wait_event<T>(world: &mut World, name: &str, what: &str, which: impl Fn(&EventBody) -> Option<T>) -> Result<T> {
    let found = world.wait_until(what, LIMIT, |world| Ok(story(world, name)?.iter().find_map(&which)));
    found.with_context(|| format!("the log has {:#?}", story(world, name).unwrap_or_default()))
}

/// Waits for a change of the configuration in these words. With `after` empty: that something went.
fn wait_change(world: &mut World, name: &str, what: &str, before: &str, after: &str) -> Result<ConfigChange> {
    let fits = |text: &str, part: &str| text.is_empty() == part.is_empty() && text.contains(part);
    wait_event(world, name, &format!("{what}: {before:?} to {after:?}"), |body| match body {
        EventBody::ConfigChange(change)
            if change.what == what && fits(&change.before, before) && fits(&change.after, after) =>
        {
            Some(change.clone())
        }
        _ => None,
    })
}

fn digest(path: &Path) -> Result<String> {
    let measured = onequote_verity::measure(&fs::File::open(path)?, onequote_verity::Options::default())?;
    Ok(format!("fs-verity:{}", Sha256(measured.digest)))
}

/// Whether an image was logged as what the file holds.
fn check_image(image: &Image, slot: &str, path: &Path) -> Result<()> {
    let now = digest(path)?;
    ensure!(image.slot == slot && Path::new(&image.path) == path, "another image: {image:?}");
    ensure!(image.digest.to_string() == now, "{} holds {now}: {image:?}", path.display());
    Ok(())
}

fn qemu_img(folder: &Path, arguments: &[&str]) -> Result<()> {
    let status = Command::new("qemu-img").args(arguments).arg("-q").current_dir(folder).status()?;
    ensure!(status.success(), "qemu-img failed");
    Ok(())
}

/// Gives commands one after the other.
fn give(monitor: &mut Qmp, commands: &[(&str, Value)]) -> Result<()> {
    commands.iter().try_for_each(|(command, arguments)| monitor.execute(command, arguments).map(drop))
}

fn human(monitor: &mut Qmp, command: &str) -> Result<()> {
    let answer = monitor.execute("human-monitor-command", &json!({"command-line": command}))?;
    ensure!(answer.as_str().is_some_and(str::is_empty), "{command}: {answer}");
    Ok(())
}

const BEGIN: [&str; 3] = ["vm-create gate", "vm-start", "vm-resume"];

fn then<'a>(more: &[&'a str]) -> Vec<&'a str> {
    BEGIN.iter().chain(more).copied().collect()
}

/// Ends a world whose log must be whole and in the TPM.
fn end_bound(world: &mut World) -> Result<()> {
    ensure!(world.proxy()?.terminate()?.success(), "the proxy does not end well");
    world.bound_log()?;
    Ok(())
}

#[test]
fn what_an_operator_does_to_a_running_vm() {
    World::test(|world| {
        begin(world)?;
        let vm = world.start_bare("vm", &[])?;
        let mut monitor = vm.monitor()?;
        expect(world, "vm", &BEGIN)?;
        give(&mut monitor, &[("stop", json!({}))])?;
        expect(world, "vm", &then(&["vm-pause paused"]))?;
        give(&mut monitor, &[("cont", json!({})), ("system_reset", json!({}))])?;
        let mut story = then(&["vm-pause paused", "vm-resume", "vm-reset host-qmp-system-reset"]);
        expect(world, "vm", &story)?;
        // Pauses that are over before anybody can ask what they were.
        give(&mut monitor, &[("stop", json!({})), ("cont", json!({})), ("stop", json!({})), ("cont", json!({}))])?;
        story.extend(["vm-pause paused", "vm-resume"].repeat(2));
        expect(world, "vm", &story)?;
        // Written as a guest would.
        monitor.execute("human-monitor-command", &json!({"command-line": "qemu-io disk \"write -P 9 0 512\""}))?;
        give(&mut monitor, &[("quit", json!({}))])?;
        story.push("vm-stop host-shutdown");
        let events = expect(world, "vm", &story)?;
        let Some(EventBody::VmStop(stop)) = events.last() else { unreachable!() };
        ensure!(stop.unmeasured.is_empty() && stop.images.len() == 1, "{stop:?}");
        check_image(&stop.images[0], "disk", &vm.folder().join("disk.img"))?;
        end_bound(world)
    });
}

#[test]
fn ways_in_which_a_vm_ends() {
    World::test(|world| {
        begin(world)?;
        for (name, signal, cause) in [
            ("killed", Signal::SIGKILL, "vm-stop lost"),
            ("crashed", Signal::SIGSEGV, "vm-stop lost"),
            ("aborted", Signal::SIGABRT, "vm-stop lost"),
            ("ended", Signal::SIGTERM, "vm-stop host-shutdown"),
        ] {
            let vm = world.start_bare(name, &[])?;
            expect(world, name, &BEGIN)?;
            vm.qemu.signal(signal)?;
            let events = expect(world, name, &then(&[cause]))?;
            let Some(EventBody::VmStop(stop)) = events.last() else { unreachable!() };
            check_image(&stop.images[0], "disk", &vm.folder().join("disk.img"))?;
        }
        // What a guest does.
        let _off = world.start_acting("off", &[Act::PowerOff], &[])?;
        expect(world, "off", &then(&["vm-stop guest-shutdown"]))?;
        end_bound(world)
    });
}

#[test]
fn what_a_guest_does() {
    World::test(|world| {
        begin(world)?;
        let mut reboots = world.start_acting("reboots", &[Act::ResetOnce], &[])?;
        expect(world, "reboots", &then(&["vm-reset guest-reset"]))?;
        reboots.qemu.kill()?;

        let panics = world.start_acting("panics", &[Act::Panic], &["-device", "pvpanic", "-action", "panic=pause"])?;
        let story = then(&["vm-crash guest-panic pause", "vm-pause guest-panicked"]);
        expect(world, "panics", &story)?;
        drop(panics);
        let _ends = world.start_acting("ends", &[Act::Panic], &["-device", "pvpanic"])?;
        expect(world, "ends", &then(&["vm-crash guest-panic poweroff", "vm-stop guest-shutdown"]))?;

        let dog = ["-device", "ib700", "-action", "watchdog=pause"];
        let _hangs = world.start_acting("hangs", &[Act::Watchdog], &dog)?;
        expect(world, "hangs", &then(&["vm-crash watchdog pause", "vm-pause watchdog"]))?;

        let sleeps = world.start_acting("sleeps", &[Act::Suspend], &[])?;
        expect(world, "sleeps", &then(&["vm-pause suspended"]))?;
        // Waking up it runs its firmware again, which suspends again.
        give(&mut sleeps.monitor()?, &[("system_wakeup", json!({}))])?;
        expect(world, "sleeps", &then(&["vm-pause suspended", "vm-resume", "vm-pause suspended"]))?;
        end_bound(world)
    });
}

#[test]
fn what_is_plugged_into_a_running_vm() {
    World::test(|world| {
        begin(world)?;
        let vm = world.start_bare(
            "vm",
            &["-m", "32,slots=2,maxmem=1G", "-smp", "1,maxcpus=2", "-device", "pcie-root-port,id=slot1"],
        )?;
        let mut monitor = vm.monitor()?;
        expect(world, "vm", &BEGIN)?;

        // None of these raises an event.
        let backing = vm.folder().join("memory");
        let file = json!({"qom-type": "memory-backend-file", "id": "m1", "size": 128 << 20, "share": true,
                          "mem-path": backing});
        give(&mut monitor, &[("object-add", file)])?;
        wait_change(world, "vm", "object", "", &format!("m1:memory-backend-file {}", backing.display()))?;
        give(&mut monitor, &[("device_add", json!({"driver": "pc-dimm", "id": "dimm", "memdev": "m1"}))])?;
        wait_change(world, "vm", "device", "", "dimm:pc-dimm")?;
        wait_change(world, "vm", "memory", &(32 << 20).to_string(), &((32 + 128) << 20).to_string())?;
        let cpu = json!({"driver": "qemu64-x86_64-cpu", "id": "cpu1", "socket-id": 0, "core-id": 1, "thread-id": 0});
        give(&mut monitor, &[("device_add", cpu)])?;
        wait_change(world, "vm", "cpus", "1", "2")?;
        wait_change(world, "vm", "device", "", "cpu1:qemu64-x86_64-cpu")?;
        give(
            &mut monitor,
            &[("object-add", json!({"qom-type": "rng-random", "id": "r", "filename": "/dev/urandom"}))],
        )?;
        wait_change(world, "vm", "object", "", "r:rng-random /dev/urandom")?;
        give(&mut monitor, &[("object-del", json!({"id": "r"}))])?;
        wait_change(world, "vm", "object", "r:rng-random", "")?;
        give(&mut monitor, &[("chardev-add", json!({"id": "c", "backend": {"type": "ringbuf", "data": {}}}))])?;
        wait_change(world, "vm", "chardev", "", "c:chardev-ringbuf")?;
        give(&mut monitor, &[("chardev-remove", json!({"id": "c"}))])?;
        wait_change(world, "vm", "chardev", "c:chardev-ringbuf", "")?;
        give(&mut monitor, &[("netdev_add", json!({"type": "user", "id": "n"}))])?;
        wait_change(world, "vm", "netdev", "", "n:user")?;
        let nic = json!({"driver": "virtio-net-pci", "id": "nic", "netdev": "n", "bus": "slot1"});
        give(&mut monitor, &[("device_add", nic)])?;
        wait_change(world, "vm", "device", "", "nic:virtio-net-pci")?;
        // A guest without a driver lets go of a device at its reset.
        give(&mut monitor, &[("device_del", json!({"id": "nic"})), ("system_reset", json!({}))])?;
        wait_change(world, "vm", "device", "nic:virtio-net-pci", "")?;
        give(&mut monitor, &[("netdev_del", json!({"id": "n"}))])?;
        wait_change(world, "vm", "netdev", "n:user", "")?;
        let lie = json!({"path": "/machine", "property": "kernel", "value": "/boot/another"});
        give(&mut monitor, &[("qom-set", lie)])?;
        wait_change(world, "vm", "kernel", "", "/boot/another")?;
        end_bound(world)
    });
}

#[test]
fn disks_that_come_and_go() {
    World::test(|world| {
        begin(world)?;
        let vm = world.start_bare("vm", &["-device", "pcie-root-port,id=slot1"])?;
        let mut monitor = vm.monitor()?;
        expect(world, "vm", &BEGIN)?;
        let (folder, extra) = (vm.folder().to_owned(), vm.folder().join("extra.img"));
        fs::write(&extra, vec![7; 64 * 1024])?;
        let node = json!({"driver": "raw", "node-name": "extra", "file": {"driver": "file", "filename": extra}});
        give(&mut monitor, &[("blockdev-add", node)])?;
        let change = wait_change(world, "vm", "image", "", "extra.img (raw, writable)")?;
        check_image(&change.images[0], "extra", &extra)?;
        give(&mut monitor, &[("block_resize", json!({"node-name": "extra", "size": 128 * 1024}))])?;
        wait_change(world, "vm", "image-size", "extra: 65536", "extra: 131072")?;
        let plugged = json!({"driver": "virtio-blk-pci", "id": "plugged", "drive": "extra", "bus": "slot1"});
        give(&mut monitor, &[("device_add", plugged)])?;
        // The node's slot is its device's from now on.
        let change = wait_change(world, "vm", "image", "", "plugged: ")?;
        check_image(&change.images[0], "plugged", &extra)?;
        wait_change(world, "vm", "image", "extra: ", "")?;
        // Written as a guest would, and then taken away: how it was left is known.
        human_io(&mut monitor, "qemu-io extra \"write -P 3 0 4096\"")?;
        give(&mut monitor, &[("device_del", json!({"id": "plugged"})), ("system_reset", json!({}))])?;
        wait_change(world, "vm", "device", "plugged:virtio-blk-pci", "")?;
        let change = wait_change(world, "vm", "image", "plugged: ", "")?;
        check_image(&change.images[0], "plugged", &extra)?;
        // QEMU lets go of the node some time after the device.
        wait::until("the node to be free", LIMIT, || {
            Ok(monitor.execute("blockdev-del", &json!({"node-name": "extra"})).ok())
        })?;
        world.wait_until("both to be told", LIMIT, |world| {
            let gone = |body: &&EventBody| matches!(body, EventBody::ConfigChange(c) if c.what == "image" && c.after.is_empty());
            Ok((story(world, "vm")?.iter().filter(gone).count() == 3).then_some(()))
        })?;
        // What others can reach.
        let socket = json!({"addr": {"type": "unix", "data": {"path": folder.join("nbd.sock")}}});
        let node = json!({"driver": "raw", "node-name": "shown", "read-only": true,
                          "file": {"driver": "file", "filename": extra}});
        let export = json!({"type": "nbd", "id": "e", "node-name": "shown"});
        give(&mut monitor, &[("blockdev-add", node), ("nbd-server-start", socket), ("block-export-add", export)])?;
        wait_change(world, "vm", "block-export", "", "e:nbd shown")?;
        // A disk that cannot be measured is a disk nevertheless.
        give(&mut monitor, &[("blockdev-add", json!({"driver": "null-co", "node-name": "nothing"}))])?;
        wait_change(world, "vm", "unmeasured image", "", "nothing")?;
        give(&mut monitor, &[("quit", json!({}))])?;
        let stop = wait_event(world, "vm", "its end", |body| match body {
            EventBody::VmStop(stop) => Some(stop.clone()),
            _ => None,
        })?;
        let slots: Vec<&str> = stop.images.iter().map(|image| image.slot.as_str()).collect();
        ensure!(slots == ["disk"] && stop.unmeasured.is_empty(), "{stop:?}");
        end_bound(world)
    });
}

/// A command whose answer is what it printed.
fn human_io(monitor: &mut Qmp, command: &str) -> Result<()> {
    monitor.execute("human-monitor-command", &json!({"command-line": command})).map(drop)
}

/// The changes of a drive's chain so far, the last one first.
fn wait_chain(world: &mut World, after: &str) -> Result<ConfigChange> {
    let change = wait_change(world, "vm", "chain", "disk: ", after)?;
    Ok(change)
}

#[test]
fn chains_that_change_under_a_running_vm() {
    World::test(|world| {
        begin(world)?;
        let vm = world.start_bare("vm", &[])?;
        let mut monitor = vm.monitor()?;
        expect(world, "vm", &BEGIN)?;
        let file = |name: &str| vm.folder().join(name);
        let base = digest(&file("disk.img"))?;

        // A live snapshot: the disk is the base of a new one from now on.
        let snapshot = json!({"device": "disk", "snapshot-file": file("one.qcow2"), "format": "qcow2"});
        give(&mut monitor, &[("blockdev-snapshot-sync", snapshot)])?;
        let change = wait_chain(world, "one.qcow2 (qcow2, writable)")?;
        ensure!(change.before.contains("disk.img (raw, writable)") && change.before.contains(&base), "{change:?}");
        ensure!(change.after.contains(" <- disk/1: ") && change.after.contains(&base), "{change:?}");
        check_image(&change.images[0], "disk", &file("one.qcow2"))?;
        check_image(&change.images[1], "disk/1", &file("disk.img"))?;
        ensure!(!change.images[0].read_only && change.images[1].read_only, "{change:?}");

        // A mirror: everything goes to another file, and the old chain is left.
        human_io(&mut monitor, "qemu-io disk \"write -P 5 0 512\"")?;
        let mirror = json!({"device": "disk", "target": file("copy.qcow2"), "format": "qcow2", "sync": "full"});
        give(&mut monitor, &[("drive-mirror", mirror)])?;
        complete(&mut monitor)?;
        let change = wait_chain(world, "copy.qcow2 (qcow2, writable)")?;
        let left = digest(&file("one.qcow2"))?;
        ensure!(change.before.contains("one.qcow2") && change.before.contains(&left), "{left} {change:?}");
        check_image(&change.images[0], "disk", &file("copy.qcow2"))?;
        let gone = wait_change(world, "vm", "image", "disk/1: ", "")?;
        check_image(&gone.images[0], "disk/1", &file("disk.img"))?;

        // A snapshot on top, and merged again: the chain is what it was, the file below has changed.
        let snapshot = json!({"device": "disk", "snapshot-file": file("two.qcow2"), "format": "qcow2"});
        give(&mut monitor, &[("blockdev-snapshot-sync", snapshot)])?;
        wait_chain(world, "two.qcow2 (qcow2, writable)")?;
        human_io(&mut monitor, "qemu-io disk \"write -P 6 4096 512\"")?;
        give(&mut monitor, &[("block-commit", json!({"device": "disk"}))])?;
        complete(&mut monitor)?;
        let merged = wait_event(world, "vm", "the merged chain", |body| match body {
            EventBody::ConfigChange(c) if c.what == "chain" && c.before.contains("two.qcow2") => Some(c.clone()),
            _ => None,
        })?;
        ensure!(merged.after.contains("copy.qcow2 (qcow2, writable)"), "{merged:?}");
        give(&mut monitor, &[("quit", json!({}))])?;
        let stop = wait_event(world, "vm", "its end", |body| match body {
            EventBody::VmStop(stop) => Some(stop.clone()),
            _ => None,
        })?;
        ensure!(stop.images.len() == 1, "{stop:?}");
        check_image(&stop.images[0], "disk", &file("copy.qcow2"))?;
        end_bound(world)
    });
}

/// Ends a block job as soon as it is ready.
fn complete(monitor: &mut Qmp) -> Result<()> {
    wait::until("the job to be ready", LIMIT, || {
        let jobs = monitor.execute("query-jobs", &json!({}))?;
        Ok((jobs[0]["status"] == "ready").then_some(()))
    })?;
    give(monitor, &[("job-complete", json!({"id": "disk"}))])
}

#[test]
fn media_that_are_changed() {
    World::test(|world| {
        begin(world)?;
        let vm = world.start_bare("vm", &["-device", "ide-cd,id=cd0"])?;
        let mut monitor = vm.monitor()?;
        expect(world, "vm", &BEGIN)?;
        let file = |name: &str| vm.folder().join(name);
        fs::write(file("one.iso"), vec![1; 64 * 1024])?;
        fs::write(file("two.iso"), vec![2; 64 * 1024])?;
        let mut story: Vec<&str> = BEGIN.to_vec();
        let medium = |name: &str| json!({"id": "cd0", "filename": file(name), "format": "raw"});
        let mut step = |world: &mut World, command: &str, arguments: Value| -> Result<MediumChange> {
            give(&mut monitor, &[(command, arguments)])?;
            story.push("medium-change cd0");
            match expect(world, "vm", &story)?.pop() {
                Some(EventBody::MediumChange(change)) => Ok(change),
                other => anyhow::bail!("{other:?}"),
            }
        };
        let change = step(world, "blockdev-change-medium", medium("one.iso"))?;
        ensure!(change.before.is_empty() && change.after.contains("one.iso (raw, read-only)"), "{change:?}");
        check_image(&change.images[0], "cd0", &file("one.iso"))?;
        let change = step(world, "blockdev-change-medium", medium("two.iso"))?;
        let before = digest(&file("one.iso"))?;
        ensure!(change.before.contains("one.iso") && change.before.contains(&before), "{change:?}");
        check_image(&change.images[0], "cd0", &file("two.iso"))?;
        let change = step(world, "blockdev-open-tray", json!({"id": "cd0"}))?;
        ensure!(change.after == format!("{}, tray open", change.before) && change.images.is_empty(), "{change:?}");
        let change = step(world, "blockdev-remove-medium", json!({"id": "cd0"}))?;
        ensure!(change.before.contains("two.iso") && change.after == "tray open", "{change:?}");
        let change = step(world, "blockdev-close-tray", json!({"id": "cd0"}))?;
        ensure!(change.before == "tray open" && change.after.is_empty(), "{change:?}");
        let change = step(world, "blockdev-change-medium", medium("one.iso"))?;
        check_image(&change.images[0], "cd0", &file("one.iso"))?;
        let change = step(world, "eject", json!({"id": "cd0"}))?;
        ensure!(change.before.contains("one.iso") && change.after == "tray open", "{change:?}");
        end_bound(world)
    });
}

#[test]
fn snapshots_that_are_saved_loaded_and_deleted() {
    World::test(|world| {
        begin(world)?;
        let folder = world.prepare_bare("vm")?;
        qemu_img(&folder, &["create", "-f", "qcow2", "state.qcow2", "1M"])?;
        let state = format!("file={},if=none,format=qcow2,id=st,node-name=state", folder.join("state.qcow2").display());
        // Saving needs room for the state in each image that is written.
        let read_only = "file=disk.img,if=none,format=raw,id=disk,readonly=on";
        let device = ["-S", "-drive", &state, "-device", "virtio-blk-pci,drive=st"];
        let vm = world.start_given("vm", &device, read_only)?;
        let mut monitor = vm.monitor()?;
        let mut told: Vec<&str> = BEGIN.to_vec();
        expect(world, "vm", &told)?;

        // Quiet pauses are nothing but pauses as long as there is no snapshot.
        give(&mut monitor, &[("stop", json!({})), ("cont", json!({}))])?;
        told.extend(["vm-pause paused", "vm-resume"]);
        expect(world, "vm", &told)?;

        let job = |id: &str, tag: &str| json!({"job-id": id, "tag": tag, "vmstate": "state", "devices": ["state"]});
        give(&mut monitor, &[("snapshot-save", job("save", "one"))])?;
        told.extend(["vm-pause save-vm", "vm-resume", "snapshot-save one"]);
        let events = expect(world, "vm", &told)?;
        let Some(EventBody::SnapshotSave(save)) = events.last() else { unreachable!() };
        check_image(&save.images[0], "st", &vm.folder().join("state.qcow2"))?;

        give(&mut monitor, &[("snapshot-load", job("load", "one"))])?;
        told.extend(["vm-pause restore-vm", "vm-resume", "snapshot-load one"]);
        let events = expect(world, "vm", &told)?;
        let Some(EventBody::SnapshotLoad(load)) = events.last() else { unreachable!() };
        check_image(&load.images[0], "st", &vm.folder().join("state.qcow2"))?;

        // The human monitor's commands raise no event of their own.
        human(&mut monitor, "savevm two")?;
        told.extend(["vm-pause save-vm", "vm-resume", "snapshot-save two"]);
        expect(world, "vm", &told)?;
        human(&mut monitor, "loadvm two")?;
        // Which one is not to be seen: there are two.
        told.extend(["vm-pause restore-vm", "vm-resume", "snapshot-load"]);
        expect(world, "vm", &told)?;
        let delete = json!({"job-id": "delete", "tag": "one", "devices": ["state"]});
        give(&mut monitor, &[("snapshot-delete", delete)])?;
        told.push("config-change snapshot");
        let events = expect(world, "vm", &told)?;
        let Some(EventBody::ConfigChange(gone)) = events.last() else { unreachable!() };
        ensure!((gone.before.as_str(), gone.after.as_str()) == ("st: one", ""), "{gone:?}");
        human(&mut monitor, "loadvm two")?;
        told.extend(["vm-pause restore-vm", "vm-resume", "snapshot-load two"]);
        expect(world, "vm", &told)?;
        human(&mut monitor, "delvm two")?;
        told.push("config-change snapshot");
        expect(world, "vm", &told)?;
        // One of the disk alone.
        let internal = json!({"device": "st", "name": "disk-only"});
        give(&mut monitor, &[("blockdev-snapshot-internal-sync", internal)])?;
        told.push("config-change snapshot");
        let events = expect(world, "vm", &told)?;
        let Some(EventBody::ConfigChange(new)) = events.last() else { unreachable!() };
        ensure!((new.before.as_str(), new.after.as_str()) == ("", "st: disk-only"), "{new:?}");
        human(&mut monitor, "savevm three")?;
        told.extend(["vm-pause save-vm", "vm-resume", "snapshot-save three"]);
        expect(world, "vm", &told)?;
        give(&mut monitor, &[("quit", json!({}))])?;
        told.push("vm-stop host-shutdown");
        expect(world, "vm", &told)?;

        // Started from a snapshot: its kernel is not what it runs.
        let _again = world.start_given("again", &[&device[..], &["-loadvm", "three"]].concat(), read_only)?;
        expect(world, "again", &["vm-create gate", "vm-start", "snapshot-load three", "vm-resume"])?;
        end_bound(world)
    });
}

#[test]
fn a_vm_that_goes_to_a_file_and_comes_back() {
    World::test(|world| {
        begin(world)?;
        let vm = world.start_bare("vm", &[])?;
        let mut monitor = vm.monitor()?;
        expect(world, "vm", &BEGIN)?;
        // One that fails leaves the VM where it is.
        give(&mut monitor, &[("migrate", json!({"uri": "exec:false"}))])?;
        let mut told = then(&["migrate-out started", "migrate-out failed"]);
        expect(world, "vm", &told)?;
        let state = vm.folder().join("state");
        give(&mut monitor, &[("migrate", json!({"uri": format!("exec:cat > {}", state.display())}))])?;
        told.extend(["migrate-out started", "vm-pause postmigrate", "migrate-out completed"]);
        let events = expect(world, "vm", &told)?;
        let Some(EventBody::MigrateOut(out)) = events.last() else { unreachable!() };
        ensure!(out.unmeasured.is_empty() && out.images.len() == 1, "{out:?}");
        check_image(&out.images[0], "disk", &vm.folder().join("disk.img"))?;
        give(&mut monitor, &[("quit", json!({}))])?;
        told.push("vm-stop host-shutdown");
        expect(world, "vm", &told)?;

        // It comes back under the gate: nothing runs before it is measured and logged.
        let source = format!("exec:cat {}", state.display());
        let disk = format!("file={},if=none,format=raw,id=disk", vm.folder().join("disk.img").display());
        let back = world.start_given("back", &["-S", "-incoming", &source], &disk)?;
        let told = ["vm-create gate", "migrate-in started", "migrate-in completed", "vm-attach", "vm-resume"];
        let events = expect(world, "back", &told)?;
        let Some(EventBody::MigrateIn(arrived)) = events.get(2) else { unreachable!() };
        ensure!(arrived.source == source, "{arrived:?}");
        let Some(EventBody::VmAttach(attach)) = events.get(3) else { unreachable!() };
        ensure!(!attach.again, "{attach:?}");
        check_image(&attach.images[0], "disk", &vm.folder().join("disk.img"))?;
        drop(back);
        // And without: it runs as soon as it is there.
        let defer = world.start_given("defer", &["-incoming", "defer"], &disk)?;
        let mut told = vec!["vm-create observe", "migrate-in started"];
        expect(world, "defer", &told)?;
        give(&mut defer.monitor()?, &[("migrate-incoming", json!({"uri": source}))])?;
        told.extend(["migrate-in completed", "vm-resume", "vm-attach"]);
        expect(world, "defer", &told)?;
        drop(defer);
        // What arrives is no VM.
        fs::write(&state, "no state")?;
        let mut bad = world.start_given("bad", &["-S", "-incoming", "defer"], &disk)?;
        expect(world, "bad", &["vm-create gate", "migrate-in started"])?;
        // QEMU may end before it answers.
        let _ = give(&mut bad.monitor()?, &[("migrate-incoming", json!({"uri": source}))]);
        bad.qemu.wait(LIMIT)?;
        expect(world, "bad", &["vm-create gate", "migrate-in started", "migrate-in failed", "vm-stop lost"])?;
        end_bound(world)
    });
}

#[test]
fn a_vm_that_goes_from_one_host_to_another() {
    World::test(|source| {
        World::test(|target| {
            begin(source)?;
            begin(target)?;
            let vm = source.start_bare("vm", &[])?;
            let mut monitor = vm.monitor()?;
            expect(source, "vm", &BEGIN)?;
            // Storage that both hosts reach, as it must be.
            let disk = format!("file={},if=none,format=raw,id=disk", vm.folder().join("disk.img").display());
            let socket = format!("unix:{}", target.folder().join("migration").display());
            target.prepare_bare("vm")?;
            let there = target.start_given("vm", &["-S", "-incoming", &socket], &disk)?;
            expect(target, "vm", &["vm-create gate", "migrate-in started"])?;
            human_io(&mut monitor, "qemu-io disk \"write -P 4 0 512\"")?;
            give(&mut monitor, &[("migrate", json!({"uri": socket}))])?;
            let events =
                expect(source, "vm", &then(&["migrate-out started", "vm-pause postmigrate", "migrate-out completed"]))?;
            let Some(EventBody::MigrateOut(out)) = events.last() else { unreachable!() };
            let told = ["vm-create gate", "migrate-in started", "migrate-in completed", "vm-attach", "vm-resume"];
            let events = expect(target, "vm", &told)?;
            let Some(EventBody::VmAttach(attach)) = events.get(3) else { unreachable!() };
            ensure!(attach.images == out.images, "left as {out:?}, found as {attach:?}");
            ensure!(there.run_state()? == "running", "it does not run");
            end_bound(source)?;
            end_bound(target)
        });
        Ok(())
    });
}

#[test]
fn a_vm_that_was_running_already() {
    World::test(|world| {
        let vm = world.start_free("vm", &[])?;
        let mut monitor = vm.monitor()?;
        give(&mut monitor, &[("stop", json!({}))])?;
        begin(world)?;
        // The log takes it for running until it is looked at.
        let mut told = vec!["vm-create observe", "vm-attach", "vm-pause paused"];
        expect(world, "vm", &told)?;
        give(&mut monitor, &[("cont", json!({}))])?;
        told.push("vm-resume");
        expect(world, "vm", &told)?;
        // A proxy that was away says what it measured again, and finds what happened meanwhile.
        ensure!(world.proxy()?.terminate()?.success());
        give(&mut monitor, &[("stop", json!({}))])?;
        let node = json!({"driver": "raw", "node-name": "n", "read-only": true,
                          "file": {"driver": "file", "filename": "halt.bin"}});
        give(&mut monitor, &[("blockdev-add", node)])?;
        world.start_proxy()?;
        told.extend(["log-gap", "vm-attach", "vm-pause paused"]);
        let events = expect(world, "vm", &told)?;
        let Some(EventBody::VmAttach(attach)) = events.get(5) else { unreachable!() };
        ensure!(attach.again && attach.images.iter().any(|image| image.slot == "n"), "{attach:?}");
        end_bound(world)
    });
}
