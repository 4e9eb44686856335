//! Debian's cloud kernel: the boot image, the uncompressed ELF inside it, and the modules for virtio and vsock.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail, ensure};

use super::packages::Package;
use crate::lab::cache::{Cache, Key};
use crate::lab::command;

/// Modules in the order in which they are loaded: what is built in is missing from this list.
pub(crate) const MODULES: [&str; 10] = [
    "virtio_ring",
    "virtio",
    "virtio_pci_modern_dev",
    "virtio_pci_legacy_dev",
    "virtio_pci",
    "virtio_mmio",
    "virtio_blk",
    "vsock",
    "vmw_vsock_virtio_transport_common",
    "vmw_vsock_virtio_transport",
];

/// A kernel, unpacked.
#[derive(Debug, Clone)]
pub(crate) struct Kernel {
    /// The package's version.
    pub(crate) version: String,
    /// ELF with a PVH entry, for direct boot.
    pub(crate) vmlinux: PathBuf,
    /// The boot image with EFI stub.
    pub(crate) bzimage: PathBuf,
    /// Folder with one `NAME.ko` for each of [`MODULES`].
    pub(crate) modules: PathBuf,
}

impl Kernel {
    /// From the cache, or downloaded and unpacked.
    pub(crate) fn prepare(cache: &Cache) -> Result<Self> {
        let package = Package::behind("linux-image-cloud-amd64")?;
        let key = Key::new(1).text(&package.name).text(&package.version);
        let place = cache.entry("guest-kernel", &key, |folder| build(&package, folder))?;
        Ok(Self {
            version: package.version,
            vmlinux: place.join("vmlinux"),
            bzimage: place.join("bzImage"),
            modules: place.join("modules"),
        })
    }
}

fn build(package: &Package, folder: &Path) -> Result<()> {
    let scratch = folder.join("scratch");
    let root = scratch.join("root");
    fs::create_dir_all(&root)?;
    package.unpack(&scratch, &root)?;

    let image = find(&root.join("boot"), &|name| name.starts_with("vmlinuz-"))?
        .context("the kernel package has no /boot/vmlinuz")?;
    let image = fs::read(image)?;
    fs::write(folder.join("vmlinux"), decompress(payload(&image)?)?)?;
    fs::write(folder.join("bzImage"), image)?;

    let modules = folder.join("modules");
    fs::create_dir(&modules)?;
    for module in MODULES {
        let prefix = format!("{module}.ko");
        let file = find(&root, &|name| {
            name.strip_prefix(&prefix).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
        })?;
        // A later kernel may have it built in; the guest's init says what did not load.
        let Some(file) = file else { continue };
        let bytes = fs::read(&file)?;
        let bytes = if bytes.starts_with(b"\x7fELF") { bytes } else { decompress(&bytes)? };
        fs::write(modules.join(&prefix), bytes)?;
    }
    fs::remove_dir_all(&scratch)?;
    Ok(())
}

/// The compressed kernel inside a boot image (Linux, `Documentation/arch/x86/boot.rst`: `setup_sects` at 0x1f1,
/// `payload_offset` at 0x248 and `payload_length` at 0x24c, little-endian).
fn payload(image: &[u8]) -> Result<&[u8]> {
    ensure!(image.get(0x202..0x206) == Some(b"HdrS"), "the kernel image has no boot header");
    let sectors = match image[0x1f1] {
        0 => 4,
        count => usize::from(count),
    };
    let start = (sectors + 1) * 512 + word(image, 0x248)?;
    let end = start + word(image, 0x24c)?;
    image.get(start..end).context("the kernel image ends before its payload does")
}

fn word(bytes: &[u8], at: usize) -> Result<usize> {
    let word = bytes.get(at..at + 4).and_then(|part| part.try_into().ok()).context("the kernel image is cut short")?;
    Ok(u32::from_le_bytes(word) as usize)
}

