//! A whole Debian as guest: systemd, its own kernel and initramfs, the shim from its packages.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

use super::assets::Assets;
use super::cache::Cache;
use super::command;
use super::image::debian::{Debian, Recipe};
use super::image::ext4;
use super::image::packages::Package;
use super::machine::{Machine, copy};
use super::vm::VmSpec;
use super::world::World;

const AGENT: &str = include_str!("nested/agent.sh");

/// What a small server has.
const PACKAGES: [&str; 12] = [
    "systemd-sysv",
    "udev",
    "dbus",
    "kmod",
    "iproute2",
    "initramfs-tools",
    "cron",
    "logrotate",
    "openssh-server",
    "less",
    "python3",
    "ca-certificates",
];

/// A package that is on the disk and not installed: a program, and a script that dpkg runs.
pub const SMALL_PACKAGE: &str = "/srv/onequote-lab-tool_1_all.deb";

const SERVICES: [(&str, &str); 2] = [
    (
        "lab-agent.service",
        "[Unit]\nDescription=The lab's hand on this machine\nAfter=multi-user.target lab-scan.service\n\
         [Service]\nExecStart=/bin/bash /usr/local/lib/lab-agent /dev/ttyS0\n\
         [Install]\nWantedBy=graphical.target\n",
    ),
    // What a nightly backup does: under ima_policy=tcb everything that root reads is measured.
    (
        "lab-scan.service",
        "[Unit]\nDescription=Reads what a backup would read\n\
         [Service]\nType=oneshot\n\
         ExecStart=/bin/sh -c 'find /usr/bin /usr/lib/python3 /usr/lib/python3.* /usr/lib/systemd /usr/share/perl* \
         /etc -xdev -type f -exec cat {} + >/dev/null'\n\
         [Install]\nWantedBy=multi-user.target\n",
    ),
];

/// After the packages: `initrd.service` is an initramfs without the shim, `initrd` one with it.
const SCRIPT: &str = r#"
set -eu
tree=$1 out=$2
chroot "$tree" dpkg -i /srv/onequote-shim_0_amd64.deb
cp "$tree"/boot/initrd.img-* "$out/initrd.service"
chroot "$tree" dpkg -i /srv/onequote-shim-initramfs_0_all.deb
for unit in apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer fstrim.timer logrotate.timer \
    getty@tty1.service serial-getty@ttyS0.service; do
    ln -sf /dev/null "$tree/etc/systemd/system/$unit"
done
chroot "$tree" systemctl -q enable lab-agent.service lab-scan.service
echo /dev/vda / ext4 rw,noatime 0 0 >"$tree/etc/fstab"
echo debian >"$tree/etc/hostname"
"#;

const SIZE: &str = "1G";
const MEMORY: &str = "768M";

/// How the guest's shim is started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ShimStart {
    /// By systemd, from the package.
    Service,
    /// From the initramfs.
    Initramfs,
}

/// The Debian.
#[derive(Debug, Clone)]
pub struct Distribution {
    debian: Debian,
}

impl Distribution {
    /// From the cache, or made: one to two minutes.
    ///
    /// # Errors
    /// A package or tool is missing.
    pub fn prepare(assets: &Assets) -> Result<Self> {
        let cache = Cache::open()?;
        let mut packages: Vec<String> = PACKAGES.map(str::to_owned).to_vec();
        packages.push(Package::behind("linux-image-cloud-amd64")?.name);
        let overlay = tempfile::tempdir()?;
        fill(overlay.path(), &assets.shim)?;
        let recipe = Recipe {
            name: "debian-guest",
            packages,
            overlay: Some(overlay.path().to_owned()),
            script: SCRIPT.to_owned(),
            size: SIZE,
        };
        Ok(Self { debian: Debian::prepare(&cache, &recipe)? })
    }

