//! What guests are made of, from Debian's packages: kernel, initramfs, disk, UEFI image.

pub(crate) mod cpio;
pub(crate) mod disk;
pub(crate) mod initrd;
pub(crate) mod kernel;
pub(crate) mod packages;
pub(crate) mod uefi;
