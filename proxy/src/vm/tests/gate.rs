//! What may run, and what may not.

use std::{path::Path, sync::atomic::Ordering};

use onequote_evidence::event::*;
use tokio::io::AsyncWriteExt;

use super::world::*;
use crate::vm::*;

pub(super) fn refused(body: &EventBody) -> Option<VmRefuse> {
    match body {
        EventBody::VmRefuse(e) => Some(e.clone()),
        _ => None,
    }
}

pub(super) fn started(body: &EventBody) -> Option<VmStart> {
    match body {
        EventBody::VmStart(e) => Some(e.clone()),
        _ => None,
    }
}

pub(super) async fn is_still_stopped(world: &World, monitor: &str) {
    let status = world.monitor(monitor).await.execute(qapi::qmp::query_status {}).await.unwrap();
    assert_eq!(status.status, qapi::qmp::RunState::prelaunch);
    assert_eq!(world.registry().vms[0].stage, Stage::Refused);
    assert!(!world.log.kinds().contains(&"vm-resume".to_owned()));
}

/// As much of a kernel's header as QEMU looks at (Linux `Documentation/arch/x86/boot.rst`).
pub(super) fn bzimage() -> Vec<u8> {
    let mut image = vec![0; 8192];
    image[0x1f1] = 1;
    image[0x202..0x206].copy_from_slice(b"HdrS");
    image[0x206..0x208].copy_from_slice(&0x020c_u16.to_le_bytes());
    image[0x211] = 1;
    image[0x22c..0x230].copy_from_slice(&0x37ff_ffff_u32.to_le_bytes());
    image
}

