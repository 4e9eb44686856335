//! The kernel's measurement list as a stream of whole entries.
//!
//! The kernel's file is read through one descriptor, which gives what was added since the last read; going back to the
//! start gives the list again. `List` cuts what it reads into entries and keeps the running aggregate, so that it knows
//! at each moment how many entries lie behind it and what they come to. It holds no entries: a batch at most.

use std::fmt;
use std::io::{self, Read, Seek};

use onequote_evidence::Malformed;
use onequote_evidence::ima::{Aggregate, Entry};

/// How much is read at once. The kernel gives a page at most, more only for a single longer entry.
const READ: usize = 16 * 1024;

/// A measurement list, read up to some entry.
pub(crate) struct List<S> {
    source: S,
    hash_size: usize,
    /// Read from the kernel, not yet passed: less than one entry, or what lay behind the place sought.
    pending: Vec<u8>,
    passed: Aggregate,
}

/// Some entries in a row.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Batch {
    /// Index of the first, from 0.
    pub(crate) first: u64,
    /// The entries as listed.
    pub(crate) bytes: Vec<u8>,
}

/// Why a list cannot be read.
#[derive(Debug)]
pub(crate) enum ListError {
    /// The kernel refuses.
    Read(io::Error),
    /// What the kernel gives is no list.
    Malformed(Malformed),
}

impl fmt::Display for ListError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Read(error) => write!(f, "the IMA list cannot be read: {error}"),
            Self::Malformed(error) => write!(f, "the IMA list is malformed: {error}"),
        }
    }
}

impl From<io::Error> for ListError {
    fn from(error: io::Error) -> Self {
        Self::Read(error)
    }
}

impl<S: Read + Seek> List<S> {
    /// A list whose template hashes have `hash_size` bytes.
    pub(crate) fn new(source: S, hash_size: usize) -> Self {
        Self { source, hash_size, pending: Vec::new(), passed: Aggregate::EMPTY }
    }

    /// Size of the template hashes in bytes.
    pub(crate) fn hash_size(&self) -> usize {
        self.hash_size
    }

    /// Count and aggregate of the entries that lie behind.
    pub(crate) fn passed(&self) -> &Aggregate {
        &self.passed
    }

    /// Goes to the place behind the first `count` entries, or to the end of a shorter list.
    ///
    /// # Errors
    /// [`ListError`].
    pub(crate) fn go_to(&mut self, count: u64) -> Result<(), ListError> {
        if self.passed.count > count {
            self.source.rewind()?;
            self.pending.clear();
            self.passed = Aggregate::EMPTY;
        }
        while self.passed.count < count {
            if !self.pass_one()? {
                break;
            }
        }
        Ok(())
    }

    /// The next entries, if the list has grown: about `target` bytes at most, but at least one entry.
    ///
    /// # Errors
    /// [`ListError`].
    pub(crate) fn next_batch(&mut self, target: usize) -> Result<Option<Batch>, ListError> {
        let first = self.passed.count;
        let mut bytes = Vec::new();
        loop {
            match self.first_pending()? {
                Some(length) if bytes.is_empty() || bytes.len() + length <= target => {
                    bytes.extend_from_slice(&self.pending[..length]);
                    self.pass_one()?;
                }
                Some(_) => break,
                None if self.fill()? => {}
                None => break,
            }
        }
        Ok((!bytes.is_empty()).then_some(Batch { first, bytes }))
    }

    /// Passes one entry; false at the end of the list.
    fn pass_one(&mut self) -> Result<bool, ListError> {
        loop {
            if let Some(length) = self.first_pending()? {
                let entry = Entry::parse(&self.pending[..length], self.hash_size).map_err(ListError::Malformed)?;
                self.passed.push(&entry);
                self.pending.drain(..length);
                return Ok(true);
            }
            if !self.fill()? {
                return Ok(false);
            }
        }
    }

    /// The length of the first entry in `pending`, if it is whole.
    fn first_pending(&self) -> Result<Option<usize>, ListError> {
        if self.pending.is_empty() {
            return Ok(None);
        }
        match Entry::parse_first(&self.pending, self.hash_size) {
            Ok((_, length)) => Ok(Some(length)),
            Err(error) if error.is_truncated() => Ok(None),
            Err(error) => Err(ListError::Malformed(error)),
        }
    }

