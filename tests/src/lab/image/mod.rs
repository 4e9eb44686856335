//! What guests are made of, from Debian's packages: kernel, initramfs, disk, UEFI image.

pub(crate) mod cpio;
pub(crate) mod debian;
pub(crate) mod disk;
pub(crate) mod ext4;
pub(crate) mod initrd;
pub(crate) mod kernel;
pub(crate) mod packages;
pub(crate) mod uefi;