#[tokio::test(flavor = "multi_thread")]
async fn everything_is_measured_in_one_record_before_it_runs() {
    let world = World::new();
    let base = world.file("base.raw", vec![1; 1 << 20]);
    world.qemu_img(&["create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", "top.qcow2"]);
    world.qemu_img(&["create", "-q", "-f", "qcow2", "-o", "data_file=d.raw,data_file_raw=on", "ext.qcow2", "1M"]);
    let kernel = world.file("kernel", bzimage());
    world.file("initrd", "initrd");
    let blob = world.file("blob", "blob");
    let config = world.file("vm.cfg", "[fw_cfg]\nname = \"opt/x\"\nfile = \"blob\"\n");
    let qemu = world.qemu(
        "one",
        &[
            "-S",
            "-M",
            "q35",
            "-smp",
            "2",
            "-kernel",
            "kernel",
            "-initrd",
            "initrd",
            "-append",
            "quiet  x=1",
            "-drive",
            "file=top.qcow2,if=none,id=disk0",
            "-device",
            "virtio-blk-pci,drive=disk0,id=vda",
            "-blockdev",
            "driver=qcow2,node-name=n1,file.driver=file,file.filename=ext.qcow2",
            "-device",
            "virtio-blk-pci,drive=n1,id=vdb",
            "-readconfig",
            "vm.cfg",
        ],
    );
    world.log.wait_kind("vm-resume").await;
    let first = world.log.records()[0].clone();
    let [EventBody::VmCreate(create), EventBody::VmStart(start)] = [&first[0].body, &first[1].body] else {
        panic!("{first:#?}")
    };
    assert_eq!((create.name.as_str(), create.pid), ("one", qemu.id().unwrap()));
    assert_eq!((create.memory, create.cpus, create.depth), (64 << 20, 2, Depth::Gate));
    let version = create.qemu.rsplit_once('.').unwrap().0;
    assert_eq!((create.machine.as_str(), create.accelerator.as_str()), (&*format!("pc-q35-{version}"), "tcg"));
    assert!(!create.uuid_given && create.qemu.starts_with(char::is_numeric));
    assert_eq!(create.devices, ["vda:virtio-blk-pci", "vdb:virtio-blk-pci"]);

    let by_role = |role: Role| start.components.iter().find(|c| c.role == role).unwrap_or_else(|| panic!("{role}"));
    let path = |name: &str| world.path(name).to_string_lossy().into_owned();
    for (role, file) in [(Role::Kernel, &kernel), (Role::Initrd, &world.path("initrd"))] {
        assert_eq!(by_role(role).path, file.to_str().unwrap());
        assert_eq!(by_role(role).digest.to_string(), sha256_of(file));
    }
    assert_eq!(by_role(Role::KernelCmdline).text.as_deref(), Some("quiet  x=1"));
    assert!(by_role(Role::Firmware).path.ends_with("/bios-256k.bin"), "{}", by_role(Role::Firmware).path);
    assert!(by_role(Role::QemuBinary).path.ends_with("/qemu-system-x86_64"));
    assert!(by_role(Role::Arguments).text.as_deref().unwrap().contains("-append 'quiet  x=1'"));
    let named: Vec<_> = start.components.iter().filter(|c| c.role == Role::ArgumentFile).collect();
    assert_eq!(named.iter().map(|c| c.path.as_str()).collect::<Vec<_>>(), [path("vm.cfg"), path("blob")]);
    assert_eq!(named[0].digest.to_string(), sha256_of(&config));
    assert_eq!(named[1].digest.to_string(), sha256_of(&blob));
    let memory = |role: Role| by_role(role).memory;
    assert_eq!((memory(Role::QemuBinary), memory(Role::Arguments), named[0].memory), (None, None, None));
    // A bzImage, an initrd and what fw_cfg hands over are not in the guest's memory yet; firmware is.
    let hidden = Some(MemoryCheck::Hidden);
    assert_eq!((memory(Role::Kernel), memory(Role::Initrd), named[1].memory), (hidden, hidden, hidden));
    assert_eq!(memory(Role::Firmware), Some(MemoryCheck::Equal));

    let images: Vec<_> =
        start.images.iter().map(|i| (i.slot.as_str(), i.path.clone(), i.format.as_str(), i.read_only)).collect();
    assert_eq!(
        images,
        [
            ("disk0", path("top.qcow2"), "qcow2", false),
            ("disk0/1", path("base.raw"), "raw", true),
            ("vdb", path("ext.qcow2"), "qcow2", false),
            ("vdb+data", path("d.raw"), "raw", false),
        ]
    );
    assert_eq!(start.images[1].digest.to_string(), verity_of(&base));
    let status = &world.registry().vms[0];
    assert_eq!((status.stage, status.logged, status.depth), (Stage::Watched, true, Depth::Gate));
}

#[tokio::test(flavor = "multi_thread")]
async fn firmware_in_flash_is_an_image() {
    let world = World::new();
    world.file("code.fd", vec![0; 1 << 20]);
    world.file("vars.fd", vec![0; 1 << 16]);
    let flash = |n, rest| format!("if=pflash,unit={n},format=raw,{rest}");
    let (code, vars) = (flash(0, "readonly=on,file=code.fd"), flash(1, "file=vars.fd"));
    let _qemu = world.qemu("uefi", &["-S", "-M", "q35", "-drive", &code, "-drive", &vars]);
    let start = world.log.wait(started).await;
    // The machine's own option ROM, but no other firmware.
    let firmware: Vec<_> = start.components.iter().filter(|c| c.role == Role::Firmware).collect();
    assert!(firmware.len() == 1 && firmware[0].path.ends_with("/kvmvapic.bin"), "{firmware:?}");
    let images: Vec<_> = start.images.iter().map(|i| (i.slot.as_str(), i.read_only)).collect();
    assert_eq!(images, [("pflash0", true), ("pflash1", false)]);
}

/// Starts a waiting QEMU whose monitor the manager sees only after something happened to its files.
pub(super) async fn refused_after(world: &World, args: &[&str], happens: impl FnOnce()) -> VmRefuse {
    let _qemu = world.qemu_elsewhere("late.qmp", args);
    drop(world.monitor("late.qmp").await);
    happens();
    std::fs::rename(world.path("late.qmp"), world.socket("late")).unwrap();
    let refusal = world.log.wait(refused).await;
    assert_eq!(world.log.kinds(), ["vm-create", "vm-refuse"]);
    assert_eq!(world.registry().vms[0].run_state, "prelaunch");
    refusal
}

