//! The base image of UEFI guests: a partitioned disk in qcow2 with an EFI system partition, on it one unified kernel
//! image, and the guests' ext4 file system as second partition.

use std::fs::{self, File};
use std::io::{Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};

use super::kernel::Kernel;
use crate::lab::cache::{Cache, Key};
use crate::lab::command;

/// systemd's.
pub(crate) const STUB: &str = "/usr/lib/systemd/boot/efi/linuxx64.efi.stub";
const SECTOR: u64 = 512;
const FIRST_SECTOR: u64 = 2048;
const ESP_SIZE: u64 = 40 << 20;

/// From the cache, or made.
pub(crate) fn prepare(cache: &Cache, kernel: &Kernel, initrd: &Path, disk: &Path, cmdline: &str) -> Result<PathBuf> {
    let key = Key::new(1)
        .file(Path::new(STUB))
        .context("the package systemd-boot-efi is needed")?
        .file(&kernel.bzimage)?
        .file(initrd)?
        .file(disk)?
        .text(cmdline);
    let place = cache.entry("guest-uefi", &key, |folder| {
        let unified = unified_image(folder, kernel, initrd, cmdline)?;
        let esp = system_partition(folder, ESP_SIZE, &["EFI", "EFI/BOOT"], &[(&unified, "EFI/BOOT/BOOTX64.EFI")])?;
        let raw = folder.join("raw");
        partitioned(&raw, &[(0xef, &esp), (0x83, disk)])?;
        command::output(
            Command::new("qemu-img")
                .args(["convert", "-f", "raw", "-O", "qcow2"])
                .arg(&raw)
                .arg(folder.join("base.qcow2")),
        )?;
        for file in [unified, esp, raw] {
            fs::remove_file(file)?;
        }
        Ok(())
    })?;
    Ok(place.join("base.qcow2"))
}

/// A disk from which the firmware starts this kernel, and nothing else: `disk`, with an EFI system partition.
pub(crate) fn boot_disk(kernel: &Kernel, initrd: &Path, cmdline: &str, disk: &Path) -> Result<()> {
    let scratch = tempfile::tempdir()?;
    let unified = unified_image(scratch.path(), kernel, initrd, cmdline)?;
    let files = [(unified.as_path(), "EFI/BOOT/BOOTX64.EFI")];
    let esp = system_partition(scratch.path(), ESP_SIZE, &["EFI", "EFI/BOOT"], &files)?;
    partitioned(disk, &[(0xef, &esp)])
}

/// systemd's stub with command line, kernel and initramfs as further sections, placed behind the stub's own.
pub(crate) fn unified_image(folder: &Path, kernel: &Kernel, initrd: &Path, cmdline: &str) -> Result<PathBuf> {
    let (os_release, cmdline_file) = (folder.join("os-release"), folder.join("cmdline"));
    fs::write(&os_release, "ID=onequote-lab\nNAME=\"onequote lab guest\"\n")?;
    fs::write(&cmdline_file, cmdline)?;
    let shown = command::text(Command::new("objdump").args(["-h", "-w", STUB]))?;
    let mut address = stub_end(&shown).context("objdump shows no sections in systemd's stub")?.next_multiple_of(4096);
    let mut objcopy = Command::new("objcopy");
    for (section, file) in [
        (".osrel", os_release.as_path()),
        (".cmdline", &cmdline_file),
        (".linux", &kernel.bzimage),
        (".initrd", initrd),
    ] {
        objcopy.arg("--add-section").arg(format!("{section}={}", file.display()));
        objcopy.arg("--change-section-vma").arg(format!("{section}={address:#x}"));
        address = (address + fs::metadata(file)?.len()).next_multiple_of(4096);
    }
    let unified = folder.join("unified.efi");
    command::output(objcopy.arg(STUB).arg(&unified))?;
    fs::remove_file(os_release)?;
    fs::remove_file(cmdline_file)?;
    Ok(unified)
}

