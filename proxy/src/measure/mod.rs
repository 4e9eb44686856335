//! Measuring what a VM is made of: files by their digests, and which files there are.
//!
//! # What is measured, and through what
//! QEMU tells its block graph and its machine's kernel, initrd, command line and firmware over QMP; the kernel tells
//! its program, arguments and open files in `/proc/PID`. A file that QEMU holds open (every local block node) is read
//! through `/proc/PID/fd`, so that the measured bytes are those of the inode that QEMU has. A block node's path must
//! still name that inode, else the measurement fails: a path that was exchanged after QEMU opened it is an attack or a
//! mistake, and neither may start. A file that QEMU read and closed (kernel, initrd, firmware, files named by
//! arguments) is read by its path, and its inode, size, mtime and ctime must be the same before and after. Before a VM
//! is let run such a file, and every symbolic link on the way to it, must also be as old as its QEMU, by ctime, which
//! programs cannot set: else QEMU may have read something else.
//!
//! What QEMU loaded into the guest's memory, or has mapped, is then compared with the file: see `loaded`.
//!
//! # What this can't see
//! QEMU does not tell which of its descriptors belongs to which block node: `slots` says how two paths of one VM that
//! were exchanged with one another are found, and when not. A folder on a path that is
//! exchanged as a whole between QEMU's reading and ours leaves the ctime of its files alone: that is seen where memory
//! or a mapping shows what QEMU has, and not for a bzImage and for what is handed over through fw_cfg.
//! Disks that are no block nodes (nvdimm, vhost-user-blk, virtiofs, 9p) are seen as devices and arguments only.
//!
//! Nothing is skipped: what cannot be read, or is no local file, is an error that names the item.

mod args;
mod blocks;
mod changed;
mod claims;
mod cli;
mod digest;
mod error;
mod file;
mod loaded;
mod machine;
pub(crate) mod process;
mod program;
mod roms;
mod slots;
mod vm;

pub use args::{Arguments, Given, Lookup, NamedFile};
pub(crate) use args::{absolute, in_data_dirs};
pub use blocks::{BlockGraph, Content, Leaf, Snapshot};
pub(crate) use blocks::{drive_of, slot_name};
pub use changed::{Dirty, Quiet, Reread, quiet};
pub use claims::Told;
pub use cli::{Algorithms, measure_files};
pub use digest::{Digested, Digester, MeasureLimits, Progress, Reading, Updated, Wanted};
pub use error::{MeasureError, MeasureErrorKind};
pub use file::{MeasuredFile, Saved, Stamp};
pub(crate) use file::{measure_named, measure_path};
#[cfg(fuzzing)]
pub use loaded::fuzz_elf;
pub use machine::{Execution, Machine};
pub use process::{Held, Process};
pub use program::Program;
pub(crate) use vm::quoted;
pub use vm::{Kept, Measurement, VmMeter};
