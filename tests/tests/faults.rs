//! What goes wrong around the proxy: a clear error, no VM let go unmeasured, and nothing lost once it is mended.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs;
use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use onequote_evidence::event::EventBody;
use onequote_tests::lab::{Bare, Guest, Loss, Peer, TpmCommand, TpmRelay, World, skip, wait};
use serde_json::Value;

const LIMIT: Duration = Duration::from_secs(90);

fn wait_stage(world: &mut World, name: &str, stage: &str) -> Result<Value> {
    let what = format!("{name} to be {stage}");
    world.wait_until(&what, LIMIT, |world| {
        let vm = world.vm_status(name)?;
        Ok((vm["stage"] == stage).then_some(vm))
    })
}

/// Waits until a VM is refused, and checks that it says why and does not run.
fn check_refused(world: &mut World, bare: &Bare, words: &[&str]) -> Result<()> {
    let error = wait_stage(world, bare.name(), "refused")?["error"].as_str().unwrap_or_default().to_owned();
    eprintln!("{error}");
    for word in [bare.name(), "is not let run"].iter().chain(words) {
        ensure!(error.contains(word), "the error does not say {word:?}: {error}");
    }
    let shown = world.proxy_command(&["status"])?.success()?.output;
    ensure!(shown.contains(&error), "`status` does not show the error: {shown}");
    ensure!(bare.run_state()? == "prelaunch", "a refused VM runs");
    Ok(())
}

/// The log says why, too.
fn wait_refusal(world: &mut World, words: &[&str]) -> Result<()> {
    let reason = world.wait_until("vm-refuse in the log", LIMIT, |world| {
        let events = world.read_log()?.events()?;
        Ok(events.into_iter().find_map(|event| match event.body {
            EventBody::VmRefuse(body) => Some(body.reason),
            _ => None,
        }))
    })?;
    for word in words {
        ensure!(reason.contains(word), "the log does not say {word:?}: {reason}");
    }
    Ok(())
}

/// Another VM is let go as if nothing had happened.
fn check_others(world: &mut World) -> Result<()> {
    let fine = world.start_bare("fine", &[])?;
    wait_stage(world, "fine", "watched")?;
    wait::for_true("the other VM to run", LIMIT, || Ok(fine.run_state()? == "running"))
}

#[test]
fn a_firmware_file_that_is_gone_keeps_its_vm_from_running() {
    World::test(|world| {
        let bare = world.start_bare("bare", &[])?;
        bare.monitor()?;
        fs::remove_file(bare.folder().join("halt.bin"))?;
        world.start_proxy_alone()?;
        check_refused(world, &bare, &["firmware", "halt.bin", "not found"])?;
        wait_refusal(world, &["firmware", "halt.bin", "not found"])?;
        check_others(world)?;

        // Mended, and started again.
        drop(bare);
        let bare = world.start_bare("bare", &[])?;
        wait_stage(world, "bare", "watched")?;
        wait::for_true("the VM to run", LIMIT, || Ok(bare.run_state()? == "running"))?;
        world.end_bound()
    });
}

#[test]
fn an_image_that_cannot_be_read_keeps_its_vm_from_running() {
    World::test(|world| {
        world.start_proxy_alone()?;
        let bare = world.start_bare(
            "bare",
            &[
                "-blockdev",
                "driver=null-co,node-name=nothing,size=65536,read-zeroes=on",
                "-device",
                "virtio-blk-pci,drive=nothing",
            ],
        )?;
        check_refused(world, &bare, &["nothing"])?;
        wait_refusal(world, &["nothing"])?;
        check_others(world)?;
        world.end_bound()
    });
}

/// Only a plain user can be kept from a file: as root this test gives proxy and VM to one.
#[test]
fn an_image_without_the_right_to_read_it_keeps_its_vm_from_running() {
    World::test(|world| {
        if !nix::unistd::geteuid().is_root() {
            skip("an image without the right to read it", "only root can start VM and proxy as different users");
            return Ok(());
        }
        world.write_proxy_config()?;
        world.proxy_command(&["init"])?.success()?;
        // A folder that everybody reaches, a VM of nobody's with an image that only nobody reads, a proxy of daemon's.
        let bare = world.start_bare("bare", &[])?;
        bare.monitor()?;
        give_away(world)?;
        let program = world.folder().join("onequote-proxy");
        fs::copy(&world.assets().proxy, &program)?;
        world.settings().user = Some((1, program));
        world.spawn_proxy()?;
        let status = world.wait_until("trouble with the monitor", LIMIT, |world| {
            let status = world.proxy_status().unwrap_or_default();
            Ok((status["sockets"].as_array().is_some_and(|list| !list.is_empty())
                || status["vms"][0]["error"].is_string())
            .then_some(status))
        })?;
        eprintln!("{status:#}");
        ensure!(bare.run_state()? == "prelaunch", "a VM that cannot be measured runs");
        let text = status.to_string();
        ensure!(
            text.contains("ermission denied") && text.contains("run the proxy as root"),
            "no clear error: {status:#}"
        );
        Ok(())
    });
}

