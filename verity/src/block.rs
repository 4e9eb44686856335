//! SHA-256 of blocks, two at a time where the CPU can.

use sha2::{Digest as _, Sha256};

use crate::{BLOCK_SIZE, Digest};

/// One block of data or of the tree.
pub(crate) type Block = [u8; BLOCK_SIZE];

static ZEROS: Block = [0; BLOCK_SIZE];

/// Whether a block has nothing but zeros. Of most others the first bytes tell.
pub(crate) fn is_zeros(block: &Block) -> bool {
    block[..16] == [0; 16] && *block == ZEROS
}

/// How blocks are hashed. Both ways give the same digests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Hasher {
    /// One after the other, by the crate `sha2`.
    Plain,
    /// Two interleaved, with the CPU's SHA extensions: one stream alone waits for its own results half of the time.
    #[cfg(target_arch = "x86_64")]
    Paired(crate::x86::ShaNi),
}

impl Hasher {
    /// The fastest that this CPU has.
    pub(crate) fn best() -> Self {
        #[cfg(target_arch = "x86_64")]
        if let Some(sha) = crate::x86::ShaNi::detect() {
            return Self::Paired(sha);
        }
        Self::Plain
    }

    /// The digest of one block.
    pub(crate) fn one(self, block: &Block) -> Digest {
        Sha256::digest(block).into()
    }

    /// The digests of two blocks.
    pub(crate) fn two(self, a: &Block, b: &Block) -> [Digest; 2] {
        match self {
            Self::Plain => [self.one(a), self.one(b)],
            #[cfg(target_arch = "x86_64")]
            Self::Paired(sha) => sha.two(a, b),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Bytes that look random, the same for the same seed.
    fn noise(seed: u64, len: usize) -> Vec<u8> {
        let mut x = seed | 1;
        let mut next = || {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            (x >> 32) as u8
        };
        (0..len).map(|_| next()).collect()
    }

    #[test]
    fn known_blocks() {
        // `head -c 4096 /dev/zero | sha256sum`
        let zeros = "ad7facb2586fc6e966c004d7d1d16b024f5805ff7cb47c7a85dabd8b48892ca7";
        let hex = |d: Digest| d.iter().map(|b| format!("{b:02x}")).collect::<String>();
        for hasher in [Hasher::Plain, Hasher::best()] {
            let [a, b] = hasher.two(&[0; BLOCK_SIZE], &[0; BLOCK_SIZE]);
            assert_eq!((hex(a), hex(b)), (zeros.to_owned(), zeros.to_owned()));
        }
    }

    #[test]
    fn both_ways_agree_at_every_alignment() {
        let data = noise(7, 3 * BLOCK_SIZE + 64);
        for at in 0..64 {
            let a: &Block = data[at..at + BLOCK_SIZE].try_into().unwrap();
            let b: &Block = data[at + BLOCK_SIZE + 1..at + 2 * BLOCK_SIZE + 1].try_into().unwrap();
            assert_eq!(Hasher::best().two(a, b), [a, b].map(|x| Digest::from(Sha256::digest(x))), "offset {at}");
        }
    }

    proptest! {
        #[test]
        fn both_ways_agree(seed_a: u64, seed_b: u64, flip in 0..BLOCK_SIZE * 8) {
            let (a, mut b) = (noise(seed_a, BLOCK_SIZE), noise(seed_b, BLOCK_SIZE));
            b[flip / 8] ^= 1 << (flip % 8);
            let (a, b): (&Block, &Block) = (a.as_slice().try_into().unwrap(), b.as_slice().try_into().unwrap());
            prop_assert_eq!(Hasher::best().two(a, b), Hasher::Plain.two(a, b));
            prop_assert_eq!(Hasher::best().two(b, a), Hasher::Plain.two(b, a));
        }
    }
}
