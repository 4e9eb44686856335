//! The tree above the first level's blocks, built from left to right, and the descriptor over its root.

use std::sync::LazyLock;

use sha2::{Digest as _, Sha256};

use crate::{BLOCK_SIZE, Digest, HASHES_PER_BLOCK, block::Block};

/// Levels of the kernel's largest tree, a file of 2^63 - 1 bytes (Linux `fs/verity/fsverity_private.h`,
/// `FS_VERITY_MAX_LEVELS`).
const LEVELS: usize = 8;

/// Digests of subtrees over nothing but zeros: of a block of data, of a full block of the first level over such, and so
/// on.
static ZEROS: LazyLock<[Digest; LEVELS + 1]> = LazyLock::new(|| {
    let mut zeros = [[0; 32]; LEVELS + 1];
    zeros[0] = Sha256::digest([0; BLOCK_SIZE]).into();
    for level in 1..zeros.len() {
        let mut hasher = Sha256::new();
        for _ in 0..HASHES_PER_BLOCK {
            hasher.update(zeros[level - 1]);
        }
        zeros[level] = hasher.finalize().into();
    }
    zeros
});

/// The digest of a block of zeros.
pub(crate) fn zero_block() -> Digest {
    ZEROS[0]
}

/// Takes the digests of the first level's blocks in their order, and gives the root. Keeps one block for each level.
pub(crate) struct Builder {
    levels: Vec<Level>,
}

struct Level {
    block: Block,
    used: usize,
}

impl Builder {
    pub(crate) fn new() -> Self {
        Self { levels: (0..LEVELS).map(|_| Level { block: [0; BLOCK_SIZE], used: 0 }).collect() }
    }

    /// The next digest of a block of the first level; of a file of a single block that block's own.
    pub(crate) fn push(&mut self, digest: &Digest) {
        self.push_at(0, digest);
    }

    /// So many blocks of the first level, each full and over zeros alone. Takes time that follows the tree's height.
    pub(crate) fn push_zeros(&mut self, count: u64) {
        self.push_zeros_at(0, count);
    }

    /// The root of what was pushed; zeros if that was nothing.
    pub(crate) fn root(mut self) -> Digest {
        for level in 0..LEVELS {
            let above = self.levels[level + 1..].iter().any(|l| l.used > 0);
            let this = &mut self.levels[level];
            match this.used {
                0 => {}
                1 if !above => return first(&this.block),
                used => {
                    this.block[used * 32..].fill(0);
                    let digest = Sha256::digest(this.block).into();
                    this.used = 0;
                    if level + 1 == LEVELS {
                        return digest;
                    }
                    self.push_at(level + 1, &digest);
                }
            }
        }
        [0; 32]
    }

    fn push_at(&mut self, level: usize, digest: &Digest) {
        let this = &mut self.levels[level];
        this.block[this.used * 32..][..32].copy_from_slice(digest);
        this.used += 1;
        // The topmost level is never full: that would be a file of 2^75 bytes.
        if this.used == HASHES_PER_BLOCK && level + 1 < LEVELS {
            this.used = 0;
            let digest = Sha256::digest(this.block).into();
            self.push_at(level + 1, &digest);
        }
    }

    fn push_zeros_at(&mut self, level: usize, mut count: u64) {
        // Entries of this level stand for zero subtrees of one level more: chunks are level 0 here and 1 in `ZEROS`.
        let zero = ZEROS[level + 1];
        while count > 0 && self.levels[level].used > 0 {
            self.push_at(level, &zero);
            count -= 1;
        }
        if level + 1 < LEVELS {
            let full = count / HASHES_PER_BLOCK as u64;
            if full > 0 {
                self.push_zeros_at(level + 1, full);
                count %= HASHES_PER_BLOCK as u64;
            }
        }
        for _ in 0..count {
            self.push_at(level, &zero);
        }
    }
}

fn first(block: &Block) -> Digest {
    let mut digest = [0; 32];
    digest.copy_from_slice(&block[..32]);
    digest
}

/// The kernel's digest of a file with this root and size in bytes: SHA-256 of `struct fsverity_descriptor`
/// (Linux `fs/verity/fsverity_private.h`).
#[must_use]
pub fn file_digest(root: &Digest, size: u64) -> Digest {
    let mut descriptor = [0; 256];
    // Version 1, SHA-256, blocks of 2^12 bytes, no salt.
    descriptor[..4].copy_from_slice(&[1, 1, 12, 0]);
    descriptor[8..16].copy_from_slice(&size.to_le_bytes());
    descriptor[16..48].copy_from_slice(root);
    Sha256::digest(descriptor).into()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;

    /// The definition, without cleverness.
    fn root_of(mut digests: Vec<Digest>) -> Digest {
        if digests.is_empty() {
            return [0; 32];
        }
        while digests.len() > 1 {
            let block = |d: &[Digest]| {
                let mut block = [0; BLOCK_SIZE];
                block[..d.len() * 32].copy_from_slice(d.as_flattened());
                Sha256::digest(block).into()
            };
            digests = digests.chunks(HASHES_PER_BLOCK).map(block).collect();
        }
        digests[0]
    }

    #[test]
    fn the_root_is_that_of_the_definition() {
        for count in [0, 1, 2, 127, 128, 129, 255, 256, 257, 16383, 16384, 16385, 20000] {
            let digest = |n: u32| -> Digest { Sha256::digest(n.to_le_bytes()).into() };
            let digests: Vec<Digest> = (0..count).map(digest).collect();
            let mut builder = Builder::new();
            digests.iter().for_each(|d| builder.push(d));
            assert_eq!(builder.root(), root_of(digests), "{count} digests");
        }
    }

    #[test]
    fn zeros_are_zeros_wherever_they_stand() {
        for (before, zeros, after) in
            [(0, 1, 0), (1, 127, 0), (1, 128, 1), (5, 123, 5), (0, 16384, 0), (3, 40000, 2), (127, 1, 1), (0, 128, 1)]
        {
            let mut builder = Builder::new();
            let mut all = Vec::new();
            for n in 0..before {
                all.push([n; 32]);
            }
            all.extend((0..zeros).map(|_| ZEROS[1]));
            all.extend((0..after).map(|n| [n ^ 0x80; 32]));
            all[..usize::from(before)].iter().for_each(|d| builder.push(d));
            builder.push_zeros(zeros);
            all[all.len() - usize::from(after)..].iter().for_each(|d| builder.push(d));
            assert_eq!(builder.root(), root_of(all), "{before} {zeros} {after}");
        }
    }

    #[test]
    fn the_largest_file_has_a_root() {
        let mut builder = Builder::new();
        builder.push_zeros((1 << 44) - 1);
        builder.push(&[7; 32]);
        assert_ne!(builder.root(), [0; 32]);
        let mut builder = Builder::new();
        builder.push_zeros(1 << 44);
        let mut four = Builder::new();
        (0..4).for_each(|_| four.push_at(0, &ZEROS[7]));
        assert_eq!(builder.root(), four.root());
    }
}
