//! Allow lists for IMA: which file may have which content.

use std::{collections::HashMap, fmt};

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
    by_path: HashMap<Box<[u8]>, Vec<FileHash>>,
    by_value: HashMap<Box<[u8]>, Box<[u8]>>,
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
        if !hashes.contains(&hash) {
            hashes.push(hash);
        }
    }

    /// Whether a file may be so.
    #[must_use]
    pub fn has(&self, path: &[u8], alg: &str, value: &[u8]) -> bool {
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
