//! Images at the end of a run: read only where QEMU says that they changed, and whole wherever that is not certain. Real
//! QEMUs, whose guest is a few instructions of firmware that write to a disk.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::{fs::FileExt as _, net::UnixStream};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use onequote_evidence::event::{EventBody, HowRead, ImageRead, StopCause, VmStop};
use onequote_tests::lab::{Bare, World, wait};
use serde_json::{Value, json};

const LIMIT: Duration = Duration::from_secs(90);

/// Size of the disk as the guest sees it, in bytes.
const DISK: u64 = 64 << 20;

/// Where the guest writes: 5 times 256 sectors from sector 4000₁₆ on, 1 % of the disk.
const WRITTEN: std::ops::Range<u64> = (8 << 20)..(8 << 20) + 5 * 128 * 1024;

/// PM registers of q35 at 600₁₆, and PWRBTN_EN set (`tests/tests/launch.rs` has them one by one).
const LISTEN: [u8; 44] = [
    0xfa, 0xba, 0xf8, 0x0c, 0x66, 0xb8, 0x40, 0xf8, 0x00, 0x80, 0x66, 0xef, 0xb2, 0xfc, 0x66, 0xb8, 0x01, 0x06, 0x00,
    0x00, 0x66, 0xef, 0xb2, 0xf8, 0x66, 0xb8, 0x44, 0xf8, 0x00, 0x80, 0x66, 0xef, 0xb2, 0xfc, 0xb0, 0x80, 0xee, 0xba,
    0x02, 0x06, 0xb8, 0x00, 0x01, 0xef,
];

/// Writes [`WRITTEN`] with A5 5A by PIO to the first disk at the IDE ports (ATA/ATAPI-6, 8.62 WRITE SECTOR(S) and 8.12
/// FLUSH CACHE), in 16 bits.
#[rustfmt::skip]
const WRITE: [u8; 84] = [
    0xb3, 0x40,                                     // mov bl, 40
    0xba, 0xf7, 0x01, 0xec, 0xa8, 0x80, 0x75, 0xfb, // command: mov dx, 1f7; ready: in al, dx; test al, 80; jnz ready
    0x4a, 0xb0, 0xe0, 0xee,                         // 1f6 = e0: by sector number, first disk
    0xba, 0xf2, 0x01, 0x30, 0xc0, 0xee,             // 1f2 = 0: 256 sectors
    0x42, 0xee, 0x42, 0x88, 0xd8, 0xee,             // 1f3 = 0; 1f4 = bl
    0x42, 0x30, 0xc0, 0xee,                         // 1f5 = 0
    0xba, 0xf7, 0x01, 0xb0, 0x30, 0xee,             // 1f7 = 30: write sectors
    0xbd, 0x00, 0x01,                               // mov bp, 100
    0xec, 0x24, 0x88, 0x3c, 0x08, 0x75, 0xf9,       // sector: in al, dx; and al, 88; cmp al, 8; jne sector
    0xba, 0xf0, 0x01, 0xb9, 0x00, 0x01, 0xb8, 0xa5, 0x5a, // mov dx, 1f0; mov cx, 100; mov ax, 5aa5
    0xef, 0xe2, 0xfd,                               // word: out dx, ax; loop word
    0xba, 0xf7, 0x01, 0x4d, 0x75, 0xe7,             // mov dx, 1f7; dec bp; jnz sector
    0xec, 0xa8, 0x80, 0x75, 0xfb,                   // done: in al, dx; test al, 80; jnz done
    0xfe, 0xc3, 0x80, 0xfb, 0x45, 0x75, 0xb6,       // inc bl; cmp bl, 45; jne command
    0xb0, 0xe7, 0xee, 0xec, 0xa8, 0x80, 0x75, 0xfb, // 1f7 = e7: flush; flushed: in al, dx; test al, 80; jnz flushed
];

/// PM1_STS read until PWRBTN_STS is set.
const AWAIT_BUTTON: [u8; 9] = [0xba, 0x00, 0x06, 0xed, 0xf6, 0xc4, 0x01, 0x74, 0xfa];

/// S5, and a halt should it take its time.
const POWER_OFF: [u8; 11] = [0xba, 0x04, 0x06, 0xb8, 0x00, 0x20, 0xef, 0xf4, 0xeb, 0xfd, 0xf4];

