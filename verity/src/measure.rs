//! Measuring one file.

use std::{
    fs::File,
    num::NonZeroUsize,
    os::unix::fs::FileExt,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
};

use crate::{
    BLOCK_SIZE, CHUNK, Digest, HASHES_PER_BLOCK, VerityError,
    block::{Block, Hasher, is_zeros},
    driver::{Step, in_order},
    io::{idle_io, read_all, size_of, will_be_read},
    kernel,
    plan::{Part, Piece, Plan},
    saved,
    tree::{Builder, file_digest, zero_block},
};

/// Chunks with data that a thread takes at a time, at most.
const CHUNKS_AT_A_TIME: usize = 4;

/// Blocks that are read before they are hashed: they stay in a core's own cache in between.
const BATCH: usize = 32;

/// How a file is measured.
#[derive(Clone, Copy)]
pub struct Options<'a> {
    /// Threads at most, the calling one among them.
    pub threads: NonZeroUsize,
    /// Whether reads wait for everybody else's.
    pub idle_io: bool,
    /// Told now and then, from any thread, how many bytes are done, holes among them. Ends the measuring by saying no.
    pub progress: &'a (dyn Fn(u64) -> bool + Sync),
    /// An empty file that gets the tree ([`crate::SavedTree`]), if the digest has to be computed.
    pub save: Option<&'a File>,
}

impl Default for Options<'_> {
    /// One thread and nothing else.
    fn default() -> Self {
        Self { threads: NonZeroUsize::MIN, idle_io: false, progress: &|_| true, save: None }
    }
}

/// Where a digest is from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// The kernel, which vouches for every later read too.
    Kernel,
    /// The file was read.
    Read,
}

/// A measured file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Measured {
    /// Its size in bytes when measuring began.
    pub size: u64,
    /// Its fs-verity digest.
    pub digest: Digest,
    /// Where that is from.
    pub source: Source,
    /// Bytes that were read for it.
    pub read: u64,
    /// Whether the tree was saved. A tree that cannot be written is no reason not to measure.
    pub saved: bool,
}

/// Measures a regular file or block device from its start, whatever its position, as long as it is now.
///
/// # Errors
/// [`VerityError`]. Nothing is known then.
pub fn measure(file: &File, options: Options<'_>) -> Result<Measured, VerityError> {
    let size = size_of(file)?;
    if let Some(digest) = kernel::enabled(file, size) {
        return Ok(Measured { size, digest, source: Source::Kernel, read: 0, saved: false });
    }
    will_be_read(file);
    let run = Run {
        file,
        size,
        hasher: Hasher::best(),
        read: AtomicU64::new(0),
        save: options.save,
        unsaved: AtomicBool::new(options.save.is_none()),
    };
    let mut plan = Plan::new(file, size);
    let (mut builder, mut done) = (Builder::new(), 0);
    let next = || {
        // Small pieces are done together: the digests over them come in pairs too.
        let (mut parts, mut room) = (Vec::new(), CHUNKS_AT_A_TIME);
        while room > 0 {
            let Some(part) = plan.next(room)? else { break };
            if let Part::Piece(piece) = &part {
                room -= piece.chunks();
            }
            parts.push(part);
        }
        Ok((!parts.is_empty()).then_some(Step::Work(parts)))
    };
    let accept = |found: Vec<Found>| {
        for found in found {
            done += match &found {
                Found::Zeros(chunks) => {
                    builder.push_zeros(*chunks);
                    chunks * CHUNK
                }
                Found::Chunks { digests, count, len } => {
                    digests[..*count].iter().for_each(|d| builder.push(d));
                    *len
                }
            };
        }
        if (options.progress)(done) { Ok(()) } else { Err(VerityError::Stopped) }
    };
    let scratch = || {
        if options.idle_io {
            // Courtesy to others: measuring goes on without it.
            let _ = idle_io();
        }
        Scratch::new()
    };
    // Small files are done before another thread has begun.
    let threads = NonZeroUsize::new(usize::try_from(size / CHUNK).unwrap_or(usize::MAX)).unwrap_or(NonZeroUsize::MIN);
    in_order(threads.min(options.threads), next, scratch, |s, parts| run.parts(s, &parts), accept)?;
    run.check_end()?;
    let saved = !run.unsaved.load(Ordering::Relaxed) && options.save.is_some_and(|to| saved::finish(to, size).is_ok());
    let read = run.read.load(Ordering::Relaxed);
    Ok(Measured { size, digest: file_digest(&builder.root(), size), source: Source::Read, read, saved })
}

enum Found {
    Zeros(u64),
    Chunks { digests: [Digest; CHUNKS_AT_A_TIME], count: usize, len: u64 },
}

struct Run<'a> {
    file: &'a File,
    size: u64,
    hasher: Hasher,
    read: AtomicU64,
    save: Option<&'a File>,
    unsaved: AtomicBool,
}

/// One thread's memory.
struct Scratch {
    batch: Batch,
    /// Blocks of the tree's first level.
    tree: [Block; CHUNKS_AT_A_TIME],
}

impl Scratch {
    fn new() -> Box<Self> {
        Box::new(Self { batch: Batch::new(), tree: [[0; BLOCK_SIZE]; CHUNKS_AT_A_TIME] })
    }
}

