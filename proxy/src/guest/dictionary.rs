//! Distinct IMA entries of all guests, kept once in memory.
//!
//! Connections look their entries up here, beside each other; the writer alone adds to it. The index of an entry is its
//! place in the order in which the host saw entries first. The same bytes could be another entry in a list with
//! another size of template hashes, so that size is part of what is looked up.

use std::{
    hash::{BuildHasher as _, RandomState},
    io,
    sync::{Arc, PoisonError, RwLock, RwLockReadGuard},
};

use hashbrown::HashTable;
use onequote_evidence::{
    Malformed,
    id::Sha256,
    ima::{Aggregate, Entry, ListReader},
};

/// Stands in [`Cut::refs`] for an entry that was not known.
const UNKNOWN: u32 = u32::MAX;

/// The dictionary. Grows with distinct entries, never shrinks while the proxy runs.
#[derive(Default)]
pub(super) struct Dictionary {
    /// Keyed at random: guests choose what is hashed.
    hashing: RandomState,
    known: RwLock<Known>,
}

#[derive(Default)]
struct Known {
    /// Indexes by the hash of their entry.
    index: HashTable<u32>,
    entries: Vec<One>,
}

struct One {
    raw: Arc<[u8]>,
    digest: Sha256,
    hash_size: u8,
}

/// A piece of a guest's list, cut into entries and looked up.
pub(super) struct Cut {
    /// An index for each entry, [`UNKNOWN`] for those in `fresh`, which follow in the same order.
    refs: Vec<u32>,
    fresh: Vec<Fresh>,
    /// Count and aggregate of the list after it.
    pub(super) after: Aggregate,
}

struct Fresh {
    raw: Arc<[u8]>,
    digest: Sha256,
    hash: u64,
}

impl Dictionary {
    /// Cuts a piece of a list, which stood at `before`, into entries and looks each up.
    ///
    /// # Errors
    /// [`Malformed`] when it is not whole entries.
    pub(super) fn cut(&self, piece: &[u8], hash_size: u8, before: Aggregate) -> Result<Cut, Malformed> {
        let entries = ListReader::new(piece, hash_size.into()).collect::<Result<Vec<Entry<'_>>, _>>()?;
        let hashes: Vec<u64> = entries.iter().map(|entry| self.hash(hash_size, entry.raw)).collect();
        let mut cut = Cut { refs: Vec::with_capacity(entries.len()), fresh: Vec::new(), after: before };
        let mut digests = Vec::with_capacity(entries.len());
        {
            let known = self.read();
            for (entry, hash) in entries.iter().zip(&hashes) {
                let found = known.find(*hash, hash_size, entry.raw);
                cut.refs.push(found.unwrap_or(UNKNOWN));
                digests.push(found.and_then(|id| known.entries.get(id as usize)).map(|one| one.digest));
            }
        }
        for ((entry, hash), digest) in entries.iter().zip(hashes).zip(digests) {
            let digest = digest.unwrap_or_else(|| {
                let digest = Aggregate::digest(entry);
                cut.fresh.push(Fresh { raw: entry.raw.into(), digest, hash });
                digest
            });
            cut.after.push_digest(&digest);
        }
        Ok(cut)
    }

    /// Bytes of the entries of a piece that are still not known.
    pub(super) fn new_bytes(&self, cut: &Cut, hash_size: u8) -> u64 {
        if cut.fresh.is_empty() {
            return 0;
        }
        let known = self.read();
        let unknown = cut.fresh.iter().filter(|one| known.find(one.hash, hash_size, &one.raw).is_none());
        unknown.map(|one| one.raw.len() as u64).sum()
    }

    /// References to all entries of a piece; what is not known yet is taken in. For the writer alone.
    ///
    /// # Errors
    /// When the dictionary is full (2^32 − 1 entries).
    pub(super) fn take(&self, cut: Cut, hash_size: u8) -> io::Result<Vec<u32>> {
        let Cut { mut refs, fresh, .. } = cut;
        if !fresh.is_empty() {
            let mut known = self.known.write().unwrap_or_else(PoisonError::into_inner);
            let unknown = refs.iter_mut().filter(|id| **id == UNKNOWN);
            for (id, one) in unknown.zip(fresh) {
                *id = self.add(&mut known, hash_size, one)?;
            }
        }
        Ok(refs)
    }

    fn add(&self, known: &mut Known, hash_size: u8, one: Fresh) -> io::Result<u32> {
        if let Some(id) = known.find(one.hash, hash_size, &one.raw) {
            return Ok(id);
        }
        let id = u32::try_from(known.entries.len()).ok().filter(|id| *id != UNKNOWN);
        let id = id.ok_or_else(|| io::Error::other("the dictionary is full"))?;
        let Known { index, entries } = known;
        entries.push(One { raw: one.raw, digest: one.digest, hash_size });
        index.insert_unique(one.hash, id, |id| {
            entries.get(*id as usize).map_or(0, |one| self.hash(one.hash_size, &one.raw))
        });
        Ok(id)
    }

    /// Takes in the next entry as it was kept.
    ///
    /// # Errors
    /// When it is no entry, or the dictionary is full.
    pub(super) fn restore(&self, raw: Vec<u8>, hash_size: u8) -> io::Result<()> {
        let invalid = |error: Malformed| io::Error::new(io::ErrorKind::InvalidData, error.to_string());
        let digest = Aggregate::digest(&Entry::parse(&raw, hash_size.into()).map_err(invalid)?);
        let one = Fresh { hash: self.hash(hash_size, &raw), raw: raw.into(), digest };
        let mut known = self.known.write().unwrap_or_else(PoisonError::into_inner);
        self.add(&mut known, hash_size, one).map(drop)
    }

    /// Number of entries.
    pub(super) fn len(&self) -> usize {
        self.read().entries.len()
    }

    /// An entry's bytes.
    pub(super) fn entry(&self, id: u32) -> Option<Arc<[u8]>> {
        self.read().entries.get(id as usize).map(|one| Arc::clone(&one.raw))
    }

    /// Entries with the sizes of their template hashes, from one index to before another.
    pub(super) fn range(&self, from: usize, to: usize) -> Vec<(u8, Arc<[u8]>)> {
        let known = self.read();
        let range = known.entries.get(from..to.min(known.entries.len())).unwrap_or_default();
        range.iter().map(|one| (one.hash_size, Arc::clone(&one.raw))).collect()
    }

    /// Count and aggregate of a list with these references, up to the first that is not known.
    pub(super) fn aggregate(&self, refs: &[u32]) -> Aggregate {
        let known = self.read();
        let mut aggregate = Aggregate::EMPTY;
        for one in refs.iter().map_while(|id| known.entries.get(*id as usize)) {
            aggregate.push_digest(&one.digest);
        }
        aggregate
    }

    fn hash(&self, hash_size: u8, raw: &[u8]) -> u64 {
        self.hashing.hash_one((hash_size, raw))
    }

    fn read(&self) -> RwLockReadGuard<'_, Known> {
        // A panic in the writer leaves a table whose indexes are bounds-checked.
        self.known.read().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Known {
    fn find(&self, hash: u64, hash_size: u8, raw: &[u8]) -> Option<u32> {
        let is =
            |id: &u32| self.entries.get(*id as usize).is_some_and(|one| one.hash_size == hash_size && *one.raw == *raw);
        self.index.find(hash, is).copied()
    }
}

impl Cut {
    /// Number of entries.
    pub(super) fn len(&self) -> usize {
        self.refs.len()
    }
}