    /// Adds a VM to the world that boots it.
    ///
    /// # Errors
    /// Its folder cannot be filled.
    pub fn add_vm(&self, world: &mut World, name: &str, start: ShimStart) -> Result<()> {
        let mut spec = VmSpec::new(name, Machine::Q35);
        "root=/dev/vda rw ima_policy=tcb systemd.show_status=1".clone_into(&mut spec.append);
        let vm = world.add_vm(spec)?;
        vm.edit_config("size = \"256M\"", &format!("size = \"{MEMORY}\""))?;
        let folder = vm.folder().to_owned();
        copy(&self.debian.root(), &folder.join("disk.img"))?;
        copy(&self.initrd(start), &folder.join("initrd"))
    }

    /// Its initramfs for this start of the shim.
    #[must_use]
    pub fn initrd(&self, start: ShimStart) -> PathBuf {
        match start {
            ShimStart::Service => self.debian.root().with_file_name("initrd.service"),
            ShimStart::Initramfs => self.debian.initrd(),
        }
    }

    /// Lines of a rule that allow the files of its disk and of its initramfs, as they were made, and nothing else.
    ///
    /// # Errors
    /// The verifier refuses.
    pub fn rule(&self, world: &World) -> Result<String> {
        let tree = tempfile::tempdir()?;
        ext4::extract(&self.debian.root(), tree.path())?;
        let (service, initramfs) = (self.initrd(ShimStart::Service), self.initrd(ShimStart::Initramfs));
        // The initramfs reads files of the disk where it mounts it, before it changes over.
        let (_, rule) = world.from_tree(&[tree.path(), &service, &initramfs], &["/", "/root"], "debian-files")?;
        Ok(rule)
    }

    /// Number of its packages.
    ///
    /// # Errors
    /// The list is gone.
    pub fn packages(&self) -> Result<usize> {
        Ok(self.debian.packages()?.lines().count())
    }
}

/// What the packages of Debian do not have: our packages, the small one, the lab's services.
fn fill(overlay: &Path, shim: &Path) -> Result<()> {
    let (srv, units, lib) = (overlay.join("srv"), overlay.join("etc/systemd/system"), overlay.join("usr/local/lib"));
    for folder in [&srv, &units, &lib] {
        fs::create_dir_all(folder)?;
    }
    let build = Path::new(env!("CARGO_MANIFEST_DIR")).join("../guest-shim/debian/build.sh");
    command::output(command::program("sh").arg(build).arg(shim).arg("0").arg(&srv)).context("packages of the shim")?;
    small_package(&srv)?;
    fs::write(lib.join("lab-agent"), AGENT)?;
    for (name, text) in SERVICES {
        fs::write(units.join(name), text)?;
    }
    Ok(())
}

fn small_package(folder: &Path) -> Result<PathBuf> {
    use std::os::unix::fs::PermissionsExt as _;
    let tree = tempfile::tempdir()?;
    let control = "Package: onequote-lab-tool\nVersion: 1\nArchitecture: all\nMaintainer: lab <lab@localhost>\n\
                   Description: a small package\n";
    for (path, text, mode) in [
        ("DEBIAN/control", control, 0o644),
        ("DEBIAN/postinst", "#!/bin/sh\nexec /usr/bin/onequote-lab-tool\n", 0o755),
        ("usr/bin/onequote-lab-tool", "#!/bin/sh\necho \"here I am\"\n", 0o755),
    ] {
        let file = tree.path().join(path);
        fs::create_dir_all(file.parent().unwrap_or(tree.path()))?;
        fs::write(&file, text)?;
        fs::set_permissions(&file, fs::Permissions::from_mode(mode))?;
    }
    fs::set_permissions(tree.path(), fs::Permissions::from_mode(0o755))?;
    let package = folder.join(Path::new(SMALL_PACKAGE).file_name().unwrap_or_default());
    let mut build = command::program("dpkg-deb");
    build.env("SOURCE_DATE_EPOCH", "1704067200").args(["--root-owner-group", "--build"]).arg(tree.path()).arg(&package);
    command::output(&mut build)?;
    Ok(package)
}
