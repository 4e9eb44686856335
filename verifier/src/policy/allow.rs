//! Allow lists for IMA: which file may have which content.

use std::{
    collections::{HashMap, hash_map::Entry},
    fmt,
    hash::{BuildHasherDefault, Hasher},
};

use serde::Deserialize;

use onequote_evidence::digest::HashAlg;

/// What stands before the algorithm of an fs-verity digest.
pub const VERITY: &str = "verity:";

/// A file's digest as IMA lists it: an algorithm's name and a value.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct FileHash {
    /// The algorithm, as the kernel names it; with [`VERITY`] before it for an fs-verity digest.
    pub alg: Box<str>,
    /// The value.
    pub value: Box<[u8]>,
}

/// Which file may have which content: looked up by path, and the other way round to explain a finding.
#[derive(Debug, Clone, Default)]
pub struct AllowList {
    /// What nearly every look is for, in two places of memory and no more.
    usual: Usual,
    by_path: HashMap<Box<[u8]>, Vec<FileHash>>,
    by_value: HashMap<Box<[u8]>, Box<[u8]>>,
}

/// Files with SHA-256 digests of their bytes, by digest.
#[derive(Debug, Clone, Default)]
struct Usual {
    by_digest: HashMap<[u8; 32], Place, BuildHasherDefault<FirstBytes>>,
    /// Of further paths with the same digest.
    further: Vec<Place>,
    /// All paths, one behind the other.
    paths: Vec<u8>,
}

/// A path in [`Usual::paths`], and the further one with the same digest, counted from 1.
#[derive(Debug, Clone, Copy)]
struct Place {
    start: u32,
    len: u32,
    next: u32,
}

/// A hash of what is a hash already. Entries are chosen by the operator: what others look up meets no more of them for that.
#[derive(Debug, Clone, Copy, Default)]
struct FirstBytes(u64);

impl Hasher for FirstBytes {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        if let Some(first) = bytes.first_chunk() {
            self.0 = u64::from_le_bytes(*first);
        }
    }

    fn write_usize(&mut self, _: usize) {
        // The length of an array, always the same.
    }
}

impl Usual {
    /// Adds a path, unless there is no more room: then it is found in another way.
    fn add(&mut self, path: &[u8], digest: [u8; 32]) {
        let (Ok(start), Ok(len)) = (u32::try_from(self.paths.len()), u32::try_from(path.len())) else { return };
        let Ok(further) = u32::try_from(self.further.len() + 1) else { return };
        let place = Place { start, len, next: 0 };
        self.paths.extend_from_slice(path);
        match self.by_digest.entry(digest) {
            Entry::Vacant(vacant) => {
                vacant.insert(place);
            }
            Entry::Occupied(mut first) => {
                let next = std::mem::replace(&mut first.get_mut().next, further);
                self.further.push(Place { next, ..place });
            }
        }
    }

    fn has(&self, path: &[u8], digest: &[u8; 32]) -> bool {
        let mut place = self.by_digest.get(digest);
        while let Some(&Place { start, len, next }) = place {
            if self.paths.get(start as usize..).and_then(|rest| rest.get(..len as usize)) == Some(path) {
                return true;
            }
            place = (next as usize).checked_sub(1).and_then(|next| self.further.get(next));
        }
        false
    }
}

