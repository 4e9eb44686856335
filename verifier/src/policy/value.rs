//! The values that rules are made of.

use serde::{Deserialize, Deserializer};

use onequote_evidence::{
    digest::{FileDigest, sha256},
    pcr::PCR_COUNT,
};

/// Whether something is allowed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Consent {
    /// It is a finding.
    #[default]
    Refused,
    /// It is noted only.
    Allowed,
}

/// The digests that a part may have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Allowed {
    /// It is not judged.
    Any,
    /// One of these; none at all means that the part must not be there.
    Digests(Vec<Reference>),
}

/// One allowed digest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reference {
    /// The digest.
    pub digest: FileDigest,
    /// The text it was computed from, where the policy gave that.
    pub text: Option<String>,
}

/// One value or several.
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
pub enum OneOrMore<T> {
    /// One.
    One(T),
    /// Several.
    More(Vec<T>),
}

/// A register's index as a TOML key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(try_from = "String")]
pub struct Pcr(pub u8);

/// A pattern with `*` and `?`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(transparent)]
pub struct Pattern(pub String);

impl Allowed {
    pub(super) fn any() -> Self {
        Self::Any
    }
}

impl Default for Allowed {
    fn default() -> Self {
        Self::Digests(Vec::new())
    }
}

impl std::fmt::Display for Allowed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Any => f.write_str("any"),
            Self::Digests(none) if none.is_empty() => f.write_str("none"),
            Self::Digests(list) => {
                let one = |r: &Reference| r.text.clone().unwrap_or_else(|| r.digest.to_string());
                f.write_str(&list.iter().map(one).collect::<Vec<_>>().join(" or "))
            }
        }
    }
}

impl Reference {
    /// A digest, or else the text whose SHA-256 is meant.
    #[must_use]
    pub fn parse(text: &str) -> Self {
        match text.parse() {
            Ok(digest) => Self { digest, text: None },
            Err(_) => {
                let digest = FileDigest::sha256(sha256(&[text.as_bytes()]));
                Self { digest, text: Some(text.to_owned()) }
            }
        }
    }
}

impl<T> OneOrMore<T> {
    /// The values.
    #[must_use]
    pub fn as_slice(&self) -> &[T] {
        match self {
            Self::One(one) => std::slice::from_ref(one),
            Self::More(more) => more,
        }
    }
}

impl Pattern {
    /// Whether the whole of `text` fits.
    #[must_use]
    pub fn fits(&self, text: &str) -> bool {
        // Two positions to go back to at most: linear in practice, quadratic at worst.
        let (pattern, text): (Vec<char>, Vec<char>) = (self.0.chars().collect(), text.chars().collect());
        let (mut p, mut t) = (0, 0);
        let mut star: Option<(usize, usize)> = None;
        while t < text.len() {
            match pattern.get(p) {
                Some('*') => {
                    star = Some((p, t));
                    p += 1;
                }
                Some(&c) if c == '?' || c == text[t] => {
                    p += 1;
                    t += 1;
                }
                _ => {
                    let Some((at, from)) = star else { return false };
                    star = Some((at, from + 1));
                    p = at + 1;
                    t = from + 1;
                }
            }
        }
        pattern[p..].iter().all(|&c| c == '*')
    }
}

impl TryFrom<String> for Pcr {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let pcr = text.parse().ok().filter(|&pcr: &u8| pcr < PCR_COUNT);
        pcr.map(Self).ok_or_else(|| format!("{text:?} is not a register: give a number from 0 to 23 in quotes"))
    }
}

impl<'de> Deserialize<'de> for Allowed {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged, expecting = "a list of digests, or \"any\"")]
        enum Form {
            Word(String),
            List(Vec<String>),
        }
        match Form::deserialize(d)? {
            Form::Word(word) if word == "any" => Ok(Self::Any),
            Form::Word(word) => Err(serde::de::Error::custom(format_args!("{word:?}: give a list, or \"any\""))),
            Form::List(list) => {
                for text in &list {
                    let digest_like = text.starts_with("sha256:") || text.starts_with("fs-verity:");
                    if digest_like && text.parse::<FileDigest>().is_err() {
                        return Err(serde::de::Error::custom(format_args!("{text:?} is not a whole digest")));
                    }
                }
                Ok(Self::Digests(list.iter().map(|text| Reference::parse(text)).collect()))
            }
        }
    }
}
