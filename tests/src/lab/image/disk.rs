//! The guests' disk: a small ext4 file system with a few programs, made without root.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use anyhow::Result;

use crate::lab::cache::{Cache, Key};
use crate::lab::command;

/// Programs on the disk: those in `boot.d` run while the guest starts, in this order, those in `bin` when asked.
/// The second column is the script after its first line.
pub(crate) const PROGRAMS: [(&str, &str); 6] = [
    ("boot.d/10-network", "exit 0"),
    ("boot.d/20-clock", "exit 0"),
    ("boot.d/30-service", "exit 0"),
    ("bin/hello", "echo \"hello $*\""),
    ("bin/backup", "echo \"nothing to do\""),
    ("bin/report", "read -r up rest </proc/uptime; echo \"up $up s\""),
];

const SIZE: &str = "6M";

/// From the cache, or made.
pub(crate) fn prepare(cache: &Cache) -> Result<PathBuf> {
    let mut key = Key::new(1).text(SIZE);
    for (path, script) in PROGRAMS {
        key = key.text(path).text(script);
    }
    let place = cache.entry("guest-disk", &key, build)?;
    Ok(place.join("disk.img"))
}

fn build(folder: &Path) -> Result<()> {
    let tree = folder.join("tree");
    for (path, script) in PROGRAMS {
        let file = tree.join(path);
        fs::create_dir_all(file.parent().unwrap_or(&tree))?;
        fs::write(&file, format!("#!/bin/busybox sh\n# {path}\n{script}\n"))?;
        fs::set_permissions(&file, fs::Permissions::from_mode(0o755))?;
    }
    // No journal: a guest that only reads leaves the image as it was.
    command::output(
        command::program("mke2fs")
            .args(["-q", "-t", "ext4", "-O", "^has_journal", "-L", "lab"])
            .args(["-U", "6f6e6571-756f-7465-0000-00006c616221"])
            .args(["-E", "root_owner=0:0,hash_seed=6f6e6571-756f-7465-0000-00006c616221"])
            .arg("-d")
            .arg(&tree)
            .arg(folder.join("disk.img"))
            .arg(SIZE),
    )?;
    fs::remove_dir_all(tree)?;
    Ok(())
}
