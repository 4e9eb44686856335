//! The guests' initramfs: busybox, modules, the shim, and `init.sh`.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Result;

use super::cpio::Archive;
use super::kernel::{Kernel, MODULES};
use crate::lab::cache::{Cache, Key};

const INIT: &str = include_str!("init.sh");

/// From the cache, or packed.
pub(crate) fn prepare(cache: &Cache, kernel: &Kernel, busybox: &Path, shim: &Path) -> Result<PathBuf> {
    let mut key = Key::new(1).text(INIT).file(busybox)?.file(shim)?;
    for module in modules(kernel) {
        key = key.file(&module)?;
    }
    let place = cache.entry("guest-initrd", &key, |folder| {
        let mut archive = Archive::default();
        for path in ["bin", "dev", "disk", "modules", "proc", "sys", "tmp"] {
            archive.folder(path);
        }
        // The kernel opens it for init before anything is mounted.
        archive.device("dev/console", 5, 1);
        archive.program("bin/busybox", &fs::read(busybox)?);
        archive.link("bin/sh", "busybox");
        archive.program("init", INIT.as_bytes());
        archive.program("onequote-shim", &fs::read(shim)?);
        for module in modules(kernel) {
            let name = module.file_name().unwrap_or_default().to_string_lossy();
            archive.file(&format!("modules/{name}"), &fs::read(&module)?);
        }
        fs::write(folder.join("initrd"), archive.finish())?;
        Ok(())
    })?;
    Ok(place.join("initrd"))
}

fn modules(kernel: &Kernel) -> impl Iterator<Item = PathBuf> {
    MODULES.iter().map(|name| kernel.modules.join(format!("{name}.ko"))).filter(|file| file.exists())
}
