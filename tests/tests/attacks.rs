//! Attacks on VMs, each found under its own name: by the proxy before the VM runs, or by the verifier. Real QEMUs without a
//! guest; the attacker has a second monitor, the files, or the sockets.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{
    fs, io,
    os::unix::{
        fs::symlink,
        net::{UnixListener, UnixStream},
    },
    path::Path,
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use onequote_evidence::event::{EventBody, RefuseCause, VmRefuse};
use onequote_tests::lab::{Bare, Verdict, World, skip, wait};
use serde_json::json;

const LIMIT: Duration = Duration::from_secs(90);

fn wait_stage(world: &mut World, name: &str, stage: &str) -> Result<()> {
    world.wait_until(&format!("{name} to be {stage}"), LIMIT, |world| {
        Ok((world.vm_status(name)?["stage"] == stage).then_some(()))
    })
}

fn refusals(world: &World) -> Result<Vec<VmRefuse>> {
    let refusal = |body| if let EventBody::VmRefuse(refusal) = body { Some(refusal) } else { None };
    Ok(world.read_log()?.events()?.into_iter().filter_map(|event| refusal(event.body)).collect())
}

/// Waits for a refusal with this cause.
fn wait_refusal(world: &mut World, cause: RefuseCause, words: &[&str]) -> Result<()> {
    let refusal = world.wait_until(&format!("a refusal: {cause}"), LIMIT, |world| {
        Ok(refusals(world)?.into_iter().find(|refusal| refusal.cause == cause))
    });
    let refusal = refusal.with_context(|| format!("{:?}", refusals(world)))?;
    eprintln!("{}", refusal.reason);
    for word in words {
        ensure!(refusal.reason.contains(word), "the reason does not say {word:?}: {}", refusal.reason);
    }
    Ok(())
}

/// A VM that waits for its proxy, already with all its files open.
fn waiting(world: &World, name: &str, more: &[&str]) -> Result<Bare> {
    let bare = world.start_bare(name, more)?;
    bare.monitor()?;
    // QEMU's start is known to within 50 ms.
    std::thread::sleep(Duration::from_millis(100));
    Ok(bare)
}

/// A VM that runs and is trusted.
fn trusted(world: &mut World, more: &[&str]) -> Result<Bare> {
    let bare = world.start_bare("vm", more)?;
    wait_stage(world, "vm", "watched")?;
    wait::for_true("the VM to run", LIMIT, || Ok(bare.run_state()? == "running"))?;
    world.learn_policy()?;
    world.verdict()?.vm("vm").is("trusted")?;
    Ok(bare)
}

/// Waits for a finding about the VM.
fn wait_finding(world: &mut World, code: &str, item: &str) -> Result<Verdict> {
    let mut last = Vec::new();
    let found = world.wait_until(&format!("{code} {item}"), LIMIT, |world| {
        let verdict = world.verdict()?;
        last = verdict.vm("vm").findings();
        Ok(verdict.vm("vm").has(code, item).then_some(verdict))
    });
    let found = found.with_context(|| format!("{last:?}"))?;
    found.vm("vm").is("untrusted")?;
    Ok(found)
}

fn stop_proxy(world: &mut World) -> Result<()> {
    ensure!(world.proxy()?.terminate()?.success(), "the proxy does not end well");
    Ok(())
}

fn start_proxy_again(world: &mut World) -> Result<()> {
    world.start_proxy()?;
    world.enrol_again()
}

