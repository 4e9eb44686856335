//! The tree of a measured file, kept so that after a change only what changed is read again.
//!
//! # The file
//! A header of 4,096 bytes: `onequote-tree-1\n`, the measured file's size in bytes (u64, little-endian), zeros. Then for
//! each 512 KiB of the measured file 4,096 bytes: the digests of its 128 blocks, each XORed with the digest of a block
//! of zeros; zeros for blocks that the file does not have. So zeros in the measured file are zeros here, and holes.
//!
//! # What is believed of it
//! Nothing, before the digest that follows from all of it is the one that the caller knows from elsewhere
//! ([`SavedTree::update`]). What is checked and what is used is read once, into the same memory.

use std::{
    collections::BTreeMap,
    fs::File,
    io,
    ops::Range,
    os::unix::fs::FileExt,
    sync::atomic::{AtomicU64, Ordering},
};

use crate::{
    BLOCK_SIZE, CHUNK, Digest, HASHES_PER_BLOCK, Measured, Options, Source, VerityError,
    block::{Block, Hasher, is_zeros},
    driver::{Step, in_order},
    io::{Extents, idle_io, read_all, size_of},
    measure::{Batch, hash_all, leaves},
    tree::{Builder, file_digest, zero_block},
};

const MAGIC: &[u8; 16] = b"onequote-tree-1\n";
const BLOCK: u64 = BLOCK_SIZE as u64;

/// Chunks whose digests are read at a time.
const WINDOW: u64 = 64;

/// The most by which the measured file may have grown: more is as well read anew as a whole.
const MAX_GROWTH: u64 = 1 << 30;

/// Why a saved tree is of no use. The file is then to be measured as a whole.
#[derive(Debug, thiserror::Error)]
pub enum TreeError {
    /// Reading failed, of the tree or of the file.
    #[error(transparent)]
    Verity(#[from] VerityError),
    /// Not a saved tree, or cut.
    #[error("is not a whole saved tree")]
    Form,
    /// Another digest follows from it than the known one: it is of another file or time, or somebody changed it.
    #[error("does not give the digest that is known")]
    Mismatch,
    /// The measured file became shorter, or much longer.
    #[error("is of a file of another size")]
    Resized,
}

impl From<io::Error> for TreeError {
    fn from(e: io::Error) -> Self {
        Self::Verity(e.into())
    }
}

/// Ranges of bytes that may have changed, merged, in whole blocks.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Changed {
    /// First block, and block after the last.
    blocks: BTreeMap<u64, u64>,
}

impl Changed {
    /// Adds a range of bytes.
    pub fn add(&mut self, bytes: Range<u64>) {
        if bytes.is_empty() {
            return;
        }
        let (mut start, mut end) = (bytes.start / BLOCK, bytes.end.div_ceil(BLOCK));
        // Those that it touches begin at its end at most, and only the last ones reach its start.
        while let Some((&s, &e)) = self.blocks.range(..=end).next_back().filter(|&(_, &e)| e >= start) {
            self.blocks.remove(&s);
            (start, end) = (start.min(s), end.max(e));
        }
        self.blocks.insert(start, end);
    }

    /// Bytes that they cover.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.blocks.iter().map(|(start, end)| (end - start) * BLOCK).sum()
    }

    /// What of them is in these blocks.
    fn within(&self, blocks: Range<u64>) -> impl Iterator<Item = Range<u64>> + '_ {
        let before = self.blocks.range(..blocks.start).next_back();
        let ranges = before.into_iter().chain(self.blocks.range(blocks.clone()));
        ranges.map(move |(&s, &e)| s.max(blocks.start)..e.min(blocks.end)).filter(|r| !r.is_empty())
    }
}

/// Writes the digests of some chunks. Changes `tree`.
pub(crate) fn write(to: &File, chunk: u64, tree: &mut [Block], blocks: usize) -> io::Result<()> {
    flip(&mut tree.as_flattened_mut().as_chunks_mut::<32>().0[..blocks]);
    if tree.iter().all(is_zeros) {
        return Ok(());
    }
    to.write_all_at(tree.as_flattened(), (chunk + 1) * BLOCK)
}

