//! What the nested host is made of: a Debian with systemd, QEMU and the TPM's libraries; on it the proxy as a service and
//! VMs by description, as the operations manual has them.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};

use crate::lab::assets::Assets;
use crate::lab::cache::Cache;
use crate::lab::command;
use crate::lab::image::cpio::Archive;
use crate::lab::image::debian::{Debian, Recipe};
use crate::lab::image::ext4::Changes;
use crate::lab::image::kernel::Kernel;
use crate::lab::image::packages::Package;
use crate::lab::image::uefi;

const INIT: &str = include_str!("init.sh");
const AGENT: &str = include_str!("agent.sh");

const PROXY_UNIT: &str = include_str!("../../../../proxy/systemd/onequote-proxy.service");
const VM_UNIT: &str = include_str!("../../../../proxy/systemd/onequote-vm@.service");
const VM: &str = include_str!("../../../../qemu-configs/q35.toml");

const AGENT_UNIT: &str = "[Unit]\n\
    Description=The lab's hand on this machine\n\
    After=basic.target\n\
    [Service]\nExecStart=/bin/bash /usr/local/lib/lab-agent /dev/ttyS1\nRestart=always\n";

/// A shell on the console without a question: who has the console of a lab's machine may have the machine.
const GETTY: &str = "[Service]\nExecStart=\nExecStart=-/sbin/agetty --autologin root --keep-baud 115200 - $TERM\n";

/// What the kernel is told. The last two words only save time under TCG.
pub(super) const CMDLINE: &str = "console=ttyS0 ima_policy=tcb systemd.show_status=1 cryptomgr.notests \
    initcall_blacklist=init_kprobe_trace,load_system_certificate_list";

/// Units that a machine which lives for minutes needs not, each of which costs a second or more under TCG.
const WITHOUT: &str = r#"
set -eu
tree=$1
for unit in apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer e2scrub_reap.service fstrim.timer \
    getty@tty1.service getty-static.service systemd-pcrphase.service systemd-pcrphase-sysinit.service \
    systemd-update-utmp.service systemd-update-utmp-runlevel.service modprobe@drm.service modprobe@fuse.service \
    kexec.service kexec-load.service sys-kernel-debug.mount sys-kernel-tracing.mount dev-hugepages.mount dev-mqueue.mount; do
    ln -sf /dev/null "$tree/etc/systemd/system/$unit"
done
chroot "$tree" systemctl -q enable systemd-networkd.service
sed -i 's/^root:[^:]*:/root::/' "$tree/etc/shadow"
"#;

/// Parts of a nested host that are the same for all of them.
#[derive(Debug, Clone)]
pub(super) struct Parts {
    pub(super) debian: Debian,
    pub(super) initrd: PathBuf,
    pub(super) kernel: Kernel,
}

impl Parts {
    /// From the cache, or made: the root file system takes about a minute.
    pub(super) fn prepare(assets: &Assets, folder: &Path) -> Result<Self> {
        let cache = Cache::open()?;
        let kernel = Kernel::prepare(&cache)?;
        let kernel_package = Package::behind("linux-image-cloud-amd64")?.name;
        let mut packages: Vec<String> =
            ["systemd-sysv", "udev", "kmod", "iproute2", "socat", "kexec-tools", "qemu-system-x86", "qemu-system-data"]
                .map(str::to_owned)
                .to_vec();
        packages.push(kernel_package);
        packages.extend(tpm_libraries(&assets.proxy)?);
        let recipe = Recipe { name: "nested-host", packages, overlay: None, script: WITHOUT.to_owned(), size: "1G" };
        let debian = Debian::prepare(&cache, &recipe)?;
        let busybox = crate::lab::image::kernel::busybox(&cache)?;
        let initrd = folder.join("initrd");
        fs::write(&initrd, initramfs(&kernel, &busybox)?)?;
        Ok(Self { debian, initrd, kernel })
    }

    /// The disk that the firmware starts: `boot.img` in `folder`, with this kernel command line.
    pub(super) fn boot_disk(&self, folder: &Path, cmdline: &str) -> Result<()> {
        uefi::boot_disk(&self.kernel, &self.initrd, cmdline, &folder.join("boot.img"))
    }
}

/// Packages of the TPM libraries that the proxy is linked with, and of the way to a TPM device.
fn tpm_libraries(proxy: &Path) -> Result<Vec<String>> {
    let linked = command::text(Command::new("ldd").arg(proxy))?;
    let mut files: Vec<&str> =
        linked.lines().filter_map(|line| line.split_whitespace().nth(2)).filter(|file| file.contains("tss2")).collect();
    let device = "/usr/lib/x86_64-linux-gnu/libtss2-tcti-device.so.0";
    ensure!(!files.is_empty(), "the proxy is linked with no TPM library");
    files.push(device);
    let mut packages = Vec::new();
    for file in files {
        let file = fs::canonicalize(file).with_context(|| format!("no {file}"))?;
        let said = command::text(Command::new("dpkg-query").arg("-S").arg(&file))?;
        packages.push(said.split([':', ',']).next().unwrap_or_default().to_owned());
    }
    packages.sort();
    packages.dedup();
    Ok(packages)
}