fn give_away(world: &World) -> Result<()> {
    let folder = world.folder();
    for (program, arguments) in [("chmod", ["-R", "a+rX"]), ("chown", ["-R", "daemon:daemon"])] {
        let status = Command::new(program).args(arguments).arg(folder).status()?;
        ensure!(status.success(), "{program} failed");
    }
    // The guest's files stay root's.
    let status = Command::new("chown").args(["-R", "root:root"]).arg(folder.join("vm")).status()?;
    ensure!(status.success(), "chown failed");
    Ok(())
}

#[test]
fn what_qemu_holds_is_measured_and_not_what_the_path_names_now() {
    World::test(|world| {
        let bare = world.start_bare("bare", &[])?;
        bare.monitor()?;
        let disk = bare.folder().join("disk.img");
        let held = onequote_verity::measure(&fs::File::open(&disk)?, onequote_verity::Options::default())?.digest;
        let other = bare.folder().join("other.img");
        fs::write(&other, vec![0xa5; 256 * 1024])?;
        fs::rename(&other, &disk)?;
        world.start_proxy_alone()?;
        let log = world.wait_until("the VM in the log", LIMIT, |world| {
            let log = world.read_log()?;
            Ok((log.count("vm-start")? + log.count("vm-refuse")? > 0).then_some(log))
        })?;
        // Let run by what it holds, or not at all: never by the digest of a file that it does not have.
        for event in log.events()? {
            if let EventBody::VmStart(start) = event.body {
                ensure!(start.images.iter().any(|image| image.digest.value.0 == held), "another image: {start:?}");
            }
        }
        world.end_bound()
    });
}

#[test]
fn monitors_that_speak_rubbish_are_told_and_nobody_else_is_hurt() {
    World::test(|world| {
        world.start_proxy_alone()?;
        let answers: [(&str, Vec<u8>); 5] = [
            ("noise", b"\x00\xff\xfe{{{{\n\n\nHTTP/1.1 200 OK\r\n\r\n".to_vec()),
            ("greeting", b"{\"QMP\": 7}\r\n".to_vec()),
            ("endless", vec![b'{'; 32 << 20]),
            ("closing", Vec::new()),
            ("other", b"{\"return\": {}}\r\n".repeat(1000)),
        ];
        let paths: Vec<PathBuf> =
            answers.iter().map(|(name, _)| world.monitors().join(format!("{name}.qmp"))).collect();
        for ((_, bytes), path) in answers.into_iter().zip(&paths) {
            speak(path, bytes)?;
        }
        for path in &paths {
            let error = world.wait_until(&format!("trouble with {}", path.display()), LIMIT, |world| {
                let status = world.proxy_status()?;
                let sockets = status["sockets"].as_array().cloned().unwrap_or_default();
                Ok(sockets.into_iter().find(|socket| socket["path"] == path.to_string_lossy().as_ref()))
            })?;
            eprintln!("{}", error["error"]);
            ensure!(error["error"].as_str().is_some_and(|text| text.len() > 10), "no clear error: {error}");
        }
        check_others(world)?;
        ensure!(world.read_log()?.count("vm-create")? == 1, "rubbish became a VM");
        world.end_bound()
    });
}

/// Says the same to everybody who connects.
fn speak(path: &Path, bytes: Vec<u8>) -> Result<()> {
    let listener = UnixListener::bind(path)?;
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let bytes = bytes.clone();
            std::thread::spawn(move || {
                // Whether it is taken is the other end's business.
                let _ = stream.write_all(&bytes);
                if !bytes.is_empty() {
                    let _ = stream.read_to_end(&mut Vec::new());
                }
            });
        }
    });
    Ok(())
}

