//! A VM's state that is saved and loaded, sent and received: snapshots and migrations, as they stand in the proxy's log. Real QEMUs without
//! a guest.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs;
use std::time::Duration;

use anyhow::ensure;
use onequote_evidence::event::EventBody;
use onequote_tests::lab::story::{BEGIN, LIMIT, begin, check_image, expect, give, human, human_io, qemu_img, then};
use onequote_tests::lab::{World, wait};
use serde_json::json;

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
        // Which one is not to be seen: there are two. Nor is it told from a short pause but by what it wrote.
        told.extend(["vm-pause paused", "vm-resume", "snapshot-load"]);
        expect(world, "vm", &told)?;
        let delete = json!({"job-id": "delete", "tag": "one", "devices": ["state"]});
        give(&mut monitor, &[("snapshot-delete", delete)])?;
        told.push("config-change snapshot");
        let events = expect(world, "vm", &told)?;
        let Some(EventBody::ConfigChange(gone)) = events.last() else { unreachable!() };
        ensure!((gone.before.as_str(), gone.after.as_str()) == ("st: one", ""), "{gone:?}");
        human(&mut monitor, "loadvm two")?;
        told.extend(["vm-pause paused", "vm-resume", "snapshot-load two"]);
        expect(world, "vm", &told)?;
        // A short pause is nothing but a pause when nothing was written for a while: not even now that there is a snapshot.
        let file = folder.join("state.qcow2");
        wait::for_true("the image to rest", LIMIT, || {
            Ok(fs::metadata(&file)?.modified()?.elapsed().is_ok_and(|age| age > Duration::from_secs(3)))
        })?;
        // The proxy must have looked since then.
        give(&mut monitor, &[("object-add", json!({"qom-type": "rng-builtin", "id": "seen"}))])?;
        told.push("config-change object");
        expect(world, "vm", &told)?;
        give(&mut monitor, &[("stop", json!({})), ("cont", json!({}))])?;
        told.extend(["vm-pause paused", "vm-resume"]);
        expect(world, "vm", &told)?;
        // And the same again, put back.
        human(&mut monitor, "loadvm two")?;
        told.extend(["vm-pause paused", "vm-resume", "snapshot-load two"]);
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
        world.end_bound()
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
        // One that is cancelled, too.
        give(&mut monitor, &[("migrate-set-parameters", json!({"max-bandwidth": 4096}))])?;
        give(&mut monitor, &[("migrate", json!({"uri": "exec:cat > /dev/null"}))])?;
        told.push("migrate-out started");
        expect(world, "vm", &told)?;
        give(&mut monitor, &[("migrate_cancel", json!({}))])?;
        told.push("migrate-out cancelled");
        expect(world, "vm", &told)?;
        give(&mut monitor, &[("migrate-set-parameters", json!({"max-bandwidth": 1 << 30}))])?;
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
        world.end_bound()
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
            source.end_bound()?;
            target.end_bound()
        });
        Ok(())
    });
}