fn run(program: &str, folder: &Path, arguments: &[&str]) -> Result<()> {
    let output = Command::new(program).args(arguments).current_dir(folder).output()?;
    ensure!(output.status.success(), "{program}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

#[test]
fn an_image_swapped_before_it_is_measured_is_refused() {
    World::test(|world| {
        world.start_enrolled()?;
        stop_proxy(world)?;
        // Renamed.
        let renamed = waiting(world, "renamed", &[])?;
        fs::write(renamed.folder().join("other.img"), vec![0xa5; 256 * 1024])?;
        fs::rename(renamed.folder().join("other.img"), renamed.folder().join("disk.img"))?;
        // A link turned.
        let folder = world.folder().join("vm/linked");
        fs::create_dir_all(&folder)?;
        symlink("real.img", folder.join("disk.img"))?;
        let linked = waiting(world, "linked", &[])?;
        fs::write(folder.join("other.img"), vec![0xa5; 256 * 1024])?;
        fs::remove_file(folder.join("disk.img"))?;
        symlink("other.img", folder.join("disk.img"))?;
        start_proxy_again(world)?;
        for bare in [&renamed, &linked] {
            wait_stage(world, bare.name(), "refused")?;
            ensure!(bare.run_state()? == "prelaunch");
            world.verdict()?.vm(bare.name()).is_untrusted_for("vm-refused", "disk")?;
        }
        let causes: Vec<_> = refusals(world)?.iter().map(|refusal| refusal.cause).collect();
        ensure!(causes == [RefuseCause::Changed; 2], "{causes:?}");
        Ok(())
    });
}

/// A file system's view of one path, until the value goes.
struct Mounted<'a>(&'a Path);

impl Drop for Mounted<'_> {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.0).status();
    }
}

#[test]
fn an_image_that_was_mounted_over_is_refused() {
    World::test(|world| {
        world.start_enrolled()?;
        stop_proxy(world)?;
        let second =
            ["-drive", "file=second.img,if=none,format=raw,id=second", "-device", "virtio-blk-pci,drive=second"];
        // Over one of two disks, a foreign file; over another VM's, its own second one: QEMU holds both.
        for name in ["foreign", "own"] {
            let folder = world.folder().join("vm").join(name);
            fs::create_dir_all(&folder)?;
            for file in ["second.img", "other.img"] {
                fs::write(folder.join(file), vec![0xa5; 256 * 1024])?;
            }
        }
        let (foreign, own) = (waiting(world, "foreign", &second)?, waiting(world, "own", &second)?);
        let disks = [foreign.folder().join("disk.img"), own.folder().join("disk.img")];
        let mut mounts = Vec::new();
        for (disk, over) in disks.iter().zip(["other.img", "second.img"]) {
            let over = disk.with_file_name(over);
            if let Err(error) =
                run("mount", world.folder(), &["--bind", &over.to_string_lossy(), &disk.to_string_lossy()])
            {
                skip("an image that was mounted over", &format!("nothing can be mounted: {error}"));
                return Ok(());
            }
            mounts.push(Mounted(disk));
        }
        start_proxy_again(world)?;
        for bare in [&foreign, &own] {
            wait_stage(world, bare.name(), "refused")?;
            world.verdict()?.vm(bare.name()).is_untrusted_for("vm-refused", "disk")?;
        }
        wait_refusal(world, RefuseCause::Changed, &["disk.img"])?;
        ensure!(
            refusals(world)?.iter().any(|refusal| refusal.reason.contains("mounted over")),
            "{:?}",
            refusals(world)?
        );
        Ok(())
    });
}

#[test]
fn firmware_in_an_exchanged_folder_is_refused() {
    World::test(|world| {
        world.start_enrolled()?;
        stop_proxy(world)?;
        for (folder, byte) in [("now", 0xf4), ("later", 0x90)] {
            let folder = world.folder().join("vm/vm").join(folder);
            fs::create_dir_all(&folder)?;
            fs::write(folder.join("f.bin"), vec![byte; 64 * 1024])?;
        }
        let bare = waiting(world, "vm", &["-bios", "now/f.bin"])?;
        let at = |name: &str| bare.folder().join(name);
        fs::rename(at("now"), at("was"))?;
        fs::rename(at("later"), at("now"))?;
        start_proxy_again(world)?;
        wait_refusal(world, RefuseCause::LoadedDiffers, &["f.bin", "guest memory"])?;
        ensure!(bare.run_state()? == "prelaunch");
        wait_finding(world, "loaded-differs", "firmware")?;
        Ok(())
    });
}

