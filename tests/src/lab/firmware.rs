//! Boots under real firmware (OVMF) with a software TPM: the event log that the booted kernel shows, and the register
//! values that its TPM then has.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use onequote_evidence::pcr::{Register, Registers};

use super::cache::{Cache, Key};
use super::image::cpio::Archive;
use super::image::kernel::{self, Kernel};
use super::image::packages::Package;
use super::image::uefi;
use super::process::Process;
use super::{base64, command, wait};

/// Firmware, boot loader and kernel under TCG on a busy machine.
const LIMIT: Duration = Duration::from_secs(300);

const CODE: &str = "/usr/share/OVMF/OVMF_CODE_4M.secboot.fd";
const ESP_SIZE: u64 = 64 << 20;

/// What the booted system does: it shows registers and log, and ends.
const INIT: &str = "#!/bin/sh
b=/bin/busybox
$b mount -t proc none /proc
$b mount -t sysfs none /sys
$b mount -t securityfs none /sys/kernel/security
echo 1 >/proc/sys/kernel/printk
echo
for f in /sys/class/tpm/tpm0/pcr-*/*; do echo \"register ${f#*pcr-} $($b cat $f)\"; done
echo log begins
$b base64 /sys/kernel/security/tpm0/binary_bios_measurements
echo log ends
$b poweroff -f
";

const GRUB_CONFIG: &str = "set timeout=0\nlinux /vmlinuz console=ttyS0 quiet\ninitrd /initrd\nboot\n";

/// How the kernel is started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BootedBy {
    /// By the firmware, from QEMU; Secure Boot is off. Linux' EFI stub measures.
    Firmware,
    /// As a unified image with another command line than its own; Secure Boot is off. systemd's stub measures.
    Stub,
    /// By Debian's shim and GRUB from a disk, under Secure Boot.
    Grub,
}

/// A boot.
#[derive(Debug, Clone)]
pub struct FirmwareBoot {
    /// `binary_bios_measurements`.
    pub log: Vec<u8>,
    /// All registers of all banks, as the kernel shows them.
    pub registers: Registers,
}

impl FirmwareBoot {
    /// The command line that [`BootedBy::Stub`] measures.
    pub const COMMAND_LINE: &'static str = "console=ttyS0 quiet lab.words=given";

    /// From the cache, or booted.
    ///
    /// # Errors
    /// Something is missing, or the boot does not come to its end.
    pub fn of(by: BootedBy) -> Result<Self> {
        let cache = Cache::open()?;
        let kernel = Kernel::prepare(&cache)?;
        let initrd = initrd(&cache)?;
        let (vars, arguments) = match by {
            BootedBy::Firmware => {
                let append = "console=ttyS0 quiet";
                ("OVMF_VARS_4M.fd", direct(&kernel.bzimage, Some(&initrd), append))
            }
            BootedBy::Stub => {
                let unified = unified(&cache, &kernel, &initrd)?;
                ("OVMF_VARS_4M.fd", direct(&unified, None, Self::COMMAND_LINE))
            }
            BootedBy::Grub => {
                let drive = format!(
                    "if=none,id=disk,format=raw,readonly=on,file={}",
                    disk(&cache, &kernel, &initrd)?.display()
                );
                let arguments = ["-drive", &drive, "-device", "virtio-blk-pci,drive=disk"];
                ("OVMF_VARS_4M.ms.fd", arguments.map(str::to_owned).to_vec())
            }
        };
        let vars = Path::new("/usr/share/OVMF").join(vars);
        let qemu = command::find("qemu-system-x86_64").context("QEMU is missing")?;
        let key = Key::new(1).file(&qemu)?.file(Path::new(CODE)).context("the package ovmf is needed")?.file(&vars)?;
        let key = key.text(&arguments.join(" ")).text(INIT);
        let place = cache.entry("firmware-boot", &key, |folder| {
            let shown = boot(folder, &vars, &arguments)?;
            fs::write(folder.join("shown"), shown)?;
            Ok(())
        })?;
        Self::read(&fs::read_to_string(place.join("shown"))?)
    }

    fn read(shown: &str) -> Result<Self> {
        let mut registers = Registers::new();
        for line in shown.lines().filter_map(|line| line.strip_prefix("register ")) {
            let (name, value) = line.split_once(' ').context("a register without value")?;
            let (bank, pcr) = name.split_once('/').context("a register without bank")?;
            let bank = bank.parse().map_err(anyhow::Error::msg)?;
            registers.insert(Register { bank, pcr: pcr.parse()? }, hex::decode(value.trim())?);
        }
        ensure!(!registers.is_empty(), "the kernel shows no registers");
        let (_, rest) = shown.split_once("log begins\n").context("no log")?;
        let (log, _) = rest.split_once("log ends\n").context("the log does not end")?;
        Ok(Self { log: base64::decode(&log.split_whitespace().collect::<String>())?, registers })
    }
}

fn direct(kernel: &Path, initrd: Option<&Path>, append: &str) -> Vec<String> {
    let mut arguments = vec!["-kernel".to_owned(), kernel.display().to_string()];
    if let Some(initrd) = initrd {
        arguments.extend(["-initrd".to_owned(), initrd.display().to_string()]);
    }
    arguments.extend(["-append".to_owned(), append.to_owned()]);
    arguments
}

fn initrd(cache: &Cache) -> Result<PathBuf> {
    let busybox = kernel::busybox(cache)?;
    let place = cache.entry("firmware-initrd", &Key::new(1).text(INIT).file(&busybox)?, |folder| {
        let mut archive = Archive::default();
        for path in ["bin", "dev", "proc", "sys"] {
            archive.folder(path);
        }
        archive.device("dev/console", 5, 1);
        archive.program("bin/busybox", &fs::read(&busybox)?);
        archive.link("bin/sh", "busybox");
        archive.program("init", INIT.as_bytes());
        fs::write(folder.join("initrd"), archive.finish())?;
        Ok(())
    })?;
    Ok(place.join("initrd"))
}

fn unified(cache: &Cache, kernel: &Kernel, initrd: &Path) -> Result<PathBuf> {
    let key = Key::new(1).file(Path::new(uefi::STUB)).context("the package systemd-boot-efi is needed")?;
    let key = key.file(&kernel.bzimage)?.file(initrd)?;
    let place = cache.entry("firmware-unified", &key, |folder| {
        uefi::unified_image(folder, kernel, initrd, "console=ttyS0 quiet").map(drop)
    })?;
    Ok(place.join("unified.efi"))
}

/// A disk with shim, GRUB and a kernel, all signed by Debian, on its EFI system partition.
fn disk(cache: &Cache, kernel: &Kernel, initrd: &Path) -> Result<PathBuf> {
    let packages = [Package::candidate("shim-signed")?, Package::candidate("grub-efi-amd64-signed")?];
    let mut key = Key::new(1).file(&kernel.bzimage)?.file(initrd)?.text(GRUB_CONFIG);
    for package in &packages {
        key = key.text(&package.name).text(&package.version);
    }
    let place = cache.entry("firmware-disk", &key, |folder| {
        let (scratch, root) = (folder.join("scratch"), folder.join("scratch/root"));
        fs::create_dir_all(&root)?;
        for package in &packages {
            package.unpack(&scratch, &root)?;
        }
        let config = scratch.join("grub.cfg");
        fs::write(&config, GRUB_CONFIG)?;
        let esp = uefi::system_partition(
            &scratch,
            ESP_SIZE,
            &["EFI", "EFI/BOOT", "EFI/debian"],
            &[
                (&root.join("usr/lib/shim/shimx64.efi.signed"), "EFI/BOOT/BOOTX64.EFI"),
                (&root.join("usr/lib/grub/x86_64-efi-signed/grubx64.efi.signed"), "EFI/BOOT/grubx64.efi"),
                (&config, "EFI/debian/grub.cfg"),
                (&kernel.bzimage, "vmlinuz"),
                (initrd, "initrd"),
            ],
        )?;
        uefi::partitioned(&folder.join("disk"), &[(0xef, &esp)])?;
        fs::remove_dir_all(&scratch)?;
        Ok(())
    })?;
    Ok(place.join("disk"))
}

/// Boots, and gives what the guest said.
fn boot(folder: &Path, vars: &Path, arguments: &[String]) -> Result<String> {
    let scratch = tempfile::tempdir()?;
    let place = |name: &str| scratch.path().join(name);
    fs::create_dir(place("state"))?;
    fs::copy(vars, place("vars"))?;
    let mut swtpm = Command::new("swtpm");
    swtpm
        .args(["socket", "--tpm2", "--flags", "startup-clear", "--tpmstate"])
        .arg(format!("dir={}", place("state").display()))
        .arg("--ctrl")
        .arg(format!("type=unixio,path={}", place("tpm").display()));
    let mut tpm = Process::spawn("swtpm", &swtpm, &folder.join("swtpm.log"), false)?;
    wait::for_true("the TPM's socket", Duration::from_secs(20), || {
        tpm.check_alive()?;
        Ok(place("tpm").exists())
    })?;
    let mut qemu = Command::new("qemu-system-x86_64");
    qemu.args(["-M", "q35,smm=on", "-m", "512", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"])
        .args(["-global", "driver=cfi.pflash01,property=secure,value=on"])
        .args(["-drive", &format!("if=pflash,unit=0,format=raw,readonly=on,file={CODE}")])
        .args(["-drive", &format!("if=pflash,unit=1,format=raw,file={}", place("vars").display())])
        .args(["-chardev", &format!("socket,id=tpm,path={}", place("tpm").display())])
        .args(["-tpmdev", "emulator,id=tpm0,chardev=tpm", "-device", "tpm-crb,tpmdev=tpm0"])
        .args(["-serial", &format!("file:{}", place("console").display())])
        .args(arguments);
    Process::spawn("QEMU", &qemu, &folder.join("qemu.log"), false)?.wait(LIMIT)?;
    let said = String::from_utf8_lossy(&fs::read(place("console"))?).replace('\r', "");
    ensure!(said.contains("\nlog ends\n"), "the boot did not come to its end:\n{said}");
    Ok(said)
}
