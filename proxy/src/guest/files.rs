//! The guests' lists on disk: two files that only grow, each written and synced once for all that came together.
//!
//! - `dictionary`: `u32 little-endian length ‖ u8 hash size ‖ entry`, one after the other; the length is the entry's, the
//!   hash size that of its list. An entry's index is its place.
//! - `references`: chunks `u32 count ‖ VM (16 bytes) ‖ session (8 bytes) ‖ u32 boot ‖ u64 first ‖ count × u32`, all
//!   little-endian: references of one list from number `first` on. A chunk that begins inside of what is there
//!   replaces it from there on. Chunks of VMs that have ended go when the file is written anew.
//!
//! What counts is not these files but the log: `guest-entries` events say how many entries with which aggregate were
//! bound to the TPM. A torn tail is cut at the next start: no list that was logged refers to it, because both files are synced
//! before a list is logged.

use std::{
    collections::HashMap,
    fs::{self, File, OpenOptions},
    io::{self, BufReader, Read},
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
    sync::Arc,
};

use onequote_evidence::{
    event::VmRef,
    id::{SessionId, VmId},
    ima,
};

use super::dictionary::Dictionary;

/// Which list.
pub(super) type Key = (VmRef, u32);

/// References of lists, as they are on disk.
pub(super) type Kept = HashMap<Key, Vec<u32>>;

/// References of one list.
pub(super) struct Chunk {
    pub(super) key: Key,
    /// Number of the first of them.
    pub(super) first: usize,
    pub(super) refs: Vec<u32>,
}

/// Bytes before an entry in `dictionary`.
const ENTRY_HEAD: usize = 5;

/// Bytes before the references of a chunk.
const CHUNK_HEAD: usize = 40;

/// A file of references below this size is not written anew while the proxy runs, however little of it counts.
const SMALL: u64 = 16 * 1024 * 1024;

pub(super) struct Files {
    folder: PathBuf,
    dictionary: Growing,
    /// Entries in it.
    entries: usize,
    references: Growing,
}

impl Files {
    /// Opens the folder, and reads the dictionary and the references of lists that `wanted` names.
    ///
    /// # Errors
    /// Of the file system; a dictionary that is damaged before its end is an error too.
    pub(super) fn open(folder: &Path, wanted: impl Fn(&Key) -> bool) -> io::Result<(Self, Arc<Dictionary>, Kept)> {
        fs::create_dir_all(folder)?;
        let known = Dictionary::default();
        let path = folder.join("dictionary");
        let (dictionary, entries) = Growing::open(&path, |reader| {
            let (mut end, mut entries) = (0, 0);
            while let Some((hash_size, raw)) = next_entry(reader)? {
                end += (ENTRY_HEAD + raw.len()) as u64;
                entries += 1;
                known.restore(raw, hash_size)?;
            }
            Ok((end, entries))
        })
        .map_err(|e| named(&path, &e))?;
        if known.len() != entries {
            return Err(named(&path, &io::Error::new(io::ErrorKind::InvalidData, "an entry stands in it twice")));
        }
        let mut lists = Kept::new();
        let path = folder.join("references");
        let (references, ()) = Growing::open(&path, |reader| {
            let mut end = 0;
            while let Some(chunk) = next_chunk(reader)? {
                end += (CHUNK_HEAD + chunk.refs.len() * 4) as u64;
                if wanted(&chunk.key) {
                    let list = lists.entry(chunk.key).or_default();
                    // References that are missing before it: the list's aggregate will tell.
                    list.truncate(chunk.first);
                    list.extend(chunk.refs);
                }
            }
            Ok((end, ()))
        })
        .map_err(|e| named(&path, &e))?;
        let files = Self { folder: folder.to_owned(), dictionary, entries, references };
        Ok((files, Arc::new(known), lists))
    }

    /// Whether most of the file of references does not count any more, when `live` references do.
    pub(super) fn is_wasteful(&self, live: usize) -> bool {
        self.references.end > SMALL && self.references.end / 4 > live as u64 * 4
    }

    /// Writes what is new and syncs it: the dictionary's entries up to number `entries`, and `chunks`; with `anew` they
    /// are all that there is. After an error nothing of the chunks counts as written and it can be tried again.
    ///
    /// # Errors
    /// Of the file system.
    pub(super) fn write(
        &mut self,
        dictionary: &Dictionary,
        entries: usize,
        chunks: &[Chunk],
        anew: bool,
    ) -> io::Result<()> {
        let new = dictionary.range(self.entries, entries);
        let mut bytes = Vec::with_capacity(new.iter().map(|(_, raw)| ENTRY_HEAD + raw.len()).sum());
        for (hash_size, raw) in &new {
            bytes.extend_from_slice(&(raw.len() as u32).to_le_bytes());
            bytes.push(*hash_size);
            bytes.extend_from_slice(raw);
        }
        self.dictionary.append(&bytes).map_err(|e| named(&self.folder.join("dictionary"), &e))?;
        self.entries += new.len();
        let mut bytes = Vec::with_capacity(chunks.iter().map(|chunk| CHUNK_HEAD + chunk.refs.len() * 4).sum());
        for chunk in chunks {
            put_chunk(chunk, &mut bytes);
        }
        let path = self.folder.join("references");
        match anew {
            true => self.references.replace(&path, &bytes),
            false => self.references.append(&bytes),
        }
        .map_err(|e| named(&path, &e))
    }
}

