//! The kernel's fs-verity digest of a file, with SHA-256, blocks of 4 KiB and no salt
//! (Linux `Documentation/filesystems/fsverity.rst`).
//!
//! # What the digest is
//! The file is cut into blocks of 4,096 bytes, the last one padded with zeros. The digests of 128 blocks fill a block
//! of the tree's first level, the digests of 128 of those one of the second, and so on, each level's last block padded
//! with zeros, until one digest is left: the root. Of a file of one block the root is that block's digest; of an empty
//! file it is zeros. The file's digest is SHA-256 of a descriptor of 256 bytes with root and size ([`file_digest`]).
//!
//! # How it is had
//! [`measure`] takes it from the kernel where fs-verity is enabled on the file with just these parameters, and computes
//! it otherwise: several threads, two blocks at a time on each where the CPU has SHA extensions, and without reading
//! holes. Memory is bounded: about 200 KiB a thread, and a window of digests between them.
//!
//! Nothing here knows what a file is for. Whether it changed while it was read is the caller's to find out.

mod block;
mod driver;
mod io;
mod kernel;
mod measure;
mod plan;
mod saved;
mod tree;
#[cfg(target_arch = "x86_64")]
mod x86;

pub use kernel::{digest_of_descriptor, enabled};
pub use measure::{Measured, Options, Source, measure};
pub use saved::{Changed, SavedTree, TreeError};
pub use tree::file_digest;

pub use crate::io::{idle_io, size_of};

/// Bytes in a block of data and of the tree.
pub const BLOCK_SIZE: usize = 4096;

/// Digests in a block of the tree.
pub const HASHES_PER_BLOCK: usize = BLOCK_SIZE / 32;

/// Bytes of a file under one block of the tree's first level.
pub const CHUNK: u64 = (BLOCK_SIZE * HASHES_PER_BLOCK) as u64;

/// A SHA-256 digest.
pub type Digest = [u8; 32];

/// Why there is no digest.
#[derive(Debug, thiserror::Error)]
pub enum VerityError {
    /// The file cannot be read.
    #[error(transparent)]
    Io(#[from] std::io::Error),
    /// Neither a regular file nor a block device.
    #[error("is neither a regular file nor a block device")]
    NotAFile,
    /// It has fewer bytes than it had when reading began.
    #[error("it became shorter while it was read")]
    Shrunk,
    /// It gives more bytes than its size says: a file whose size means nothing, as in procfs.
    #[error("it holds more than its size says")]
    Unsized,
    /// The caller asked to stop.
    #[error("stopped before the end")]
    Stopped,
}
