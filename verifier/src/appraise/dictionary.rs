//! Distinct entries of guests' lists: one in memory for all hosts that have it.
//!
//! A host's dictionary is a sequence of them that only grows. It is kept in chunks, so that a round that adds to it
//! shares all but the last with the state before.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
};

use onequote_evidence::{
    digest::sha256,
    id::{Blob, Sha256},
    ima::{Aggregate, Entry, SHA1_HASH_SIZE},
};

/// Entries in a chunk.
const CHUNK: usize = 256;

/// Parts of a pool that are locked each for itself.
const SHARDS: usize = 16;

/// One distinct entry.
#[derive(Debug)]
pub struct Distinct {
    raw: Box<[u8]>,
    /// SHA-256 of the entry as listed.
    id: Sha256,
    /// What it extends an aggregate with, read with the usual size of template hash; none if it cannot be read so.
    digest: Option<Sha256>,
}

impl Distinct {
    fn new(raw: &[u8], id: Sha256) -> Self {
        let digest = Entry::parse(raw, SHA1_HASH_SIZE).ok().map(|entry| Aggregate::digest(&entry));
        Self { raw: raw.into(), id, digest }
    }

    /// SHA-256 of the entry as listed.
    #[must_use]
    pub fn id(&self) -> &Sha256 {
        &self.id
    }

    /// The entry, read with this size of template hash.
    #[must_use]
    pub fn entry(&self, hash_size: usize) -> Option<Entry<'_>> {
        Entry::parse(&self.raw, hash_size).ok()
    }

    /// What it extends an aggregate with; none if it cannot be read with this size of template hash.
    #[must_use]
    pub fn digest(&self, hash_size: usize) -> Option<Sha256> {
        match hash_size {
            SHA1_HASH_SIZE => self.digest,
            _ => self.entry(hash_size).map(|entry| Aggregate::digest(&entry)),
        }
    }
}

/// All distinct entries that some host has.
#[derive(Debug, Default)]
pub struct Pool {
    shards: [Mutex<Shard>; SHARDS],
}

#[derive(Debug, Default)]
struct Shard {
    known: HashMap<Sha256, Weak<Distinct>>,
    /// How many there may be before those that nobody has are looked for.
    sweep_at: usize,
}

impl Pool {
    /// The one entry with these bytes.
    #[must_use]
    pub fn entry(&self, raw: &[u8]) -> Arc<Distinct> {
        let id = sha256(&[raw]);
        let mut shard = lock(&self.shards[usize::from(id.0[0]) % SHARDS]);
        if let Some(known) = shard.known.get(&id).and_then(Weak::upgrade) {
            return known;
        }
        if shard.known.len() >= shard.sweep_at {
            shard.known.retain(|_, entry| entry.strong_count() > 0);
            let twice = 2 * shard.known.len();
            shard.known.shrink_to(twice);
            shard.sweep_at = twice.max(1024);
        }
        let new = Arc::new(Distinct::new(raw, id));
        shard.known.insert(id, Arc::downgrade(&new));
        new
    }

    /// How many distinct entries there are, for statistics.
    #[must_use]
    pub fn len(&self) -> usize {
        self.shards
            .iter()
            .map(|shard| lock(shard).known.values().filter(|entry| entry.strong_count() > 0).count())
            .sum()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// What a thread that panicked had locked is whole: every change is one insertion.
fn lock(shard: &Mutex<Shard>) -> MutexGuard<'_, Shard> {
    shard.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A host's dictionary.
#[derive(Debug, Clone, Default)]
pub struct Dictionary {
    chunks: Vec<Arc<Vec<Arc<Distinct>>>>,
    len: usize,
}

impl Dictionary {
    /// Adds entries as sent.
    pub fn extend(&mut self, pool: &Pool, entries: &[Blob]) {
        for entry in entries {
            if self.len.is_multiple_of(CHUNK) {
                self.chunks.push(Arc::new(Vec::new()));
            }
            if let Some(last) = self.chunks.last_mut() {
                Arc::make_mut(last).push(pool.entry(&entry.0));
            }
            self.len += 1;
        }
    }

    /// One entry.
    #[must_use]
    pub fn get(&self, index: u32) -> Option<&Arc<Distinct>> {
        let index = index as usize;
        self.chunks.get(index / CHUNK)?.get(index % CHUNK)
    }

    /// All of them, in order.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<Distinct>> {
        self.chunks.iter().flat_map(|chunk| chunk.iter())
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}
