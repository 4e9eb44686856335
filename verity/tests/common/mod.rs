//! What the tests share: files of noise, and the definition without cleverness.
#![allow(clippy::unwrap_used)]

use std::{fs::File, num::NonZeroUsize, os::unix::fs::FileExt};

use onequote_verity::{BLOCK_SIZE, Digest, HASHES_PER_BLOCK, Options, file_digest};
use sha2::{Digest as _, Sha256};

pub(crate) const BLOCK: u64 = BLOCK_SIZE as u64;

/// Two threads on any machine, so that results come out of order too.
pub(crate) fn threads() -> Options<'static> {
    Options { threads: NonZeroUsize::new(3).unwrap(), ..Options::default() }
}

/// Bytes that look random, the same for the same seed.
pub(crate) fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut data = Vec::with_capacity(len + 8);
    while data.len() < len {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        data.extend_from_slice(&x.to_le_bytes());
    }
    data.truncate(len);
    data
}

/// The digest as the kernel's documentation defines it.
pub(crate) fn definition(data: &[u8]) -> Digest {
    let hash = |part: &[u8]| -> Digest {
        let mut block = [0; BLOCK_SIZE];
        block[..part.len()].copy_from_slice(part);
        Sha256::digest(block).into()
    };
    let mut level: Vec<Digest> = data.chunks(BLOCK_SIZE).map(hash).collect();
    while level.len() > 1 {
        level = level.chunks(HASHES_PER_BLOCK).map(|digests| hash(digests.as_flattened())).collect();
    }
    file_digest(&level.first().copied().unwrap_or_default(), data.len() as u64)
}

/// A new file of this size, with noise from each of these offsets on, so long.
pub(crate) fn sparse(size: u64, data: &[(u64, usize)]) -> File {
    let file = tempfile::tempfile().unwrap();
    file.set_len(size).unwrap();
    for &(at, len) in data {
        file.write_all_at(&noise(at + 1, len), at).unwrap();
    }
    file
}

/// All bytes of a file.
pub(crate) fn content(file: &File) -> Vec<u8> {
    let mut data = vec![0; usize::try_from(file.metadata().unwrap().len()).unwrap()];
    file.read_exact_at(&mut data, 0).unwrap();
    data
}