/// A TPM that is away for a while, with the extend done or not: nothing is lost, nothing is extended twice.
fn lose_an_extend(world: &mut World, loss: Loss) -> Result<()> {
    let relay = TpmRelay::start(world)?;
    world.start_proxy_alone()?;
    let first = world.start_bare("first", &[])?;
    let peer = Peer::start(world.guest_socket("first"), Guest::new(3));
    peer.guest().grow(10)?;
    world.wait_until("the guest's entries", LIMIT, |world| {
        Ok((world.vm_status("first")?["entries"] == 10).then_some(()))
    })?;

    relay.lose(TpmCommand::PCR_EXTEND, loss);
    peer.grow_steadily(2);
    world.wait_until("the TPM to be away", LIMIT, |_| Ok(relay.is_away().then_some(())))?;
    let second = world.start_bare("second", &[])?;
    check_refused(world, &second, &["TPM"])?;
    let failure = world.wait_until("the failure in the status", LIMIT, |world| {
        Ok(world.proxy_status()?["failure"].as_str().map(str::to_owned))
    })?;
    eprintln!("{failure}");
    ensure!(failure.contains("TPM"), "no clear error: {failure}");
    ensure!(first.run_state()? == "running", "a VM that ran before does not run any more");

    relay.mend();
    peer.grow_steadily(0);
    let count = peer.guest().count();
    ensure!(count > 10);
    world.wait_until("the guest's entries after all", LIMIT, |world| {
        Ok((world.vm_status("first")?["entries"] == count).then_some(()))
    })?;
    peer.check()?;
    ensure!(world.proxy_export("first")? == peer.guest().list());
    wait_refusal(world, &["TPM"])?;
    check_others(world)?;
    ensure!(second.run_state()? == "prelaunch", "a refused VM runs");
    world.end_bound()?;
    ensure!(world.epochs()? == [1], "the log began anew");
    let log = world.bound_log()?;
    let mut next = 0;
    for event in log.events()? {
        if let EventBody::GuestEntries(body) = &event.body {
            ensure!(body.first == next, "entries {} after {next}", body.first);
            next += body.count;
        }
    }
    ensure!(next == count && log.count("log-gap")? == 0);
    Ok(())
}

#[test]
fn a_tpm_that_goes_away_before_an_extend_loses_nothing() {
    World::test(|world| lose_an_extend(world, Loss::Before));
}

#[test]
fn a_tpm_that_goes_away_after_an_extend_doubles_nothing() {
    World::test(|world| lose_an_extend(world, Loss::After));
}

#[test]
fn a_tpm_that_is_busy_is_asked_again_and_nothing_is_lost() {
    World::test(|world| {
        let relay = TpmRelay::start(world)?;
        // More often than the TPM library asks again by itself.
        relay.keep_busy(7);
        world.start_proxy_alone()?;
        let first = world.start_bare("first", &[])?;
        let peer = Peer::start(world.guest_socket("first"), Guest::new(3));
        peer.guest().grow(10)?;
        let arrived = |world: &mut World, count: u64| {
            world.wait_until("the guest's entries", LIMIT, |world| {
                Ok((world.vm_status("first")?["entries"] == count).then_some(()))
            })
        };
        arrived(world, 10)?;
        ensure!(first.run_state()? == "running" && world.proxy_status()?["failure"].is_null());

        relay.keep_busy(u32::MAX);
        peer.guest().grow(10)?;
        let second = world.start_bare("second", &[])?;
        check_refused(world, &second, &["TPM", "busy"])?;
        relay.mend();
        arrived(world, 20)?;
        check_others(world)?;
        ensure!(first.run_state()? == "running" && second.run_state()? == "prelaunch");
        world.end_bound()?;
        ensure!(world.epochs()? == [1], "the log began anew");
        ensure!(world.bound_log()?.count("log-gap")? == 0);
        Ok(())
    });
}

#[test]
fn a_tpm_that_dies_in_the_middle_begins_a_new_log_and_the_old_one_stays() {
    World::test(|world| {
        let relay = TpmRelay::start(world)?;
        world.start_proxy_alone()?;
        let first = world.start_bare("first", &[])?;
        let peer = Peer::start(world.guest_socket("first"), Guest::new(3));
        peer.grow_steadily(2);
        world.wait_until("entries", LIMIT, |world| {
            Ok((world.vm_status("first")?["entries"].as_u64() > Some(10)).then_some(()))
        })?;
        relay.lose(TpmCommand::PCR_EXTEND, Loss::Before);
        world.wait_until("the TPM to be away", LIMIT, |_| Ok(relay.is_away().then_some(())))?;
        world.tpm()?.kill()?;
        let second = world.start_bare("second", &[])?;
        check_refused(world, &second, &["TPM"])?;
        let old = fs::read(world.log_file()?)?;
        peer.grow_steadily(0);

        // Its registers are gone with it: the proxy says so and ends, and a new start measures everything anew.
        world.tpm()?.reset()?;
        relay.mend();
        world.proxy()?.wait(LIMIT)?;
        let said = fs::read_to_string(world.folder().join("log/proxy.log"))?;
        ensure!(said.contains("the log began a new epoch"), "the proxy does not say why it ends");
        world.start_proxy()?;
        wait_stage(world, "first", "watched")?;
        wait_stage(world, "second", "watched")?;
        ensure!(first.run_state()? == "running" && second.run_state()? == "running");
        let count = peer.guest().count();
        world.wait_until("the whole list in the new log", LIMIT, |world| {
            Ok((world.vm_status("first")?["entries"] == count).then_some(()))
        })?;
        world.end_bound()?;
        ensure!(world.epochs()? == [1, 2], "{:?}", world.epochs()?);
        let kept = fs::read(world.proxy_state().join("log/epoch-00000001.cel"))?;
        ensure!(kept == old, "the old log is not what it was");
        Ok(())
    });
}