#[test]
fn a_backing_file_that_was_changed_under_a_running_vm_is_found() {
    World::test(|world| {
        world.start_enrolled()?;
        let folder = world.folder().join("vm/vm");
        fs::create_dir_all(&folder)?;
        fs::write(folder.join("base.raw"), vec![7; 1 << 20])?;
        run("qemu-img", &folder, &["create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", "top.qcow2"])?;
        let top = ["-drive", "file=top.qcow2,if=none,id=top", "-device", "virtio-blk-pci,drive=top"];
        let bare = trusted(world, &top)?;
        fs::write(folder.join("base.raw"), vec![8; 1 << 20])?;
        // Seen when it is measured again: here, after a restart of the proxy.
        stop_proxy(world)?;
        start_proxy_again(world)?;
        wait_finding(world, "component-changed", "top/1")?;
        // And at the next start, when the policy has its digest.
        drop(bare);
        world.wait_gone("vm")?;
        let _bare = world.start_bare("vm", &top)?;
        wait_stage(world, "vm", "watched")?;
        wait_finding(world, "image-mismatch", "top/1")?;
        Ok(())
    });
}

#[test]
fn disks_and_data_files_added_through_another_monitor_are_found() {
    World::test(|world| {
        world.start_enrolled()?;
        let bare = trusted(world, &["-device", "pcie-root-port,id=rp,slot=1"])?;
        run(
            "qemu-img",
            bare.folder(),
            &["create", "-q", "-f", "qcow2", "-o", "data_file=secret.raw", "e.qcow2", "1M"],
        )?;
        let mut monitor = bare.monitor()?;
        let node = json!({"driver": "qcow2", "node-name": "evil", "file": {"driver": "file", "filename": "e.qcow2"}});
        monitor.execute("blockdev-add", &node)?;
        monitor
            .execute("device_add", &json!({"driver": "virtio-blk-pci", "bus": "rp", "drive": "evil", "id": "hot"}))?;
        wait_finding(world, "config-change", "image")?;
        let verdict = wait_finding(world, "config-change", "device")?;
        let found = verdict.vm("vm").field("findings").to_string();
        // The file that the image itself names, too.
        ensure!(found.contains("secret.raw") && found.contains("e.qcow2") && found.contains("hot"), "{found}");
        Ok(())
    });
}

#[test]
fn a_disk_that_was_put_back_while_its_vm_was_off_is_found() {
    World::test(|world| {
        world.start_enrolled()?;
        let bare = trusted(world, &[])?;
        let disk = bare.folder().join("disk.img");
        let before = fs::read(&disk)?;
        drop(bare);
        world.wait_gone("vm")?;
        // A next run leaves it otherwise: here the VM's own QEMU writes it, through its human monitor.
        let bare = world.start_bare("vm", &[])?;
        wait_stage(world, "vm", "watched")?;
        wait::for_true("the VM to run", LIMIT, || Ok(bare.run_state()? == "running"))?;
        let write = json!({"command-line": "qemu-io disk \"write -P 0x11 0 4096\""});
        bare.monitor()?.execute("human-monitor-command", &write)?;
        drop(bare);
        world.wait_gone("vm")?;
        ensure!(fs::read(&disk)? != before, "nothing was written");
        // `prepare_bare` writes the old content: a rollback.
        let _bare = world.start_bare("vm", &[])?;
        ensure!(fs::read(&disk)? == before);
        wait_stage(world, "vm", "watched")?;
        wait_finding(world, "image-discontinuity", "disk")?;
        Ok(())
    });
}