/// Ends a file that was written by [`write`].
pub(crate) fn finish(to: &File, size: u64) -> io::Result<()> {
    let mut header = [0; 24];
    header[..16].copy_from_slice(MAGIC);
    header[16..].copy_from_slice(&size.to_le_bytes());
    to.set_len((size.div_ceil(CHUNK) + 1) * BLOCK)?;
    to.write_all_at(&header, 0)
}

fn flip(leaves: &mut [Digest]) {
    let zero = zero_block();
    leaves.iter_mut().for_each(|leaf| leaf.iter_mut().zip(zero).for_each(|(a, b)| *a ^= b));
}

/// A tree that was saved by [`crate::measure`].
#[derive(Debug)]
pub struct SavedTree {
    tree: File,
    size: u64,
}

impl SavedTree {
    /// Opens one.
    ///
    /// # Errors
    /// [`TreeError::Form`], or what reading gives.
    pub fn open(tree: File) -> Result<Self, TreeError> {
        let mut header = [0; BLOCK_SIZE];
        read_all(&tree, &mut header, 0).map_err(|e| match e {
            VerityError::Shrunk => TreeError::Form,
            e => e.into(),
        })?;
        let mut size = [0; 8];
        size.copy_from_slice(&header[16..24]);
        let size = u64::from_le_bytes(size);
        let plain = header[..16] == *MAGIC && header[24..].iter().all(|&b| b == 0);
        let whole = i64::try_from(size).is_ok() && size_of(&tree)? == (size.div_ceil(CHUNK) + 1) * BLOCK;
        if plain && whole { Ok(Self { tree, size }) } else { Err(TreeError::Form) }
    }

    /// The digest of `file` as it is now, reading of it only what changed since its digest was `known`.
    ///
    /// It is right if `known` is what the file had, and nothing but `changed` changed since. What was added at the
    /// file's end since counts as changed.
    ///
    /// # Errors
    /// [`TreeError`]. The file is then to be measured as a whole.
    pub fn update(
        &self,
        file: &File,
        changed: &Changed,
        known: &Digest,
        options: Options<'_>,
    ) -> Result<Measured, TreeError> {
        let size = size_of(file)?;
        if size < self.size || size - self.size > MAX_GROWTH {
            return Err(TreeError::Resized);
        }
        let mut changed = changed.clone();
        if size > self.size {
            changed.add(self.size..size);
        }
        // A chunk that is not whole before or after is never taken for a whole one of zeros.
        let whole = self.size / CHUNK;
        let mut windows = Windows {
            extents: Extents::new(&self.tree, (self.size.div_ceil(CHUNK) + 1) * BLOCK),
            changed: &changed,
            whole,
            at: 0,
            end: size.div_ceil(CHUNK),
        };
        let pass = Pass {
            tree: &self.tree,
            before: self.size,
            file,
            size,
            changed: &changed,
            hasher: Hasher::best(),
            read: AtomicU64::new(0),
        };
        let (mut old, mut new, mut done) = (Builder::new(), Builder::new(), 0);
        let accept = |found| {
            match found {
                Both::Zeros(chunks) => {
                    old.push_zeros(chunks);
                    new.push_zeros(chunks);
                    done += chunks * CHUNK;
                }
                Both::Chunks { before, after } => {
                    before.iter().for_each(|d| old.push(d));
                    after.iter().for_each(|d| new.push(d));
                    done += after.len() as u64 * CHUNK;
                }
            }
            if (options.progress)(done.min(size)) { Ok(()) } else { Err(VerityError::Stopped) }
        };
        let scratch = || {
            if options.idle_io {
                let _ = idle_io();
            }
            Box::new(Scratch { batch: Batch::new(), tree: vec![[0; BLOCK_SIZE]; WINDOW as usize] })
        };
        in_order(options.threads, || windows.next(), scratch, |s, chunks| pass.window(s, chunks), accept)?;
        if file_digest(&old.root(), self.size) != *known {
            return Err(TreeError::Mismatch);
        }
        if size_of(file)? != size {
            return Err(TreeError::Resized);
        }
        let read = pass.read.load(Ordering::Relaxed);
        let digest = file_digest(&new.root(), size);
        Ok(Measured { size, digest, source: Source::Read, read, saved: false })
    }
}