impl Run<'_> {
    /// The digests of the chunks of all pieces.
    fn parts(&self, scratch: &mut Scratch, parts: &[Part]) -> Result<Vec<Found>, VerityError> {
        let Scratch { batch, tree } = scratch;
        let mut used = 0;
        for part in parts {
            let Part::Piece(piece) = part else { continue };
            self.read(batch, tree, piece, used)?;
            used += piece.chunks();
        }
        batch.hash(self.hasher, leaves(tree));
        let mut all = [[0; 32]; CHUNKS_AT_A_TIME];
        if self.size <= BLOCK_SIZE as u64 {
            // No tree over a single block.
            all[0] = leaves(tree)[0];
        } else {
            hash_all(self.hasher, &tree[..used], &mut all);
        }
        let mut first = 0;
        let found = parts.iter().map(|part| match part {
            Part::Zeros(chunks) => Found::Zeros(*chunks),
            Part::Piece(piece) => {
                let count = piece.chunks();
                let mut digests = [[0; 32]; CHUNKS_AT_A_TIME];
                digests[..count].copy_from_slice(&all[first..first + count]);
                self.save(piece, &mut tree[first..first + count], piece.blocks());
                first += count;
                Found::Chunks { digests, count, len: piece.len }
            }
        });
        Ok(found.collect())
    }

    /// Reads a piece whose chunks' blocks of the tree begin with `first`. Some of it is left in the batch.
    fn read(
        &self,
        batch: &mut Batch,
        tree: &mut [Block; CHUNKS_AT_A_TIME],
        piece: &Piece,
        first: usize,
    ) -> Result<(), VerityError> {
        let offset = first * HASHES_PER_BLOCK;
        let (there, beyond) = leaves(&mut tree[first..first + piece.chunks()]).split_at_mut(piece.blocks());
        there.fill(zero_block());
        beyond.fill([0; 32]);
        for run in &piece.runs {
            let mut at = run.start;
            while at < run.end {
                let read = batch.read(self.file, self.size, piece.at, at..run.end, offset)?;
                at += read.blocks;
                self.read.fetch_add(read.bytes, Ordering::Relaxed);
                if batch.is_full() {
                    batch.hash(self.hasher, leaves(tree));
                }
            }
        }
        Ok(())
    }

    fn save(&self, piece: &Piece, tree: &mut [Block], blocks: usize) {
        let Some(to) = self.save else { return };
        if saved::write(to, piece.at / CHUNK, tree, blocks).is_err() {
            self.unsaved.store(true, Ordering::Relaxed);
        }
    }

    /// Whether the file is still as long as it was, and does not go on after its end.
    fn check_end(&self) -> Result<(), VerityError> {
        let now = size_of(self.file)?;
        if now < self.size {
            return Err(VerityError::Shrunk);
        }
        // A file that grew is the caller's to judge: only then there may be more.
        if now == self.size && matches!(self.file.read_at(&mut [0], self.size), Ok(1)) && size_of(self.file)? == now {
            return Err(VerityError::Unsized);
        }
        Ok(())
    }
}

/// Blocks read and not hashed yet, each with the place of its digest.
pub(crate) struct Batch {
    data: [Block; BATCH],
    places: [usize; BATCH],
    used: usize,
}

/// What [`Batch::read`] did.
pub(crate) struct BatchRead {
    pub(crate) blocks: u64,
    pub(crate) bytes: u64,
}

impl Batch {
    pub(crate) fn new() -> Self {
        Self { data: [[0; BLOCK_SIZE]; BATCH], places: [0; BATCH], used: 0 }
    }

    pub(crate) fn is_full(&self) -> bool {
        self.used == BATCH
    }

    /// Reads as many of these blocks as there is room for, at least one; they are counted from `base`, in bytes, and their
    /// places from `offset`. The file's last block is filled up with zeros.
    pub(crate) fn read(
        &mut self,
        file: &File,
        size: u64,
        base: u64,
        blocks: std::ops::Range<u64>,
        offset: usize,
    ) -> Result<BatchRead, VerityError> {
        let count = usize::try_from(blocks.end - blocks.start).unwrap_or(usize::MAX).min(BATCH - self.used);
        let at = base + blocks.start * BLOCK_SIZE as u64;
        let room = self.data[self.used..][..count].as_flattened_mut();
        let bytes = room.len().min(usize::try_from(size - at).unwrap_or(usize::MAX));
        let (data, rest) = room.split_at_mut(bytes);
        read_all(file, data, at)?;
        rest.fill(0);
        for (place, block) in self.places[self.used..][..count].iter_mut().zip(blocks) {
            *place = offset + usize::try_from(block).unwrap_or(usize::MAX);
        }
        self.used += count;
        Ok(BatchRead { blocks: count as u64, bytes: bytes as u64 })
    }

    /// Puts the digests to their places among `leaves`, and is empty again.
    pub(crate) fn hash(&mut self, hasher: Hasher, leaves: &mut [Digest]) {
        let mut odd: Option<usize> = None;
        for n in 0..self.used {
            if is_zeros(&self.data[n]) {
                leaves[self.places[n]] = zero_block();
            } else if let Some(m) = odd.take() {
                [leaves[self.places[m]], leaves[self.places[n]]] = hasher.two(&self.data[m], &self.data[n]);
            } else {
                odd = Some(n);
            }
        }
        if let Some(n) = odd {
            leaves[self.places[n]] = hasher.one(&self.data[n]);
        }
        self.used = 0;
    }
}

/// The digests in blocks of the tree.
pub(crate) fn leaves(tree: &mut [Block]) -> &mut [Digest] {
    tree.as_flattened_mut().as_chunks_mut::<32>().0
}

/// The digests of blocks.
pub(crate) fn hash_all(hasher: Hasher, blocks: &[Block], digests: &mut [Digest]) {
    let (pairs, odd) = blocks.as_chunks::<2>();
    for (n, [a, b]) in pairs.iter().enumerate() {
        [digests[2 * n], digests[2 * n + 1]] = hasher.two(a, b);
    }
    if let [last] = odd {
        digests[blocks.len() - 1] = hasher.one(last);
    }
}