/// Takes all space of a file system until the value goes.
struct Filler(PathBuf);

impl Filler {
    fn fill(folder: &Path) -> Result<Self> {
        let path = folder.join("filler");
        let mut file = fs::File::create(&path)?;
        let block = [0; 4096];
        while file.write_all(&block).is_ok() {}
        Ok(Self(path))
    }
}

impl Drop for Filler {
    fn drop(&mut self) {
        // The test that needs the space again fails by itself.
        let _ = fs::remove_file(&self.0);
    }
}

/// A small file system at `folder`, as long as the value lives.
struct Small(PathBuf);

impl Small {
    fn mount(folder: &Path) -> Result<Self> {
        let output =
            Command::new("mount").args(["-t", "tmpfs", "-o", "size=2m,mode=700", "none"]).arg(folder).output()?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr).trim().to_owned());
        Ok(Self(folder.to_owned()))
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

#[test]
fn a_full_disk_under_the_log_keeps_vms_from_running_and_loses_nothing() {
    World::test(|world| {
        let state = world.proxy_state();
        let _small = match Small::mount(&state) {
            Ok(small) => small,
            Err(error) => {
                skip("a full disk under the log", &format!("no small file system can be mounted: {error}"));
                return Ok(());
            }
        };
        world.start_proxy_alone()?;
        let first = world.start_bare("first", &[])?;
        let peer = Peer::start(world.guest_socket("first"), Guest::new(3));
        peer.guest().grow(10)?;
        world.wait_until("the guest's entries", LIMIT, |world| {
            Ok((world.vm_status("first")?["entries"] == 10).then_some(()))
        })?;

        let filler = Filler::fill(&state)?;
        peer.guest().grow(5000)?;
        // What is left of the log's last page takes a VM or two.
        let mut vms = Vec::new();
        let refused = loop {
            let name = format!("more{}", vms.len());
            ensure!(vms.len() < 8, "the disk is not full");
            let bare = world.start_bare(&name, &[])?;
            let stage = world.wait_until("a stage", LIMIT, |world| {
                let stage = world.vm_status(&name)?["stage"].as_str().unwrap_or_default().to_owned();
                Ok(["watched", "refused"].contains(&stage.as_str()).then_some(stage))
            })?;
            if stage == "refused" {
                break bare;
            }
            vms.push(bare);
        };
        check_refused(world, &refused, &["epoch-00000001.cel", "No space left on device"])?;
        ensure!(first.run_state()? == "running", "a VM that ran before does not run any more");
        let said = fs::read_to_string(world.folder().join("log/proxy.log"))?;
        let waits =
            said.lines().find(|line| line.contains("guests' entries wait")).context("nobody says that entries wait")?;
        ensure!(waits.contains("No space left") && waits.contains(&*state.to_string_lossy()), "{waits}");
        drop(filler);
        let count = peer.guest().count();
        world.wait_until("the guest's entries after all", LIMIT, |world| {
            Ok((world.vm_status("first")?["entries"] == count).then_some(()))
        })?;
        peer.check()?;
        ensure!(world.proxy_export("first")? == peer.guest().list());
        wait_refusal(world, &["No space left on device"])?;
        ensure!(refused.run_state()? == "prelaunch", "a refused VM runs");
        ensure!(world.proxy()?.terminate()?.success());

        // Starts of the proxy with no room: sooner or later one does not get its own record into the log.
        let filler = Filler::fill(&state)?;
        let last = loop {
            world.spawn_proxy()?;
            let address = state.join("listen.addr");
            wait::for_true("the proxy to listen or to end", LIMIT, || {
                Ok(world.proxy()?.exited()?.is_some() || fs::metadata(&address).is_ok_and(|data| data.len() > 0))
            })?;
            if let Some(status) = world.proxy()?.exited()? {
                ensure!(!status.success());
                let said = fs::read_to_string(world.folder().join("log/proxy.log"))?;
                break said.lines().last().context("the proxy says nothing")?.to_owned();
            }
            world.proxy()?.kill()?;
        };
        eprintln!("{last}");
        ensure!(last.contains("No space left on device") && last.contains(&*state.to_string_lossy()), "{last}");
        drop(filler);
        world.start_proxy()?;
        wait_stage(world, "first", "watched")?;
        wait_stage(world, refused.name(), "watched")?;
        ensure!(refused.run_state()? == "running");
        ensure!(world.proxy_export("first")? == peer.guest().list());
        world.end_bound()?;
        ensure!(world.epochs()? == [1], "the log began anew");
        Ok(())
    });
}