#[test]
fn a_vm_that_was_put_back_to_a_snapshot_is_found() {
    World::test(|world| {
        world.start_enrolled()?;
        let folder = world.folder().join("vm/vm");
        fs::create_dir_all(&folder)?;
        run("qemu-img", &folder, &["create", "-q", "-f", "qcow2", "state.qcow2", "64M"])?;
        // Only an image that can hold states may be writable.
        fs::write(folder.join("disk.img"), vec![0; 512])?;
        let state = ["-drive", "file=state.qcow2,if=none,id=state", "-device", "virtio-blk-pci,drive=state"];
        let read_only = ["-set", "drive.disk.readonly=on"];
        let bare = trusted(world, &[&state[..], &read_only].concat())?;
        let human = |command: &str| -> Result<()> {
            let said = bare.monitor()?.execute("human-monitor-command", &json!({"command-line": command}))?;
            ensure!(said == "", "{command}: {said}");
            Ok(())
        };
        human("savevm before")?;
        wait_finding(world, "config-change", "snapshot-save")?;
        human("loadvm before")?;
        wait_finding(world, "snapshot-load", "before")?;
        Ok(())
    });
}

#[test]
fn a_vm_without_a_monitor_is_found() {
    World::test(|world| {
        world.start_enrolled()?;
        let policy = world.learn_policy()?;
        let strict = fs::read_to_string(&policy)?.replace("unmanaged = \"allowed\"\n", "");
        fs::write(&policy, strict)?;
        world.verifier(&["policy", "set", World::HOST, &policy.to_string_lossy()])?.success()?;
        stop_proxy(world)?;
        let bare = waiting(world, "hidden", &[])?;
        fs::remove_file(world.monitors().join("hidden.qmp"))?;
        start_proxy_again(world)?;
        let pid = format!("pid {}", bare.qemu.id());
        let verdict = world.wait_until("the hidden VM to be found", LIMIT, |world| {
            let verdict = world.verdict()?;
            Ok(verdict.host().has("unmanaged-vm", &pid).then_some(verdict))
        })?;
        verdict.host().is("untrusted")?;
        Ok(())
    });
}

/// Passes everything on to another monitor: a process in between.
fn relay(listener: &UnixListener, to: &Path) -> io::Result<()> {
    loop {
        let (ours, _) = listener.accept()?;
        let theirs = UnixStream::connect(to)?;
        let (mut from, mut back) = (ours.try_clone()?, theirs.try_clone()?);
        std::thread::spawn(move || io::copy(&mut from, &mut &theirs));
        io::copy(&mut back, &mut &ours)?;
    }
}

#[test]
fn an_impostor_at_a_monitor_is_refused() {
    World::test(|world| {
        world.start_enrolled()?;
        stop_proxy(world)?;
        let bare = waiting(world, "vm", &[])?;
        let (socket, to) = (world.monitors().join("vm.qmp"), bare.folder().join("own.qmp"));
        fs::remove_file(&socket)?;
        let listener = UnixListener::bind(&socket)?;
        std::thread::spawn(move || relay(&listener, &to));
        start_proxy_again(world)?;
        wait_refusal(world, RefuseCause::Impostor, &["its arguments say"])?;
        wait_finding(world, "monitor-impostor", "")?;
        Ok(())
    });
}

#[test]
fn a_vm_that_somebody_else_let_run_is_found() {
    World::test(|world| {
        world.start_enrolled()?;
        stop_proxy(world)?;
        let bare = waiting(world, "vm", &[])?;
        bare.monitor()?.execute("cont", &json!({}))?;
        start_proxy_again(world)?;
        wait_stage(world, "vm", "watched")?;
        wait_refusal(world, RefuseCause::Continued, &["-S", "somebody else let it run"])?;
        wait_finding(world, "vm-continued", "")?.vm("vm").is_untrusted_for("attached-while-running", "")
    });
}