#[tokio::test(flavor = "multi_thread")]
async fn a_path_that_was_exchanged_does_not_start() {
    let world = World::new();
    world.file("disk.raw", vec![1; 1 << 20]);
    world.file("evil.raw", vec![2; 1 << 20]);
    let exchange = || {
        std::fs::rename(world.path("disk.raw"), world.path("was.raw")).unwrap();
        std::fs::rename(world.path("evil.raw"), world.path("disk.raw")).unwrap();
    };
    let args = ["-M", "q35", "-drive", "file=disk.raw,format=raw,if=virtio,id=root"];
    let refusal = refused_after(&world, &args, exchange).await;
    assert_eq!(refusal.item, "root");
    assert!(refusal.reason.contains("disk.raw") && refusal.reason.contains("replaced"), "{}", refusal.reason);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kernel_that_changed_after_qemu_read_it_does_not_start() {
    let world = World::new();
    world.file("kernel", bzimage());
    // The process' start is known to within some hundredths of a second.
    let change = || {
        std::thread::sleep(std::time::Duration::from_millis(100));
        world.file("kernel", [1; 8192]);
    };
    let refusal = refused_after(&world, &["-M", "q35", "-kernel", "kernel"], change).await;
    assert_eq!(refusal.item, "kernel");
    assert!(refusal.reason.contains("changed after QEMU was started"), "{}", refusal.reason);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_is_gone_does_not_start() {
    for (arg, value, item) in [
        ("-kernel", "gone", "kernel"),
        ("-bios", "gone", "firmware"),
        ("-fw_cfg", "name=opt/x,file=gone", "argument-file"),
    ] {
        let world = World::new();
        world.file("gone", vec![0; 1 << 16]);
        let remove = || std::fs::remove_file(world.path("gone")).unwrap();
        let refusal = refused_after(&world, &["-M", "q35", arg, value], remove).await;
        assert_eq!(refusal.item, item);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_measured_does_not_start() {
    let world = World::new();
    world.file("kernel", [0; 8192]);
    let blob = "loader,file=blob,addr=0x1000,force-raw=on";
    world.file("blob", "x");
    let _qemu = world.qemu(
        "vm",
        &[
            "-S",
            "-M",
            "q35",
            "-kernel",
            "kernel",
            "-device",
            blob,
            "-drive",
            "driver=null-co,if=virtio,id=nothing",
            "-qmp",
            &second_monitor("b.qmp"),
        ],
    );
    let refusal = world.log.wait(refused).await;
    assert_eq!(refusal.item, "nothing");
    assert!(refusal.reason.contains("null-co"), "{}", refusal.reason);
    assert_eq!(world.log.records()[0].len(), 2, "creation and refusal are one record");
    is_still_stopped(&world, "b.qmp").await;
    assert!(world.registry().vms[0].error.as_deref().unwrap().contains("vm is not let run: nothing"));
}

#[tokio::test(flavor = "multi_thread")]
async fn references_decide() {
    let zero = "00".repeat(32);
    let world = World::with(Some(&format!("[[vm]]\nname='*'\nkernel=['sha256:{zero}']")));
    world.file("kernel", [0; 8192]);
    let monitor = second_monitor("b.qmp");
    let _qemu = world.qemu("web", &["-S", "-M", "q35", "-kernel", "kernel", "-qmp", &monitor]);
    let refusal = world.log.wait(refused).await;
    assert_eq!(refusal.item, "kernel");
    assert!(refusal.reason.contains(&sha256_of(&world.path("kernel"))), "{}", refusal.reason);
    is_still_stopped(&world, "b.qmp").await;

    let world = World::with(Some(&format!("[[vm]]\nname='*'\nkernel=['{}']", sha256_of(&world.path("kernel")))));
    world.file("kernel", [0; 8192]);
    let _qemu = world.qemu("web", &["-S", "-M", "q35", "-kernel", "kernel"]);
    world.log.wait_kind("vm-resume").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_logged_does_not_start_and_is_logged_later() {
    let world = World::new();
    world.log.broken.store(true, Ordering::SeqCst);
    let _qemu = world.qemu("vm", &["-S", "-M", "q35", "-qmp", &second_monitor("b.qmp")]);
    world.until(|r| r.vms.first().is_some_and(|vm| vm.stage == Stage::Refused)).await;
    is_still_stopped(&world, "b.qmp").await;
    let error = world.registry().vms[0].error.clone().unwrap();
    assert!(error.contains("no space left"), "{error}");
    world.log.broken.store(false, Ordering::SeqCst);
    world.log.wait(refused).await;
    assert_eq!(world.log.kinds(), ["vm-create", "vm-refuse"]);
    world.until(|r| r.vms[0].logged).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_second_vm_with_a_uuid_is_refused() {
    const UUID: &str = "00112233-4455-6677-8899-aabbccddeeff";
    let world = World::new();
    let _first = world.qemu("first", &["-S", "-M", "q35", "-uuid", UUID]);
    world.log.wait(started).await;
    let _second = world.qemu("second", &["-S", "-M", "q35", "-uuid", UUID]);
    let refusal = world.log.wait(refused).await;
    assert!(refusal.reason.contains("first") && refusal.reason.contains("second"), "{}", refusal.reason);
    let vms = world.registry().vms;
    assert_eq!(vms.len(), 2);
    assert!(vms.iter().all(|vm| vm.vm.vm.to_string() == UUID));
    assert_eq!(
        vms.iter().filter(|vm| vm.stage == Stage::Refused).map(|vm| vm.name.as_str()).collect::<Vec<_>>(),
        ["second"]
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn sockets_that_are_no_monitors_are_shown() {
    let world = World::new();
    let rubbish = tokio::net::UnixListener::bind(world.socket("rubbish")).unwrap();
    let _silent = std::os::unix::net::UnixListener::bind(world.socket("silent")).unwrap();
    let _name = std::os::unix::net::UnixListener::bind(world.socket("-bad name")).unwrap();
    let serve = tokio::spawn(async move {
        loop {
            let (mut stream, _) = rubbish.accept().await.unwrap();
            // The client may have gone.
            let _ = stream.write_all(b"220 smtp ready\r\n").await;
        }
    });
    world.until(|r| r.sockets.len() == 3).await;
    let errors: Vec<_> = world.registry().sockets.into_iter().map(|s| (s.name, s.error)).collect();
    assert!(errors[0].0 == "-bad name" && errors[0].1.contains("no name for a VM"), "{errors:?}");
    assert!(errors[1].0 == "rubbish" && errors[1].1.contains("220 smtp"), "{errors:?}");
    assert!(errors[2].0 == "silent" && errors[2].1.contains("another client"), "{errors:?}");
    assert!(world.log.events().is_empty());
    serve.abort();
    std::fs::remove_file(world.socket("rubbish")).unwrap();
    world.until(|r| r.sockets.len() == 2).await;
    assert!(Path::exists(&world.socket("silent")));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_turns_up_in_the_log_after_all_is_not_logged_twice() {
    let world = World::new();
    world.log.lying.store(true, Ordering::SeqCst);
    let _qemu = world.qemu("vm", &["-S", "-M", "q35", "-qmp", &second_monitor("b.qmp")]);
    world.until(|r| r.vms.first().is_some_and(|vm| vm.stage == Stage::Refused)).await;
    is_still_stopped(&world, "b.qmp").await;
    world.log.lying.store(false, Ordering::SeqCst);
    world.monitor("b.qmp").await.execute(qapi::qmp::system_reset {}).await.unwrap();
    world.log.wait_kind("vm-reset").await;
    assert_eq!(world.log.kinds(), ["vm-create", "vm-start", "vm-refuse", "vm-reset"]);
}