/// Cuts the chunks into runs that have been and are zeros, and windows.
struct Windows<'a> {
    extents: Extents<'a>,
    changed: &'a Changed,
    /// Chunks from here on are never in a run.
    whole: u64,
    at: u64,
    end: u64,
}

impl Windows<'_> {
    fn next(&mut self) -> Result<Option<Step<Range<u64>, Both>>, VerityError> {
        if self.at >= self.end {
            return Ok(None);
        }
        if self.at < self.whole {
            let (data, _) = self.extents.from((self.at + 1) * BLOCK)?;
            let data = data / BLOCK - 1;
            let per_chunk = HASHES_PER_BLOCK as u64;
            let mut changed = self.changed.within(self.at * per_chunk..self.whole * per_chunk);
            let changed = changed.next().map_or(self.whole, |r| r.start / per_chunk);
            let zeros = data.min(changed).min(self.whole) - self.at;
            if zeros > 0 {
                self.at += zeros;
                return Ok(Some(Step::Ready(Both::Zeros(zeros))));
            }
        }
        let start = self.at;
        self.at = (start + WINDOW).min(self.end);
        Ok(Some(Step::Work(start..self.at)))
    }
}

enum Both {
    Zeros(u64),
    Chunks { before: Vec<Digest>, after: Vec<Digest> },
}

struct Scratch {
    batch: Batch,
    tree: Vec<Block>,
}

struct Pass<'a> {
    tree: &'a File,
    before: u64,
    file: &'a File,
    size: u64,
    changed: &'a Changed,
    hasher: Hasher,
    read: AtomicU64,
}

impl Pass<'_> {
    /// The digests of some chunks, as they were and as they are.
    fn window(&self, scratch: &mut Scratch, chunks: Range<u64>) -> Result<Both, VerityError> {
        let Scratch { batch, tree } = scratch;
        let count = |size: u64| usize::try_from(size.div_ceil(CHUNK).min(chunks.end).saturating_sub(chunks.start));
        let (before, after) = (count(self.before).unwrap_or(0), count(self.size).unwrap_or(0));
        // Blocks that the file has in this window.
        let blocks = |size: u64| {
            let last = size.div_ceil(BLOCK).saturating_sub(chunks.start * HASHES_PER_BLOCK as u64);
            usize::try_from(last).unwrap_or(usize::MAX).min(WINDOW as usize * HASHES_PER_BLOCK)
        };
        let (old, new) = (blocks(self.before), blocks(self.size));
        tree.as_flattened_mut().fill(0);
        read_all(self.tree, tree[..before].as_flattened_mut(), (chunks.start + 1) * BLOCK)?;
        flip(&mut leaves(tree)[..old]);
        let mut digests = vec![[0; 32]; before];
        self.hash(&tree[..before], self.before, &mut digests);
        let first = chunks.start * HASHES_PER_BLOCK as u64;
        let mut touched = false;
        for run in self.changed.within(first..first + new as u64) {
            let mut at = run.start - first;
            while at < run.end - first {
                let read = batch.read(self.file, self.size, chunks.start * CHUNK, at..run.end - first, 0)?;
                at += read.blocks;
                self.read.fetch_add(read.bytes, Ordering::Relaxed);
                if batch.is_full() {
                    batch.hash(self.hasher, leaves(tree));
                }
            }
            touched = true;
        }
        batch.hash(self.hasher, leaves(tree));
        let mut now = digests.clone();
        if touched || after != before {
            now.resize(after, [0; 32]);
            self.hash(&tree[..after], self.size, &mut now);
        }
        Ok(Both::Chunks { before: digests, after: now })
    }

    fn hash(&self, tree: &[Block], size: u64, digests: &mut [Digest]) {
        match (tree, digests) {
            // No tree over a single block.
            ([block, ..], [digest, ..]) if size <= BLOCK => digest.copy_from_slice(&block[..32]),
            (tree, digests) => hash_all(self.hasher, tree, digests),
        }
    }
}
