//! What QEMU loaded is not what the paths name.

use std::{fs, path::Path};

use onequote_evidence::event::*;

use super::{
    gate::{bzimage, refused_after, started},
    world::*,
};

/// An ELF kernel that says where it starts over PVH (Xen's note PHYS32_ENTRY), with `fill` in its only loaded segment.
fn pvh_kernel(fill: u8) -> Vec<u8> {
    const SEGMENT: usize = 0x1000;
    let mut file = vec![0; SEGMENT + 0x3000];
    file[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
    file[16..18].copy_from_slice(&2_u16.to_le_bytes());
    file[18..20].copy_from_slice(&62_u16.to_le_bytes());
    file[20] = 1;
    file[24..32].copy_from_slice(&0x10_0000_u64.to_le_bytes());
    file[32] = 64;
    file[52] = 64;
    file[54] = 56;
    file[56] = 2;
    let mut header = |at: usize, kind: u32, offset: u64, address: u64, size: u64| {
        file[at..at + 4].copy_from_slice(&kind.to_le_bytes());
        for (n, value) in (1..).zip([offset, address, address, size, size, 4]) {
            file[at + n * 8..at + n * 8 + 8].copy_from_slice(&value.to_le_bytes());
        }
    };
    header(64, 1, SEGMENT as u64, 0x10_0000, 0x3000);
    header(120, 4, 0x200, 0, 20);
    // Name and value's sizes, type, "Xen", value.
    for (n, word) in [4_u32, 4, 18, u32::from_le_bytes(*b"Xen\0"), 0x10_0000].into_iter().enumerate() {
        file[0x200 + n * 4..0x204 + n * 4].copy_from_slice(&word.to_le_bytes());
    }
    file[SEGMENT..].fill(fill);
    file
}

/// Two folders with one file each, of a time before any QEMU; QEMU reads the one in `now`.
fn folders(world: &World, file: &str, loaded: &[u8], shown: &[u8]) {
    for (folder, content) in [("now", loaded), ("later", shown)] {
        fs::create_dir(world.path(folder)).unwrap();
        fs::write(world.path(folder).join(file), content).unwrap();
    }
}

/// Folders exchanged as a whole leave the files in them as they were, times and all.
fn exchange(dir: &Path) {
    fs::rename(dir.join("now"), dir.join("other")).unwrap();
    fs::rename(dir.join("later"), dir.join("now")).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn folders_exchanged_after_qemu_read_from_them_are_found() {
    let blob = |fill| vec![fill; 70_000];
    type Case<'a> = (&'a [&'a str], &'a str, Vec<u8>, Vec<u8>, &'a str);
    let cases: [Case<'_>; 4] = [
        (&["-bios", "now/f"], "f", vec![0xf4; 1 << 16], vec![0x90; 1 << 16], "firmware"),
        (&["-kernel", "now/k"], "k", pvh_kernel(1), pvh_kernel(2), "kernel"),
        (&["-kernel", "bz", "-initrd", "now/i"], "i", blob(1), blob(2), "initrd"),
        (&["-device", "loader,file=now/b,addr=0x200000"], "b", blob(1), blob(2), "argument-file"),
    ];
    for (args, file, loaded, shown, item) in cases {
        let world = World::new();
        world.file("bz", bzimage());
        folders(&world, file, &loaded, &shown);
        let args: Vec<_> = ["-M", "q35"].iter().chain(args).copied().collect();
        let refusal = refused_after(&world, &args, || exchange(world.dir.path())).await;
        assert_eq!((refusal.cause, refusal.item.as_str()), (RefuseCause::LoadedDiffers, item), "{}", refusal.reason);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_loaded_as_it_is_starts() {
    let world = World::new();
    world.file("kernel", pvh_kernel(7));
    world.file("initrd", vec![1; 5000]);
    world.file("raw", vec![8; 3 << 20]);
    world.file("elf", pvh_kernel(9));
    let _qemu = world.qemu(
        "vm",
        &[
            "-S",
            "-M",
            "q35",
            "-kernel",
            "kernel",
            "-initrd",
            "initrd",
            "-device",
            "loader,file=raw,addr=0x2000000",
            "-device",
            r#"{"driver":"loader","file":"raw","addr":16777216,"force-raw":true}"#,
            "-device",
            "virtio-net-pci",
            "-vga",
            "std",
        ],
    );
    let start = world.log.wait(started).await;
    world.log.wait_kind("vm-resume").await;
    let parts: Vec<_> =
        start.components.iter().map(|c| (c.role, c.path.rsplit('/').next().unwrap(), c.memory)).collect();
    let (equal, hidden) = (Some(MemoryCheck::Equal), Some(MemoryCheck::Hidden));
    assert_eq!(
        parts,
        [
            (Role::QemuBinary, "qemu-system-x86_64", None),
            (Role::Arguments, "", None),
            (Role::ArgumentFile, "raw", equal),
            (Role::Kernel, "kernel", equal),
            (Role::Initrd, "initrd", hidden),
            (Role::KernelCmdline, "", None),
            (Role::Firmware, "bios-256k.bin", equal),
            // What devices and the machine load without being told.
            (Role::Firmware, "efi-virtio.rom", hidden),
            (Role::Firmware, "kvmvapic.bin", hidden),
            (Role::Firmware, "pvh.bin", hidden),
            (Role::Firmware, "vgabios-stdvga.bin", hidden),
        ]
    );
}

/// An ELF file goes where its segments ask for, whatever address the loader was given.
#[tokio::test(flavor = "multi_thread")]
async fn an_elf_file_of_the_generic_loader_is_compared_by_its_segments() {
    let world = World::new();
    world.file("elf", pvh_kernel(9));
    let _qemu = world.qemu("vm", &["-S", "-M", "q35", "-device", "loader,file=elf,addr=0x1200000"]);
    let start = world.log.wait(started).await;
    let elf = start.components.iter().find(|c| c.path.ends_with("/elf")).unwrap();
    assert_eq!(elf.memory, Some(MemoryCheck::Equal));
}

/// A VM that runs shows nothing of what it started from: the guest may have written over it.
#[tokio::test(flavor = "multi_thread")]
async fn memory_of_a_running_vm_says_nothing() {
    let world = World::new();
    let _qemu = world.qemu("vm", &["-M", "q35"]);
    let attached = world.log.wait_kind("vm-attach").await;
    let EventBody::VmAttach(attached) = attached else { unreachable!() };
    assert!(attached.components.iter().all(|c| c.memory.is_none()), "{attached:#?}");
}

/// Two disks of one VM, both opened by QEMU, and then exchanged with one another.
#[tokio::test(flavor = "multi_thread")]
async fn images_exchanged_with_one_another_are_found() {
    let exchange = |world: &World, a: &str, b: &str| {
        let (a, b, between) = (world.path(a), world.path(b), world.path("between"));
        std::thread::sleep(std::time::Duration::from_millis(100));
        fs::rename(&a, &between).unwrap();
        fs::rename(&b, &a).unwrap();
        fs::rename(&between, &b).unwrap();
    };
    let disk = |n: u32, path: &str| format!("file={path},format=raw,if=virtio,id=d{n}");
    // Alike but for their content, in one folder and in two; and of other sizes.
    for (one, other, content, moved) in [
        ("a", "b", vec![2; 1 << 20], ("a", "b")),
        ("x/d", "y/d", vec![2; 1 << 20], ("x", "y")),
        ("a", "b", vec![2; 2 << 20], ("a", "b")),
        // Without newer times of change: only QEMU's own word on sizes tells.
        ("x/d", "y/d", vec![2; 2 << 20], ("x", "y")),
    ] {
        let world = World::new();
        for folder in ["x", "y"] {
            fs::create_dir(world.path(folder)).unwrap();
        }
        world.file(one, vec![1; 1 << 20]);
        world.file(other, content);
        let (d1, d2) = (disk(1, one), disk(2, other));
        let args = ["-M", "q35", "-drive", &d1, "-drive", &d2];
        let refusal = refused_after(&world, &args, || exchange(&world, moved.0, moved.1)).await;
        assert_eq!(refusal.cause, RefuseCause::Changed, "{}", refusal.reason);
        assert!(["d1", "d2"].contains(&refusal.item.as_str()), "{}", refusal.reason);
        assert!(refusal.reason.contains("may not be the file"), "{}", refusal.reason);
    }
    // Nobody moved them; or they are the same, and it does not matter.
    for (content, exchanged) in [(2, false), (1, true)] {
        let world = World::new();
        world.file("a", vec![1; 1 << 20]);
        world.file("b", vec![content; 1 << 20]);
        let (d1, d2) = (disk(1, "a"), disk(2, "b"));
        let _qemu = world.qemu_elsewhere("late.qmp", &["-M", "q35", "-drive", &d1, "-drive", &d2]);
        drop(world.monitor("late.qmp").await);
        if exchanged {
            exchange(&world, "a", "b");
        }
        fs::rename(world.path("late.qmp"), world.socket("late")).unwrap();
        assert_eq!(world.log.wait(started).await.images.len(), 2);
    }
}