/// Where the last section ends, from `objdump -h`: number, name, size, address, …
fn stub_end(shown: &str) -> Option<u64> {
    shown
        .lines()
        .filter_map(|line| {
            let mut words = line.split_whitespace();
            words.next()?.parse::<u32>().ok()?;
            let size = u64::from_str_radix(words.nth(1)?, 16).ok()?;
            Some(u64::from_str_radix(words.next()?, 16).ok()? + size)
        })
        .max()
}

/// An EFI system partition, in the file `esp`.
pub(crate) fn system_partition(folder: &Path, size: u64, folders: &[&str], files: &[(&Path, &str)]) -> Result<PathBuf> {
    let esp = folder.join("esp");
    File::create(&esp)?.set_len(size)?;
    let mtool = |name: &str| {
        let mut tool = command::program(name);
        // A fixed serial number, not one from the clock.
        tool.arg("-i").arg(&esp);
        tool
    };
    command::output(mtool("mformat").args(["-F", "-N", "6f710001", "-v", "ESP", "::"]))?;
    command::output(mtool("mmd").args(folders.iter().map(|path| format!("::{path}"))))?;
    for (file, path) in files {
        command::output(mtool("mcopy").arg(file).arg(format!("::{path}")))?;
    }
    Ok(esp)
}

/// A disk with a DOS partition table: an entry is flag, first CHS, type, last CHS, first sector, sectors; the table is at
/// 446, the signature at 510.
pub(crate) fn partitioned(raw: &Path, partitions: &[(u8, &Path)]) -> Result<()> {
    let mut table = [0; SECTOR as usize];
    let mut disk = File::create(raw)?;
    let mut first = FIRST_SECTOR;
    for (index, (kind, file)) in partitions.iter().enumerate() {
        let sectors = fs::metadata(file)?.len().div_ceil(SECTOR);
        let entry = &mut table[446 + 16 * index..][..16];
        entry[1..4].copy_from_slice(&[0xfe, 0xff, 0xff]);
        entry[4] = *kind;
        entry[5..8].copy_from_slice(&[0xfe, 0xff, 0xff]);
        entry[8..12].copy_from_slice(&u32::try_from(first)?.to_le_bytes());
        entry[12..16].copy_from_slice(&u32::try_from(sectors)?.to_le_bytes());
        disk.seek(SeekFrom::Start(first * SECTOR))?;
        std::io::copy(&mut File::open(file)?, &mut disk)?;
        first += sectors;
    }
    disk.set_len(first * SECTOR)?;
    table[510..].copy_from_slice(&[0x55, 0xaa]);
    disk.seek(SeekFrom::Start(0))?;
    disk.write_all(&table)?;
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_the_stub_is_read_from_its_section_table() {
        let shown = "\nSections:\nIdx Name Size VMA LMA\n  0 .text 0000bff0  0000000000004000 0\n  1 .sbat 000000e2 0000000000019000 0\n";
        assert_eq!(stub_end(shown), Some(0x190e2));
        assert_eq!(stub_end("nothing"), None);
    }

    #[test]
    fn partitions_follow_each_other() {
        let folder = tempfile::tempdir().unwrap();
        let (one, two, raw) = (folder.path().join("1"), folder.path().join("2"), folder.path().join("r"));
        fs::write(&one, vec![1; 1024]).unwrap();
        fs::write(&two, vec![2; 512]).unwrap();
        partitioned(&raw, &[(0xef, &one), (0x83, &two)]).unwrap();
        let disk = fs::read(raw).unwrap();
        assert_eq!(disk.len(), (2048 + 3) * 512);
        assert_eq!((disk[2048 * 512], disk[2050 * 512]), (1, 2));
        assert_eq!(&disk[446 + 16 + 8..446 + 32], &[2, 8, 0, 0, 1, 0, 0, 0]);
    }
}
