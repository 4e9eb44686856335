//! fs-verity in the kernel: the digest of a file on which it is enabled, without reading the file.
//!
//! `FS_IOC_MEASURE_VERITY` (Linux `include/uapi/linux/fsverity.h`) tells algorithm and digest, but neither block size
//! nor salt, and the digest of the same bytes is another with each of them. So the descriptor is asked for too
//! (`FS_IOC_READ_VERITY_METADATA`, since Linux 5.12), must have our parameters and the file's size, and its own SHA-256
//! must be the digest that the kernel told. From when fs-verity is enabled the kernel lets nobody write the file, and
//! gives no byte of it that is not under that digest.

use std::{
    fs::File,
    os::fd::{AsFd, AsRawFd, BorrowedFd},
};

use sha2::{Digest as _, Sha256};

use crate::Digest;

/// `FS_VERITY_HASH_ALG_SHA256`.
const SHA256: u16 = 1;

/// `FS_VERITY_METADATA_TYPE_DESCRIPTOR`.
const DESCRIPTOR: u64 = 2;

/// Bytes of a descriptor without a signature.
const DESCRIPTOR_SIZE: usize = 256;

/// `struct fsverity_digest` with room for a SHA-256.
#[repr(C)]
struct MeasureArg {
    algorithm: u16,
    size: u16,
    digest: [u8; 32],
}

/// `struct fsverity_read_metadata_arg`.
#[repr(C)]
struct ReadArg {
    metadata_type: u64,
    offset: u64,
    length: u64,
    buffer: u64,
    reserved: u64,
}

mod raw {
    use super::ReadArg;

    // The size in the request's number is that of the struct's head, without the digest that follows.
    nix::ioctl_readwrite_bad!(measure, nix::request_code_readwrite!(b'f', 134, 4), super::MeasureArg);
    nix::ioctl_readwrite!(read_metadata, b'f', 135, ReadArg);
}

/// The digest of a file on which fs-verity is enabled with SHA-256, blocks of 4 KiB and no salt; nothing for every other
/// file, and where kernel or file system know no fs-verity.
#[must_use]
pub fn enabled(file: &File, size: u64) -> Option<Digest> {
    let told = told(file.as_fd())?;
    let computed = digest_of_descriptor(&descriptor(file.as_fd())?, size)?;
    (told == computed).then_some(computed)
}

fn told(fd: BorrowedFd<'_>) -> Option<Digest> {
    let mut arg = MeasureArg { algorithm: 0, size: 32, digest: [0; 32] };
    #[expect(unsafe_code, reason = "kernel interface")]
    // SAFETY: the descriptor is open; `arg` is a `struct fsverity_digest` followed by the 32 bytes that it says it has,
    // and the kernel writes no more (EOVERFLOW otherwise).
    unsafe { raw::measure(fd.as_raw_fd(), &raw mut arg) }.ok()?;
    (arg.algorithm == SHA256 && arg.size == 32).then_some(arg.digest)
}

fn descriptor(fd: BorrowedFd<'_>) -> Option<[u8; DESCRIPTOR_SIZE]> {
    let mut buffer = [0; DESCRIPTOR_SIZE];
    let mut arg = ReadArg {
        metadata_type: DESCRIPTOR,
        offset: 0,
        length: DESCRIPTOR_SIZE as u64,
        buffer: buffer.as_mut_ptr() as u64,
        reserved: 0,
    };
    #[expect(unsafe_code, reason = "kernel interface")]
    // SAFETY: the descriptor is open; `arg` is a `struct fsverity_read_metadata_arg` whose buffer is `buffer`, alive and
    // not otherwise used, with the length that it says; the kernel writes at most so much.
    let read = unsafe { raw::read_metadata(fd.as_raw_fd(), &raw mut arg) }.ok()?;
    (usize::try_from(read) == Ok(DESCRIPTOR_SIZE)).then_some(buffer)
}

/// The digest that follows from a descriptor (`struct fsverity_descriptor`) if it has our parameters, this size in
/// bytes, and nothing else set.
#[must_use]
pub fn digest_of_descriptor(descriptor: &[u8; DESCRIPTOR_SIZE], size: u64) -> Option<Digest> {
    // Version, algorithm, log2 of the block size, size of the salt, size of the signature (in the digest always 0).
    let ours = descriptor[..8] == [1, 1, 12, 0, 0, 0, 0, 0];
    let sized = descriptor[8..16] == size.to_le_bytes();
    // A root of 64 bytes of which SHA-256 uses half, the salt, and what is reserved.
    let plain = descriptor[48..].iter().all(|&b| b == 0);
    (ours && sized && plain).then(|| Sha256::digest(descriptor).into())
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;
    use crate::file_digest;

    fn example() -> [u8; DESCRIPTOR_SIZE] {
        let mut d = [0; DESCRIPTOR_SIZE];
        d[..4].copy_from_slice(&[1, 1, 12, 0]);
        d[8..16].copy_from_slice(&70_000_u64.to_le_bytes());
        d[16..48].fill(0xab);
        d
    }

    #[test]
    fn a_descriptor_with_our_parameters_gives_our_digest() {
        assert_eq!(digest_of_descriptor(&example(), 70_000), Some(file_digest(&[0xab; 32], 70_000)));
    }

    #[test]
    fn every_other_descriptor_gives_none() {
        assert_eq!(digest_of_descriptor(&example(), 70_001), None);
        // Every byte but the root's: version, algorithm, block size, salt and its size, signature's size, reserved.
        for at in (0..16).chain(48..DESCRIPTOR_SIZE) {
            let mut other = example();
            other[at] ^= 1;
            assert_eq!(digest_of_descriptor(&other, 70_000), None, "byte {at}");
        }
    }

    #[test]
    fn requests_have_the_kernels_numbers() {
        // As the macros of `linux/fsverity.h` give them on x86-64 and arm64.
        assert_eq!(nix::request_code_readwrite!(b'f', 134, 4), 0xc004_6686);
        assert_eq!(nix::request_code_readwrite!(b'f', 135, size_of::<ReadArg>()), 0xc028_6687);
        assert_eq!(std::mem::offset_of!(MeasureArg, digest), 4);
    }

    #[test]
    fn a_plain_file_has_none() {
        let file = tempfile::tempfile().unwrap();
        assert_eq!(enabled(&file, 0), None);
    }
}