fn initramfs(kernel: &Kernel, busybox: &Path) -> Result<Vec<u8>> {
    let mut archive = Archive::default();
    for path in ["bin", "dev", "modules", "root"] {
        archive.folder(path);
    }
    archive.device("dev/console", 5, 1);
    archive.program("bin/busybox", &fs::read(busybox)?);
    archive.program("init", INIT.as_bytes());
    for item in fs::read_dir(&kernel.modules)? {
        let file = item?;
        archive.file(&format!("modules/{}", file.file_name().to_string_lossy()), &fs::read(file.path())?);
    }
    Ok(archive.finish())
}

/// What is put on a Debian's root file system to make it this world's host.
pub(super) struct Host<'a> {
    pub(super) id: &'a str,
    /// The port on which its proxy answers verifiers.
    pub(super) port: u16,
    pub(super) guests: &'a [String],
}

impl Host<'_> {
    /// Puts it into `root.img` of `folder`.
    pub(super) fn install(&self, assets: &Assets, folder: &Path) -> Result<()> {
        let mut changes = Changes::default();
        // Most of a debug build's size is not loaded when it runs, but IMA reads all of it.
        let proxy = folder.join("onequote-proxy");
        command::output(command::program("objcopy").arg("--strip-debug").arg(&assets.proxy).arg(&proxy))?;
        changes.file(&proxy, "/usr/local/sbin/onequote-proxy", 0o755);
        changes.text(&self.configuration(), "/etc/onequote/proxy.toml", 0o644)?;
        changes.text("/dev/vdb / ext4 rw,noatime 0 0\n", "/etc/fstab", 0o644)?;
        changes.text("nested-host\n", "/etc/hostname", 0o644)?;
        // Which of them loads says the processor; the other one fails.
        changes.text("vhost_vsock\nkvm_amd\nkvm_intel\n", "/etc/modules-load.d/onequote.conf", 0o644)?;
        changes.text("[Match]\nName=en* eth*\n[Network]\nDHCP=yes\n", "/etc/systemd/network/80-lab.network", 0o644)?;
        changes.text(AGENT, "/usr/local/lib/lab-agent", 0o755)?;
        changes.text(GETTY, "/etc/systemd/system/serial-getty@ttyS0.service.d/lab.conf", 0o644)?;
        for (name, text) in [
            ("onequote-proxy.service", PROXY_UNIT),
            ("onequote-vm@.service", VM_UNIT),
            ("lab-agent.service", AGENT_UNIT),
        ] {
            changes.text(text, &format!("/etc/systemd/system/{name}"), 0o644)?;
        }
        for name in ["onequote-proxy", "lab-agent"] {
            enable(&mut changes, &format!("{name}.service"), &format!("{name}.service"));
        }
        changes.file(&folder.join("initrd"), "/boot/initrd", 0o644);
        changes.file(&assets.vmlinux, "/srv/vm/vmlinux", 0o644);
        changes.file(&assets.initrd, "/srv/vm/initrd", 0o644);
        for guest in self.guests {
            changes.file(&assets.disk, &format!("/srv/vm/{guest}/disk.img"), 0o644);
            changes.text(&description(guest), &format!("/etc/onequote/vms/{guest}.toml"), 0o644)?;
            enable(&mut changes, &format!("onequote-vm@{guest}.service"), "onequote-vm@.service");
        }
        changes.apply(&folder.join("root.img"))?;
        fs::remove_file(proxy)?;
        Ok(())
    }

    fn configuration(&self) -> String {
        format!(
            "host_id = {:?}\nlisten = \"0.0.0.0:{}\"\n\n\
             [tpm]\ntcti = \"device:/dev/tpmrm0\"\n\n\
             [host]\nfirmware_log = \"/sys/kernel/security/tpm0/binary_bios_measurements\"\n\
             ima_list = \"/sys/kernel/security/ima/binary_runtime_measurements\"\n\n\
             [guest]\nvsock = true\nunix = false\n",
            self.id, self.port
        )
    }
}

fn enable(changes: &mut Changes, name: &str, unit: &str) {
    changes
        .link(&format!("/etc/systemd/system/multi-user.target.wants/{name}"), &format!("/etc/systemd/system/{unit}"));
}

/// The ready description, with this VM's files.
fn description(guest: &str) -> String {
    VM.replace("\"vmlinux\"", "\"/srv/vm/vmlinux\"")
        .replace("\"initrd\"", "\"/srv/vm/initrd\"")
        .replace("\nmachine = ", "\naccelerator = \"kvm\"\nmachine = ")
        .replace("\"disk.img\"", &format!("\"/srv/vm/{guest}/disk.img\""))
        .replace("\"console.sock\"", &format!("\"/srv/vm/{guest}/console.sock\""))
        .replace("\"console.log\"", &format!("\"/srv/vm/{guest}/console.log\""))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;

    #[test]
    fn a_description_names_the_files_of_its_vm_and_no_others() {
        let text = description("web1");
        let relative: Vec<&str> = text
            .lines()
            .filter(|line| !line.starts_with('#'))
            .filter_map(|line| line.split_once(" = \""))
            .filter(|(key, value)| matches!(*key, "kernel" | "initrd" | "path" | "log") && !value.starts_with('/'))
            .map(|(_, value)| value)
            .collect();
        assert!(relative.is_empty(), "{relative:?}");
        assert_eq!(text.matches("/srv/vm/web1/").count(), 3);
        assert!(text.contains("\naccelerator = \"kvm\"\n"));
    }
}