    /// Reads on; false at the end of the list.
    fn fill(&mut self) -> Result<bool, ListError> {
        let old = self.pending.len();
        self.pending.resize(old + READ, 0);
        let read = loop {
            match self.source.read(&mut self.pending[old..]) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                other => break other,
            }
        };
        self.pending.truncate(old + *read.as_ref().unwrap_or(&0));
        Ok(read? > 0)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
pub(crate) mod tests {
    use super::*;
    use std::cell::RefCell;
    use std::io::SeekFrom;
    use std::rc::Rc;

    /// An entry of template `ima-ng` (its hash is not checked by the shim).
    pub(crate) fn entry(number: u32) -> Vec<u8> {
        let path = format!("/bin/program-{number}\0");
        let mut data = Vec::new();
        data.extend(40_u32.to_le_bytes());
        data.extend(b"sha256:\0");
        data.extend([number as u8; 32]);
        data.extend((path.len() as u32).to_le_bytes());
        data.extend(path.as_bytes());
        let mut bytes = 10_u32.to_le_bytes().to_vec();
        bytes.extend([1; 20]);
        bytes.extend(6_u32.to_le_bytes());
        bytes.extend(b"ima-ng");
        bytes.extend((data.len() as u32).to_le_bytes());
        bytes.extend(data);
        bytes
    }

    pub(crate) fn aggregate(count: u32) -> Aggregate {
        let mut aggregate = Aggregate::EMPTY;
        for number in 0..count {
            aggregate.push(&Entry::parse(&entry(number), 20).unwrap());
        }
        aggregate
    }

    /// A kernel's file: grows, and gives a few bytes at a time.
    #[derive(Clone, Default)]
    pub(crate) struct Source {
        pub(crate) content: Rc<RefCell<Vec<u8>>>,
        at: usize,
    }

    impl Source {
        pub(crate) fn add(&self, numbers: std::ops::Range<u32>) {
            for number in numbers {
                self.content.borrow_mut().extend(entry(number));
            }
        }
    }

    impl Read for Source {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            let content = self.content.borrow();
            let count = buffer.len().min(content.len() - self.at).min(37);
            buffer[..count].copy_from_slice(&content[self.at..self.at + count]);
            self.at += count;
            Ok(count)
        }
    }

    impl Seek for Source {
        fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
            let SeekFrom::Start(at) = to else { panic!("only from the start") };
            self.at = at as usize;
            Ok(at)
        }
    }

    #[test]
    fn a_growing_list_comes_in_whole_entries() {
        let source = Source::default();
        let mut list = List::new(source.clone(), 20);
        assert_eq!(list.next_batch(1000).unwrap(), None);
        source.add(0..3);
        let batch = list.next_batch(10_000).unwrap().unwrap();
        assert_eq!(batch, Batch { first: 0, bytes: source.content.borrow().clone() });
        assert_eq!(list.passed(), &aggregate(3));
        // Half an entry is none yet.
        source.content.borrow_mut().extend(&entry(3)[..50]);
        assert_eq!(list.next_batch(1000).unwrap(), None);
        source.content.borrow_mut().extend(&entry(3)[50..]);
        assert_eq!(list.next_batch(1000).unwrap().unwrap().first, 3);
    }

    #[test]
    fn a_batch_ends_at_its_target_but_has_one_entry_at_least() {
        let source = Source::default();
        source.add(0..5);
        let mut list = List::new(source, 20);
        let length = entry(0).len();
        assert_eq!(list.next_batch(2 * length).unwrap().unwrap().bytes.len(), 2 * length);
        assert_eq!(list.next_batch(1).unwrap().unwrap(), Batch { first: 2, bytes: entry(2) });
    }

    #[test]
    fn any_place_can_be_gone_to() {
        let source = Source::default();
        source.add(0..10);
        let mut list = List::new(source, 20);
        for place in [7, 3, 3, 10, 0, 9] {
            list.go_to(u64::from(place)).unwrap();
            assert_eq!(list.passed(), &aggregate(place));
            if place < 10 {
                assert_eq!(list.next_batch(1).unwrap().unwrap().bytes, entry(place));
            }
        }
        list.go_to(50).unwrap();
        assert_eq!(list.passed(), &aggregate(10));
    }

    #[test]
    fn what_is_no_list_is_an_error_not_a_wait() {
        let source = Source::default();
        source.content.borrow_mut().extend([0xff; 100]);
        let mut list = List::new(source, 20);
        assert!(matches!(list.next_batch(100), Err(ListError::Malformed(_))));
    }
}
