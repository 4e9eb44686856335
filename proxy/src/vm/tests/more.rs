//! Ways to give QEMU its parts.

use onequote_evidence::event::*;

use super::{gate::bzimage, world::*};
use crate::launch::{HostVsock, Launch, TakenCids, VsockWish};

fn started(body: &EventBody) -> Option<VmStart> {
    match body {
        EventBody::VmStart(e) => Some(e.clone()),
        _ => None,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_launched_vm_with_a_ready_configuration() {
    let world = World::new();
    for name in ["vmlinux", "initrd"] {
        world.file(name, bzimage());
    }
    world.file("disk.img", vec![1; 1 << 20]);
    let config = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../qemu-configs/q35.cfg");
    let command = ["qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none", "-readconfig"];
    let mut command: Vec<std::ffi::OsString> = command.iter().map(Into::into).collect();
    command.push(config.clone().into());
    let launch = Launch {
        name: Some("web".into()),
        dir: world.path("vms"),
        command,
        vsock: VsockWish::Off,
        host: HostVsock { device: false, taken: Ok(TakenCids::new()) },
        folder: None,
        notes: Vec::new(),
    };
    let planned = launch.plan().unwrap();
    let _qemu = tokio::process::Command::new(&planned.command[0])
        .args(&planned.command[1..])
        .current_dir(world.dir.path())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let start = world.log.wait(started).await;
    world.log.wait_kind("vm-resume").await;
    let roles: Vec<_> = start.components.iter().map(|c| (c.role, c.path.rsplit('/').next().unwrap())).collect();
    assert_eq!(
        roles,
        [
            (Role::QemuBinary, "qemu-system-x86_64"),
            (Role::Arguments, ""),
            (Role::ArgumentFile, "q35.cfg"),
            (Role::Kernel, "vmlinux"),
            (Role::Initrd, "initrd"),
            (Role::KernelCmdline, ""),
            (Role::Firmware, "qboot.rom"),
            (Role::Firmware, "kvmvapic.bin"),
            (Role::Firmware, "linuxboot_dma.bin"),
        ]
    );
    assert_eq!(start.components[2].digest.to_string(), sha256_of(&config));
    assert_eq!(start.images.iter().map(|i| i.slot.as_str()).collect::<Vec<_>>(), ["disk0"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn microvm_says_nothing_of_its_firmware() {
    let world = World::new();
    let _qemu = world.qemu("micro", &["-S", "-M", "microvm"]);
    let start = world.log.wait(started).await;
    let firmware = start.components.iter().find(|c| c.role == Role::Firmware).unwrap();
    assert!(firmware.path.ends_with("/bios-microvm.bin"), "{}", firmware.path);
    let world = World::new();
    let _qemu = world.qemu("micro", &["-S", "-M", "microvm,acpi=off"]);
    let start = world.log.wait(started).await;
    let firmware = start.components.iter().find(|c| c.role == Role::Firmware).unwrap();
    assert!(firmware.path.ends_with("/qboot.rom"), "{}", firmware.path);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_handed_over_as_a_descriptor() {
    let world = World::new();
    let disk = world.file("disk.raw", vec![6; 1 << 20]);
    let script = format!(
        "exec 7<>disk.raw 8<disk.raw; exec qemu-system-x86_64 -nodefaults -display none -M q35 -S \
         -qmp unix:{},server=on,wait=off -add-fd fd=7,set=2 -add-fd fd=8,set=2 -drive file=/dev/fdset/2,format=raw,if=virtio,id=root",
        world.socket("vm").display()
    );
    let _qemu = tokio::process::Command::new("bash")
        .args(["-c", &script])
        .current_dir(world.dir.path())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let start = world.log.wait(started).await;
    assert_eq!(start.images[0].slot, "root");
    assert_eq!(start.images[0].path, disk.to_string_lossy());
    assert_eq!(start.images[0].digest.to_string(), verity_of(&disk));
}