fn decompress(bytes: &[u8]) -> Result<Vec<u8>> {
    match bytes {
        [0x02, 0x21, 0x4c, 0x18, ..] => lz4_legacy(bytes),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => filter("zstd", bytes),
        [0xfd, b'7', b'z', b'X', b'Z', ..] => filter("xz", bytes),
        [0x1f, 0x8b, ..] => filter("gzip", bytes),
        _ => bail!("the kernel is compressed in a way that the lab does not know"),
    }
}

/// LZ4's legacy frame: magic, then blocks, each a little-endian length and its bytes, 8 MiB when expanded (the last one
/// less). Linux puts the expanded length, four bytes, at the very end.
fn lz4_legacy(bytes: &[u8]) -> Result<Vec<u8>> {
    const BLOCK: usize = 8 << 20;
    let end = bytes.len().saturating_sub(4);
    let size = word(bytes, end)?;
    let mut expanded = Vec::with_capacity(size.min(1 << 30));
    let mut at = 4;
    while at < end && expanded.len() < size {
        let length = word(bytes, at)?;
        let block = bytes.get(at + 4..at + 4 + length).context("the kernel's LZ4 data is cut short")?;
        expanded.extend(lz4_flex::block::decompress(block, BLOCK)?);
        at += 4 + length;
    }
    ensure!(expanded.len() == size, "the kernel's LZ4 data expands to another length than it says");
    Ok(expanded)
}

/// Through a program that takes `-dc`; what follows the compressed data is ignored.
fn filter(program: &str, bytes: &[u8]) -> Result<Vec<u8>> {
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("data");
    fs::write(&file, bytes)?;
    let output = Command::new(program).arg("-dc").arg(&file).output();
    let output = output.with_context(|| format!("cannot start {program}"))?;
    ensure!(!output.stdout.is_empty(), "{program} could not expand the kernel");
    Ok(output.stdout)
}

fn find(folder: &Path, wanted: &dyn Fn(&str) -> bool) -> Result<Option<PathBuf>> {
    for item in fs::read_dir(folder).with_context(|| format!("no folder {}", folder.display()))? {
        let item = item?;
        if item.file_type()?.is_dir() {
            if let Some(file) = find(&item.path(), wanted)? {
                return Ok(Some(file));
            }
        } else if wanted(&item.file_name().to_string_lossy()) {
            return Ok(Some(item.path()));
        }
    }
    Ok(None)
}

/// The static busybox, from its package.
pub(crate) fn busybox(cache: &Cache) -> Result<PathBuf> {
    let package = Package::candidate("busybox-static")?;
    let key = Key::new(2).text(&package.name).text(&package.version);
    let place = cache.entry("guest-busybox", &key, |folder| {
        let scratch = folder.join("scratch");
        let root = scratch.join("root");
        fs::create_dir_all(&root)?;
        package.unpack(&scratch, &root)?;
        let file = ["usr/bin/busybox", "bin/busybox"]
            .map(|path| root.join(path))
            .into_iter()
            .find(|file| file.is_file())
            .context("package busybox-static has no busybox")?;
        fs::copy(file, folder.join("busybox"))?;
        fs::remove_dir_all(&scratch)?;
        Ok(())
    })?;
    command::output(Command::new(place.join("busybox")).arg("true"))?;
    Ok(place.join("busybox"))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;

    #[test]
    fn a_legacy_lz4_frame_expands() {
        let content = b"kernel kernel kernel kernel kernel kernel".repeat(50);
        let block = lz4_flex::block::compress(&content);
        let mut frame = vec![0x02, 0x21, 0x4c, 0x18];
        frame.extend((block.len() as u32).to_le_bytes());
        frame.extend(&block);
        frame.extend((content.len() as u32).to_le_bytes());
        assert_eq!(decompress(&frame).unwrap(), content);
        frame.truncate(frame.len() - 9);
        assert!(decompress(&frame).is_err());
    }

    #[test]
    fn what_is_no_boot_image_is_refused() {
        assert!(payload(b"short").is_err());
        let mut image = vec![0; 0x400];
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x24c] = 1;
        assert!(payload(&image).is_err());
    }
}
