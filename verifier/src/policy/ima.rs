//! What a rule says of an IMA list: files, their signatures, and buffers that the kernel measured.

use std::collections::BTreeMap;

use regex::RegexSet;
use serde::{Deserialize, Deserializer};

use onequote_evidence::digest::HashAlg;

use super::{AllowList, FileHash, HostRule, KeyEntry, Pattern, VmRule};

/// The part of a host's or VM's rule that is about its IMA list.
#[derive(Debug, Clone, Copy)]
pub struct ImaRule<'r> {
    /// Files by path.
    pub allow: Option<&'r AllowList>,
    /// Path patterns that are not judged.
    pub ignore: &'r [Pattern],
    /// The same as regular expressions.
    pub exclude: &'r Excludes,
    /// Keys that may sign files.
    pub keys: &'r [KeyEntry],
    /// Patterns of paths that must have a good signature.
    pub signed: &'r [Pattern],
    /// Buffers by name.
    pub buffers: &'r BTreeMap<String, Vec<Content>>,
    /// Keys by keyring.
    pub keyrings: &'r BTreeMap<String, Vec<Content>>,
    /// Keyrings whose keys are not judged.
    pub ignored_keyrings: &'r [Pattern],
}

macro_rules! ima_rule {
    ($rule:expr) => {
        ImaRule {
            allow: $rule.ima.as_ref(),
            ignore: &$rule.ima_ignore,
            exclude: &$rule.ima_exclude,
            keys: &$rule.ima_keys,
            signed: &$rule.ima_signed,
            buffers: &$rule.ima_buf,
            keyrings: &$rule.ima_keyrings,
            ignored_keyrings: &$rule.ima_ignored_keyrings,
        }
    };
}

impl HostRule {
    /// What it says of the host's list.
    #[must_use]
    pub fn ima_rule(&self) -> ImaRule<'_> {
        ima_rule!(self)
    }
}

impl VmRule {
    /// What it says of the guest's list.
    #[must_use]
    pub fn ima_rule(&self) -> ImaRule<'_> {
        ima_rule!(self)
    }
}

impl ImaRule<'_> {
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