/// PVPANIC_PANICKED to the port of QEMU's pvpanic device (docs/specs/pvpanic.txt), and a halt.
const PANIC: [u8; 7] = [0xba, 0x05, 0x05, 0xb0, 0x01, 0xee, 0xf4];

/// Firmware that listens for the power button, writes, and powers off when it was pressed.
fn writing_firmware() -> Vec<u8> {
    firmware(&[&LISTEN, &WRITE, &AWAIT_BUTTON, &POWER_OFF])
}

fn firmware(code: &[&[u8]]) -> Vec<u8> {
    let mut image = vec![0xf4; 64 * 1024];
    let code = code.concat();
    image[0xf000..0xf000 + code.len()].copy_from_slice(&code);
    // jmp f000, from fff3
    image[0xfff0..0xfff3].copy_from_slice(&[0xe9, 0x0d, 0xf0]);
    image
}

/// Bytes that look like nothing.
fn noise(len: usize) -> Vec<u8> {
    let mut x = 0x2545_f491_4f6c_dd1d_u64;
    let mut next = || {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        x.to_le_bytes()
    };
    (0..len / 8).flat_map(|_| next()).collect()
}

fn tool(folder: &Path, program: &str, arguments: &[&str]) -> Result<String> {
    let output = Command::new(program).args(arguments).current_dir(folder).output()?;
    ensure!(output.status.success(), "{program}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8(output.stdout)?)
}

/// Puts a VM with a full disk `data.img` of this format in place; gives its description.
fn describe(world: &World, name: &str, format: &str, options: &str) -> Result<std::path::PathBuf> {
    let folder = world.prepare_bare(name)?;
    fs::write(folder.join("halt.bin"), writing_firmware())?;
    fs::write(folder.join("noise.raw"), noise(usize::try_from(DISK)?))?;
    tool(&folder, "qemu-img", &["convert", "-O", format, "-o", options, "noise.raw", "data.img"])?;
    let path = folder.join(name).with_extension("toml");
    let text = format!(
        "memory = \"32M\"\naccelerator = \"tcg\"\narguments = [\"-device\", \"isa-ide,id=pio\", \"-blockdev\", \
         \"driver={format},node-name=data,file.driver=file,file.filename=data.img\", \"-device\", \
         \"ide-hd,drive=data,bus=pio.0\"]\n[firmware]\nbios = \"halt.bin\"\n[[disk]]\npath = \"disk.img\"\nformat = \"raw\"\n"
    );
    fs::write(&path, text)?;
    Ok(path)
}

fn launch(world: &mut World, description: &Path) -> Result<Bare> {
    let mut bare = world.launch_bare(description)?;
    let name = bare.name().to_owned();
    world.wait_until(&format!("{name} to run"), LIMIT, |world| {
        bare.qemu.check_alive()?;
        let vm = world.vm_status(&name)?;
        Ok((vm["stage"] == "watched" && vm["run_state"] == "running").then_some(()))
    })?;
    Ok(bare)
}

/// Presses the power button until the guest, which may not have listened yet, has powered off.
fn power_off(world: &mut World, bare: &mut Bare) -> Result<VmStop> {
    let name = bare.name().to_owned();
    wait::for_true("the guest to power down", LIMIT, || {
        Ok(world.proxy_command(&["stop", &name, "--timeout", "5"])?.code == 0)
    })?;
    ensure!(bare.qemu.wait(LIMIT)?.success(), "QEMU did not end well");
    world.wait_gone(&name)?;
    last_stop(world)
}

fn last_stop(world: &World) -> Result<VmStop> {
    let events = world.read_log()?.events()?;
    let stop = events.into_iter().rev().find_map(|event| match event.body {
        EventBody::VmStop(stop) => Some(stop),
        _ => None,
    });
    stop.context("no vm-stop in the log")
}

fn kinds(world: &World) -> Result<Vec<String>> {
    Ok(world.read_log()?.events()?.iter().filter(|e| e.vm.is_some()).map(|e| e.body.kind().to_owned()).collect())
}

/// How the digest of the disk that the guest writes was made.
fn read_of_data(stop: &VmStop) -> Result<ImageRead> {
    eprintln!("{:?}", stop.read);
    stop.read.iter().find(|read| read.slot == "data").cloned().context("the disk's digest was made in no known way")
}

fn digest_of_data(stop: &VmStop) -> Result<String> {
    let image = stop.images.iter().find(|image| image.slot == "data").context("no image")?;
    Ok(image.digest.value.to_string())
}

/// What Debian's own tool says of the file.
fn fsverity(folder: &Path) -> Result<String> {
    Ok(tool(folder, "fsverity", &["digest", "--compact", "data.img"])?.trim().to_owned())
}

/// That the digest is right, and was made in this way; gives why all was read.
fn measured(stop: &VmStop, folder: &Path, how: HowRead) -> Result<String> {
    let read = read_of_data(stop)?;
    ensure!(read.how == how, "{read:?}");
    ensure!(digest_of_data(stop)? == fsverity(folder)?, "the digest is not that of the file");
    let size = fs::metadata(folder.join("data.img"))?.len();
    match how {
        HowRead::Changed => ensure!(read.bytes > 0 && read.bytes < size / 20 && read.why.is_empty(), "{read:?}"),
        HowRead::Full => ensure!(read.bytes == size && !read.why.is_empty(), "{read:?}"),
    }
    Ok(read.why)
}

/// That the guest wrote what it was to write.
fn must_be_written(folder: &Path, format: &str) -> Result<()> {
    tool(folder, "qemu-img", &["convert", "-f", format, "-O", "raw", "data.img", "after.raw"])?;
    let mut bytes = vec![0; usize::try_from(WRITTEN.end - WRITTEN.start + 16)?];
    File::open(folder.join("after.raw"))?.read_exact_at(&mut bytes, WRITTEN.start - 8)?;
    let (inner, outer) = (&bytes[8..bytes.len() - 8], [&bytes[..8], &bytes[bytes.len() - 8..]].concat());
    ensure!(inner.chunks(2).all(|word| word == [0xa5, 0x5a]), "the guest did not write");
    ensure!(!outer.chunks(2).all(|word| word == [0xa5, 0x5a]), "the guest wrote elsewhere");
    Ok(())
}

fn end_bound(world: &mut World) -> Result<()> {
    ensure!(world.proxy()?.terminate()?.success(), "the proxy does not end well");
    world.bound_log()?;
    Ok(())
}

/// One launched VM writes one percent of its disk and powers off.
fn one_percent(format: &'static str, options: &'static str) {
    World::test(|world| {
        world.start_proxy_alone()?;
        let description = describe(world, "vm", format, options)?;
        let folder = description.parent().context("a folder")?.to_owned();
        let before = fsverity(&folder)?;
        let mut bare = launch(world, &description)?;
        let stop = power_off(world, &mut bare)?;
        ensure!(stop.cause == StopCause::GuestShutdown && stop.unmeasured.is_empty(), "{stop:?}");
        measured(&stop, &folder, HowRead::Changed)?;
        ensure!(fsverity(&folder)? != before, "nothing was written");
        must_be_written(&folder, format)?;
        // The disk that nobody wrote to: nothing of it was read.
        let idle = stop.read.iter().find(|read| read.slot == "disk0").context("no disk0")?;
        ensure!((idle.how, idle.bytes) == (HowRead::Changed, 0), "{idle:?}");
        // The end looks as ends do: the pause before it is the proxy's own.
        ensure!(kinds(world)? == ["vm-create", "vm-start", "vm-resume", "vm-stop"], "{:?}", kinds(world)?);

        // And again, from what was left.
        let mut bare = launch(world, &description)?;
        let stop = power_off(world, &mut bare)?;
        measured(&stop, &folder, HowRead::Changed)?;
        end_bound(world)
    });
}

#[test]
fn of_a_raw_image_only_what_changed_is_read() {
    one_percent("raw", "preallocation=off");
}

#[test]
fn of_a_qcow2_image_only_what_changed_is_read() {
    one_percent("qcow2", "compat=1.1");
}

#[test]
fn what_qemu_writes_when_it_closes_an_image_means_a_full_reading() {
    World::test(|world| {
        world.start_proxy_alone()?;
        let description = describe(world, "vm", "qcow2", "lazy_refcounts=on")?;
        let folder = description.parent().context("a folder")?.to_owned();
        // A snapshot, so that writing allocates and makes the image's counts stale.
        tool(&folder, "qemu-img", &["snapshot", "-c", "before", "data.img"])?;
        let mut bare = launch(world, &description)?;
        let stop = power_off(world, &mut bare)?;
        let why = measured(&stop, &folder, HowRead::Full)?;
        ensure!(why.contains("written after QEMU"), "{why}");
        end_bound(world)
    });
}

#[test]
fn a_tampered_tree_means_a_full_reading() {
    World::test(|world| {
        world.start_proxy_alone()?;
        let description = describe(world, "vm", "raw", "preallocation=off")?;
        let folder = description.parent().context("a folder")?.to_owned();
        let mut bare = launch(world, &description)?;
        // The trees have no names; whoever can get at the proxy's descriptors gets at them.
        let fds = format!("/proc/{}/fd", world.proxy()?.id());
        let mut trees = 0;
        for fd in fs::read_dir(fds)? {
            let path = fd?.path();
            if fs::read_link(&path).is_ok_and(|target| target.starts_with(world.proxy_state().join("trees"))) {
                let tree = File::options().write(true).open(&path)?;
                // The digest of a block that nobody writes.
                tree.write_all_at(&[0x77], 4096 + 100)?;
                trees += 1;
            }
        }
        ensure!(trees == 2, "{trees} trees for two disks");
        let stop = power_off(world, &mut bare)?;
        let why = measured(&stop, &folder, HowRead::Full)?;
        ensure!(why.contains("saved tree"), "{why}");
        end_bound(world)
    });
}

#[test]
fn a_killed_qemu_means_a_full_reading() {
    World::test(|world| {
        world.start_proxy_alone()?;
        let description = describe(world, "vm", "qcow2", "compat=1.1")?;
        let folder = description.parent().context("a folder")?.to_owned();
        let mut bare = launch(world, &description)?;
        bare.qemu.kill()?;
        world.wait_gone("vm")?;
        let stop = last_stop(world)?;
        ensure!(stop.cause == StopCause::Lost, "{stop:?}");
        let why = measured(&stop, &folder, HowRead::Full)?;
        ensure!(why.contains("before it was asked"), "{why}");
        end_bound(world)
    });
}

#[test]
fn what_another_process_writes_is_found_at_the_next_start() {
    World::test(|world| {
        world.start_enrolled()?;
        let description = describe(world, "vm", "raw", "preallocation=off")?;
        let folder = description.parent().context("a folder")?.to_owned();
        let mut bare = launch(world, &description)?;
        world.learn_policy()?;
        world.verdict()?.vm("vm").is("trusted")?;
        // Past QEMU, which cannot know of it.
        File::options().write(true).open(folder.join("data.img"))?.write_all_at(b"somebody else", 40 << 20)?;
        let stop = power_off(world, &mut bare)?;
        ensure!(read_of_data(&stop)?.how == HowRead::Changed, "{stop:?}");
        ensure!(digest_of_data(&stop)? != fsverity(&folder)?, "the bitmap cannot have it");
        let notes = world.attest()?.output;
        ensure!(notes.contains("said had changed"), "no note of how the digest was made: {notes}");

        let _bare = launch(world, &description)?;
        let found = world.wait_until("image-discontinuity data", LIMIT, |world| {
            let verdict = world.verdict()?;
            Ok(verdict.vm("vm").has("image-discontinuity", "data").then_some(verdict))
        })?;
        found.vm("vm").is_untrusted_for("image-discontinuity", "data")
    });
}

#[test]
fn an_image_of_two_live_vms_means_a_full_reading_of_both() {
    World::test(|world| {
        world.start_proxy_alone()?;
        let mut folders = Vec::new();
        let mut bares = Vec::new();
        for name in ["one", "two"] {
            let description = describe(world, name, "raw", "preallocation=off")?;
            let text = fs::read_to_string(&description)?;
            // QEMU's locks are advice, which can be turned down.
            let text = text.replace("file.filename=data.img", "file.filename=../data.img,file.locking=off");
            fs::write(&description, text)?;
            let folder = description.parent().context("a folder")?.to_owned();
            fs::copy(folder.join("data.img"), folder.join("../data.img"))?;
            folders.push(folder);
            bares.push(launch(world, &description)?);
        }
        for mut bare in bares {
            let stop = power_off(world, &mut bare)?;
            // What the other one writes meanwhile cannot be measured at all, which is said as well.
            let read = read_of_data(&stop);
            let whole = read.is_ok_and(|read| read.how == HowRead::Full && read.why.contains("another VM"));
            ensure!(whole || stop.unmeasured.iter().any(|what| what.contains("data.img")), "{stop:?}");
        }
        end_bound(world)
    });
}

#[test]
fn a_panicked_guest_ends_as_it_would_without_the_proxy() {
    World::test(|world| {
        world.start_proxy_alone()?;
        let description = describe(world, "vm", "raw", "preallocation=off")?;
        let folder = description.parent().context("a folder")?.to_owned();
        fs::write(folder.join("halt.bin"), firmware(&[&WRITE, &PANIC]))?;
        let text = fs::read_to_string(&description)?;
        fs::write(&description, text.replace("arguments = [", "arguments = [\"-device\", \"pvpanic\", "))?;
        // QEMU would end at a panic, as at power-off; standing still is only for the proxy's questions.
        let mut bare = world.launch_bare(&description)?;
        ensure!(bare.qemu.wait(LIMIT)?.success(), "QEMU did not end well");
        world.wait_gone("vm")?;
        let stop = last_stop(world)?;
        measured(&stop, &folder, HowRead::Changed)?;
        ensure!(kinds(world)?.contains(&"vm-crash".to_owned()), "{:?}", kinds(world)?);
        end_bound(world)
    });
}

#[test]
fn after_a_restart_of_the_proxy_a_vm_ends_by_itself() {
    World::test(|world| {
        world.start_proxy_alone()?;
        let description = describe(world, "vm", "raw", "preallocation=off")?;
        let folder = description.parent().context("a folder")?.to_owned();
        let mut bare = launch(world, &description)?;
        ensure!(world.proxy()?.terminate()?.success());
        world.start_proxy()?;
        world.wait_until("it to be watched again", LIMIT, |world| {
            Ok((world.vm_status("vm")?["stage"] == "watched").then_some(()))
        })?;
        let stop = power_off(world, &mut bare)?;
        ensure!(stop.cause == StopCause::GuestShutdown && stop.unmeasured.is_empty(), "{stop:?}");
        ensure!(digest_of_data(&stop)? == fsverity(&folder)?, "the digest is not that of the file");
        end_bound(world)
    });
}

/// Everything that QEMU says from now on to whoever connects, and its end.
fn listen(world: &World, name: &str) -> Result<std::thread::JoinHandle<Vec<String>>> {
    let mut stream = UnixStream::connect(world.intercepted(name))?;
    stream.set_read_timeout(Some(LIMIT))?;
    stream.write_all(b"{\"execute\": \"qmp_capabilities\"}\n")?;
    let mut reader = BufReader::new(stream);
    // Greeting and answer: it has negotiated.
    for _ in 0..2 {
        reader.read_line(&mut String::new())?;
    }
    Ok(std::thread::spawn(move || {
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        let event = |line: &str| serde_json::from_str::<Value>(line).unwrap()["event"].as_str().unwrap().to_owned();
        text.lines().map(event).collect()
    }))
}

/// An intercepted VM that runs, and its folder.
fn intercepted(world: &mut World) -> Result<(Bare, std::path::PathBuf)> {
    world.settings().tables = "\n[intercept]\n".to_owned();
    world.start_proxy_alone()?;
    let description = describe(world, "vm", "raw", "preallocation=off")?;
    let folder = description.parent().context("a folder")?.to_owned();
    Ok((launch(world, &description)?, folder))
}

fn wait_written(folder: &Path) -> Result<()> {
    let file = File::open(folder.join("data.img"))?;
    wait::for_true("the guest to write", LIMIT, || {
        let mut bytes = [0; 2];
        file.read_exact_at(&mut bytes, WRITTEN.end - 2)?;
        Ok(bytes == [0xa5, 0x5a])
    })
}

#[test]
fn a_tools_quit_waits_until_qemu_was_asked() {
    World::test(|world| {
        let (mut bare, folder) = intercepted(world)?;
        wait_written(&folder)?;
        let mut tool = world.tool("vm")?;
        // It sees our bitmaps; nothing else is other than in QEMU.
        let nodes = tool.execute("query-named-block-nodes", &json!({"flat": true}))?.to_string();
        ensure!(nodes.contains("\"onequote\""), "{nodes}");
        let events = listen(world, "vm")?;
        tool.execute("quit", &json!({}))?;
        ensure!(bare.qemu.wait(LIMIT)?.success(), "QEMU did not end well");
        world.wait_gone("vm")?;
        let stop = last_stop(world)?;
        ensure!(stop.cause == StopCause::HostShutdown, "{stop:?}");
        measured(&stop, &folder, HowRead::Changed)?;
        let events = events.join().unwrap();
        ensure!(events == ["SHUTDOWN"], "{events:?}");
        ensure!(kinds(world)?.ends_with(&["monitor-command".to_owned(), "vm-stop".to_owned()]), "{:?}", kinds(world)?);
        end_bound(world)
    });
}

#[test]
fn a_power_off_looks_to_tools_as_it_always_did() {
    World::test(|world| {
        let (mut bare, folder) = intercepted(world)?;
        let events = listen(world, "vm")?;
        let stop = power_off(world, &mut bare)?;
        measured(&stop, &folder, HowRead::Changed)?;
        let events = events.join().unwrap();
        let ends: Vec<_> = events.iter().filter(|event| *event != "POWERDOWN").collect();
        ensure!(ends == ["SHUTDOWN"], "{events:?}");
        end_bound(world)
    });
}

#[test]
fn a_tool_keeps_its_own_way_to_end() {
    World::test(|world| {
        let (mut bare, folder) = intercepted(world)?;
        let mut tool = world.tool("vm")?;
        tool.execute("set-action", &json!({"shutdown": "pause"}))?;
        wait_written(&folder)?;
        wait::for_true("the guest to power down", LIMIT, || {
            tool.execute("system_powerdown", &json!({}))?;
            Ok(tool.execute("query-status", &json!({}))?["status"] == "shutdown")
        })?;
        // It stands still as it was told to, until it is told to end.
        world.wait_until("the pause to be logged", LIMIT, |world| {
            Ok(kinds(world)?.contains(&"vm-pause".to_owned()).then_some(()))
        })?;
        bare.qemu.check_alive()?;
        tool.execute("quit", &json!({}))?;
        ensure!(bare.qemu.wait(LIMIT)?.success(), "QEMU did not end well");
        world.wait_gone("vm")?;
        measured(&last_stop(world)?, &folder, HowRead::Changed)?;
        end_bound(world)
    });
}

#[test]
fn a_removed_bitmap_means_a_full_reading() {
    World::test(|world| {
        let (mut bare, folder) = intercepted(world)?;
        let mut tool = world.tool("vm")?;
        let nodes = tool.execute("query-named-block-nodes", &json!({"flat": true}))?;
        let node =
            nodes.as_array().into_iter().flatten().find(|node| {
                node["drv"] == "file" && node["file"].as_str().is_some_and(|file| file.ends_with("data.img"))
            });
        let node = &node.context("no such node")?["node-name"];
        tool.execute("block-dirty-bitmap-remove", &json!({"node": node, "name": "onequote"}))?;
        // One of the same name that saw less.
        tool.execute("block-dirty-bitmap-add", &json!({"node": node, "name": "onequote"}))?;
        let stop = power_off(world, &mut bare)?;
        let why = measured(&stop, &folder, HowRead::Full)?;
        ensure!(why.contains("block-dirty-bitmap-remove"), "{why}");
        end_bound(world)
    });
}

#[test]
fn a_vm_that_powers_off_without_its_proxy_is_ended_by_the_next() {
    World::test(|world| {
        world.start_proxy_alone()?;
        let description = describe(world, "vm", "raw", "preallocation=off")?;
        let folder = description.parent().context("a folder")?.to_owned();
        let mut bare = launch(world, &description)?;
        world.proxy()?.kill()?;
        // Nobody holds its monitor now.
        let monitor = world.monitors().join("vm.qmp");
        {
            let mut qmp = onequote_tests::lab::Qmp::connect(&monitor)?;
            wait::for_true("the guest to power down", LIMIT, || {
                qmp.execute("system_powerdown", &json!({}))?;
                Ok(qmp.execute("query-status", &json!({}))?["status"] == "shutdown")
            })?;
        }
        bare.qemu.check_alive()?;
        world.start_proxy()?;
        ensure!(bare.qemu.wait(LIMIT)?.success(), "QEMU did not end well");
        world.wait_gone("vm")?;
        measured(&last_stop(world)?, &folder, HowRead::Full)?;
        end_bound(world)
    });
}
