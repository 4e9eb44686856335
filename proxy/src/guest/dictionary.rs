//! Distinct IMA entries of all guests, kept once in memory and once on disk.
//!
//! On disk: `u32 little-endian length ‖ u8 hash size ‖ entry`, one after the other, only ever appended to; the length
//! is the entry's, the hash size that of its list (the same bytes could be another entry in a list with another hash
//! size). The index of an entry is its place in this sequence. A torn tail (a crash in the middle of an append) is cut at the next start: no list
//! that was logged refers to it, because dictionary and list are synced before the list is logged.

use std::{
    collections::HashMap,
    fs::{File, OpenOptions},
    io::{self, BufReader, Read as _, Seek as _, SeekFrom, Write as _},
    path::Path,
    sync::Arc,
};

use onequote_evidence::{
    id::Sha256,
    ima::{self, Aggregate, Entry},
};

/// The dictionary. Grows with distinct entries, never shrinks while the proxy runs.
pub(super) struct Dictionary {
    /// By hash size.
    index: HashMap<u8, HashMap<Arc<[u8]>, u32>>,
    entries: Vec<Known>,
    file: File,
    /// Entries that are not on disk yet.
    unsaved: usize,
    /// Where the next entry goes. A failed write leaves bytes behind it that the next one overwrites.
    end: u64,
}

struct Known {
    raw: Arc<[u8]>,
    hash_size: u8,
    digest: Sha256,
}

impl Dictionary {
    /// Opens or makes the file and reads it.
    ///
    /// # Errors
    /// Of the file system; a file that is damaged before its end is an error too.
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)?;
        let mut dictionary = Self { index: HashMap::new(), entries: Vec::new(), file, unsaved: 0, end: 0 };
        let mut reader = BufReader::new(&dictionary.file);
        let mut read = Vec::new();
        while let Some(entry) = next_entry(&mut reader)? {
            read.push(entry);
        }
        for (hash_size, raw) in read {
            dictionary.end += HEADER as u64 + raw.len() as u64;
            let entry = Entry::parse(&raw, hash_size.into())
                .map_err(|e| io::Error::new(io::ErrorKind::InvalidData, format!("{}: {e}", path.display())))?;
            dictionary.intern(&entry)?;
        }
        dictionary.unsaved = 0;
        if dictionary.file.metadata()?.len() != dictionary.end {
            dictionary.file.set_len(dictionary.end)?;
            dictionary.file.sync_all()?;
        }
        Ok(dictionary)
    }

    /// The index of an entry, which is taken in if it is new.
    ///
    /// # Errors
    /// When the dictionary is full (2^32 entries).
    pub(super) fn intern(&mut self, entry: &Entry<'_>) -> io::Result<(u32, Sha256)> {
        let hash_size = entry.template_hash.len() as u8;
        let index = self.index.entry(hash_size).or_default();
        if let Some(&id) = index.get(entry.raw) {
            return Ok((id, self.entries[id as usize].digest));
        }
        let id = u32::try_from(self.entries.len()).map_err(|_| io::Error::other("the dictionary is full"))?;
        let digest = Aggregate::digest(entry);
        let raw: Arc<[u8]> = entry.raw.into();
        index.insert(Arc::clone(&raw), id);
        self.entries.push(Known { raw, hash_size, digest });
        self.unsaved += 1;
        Ok((id, digest))
    }

    /// Whether an entry is known.
    #[must_use]
    pub(super) fn contains(&self, entry: &Entry<'_>) -> bool {
        let index = self.index.get(&(entry.template_hash.len() as u8));
        index.is_some_and(|index| index.contains_key(entry.raw))
    }

    /// Writes what is new to disk and syncs it. After an error nothing counts as written and it can be tried again.
    ///
    /// # Errors
    /// Of the file system.
    pub(super) fn save(&mut self) -> io::Result<()> {
        if self.unsaved == 0 {
            return Ok(());
        }
        let mut out = Vec::new();
        for known in &self.entries[self.entries.len() - self.unsaved..] {
            out.extend_from_slice(&(known.raw.len() as u32).to_le_bytes());
            out.push(known.hash_size);
            out.extend_from_slice(&known.raw);
        }
        self.file.seek(SeekFrom::Start(self.end))?;
        self.file.write_all(&out)?;
        self.file.sync_data()?;
        self.end += out.len() as u64;
        self.unsaved = 0;
        Ok(())
    }

    /// An entry's bytes.
    #[must_use]
    pub(super) fn entry(&self, id: u32) -> Option<&Arc<[u8]>> {
        self.entries.get(id as usize).map(|known| &known.raw)
    }

    /// What an entry extends a list's aggregate with.
    #[must_use]
    pub(super) fn digest(&self, id: u32) -> Option<&Sha256> {
        self.entries.get(id as usize).map(|known| &known.digest)
    }
}

/// Bytes before an entry on disk: length and hash size.
const HEADER: usize = 5;

/// Reads one entry and its hash size; `None` at the end and at a torn tail.
fn next_entry(reader: &mut impl io::Read) -> io::Result<Option<(u8, Vec<u8>)>> {
    let mut header = Vec::with_capacity(HEADER);
    reader.take(HEADER as u64).read_to_end(&mut header)?;
    let &[a, b, c, d, hash_size] = header.as_slice() else { return Ok(None) };
    let len = u32::from_le_bytes([a, b, c, d]) as usize;
    if len == 0 || len > ima::MAX_ENTRY {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "an entry's length is out of bounds"));
    }
    let mut entry = Vec::with_capacity(len);
    reader.take(len as u64).read_to_end(&mut entry)?;
    Ok((entry.len() == len).then_some((hash_size, entry)))
}