#[test]
fn a_vm_that_was_changed_while_the_proxy_was_stopped_is_found() {
    World::test(|world| {
        world.start_enrolled()?;
        let bare = trusted(world, &["-device", "pcie-root-port,id=rp,slot=1"])?;
        stop_proxy(world)?;
        fs::write(bare.folder().join("evil.img"), vec![9; 1 << 20])?;
        let mut monitor = bare.monitor()?;
        let node = json!({"driver": "raw", "node-name": "evil", "file": {"driver": "file", "filename": "evil.img"}});
        monitor.execute("blockdev-add", &node)?;
        monitor
            .execute("device_add", &json!({"driver": "virtio-blk-pci", "bus": "rp", "drive": "evil", "id": "hot"}))?;
        start_proxy_again(world)?;
        let verdict = wait_finding(world, "component-changed", "hot")?;
        // That nobody watched is a finding of its own.
        ensure!(verdict.vm("vm").has("log-gap", "proxy-down"), "{verdict}");
        Ok(())
    });
}

#[test]
fn a_second_monitor_and_a_debugger_are_found() {
    World::test(|world| {
        world.start_enrolled()?;
        let bare = world.start_bare("vm", &["-gdb", "unix:gdb.sock,server=on,wait=off"])?;
        wait_stage(world, "vm", "watched")?;
        // A policy of the tests allows their own monitor.
        let policy = world.learn_policy()?;
        let strict = fs::read_to_string(&policy)?.replace("monitors = \"allowed\"\n", "");
        fs::write(&policy, strict)?;
        world.verifier(&["policy", "set", World::HOST, &policy.to_string_lossy()])?.success()?;
        let verdict = wait_finding(world, "second-monitor", "own.qmp")?;
        ensure!(verdict.vm("vm").has("second-monitor", "debugger"), "{verdict}");
        drop(bare);
        world.wait_gone("vm")?;
        // One that is opened when everything is measured.
        let bare = world.start_bare("vm", &[])?;
        wait_stage(world, "vm", "watched")?;
        let open = json!({"command-line": "gdbserver unix:late.sock,server=on,wait=off"});
        bare.monitor()?.execute("human-monitor-command", &open)?;
        wait_finding(world, "second-monitor", "gdb:")?;
        Ok(())
    });
}

/// As deep as QEMU itself opens it.
#[test]
fn a_chain_that_is_too_deep_is_refused_and_nobody_else_is_hurt() {
    World::test(|world| {
        world.start_proxy_alone()?;
        let folder = world.folder().join("vm/deep");
        fs::create_dir_all(&folder)?;
        fs::write(folder.join("0"), vec![1; 1 << 16])?;
        for n in 1..=300 {
            let (this, below) = (n.to_string(), (n - 1).to_string());
            let format = if n == 1 { "raw" } else { "qcow2" };
            // Without a look at the chain below, which would take the square of it.
            let arguments = [
                "create",
                "-q",
                "-u",
                "-f",
                "qcow2",
                "-o",
                "cluster_size=4k",
                "-b",
                &below,
                "-F",
                format,
                &this,
                "64k",
            ];
            run("qemu-img", &folder, &arguments)?;
        }
        let deep = world
            .start_bare("deep", &["-drive", "file=300,if=none,id=chain", "-device", "virtio-blk-pci,drive=chain"])?;
        let fine = world.start_bare("fine", &[])?;
        wait_stage(world, "fine", "watched")?;
        wait::for_true("the other VM to run", LIMIT, || Ok(fine.run_state()? == "running"))?;
        wait_stage(world, "deep", "refused")?;
        wait_refusal(world, RefuseCause::Unmeasurable, &["chain", "deeper than 256"])?;
        let error = world.vm_status("deep")?["error"].as_str().unwrap_or_default().to_owned();
        ensure!(error.contains("deep is not let run") && error.contains("chain/"), "{error}");
        ensure!(deep.run_state()? == "prelaunch");
        Ok(())
    });
}