/// A file that grows by whole writes.
struct Growing {
    file: File,
    /// Where the next write goes.
    end: u64,
    /// Whether something is behind the end that a failed write may have left.
    torn: bool,
}

impl Growing {
    /// Opens or makes a file. `read` reads it and says where it ends; the rest is cut off.
    fn open<T>(path: &Path, read: impl FnOnce(&mut BufReader<&File>) -> io::Result<(u64, T)>) -> io::Result<(Self, T)> {
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)?;
        let (end, content) = read(&mut BufReader::with_capacity(256 * 1024, &file))?;
        if file.metadata()?.len() != end {
            file.set_len(end)?;
            file.sync_all()?;
        }
        Ok((Self { file, end, torn: false }, content))
    }

    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        if bytes.is_empty() {
            return Ok(());
        }
        if self.torn {
            self.file.set_len(self.end)?;
        }
        self.torn = true;
        self.file.write_all_at(bytes, self.end)?;
        self.file.sync_data()?;
        self.torn = false;
        self.end += bytes.len() as u64;
        Ok(())
    }

    /// Puts another content in the file's place, all of it or nothing.
    fn replace(&mut self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        let beside = path.with_extension("new");
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(true).open(&beside)?;
        file.write_all_at(bytes, 0)?;
        file.sync_all()?;
        fs::rename(&beside, path)?;
        *self = Self { file, end: bytes.len() as u64, torn: false };
        if let Some(folder) = path.parent() {
            File::open(folder)?.sync_all()?;
        }
        Ok(())
    }
}

fn put_chunk(chunk: &Chunk, out: &mut Vec<u8>) {
    let (VmRef { vm, session }, boot) = chunk.key;
    out.extend_from_slice(&(chunk.refs.len() as u32).to_le_bytes());
    out.extend_from_slice(vm.0.as_bytes());
    out.extend_from_slice(&session.0);
    out.extend_from_slice(&boot.to_le_bytes());
    out.extend_from_slice(&(chunk.first as u64).to_le_bytes());
    out.extend(chunk.refs.iter().flat_map(|id| id.to_le_bytes()));
}

/// Reads `N` bytes; `None` at the end, also inside of them.
fn exactly<const N: usize>(reader: &mut impl Read) -> io::Result<Option<[u8; N]>> {
    let mut bytes = [0; N];
    match reader.read_exact(&mut bytes) {
        Ok(()) => Ok(Some(bytes)),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(None),
        Err(error) => Err(error),
    }
}

/// The same for a number of bytes that the file says, which need not be there.
fn as_many(reader: &mut impl Read, len: usize) -> io::Result<Option<Vec<u8>>> {
    let mut bytes = Vec::new();
    reader.take(len as u64).read_to_end(&mut bytes)?;
    Ok((bytes.len() == len).then_some(bytes))
}

/// Reads one entry and its hash size; `None` at the end and at a torn tail.
fn next_entry(reader: &mut impl Read) -> io::Result<Option<(u8, Vec<u8>)>> {
    let Some([a, b, c, d, hash_size]) = exactly::<ENTRY_HEAD>(reader)? else { return Ok(None) };
    let len = u32::from_le_bytes([a, b, c, d]) as usize;
    if len == 0 || len > ima::MAX_ENTRY {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "an entry's length is out of bounds"));
    }
    Ok(as_many(reader, len)?.map(|entry| (hash_size, entry)))
}

/// Reads one chunk; `None` at the end and at a torn tail.
fn next_chunk(reader: &mut impl Read) -> io::Result<Option<Chunk>> {
    let Some(count) = exactly::<4>(reader)? else { return Ok(None) };
    let (Some(vm), Some(session)) = (exactly::<16>(reader)?, exactly::<8>(reader)?) else { return Ok(None) };
    let (Some(boot), Some(first)) = (exactly::<4>(reader)?, exactly::<8>(reader)?) else { return Ok(None) };
    let Some(bytes) = as_many(reader, u32::from_le_bytes(count) as usize * 4)? else { return Ok(None) };
    let refs = bytes.as_chunks().0.iter().map(|id| u32::from_le_bytes(*id)).collect();
    let vm = VmRef { vm: VmId(uuid::Uuid::from_bytes(vm)), session: SessionId(session) };
    let first = usize::try_from(u64::from_le_bytes(first)).unwrap_or(usize::MAX);
    Ok(Some(Chunk { key: (vm, u32::from_le_bytes(boot)), first, refs }))
}

/// An error of the file system that says where it happened.
fn named(path: &Path, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}
