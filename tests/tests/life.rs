//! Everything that can happen to a VM while it runs, as it stands in the proxy's log. Real QEMUs without a guest: what a guest would do
//! is done by a firmware of a few bytes, what the operator does goes through a second monitor, as he would do it.
//! A VM's state that is saved, loaded, sent and received is in `saved_state.rs`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs;

use anyhow::{Result, ensure};
use nix::sys::signal::Signal;
use onequote_evidence::event::{ConfigChange, EventBody, MediumChange};
use onequote_tests::lab::story::{BEGIN, LIMIT, begin, check_image, digest, expect, give, human_io, story, then};
use onequote_tests::lab::story::{wait_change, wait_event};
use onequote_tests::lab::{Act, Qmp, World, wait};
use serde_json::{Value, json};

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
        world.end_bound()
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
        world.end_bound()
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
        world.end_bound()
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
        world.end_bound()
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
        world.end_bound()
    });
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
            // While the job works, the file below is writable already.
            EventBody::ConfigChange(c) if c.what == "chain" && c.before.contains("two.qcow2") => {
                Some(c.clone()).filter(|c| !c.after.contains("two.qcow2"))
            }
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
        world.end_bound()
    });
}

#[test]
fn a_chain_that_is_streamed_into_one_image() {
    World::test(|world| {
        begin(world)?;
        let vm = world.start_bare("vm", &[])?;
        let mut monitor = vm.monitor()?;
        expect(world, "vm", &BEGIN)?;
        let file = |name: &str| vm.folder().join(name);
        let snapshot = json!({"device": "disk", "snapshot-file": file("one.qcow2"), "format": "qcow2"});
        give(&mut monitor, &[("blockdev-snapshot-sync", snapshot)])?;
        wait_chain(world, "one.qcow2 (qcow2, writable)")?;
        give(&mut monitor, &[("block-stream", json!({"device": "disk", "job-id": "stream"}))])?;
        let gone = wait_change(world, "vm", "image", "disk/1: ", "")?;
        check_image(&gone.images[0], "disk/1", &file("disk.img"))?;
        give(&mut monitor, &[("quit", json!({}))])?;
        let stop = wait_event(world, "vm", "its end", |body| match body {
            EventBody::VmStop(stop) => Some(stop.clone()),
            _ => None,
        })?;
        ensure!(stop.images.len() == 1, "{stop:?}");
        check_image(&stop.images[0], "disk", &file("one.qcow2"))?;
        world.end_bound()
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
        world.end_bound()
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
        world.end_bound()
    });
}