/// What an allow list says of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Judgement<'a> {
    /// It may be so.
    Allowed,
    /// The path is known with other contents.
    WrongDigest(&'a [FileHash]),
    /// The path is not known; the same content may be allowed under another one.
    UnknownFile(Option<&'a [u8]>),
}

impl AllowList {
    /// Adds an allowed content of a path.
    pub fn allow(&mut self, path: &[u8], hash: FileHash) {
        self.by_value.entry(hash.value.clone()).or_insert_with(|| path.into());
        let hashes = self.by_path.entry(path.into()).or_default();
        if hashes.contains(&hash) {
            return;
        }
        if let Ok(digest) = (*hash.value).try_into()
            && *hash.alg == *HashAlg::Sha256.name()
        {
            self.usual.add(path, digest);
        }
        hashes.push(hash);
    }

    /// Whether a file may be so.
    #[must_use]
    pub fn has(&self, path: &[u8], alg: &str, value: &[u8]) -> bool {
        if let Ok(digest) = value.try_into()
            && alg == HashAlg::Sha256.name()
            && self.usual.has(path, digest)
        {
            return true;
        }
        self.by_path.get(path).is_some_and(|hashes| hashes.iter().any(|h| *h.alg == *alg && *h.value == *value))
    }

    /// Judges a file.
    #[must_use]
    pub fn judge(&self, path: &[u8], alg: &str, value: &[u8]) -> Judgement<'_> {
        match self.by_path.get(path) {
            Some(hashes) if hashes.iter().any(|h| *h.alg == *alg && *h.value == *value) => Judgement::Allowed,
            Some(hashes) => Judgement::WrongDigest(hashes),
            None => Judgement::UnknownFile(self.by_value.get(value).map(|path| &**path)),
        }
    }

    /// Number of paths.
    #[must_use]
    pub fn len(&self) -> usize {
        self.by_path.len()
    }

    /// Whether nothing is allowed.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.by_path.is_empty()
    }
}

impl fmt::Display for FileHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.alg, hex::encode(&self.value))
    }
}

impl std::str::FromStr for FileHash {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        // As a list has it: verity:sha256:… for an fs-verity digest.
        let (alg, value) = text.rsplit_once(':').unwrap_or(("", text));
        let (kind, alg) = alg.rsplit_once(':').unwrap_or(("", alg));
        let kind = match kind {
            "" | "ima" => "",
            "verity" => VERITY,
            other => return Err(format!("{text:?}: {other:?} is not a kind of digest: ima or verity")),
        };
        let value = hex::decode(value).map_err(|_| format!("{text:?} is not ALGORITHM:HEX"))?;
        let known =
            HashAlg::ALL.into_iter().find(|known| known.name() == alg || alg.is_empty() && known.size() == value.len());
        match known {
            Some(known) if known.size() != value.len() => {
                Err(format!("{text:?}: a {known} digest has {} bytes", known.size()))
            }
            Some(known) => Ok(Self { alg: format!("{kind}{known}").into(), value: value.into() }),
            // The kernel knows more algorithms than TPMs do; they are compared by name.
            None if !alg.is_empty() && !value.is_empty() => {
                Ok(Self { alg: format!("{kind}{alg}").into(), value: value.into() })
            }
            None => Err(format!("{text:?}: no algorithm named, and the length is that of none")),
        }
    }
}

impl<'de> Deserialize<'de> for AllowList {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let table = HashMap::<String, Vec<String>>::deserialize(d)?;
        let mut list = Self::default();
        for (path, digests) in table {
            if digests.is_empty() {
                return Err(serde::de::Error::custom(format_args!("{path:?} has no digest")));
            }
            for text in digests {
                list.allow(path.as_bytes(), text.parse().map_err(serde::de::Error::custom)?);
            }
        }
        Ok(list)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// However it is looked up, the answer is the same.
        #[test]
        fn has_is_what_judge_allows(
            allowed in prop::collection::vec((0_u8..6, 0_u8..3, 0_u8..6), 0..40),
            asked in prop::collection::vec((0_u8..7, 0_u8..3, 0_u8..7), 1..60),
        ) {
            let alg = |n: u8| ["sha256", "sha1", "verity:sha256"][usize::from(n)];
            let value = |alg: u8, n: u8| vec![n; if alg == 1 { 20 } else { 32 }];
            let path = |n: u8| vec![b'/'; usize::from(n) + 1];
            let mut list = AllowList::default();
            for &(p, a, v) in &allowed {
                list.allow(&path(p), FileHash { alg: alg(a).into(), value: value(a, v).into() });
            }
            for &(p, a, v) in &asked {
                let there = allowed.contains(&(p, a, v));
                prop_assert_eq!(list.has(&path(p), alg(a), &value(a, v)), there);
                prop_assert_eq!(list.judge(&path(p), alg(a), &value(a, v)) == Judgement::Allowed, there);
            }
        }
    }
}
