//! What a rule says of an IMA list: files, their signatures, and buffers that the kernel measured.

use std::collections::BTreeMap;

use regex::RegexSet;
use serde::{Deserialize, Deserializer, de::MapAccess};

use onequote_evidence::digest::HashAlg;

use super::{AllowList, FileHash, KeyEntry, OneOrMore, Pattern, part::Part};

/// The part of a host's or VM's rule that is about its IMA list: the keys that begin with `ima`.
#[derive(Debug, Clone, Default)]
pub struct ImaRule {
    /// `ima`: files that the list may hold; with it the list is judged.
    pub allow: Option<AllowList>,
    /// `ima_file`: the same, in files of their own, relative to the policy's.
    pub files: Option<OneOrMore<String>>,
    /// `ima_ignore`: path patterns that are not judged.
    pub ignore: Vec<Pattern>,
    /// `ima_exclude`: the same as regular expressions, each of which must fit a path's beginning.
    pub exclude: Excludes,
    /// `ima_keys`: keys that may sign files; a file with a good signature is allowed.
    pub keys: Vec<KeyEntry>,
    /// `ima_signed`: patterns of paths that must have a good signature.
    pub signed: Vec<Pattern>,
    /// `ima_buf`: what the kernel may measure beside files, by name: `kexec-cmdline`, …
    pub buffers: BTreeMap<String, Vec<Content>>,
    /// `ima_keyrings`: keys that may be put on keyrings, by keyring.
    pub keyrings: BTreeMap<String, Vec<Content>>,
    /// `ima_ignored_keyrings`: keyrings whose keys are not judged.
    pub ignored_keyrings: Vec<Pattern>,
}

impl Part for ImaRule {
    const PREFIX: &'static str = "ima";
    const KEYS: &'static [&'static str] = &[
        "ima",
        "ima_file",
        "ima_ignore",
        "ima_exclude",
        "ima_keys",
        "ima_signed",
        "ima_buf",
        "ima_keyrings",
        "ima_ignored_keyrings",
    ];

    fn take<'de, M: MapAccess<'de>>(&mut self, key: &str, map: &mut M) -> Result<(), M::Error> {
        match key {
            "ima" => self.allow = Some(map.next_value()?),
            "ima_file" => self.files = Some(map.next_value()?),
            "ima_ignore" => self.ignore = map.next_value()?,
            "ima_exclude" => self.exclude = map.next_value()?,
            "ima_keys" => self.keys = map.next_value()?,
            "ima_signed" => self.signed = map.next_value()?,
            "ima_buf" => self.buffers = map.next_value()?,
            "ima_keyrings" => self.keyrings = map.next_value()?,
            "ima_ignored_keyrings" => self.ignored_keyrings = map.next_value()?,
            _ => return Err(serde::de::Error::unknown_field(key, Self::KEYS)),
        }
        Ok(())
    }
}

impl ImaRule {
    /// Whether files are judged at all: something is said of which may be there.
    #[must_use]
    pub fn judges_files(&self) -> bool {
        self.allow.is_some() || !self.keys.is_empty() || !self.signed.is_empty()
    }

    /// Whether buffers are: with files, or for themselves.
    #[must_use]
    pub fn judges_buffers(&self) -> bool {
        self.judges_files()
            || !(self.buffers.is_empty() && self.keyrings.is_empty() && self.ignored_keyrings.is_empty())
    }

    /// Whether an entry of this path or name is not judged.
    #[must_use]
    pub fn ignores(&self, path: &str) -> bool {
        self.ignore.iter().any(|pattern| pattern.fits(path)) || self.exclude.fit(path)
    }
}

/// Whether a buffer's name is that of a keyring: the kernel's begin with a dot, those of user space that IMA and EVM
/// use with an underscore (Linux `certs/system_keyring.c`, `security/integrity/digsig.c`).
#[must_use]
pub fn is_keyring(name: &str) -> bool {
    name.starts_with(['.', '_'])
}

/// Regular expressions, each of which must fit a path's beginning.
#[derive(Debug, Clone, Default)]
pub struct Excludes {
    set: RegexSet,
}

impl Excludes {
    /// Compiles them.
    ///
    /// # Errors
    /// What is wrong with which.
    pub fn new(expressions: &[String]) -> Result<Self, String> {
        for one in expressions {
            // Alone first: a set's error does not name the expression, and a parenthesis must not close our group.
            regex::Regex::new(one).map_err(|e| format!("{one:?} is not a regular expression: {e}"))?;
        }
        let set = RegexSet::new(expressions.iter().map(|one| format!("^(?:{one})"))).map_err(|e| e.to_string())?;
        Ok(Self { set })
    }

    fn fit(&self, path: &str) -> bool {
        !self.set.is_empty() && self.set.is_match(path)
    }
}

impl<'de> Deserialize<'de> for Excludes {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        Self::new(&Vec::<String>::deserialize(d)?).map_err(serde::de::Error::custom)
    }
}

/// What a buffer may hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Content {
    /// Anything with this digest.
    Digest(FileHash),
    /// This text.
    Text(String),
}

impl Content {
    /// Whether a buffer is so.
    #[must_use]
    pub fn fits(&self, buffer: &[u8]) -> bool {
        match self {
            Self::Text(text) => text.as_bytes() == buffer,
            Self::Digest(hash) => {
                let alg: Result<HashAlg, _> = hash.alg.parse();
                alg.is_ok_and(|alg| *alg.hash(buffer) == *hash.value)
            }
        }
    }
}

impl std::fmt::Display for Content {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Digest(hash) => hash.fmt(f),
            Self::Text(text) => write!(f, "{text:?}"),
        }
    }
}

impl<'de> Deserialize<'de> for Content {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let text = String::deserialize(d)?;
        let named = text.split_once(':').filter(|(alg, _)| alg.parse::<HashAlg>().is_ok());
        if named.is_some() {
            return text.parse().map(Self::Digest).map_err(serde::de::Error::custom);
        }
        Ok(Self::Text(text))
    }
}
