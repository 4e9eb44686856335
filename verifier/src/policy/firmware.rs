//! Rules about the host's boot, which its firmware's event log shows.

use std::collections::BTreeSet;

use serde::{Deserialize, Deserializer};

use onequote_evidence::{
    digest::{FileDigest, FileDigestAlg, sha256},
    id::Sha256,
};

use super::{Pcr, Runtime};

/// `[host.firmware]`: each rule that is given must be shown by the log.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct FirmwareRule {
    /// Whether the log must come; without it, it must where a register of the firmware is not empty.
    pub log: Option<Runtime>,
    /// Registers that the log need not explain, for firmware that omits events. Their values are proven by the quote
    /// alone, and no rule can be shown by them.
    pub unexplained: BTreeSet<Pcr>,
    /// Whether Secure Boot must be on, or off.
    pub secure_boot: Option<bool>,
    /// Whether PCR 0 to 7 must each have the separator by which firmware ends its own measurements.
    pub separators: bool,
    /// Images that firmware and boot loaders may have started (PCR 4), by the digest that is extended for them.
    pub images: Option<Digests>,
    /// Files that GRUB may have read (PCR 9), and what Linux' EFI stub measures there.
    pub files: Option<Digests>,
    /// Kernels, one of which must have been started: as image in PCR 4, or as file in PCR 9.
    pub kernel: Option<Vec<PlainDigest>>,
    /// What boot stubs may have measured into the log's own registers before the proxy: command lines as text,
    /// credentials and extensions as digests.
    pub stub: Option<Vec<StubDigest>>,
    /// The platform key.
    pub pk: Option<DatabaseRule>,
    /// Keys that may change the databases.
    pub kek: Option<DatabaseRule>,
    /// What may start.
    pub db: Option<DatabaseRule>,
    /// What may not.
    pub dbx: Option<DatabaseRule>,
}

/// What a variable of Secure Boot must hold. A certificate is named by its SHA-256 fingerprint, an image by its digest as
/// listed.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DatabaseRule {
    /// SHA-256 of its whole content, one of these.
    pub content: Vec<PlainDigest>,
    /// Entries that must be in it.
    pub include: Vec<PlainDigest>,
    /// Entries that must not be in it.
    pub exclude: Vec<PlainDigest>,
    /// The only entries that may be in it.
    pub only: Option<Vec<PlainDigest>>,
}

impl DatabaseRule {
    pub(super) fn is_empty(&self) -> bool {
        self.content.is_empty() && self.include.is_empty() && self.exclude.is_empty() && self.only.is_none()
    }
}

impl FirmwareRule {
    /// The databases that are judged, by the names of their variables.
    #[must_use]
    pub fn databases(&self) -> Vec<(&'static str, &DatabaseRule)> {
        let all = [("PK", &self.pk), ("KEK", &self.kek), ("db", &self.db), ("dbx", &self.dbx)];
        all.into_iter().filter_map(|(name, rule)| Some((name, rule.as_ref()?))).collect()
    }
}

/// A SHA-256 digest, written `sha256:HEX`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PlainDigest(pub Sha256);

impl<'de> Deserialize<'de> for PlainDigest {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let digest = FileDigest::deserialize(d)?;
        match digest.alg {
            FileDigestAlg::Sha256 => Ok(Self(digest.value)),
            FileDigestAlg::FsVerity => Err(serde::de::Error::custom("firmware measures no fs-verity digests")),
        }
    }
}

impl std::fmt::Display for PlainDigest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        FileDigest::sha256(self.0).fmt(f)
    }
}

/// A list of digests, or `"any"` not to judge.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Digests {
    /// Not judged.
    Any,
    /// One of these.
    List(Vec<PlainDigest>),
}

impl Digests {
    /// Whether a digest is allowed.
    #[must_use]
    pub fn allow(&self, digest: Sha256) -> bool {
        match self {
            Self::Any => true,
            Self::List(list) => list.contains(&PlainDigest(digest)),
        }
    }
}

impl<'de> Deserialize<'de> for Digests {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged, expecting = "a list of \"sha256:…\", or \"any\"")]
        enum Form {
            List(Vec<PlainDigest>),
            Word(Word),
        }
        #[derive(Deserialize)]
        #[serde(rename_all = "kebab-case")]
        enum Word {
            Any,
        }
        Ok(match Form::deserialize(d)? {
            Form::List(list) => Self::List(list),
            Form::Word(Word::Any) => Self::Any,
        })
    }
}

/// What systemd-stub measured: a digest, or the text of a command line, which is measured in UTF-16 with its NUL.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StubDigest {
    /// The digest.
    pub digest: Sha256,
    /// The text, where the policy gave that.
    pub text: Option<String>,
}

impl StubDigest {
    /// Of a command line.
    #[must_use]
    pub fn of_text(text: &str) -> Self {
        let wide: Vec<u8> = text.encode_utf16().chain([0]).flat_map(u16::to_le_bytes).collect();
        Self { digest: sha256(&[&wide]), text: Some(text.to_owned()) }
    }
}

impl<'de> Deserialize<'de> for StubDigest {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let text = String::deserialize(d)?;
        match text.strip_prefix("sha256:") {
            Some(_) => match text.parse::<FileDigest>() {
                Ok(digest) => Ok(Self { digest: digest.value, text: None }),
                Err(_) => Err(serde::de::Error::custom(format_args!("{text:?} is not a whole digest"))),
            },
            None => Ok(Self::of_text(&text)),
        }
    }
}

impl std::fmt::Display for StubDigest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.text {
            Some(text) => write!(f, "{text:?}"),
            None => PlainDigest(self.digest).fmt(f),
        }
    }
}
