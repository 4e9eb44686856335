//! Hash algorithms by their TPM names, and digests of files.

use std::{fmt, str::FromStr};

use minicbor::{Decode, Encode};
use sha2::Digest as _;

use crate::id::{Blob, Sha256};

/// A hash algorithm of a PCR bank, numbered as in the TCG Algorithm Registry (`TPM_ALG_ID`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u16)]
pub enum HashAlg {
    /// `TPM_ALG_SHA1`.
    Sha1 = 0x0004,
    /// `TPM_ALG_SHA256`.
    Sha256 = 0x000B,
    /// `TPM_ALG_SHA384`.
    Sha384 = 0x000C,
    /// `TPM_ALG_SHA512`.
    Sha512 = 0x000D,
}

/// The longest digest of a [`HashAlg`] in bytes.
pub const MAX_DIGEST: usize = 64;

impl HashAlg {
    /// Every algorithm, in ascending order of its number.
    pub const ALL: [Self; 4] = [Self::Sha1, Self::Sha256, Self::Sha384, Self::Sha512];

    /// The algorithm of a `TPM_ALG_ID`, if it is one of ours.
    #[must_use]
    pub fn from_tpm(id: u16) -> Option<Self> {
        Self::ALL.into_iter().find(|alg| alg.tpm_id() == id)
    }

    /// The `TPM_ALG_ID`.
    #[must_use]
    pub fn tpm_id(self) -> u16 {
        self as u16
    }

    /// Size of a digest in bytes.
    #[must_use]
    pub fn size(self) -> usize {
        match self {
            Self::Sha1 => 20,
            Self::Sha256 => 32,
            Self::Sha384 => 48,
            Self::Sha512 => 64,
        }
    }

    /// The digest of `data`.
    #[must_use]
    pub fn hash(self, data: &[u8]) -> Vec<u8> {
        self.hash_parts(&[data])
    }

    /// The digest of the parts, one after the other.
    #[must_use]
    pub fn hash_parts(self, parts: &[&[u8]]) -> Vec<u8> {
        let mut out = [0; MAX_DIGEST];
        self.hash_into(parts, &mut out).to_vec()
    }

    /// The same without allocation: the digest is at the beginning of `out`, and is what is returned.
    pub fn hash_into<'o>(self, parts: &[&[u8]], out: &'o mut [u8; MAX_DIGEST]) -> &'o [u8] {
        fn run<D: sha2::Digest>(parts: &[&[u8]], out: &mut [u8]) {
            let mut hasher = D::new();
            for part in parts {
                hasher.update(part);
            }
            out.copy_from_slice(&hasher.finalize());
        }
        let out = &mut out[..self.size()];
        match self {
            Self::Sha1 => run::<sha1::Sha1>(parts, out),
            Self::Sha256 => run::<sha2::Sha256>(parts, out),
            Self::Sha384 => run::<sha2::Sha384>(parts, out),
            Self::Sha512 => run::<sha2::Sha512>(parts, out),
        }
        out
    }

    /// The name that the kernel, CEL-JSON and people use: `sha256`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Sha1 => "sha1",
            Self::Sha256 => "sha256",
            Self::Sha384 => "sha384",
            Self::Sha512 => "sha512",
        }
    }
}

impl fmt::Display for HashAlg {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for HashAlg {
    type Err = &'static str;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        Self::ALL.into_iter().find(|alg| alg.name() == name).ok_or("not one of sha1, sha256, sha384, sha512")
    }
}

impl<C> Encode<C> for HashAlg {
    fn encode<W: minicbor::encode::Write>(
        &self,
        e: &mut minicbor::Encoder<W>,
        _: &mut C,
    ) -> Result<(), minicbor::encode::Error<W::Error>> {
        e.u16(self.tpm_id())?.ok()
    }
}

impl<'b, C> Decode<'b, C> for HashAlg {
    fn decode(d: &mut minicbor::Decoder<'b>, _: &mut C) -> Result<Self, minicbor::decode::Error> {
        let at = d.position();
        Self::from_tpm(d.u16()?).ok_or_else(|| minicbor::decode::Error::message("unknown hash algorithm").at(at))
    }
}

/// SHA-256 of the parts, one after the other.
#[must_use]
pub fn sha256(parts: &[&[u8]]) -> Sha256 {
    let mut hasher = sha2::Sha256::new();
    for part in parts {
        hasher.update(part);
    }
    Sha256(hasher.finalize().into())
}

/// How a file's digest was computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode)]
#[cbor(index_only)]
pub enum FileDigestAlg {
    /// SHA-256 of the file's bytes, as `sha256sum` prints it.
    #[n(0)]
    Sha256,
    /// The kernel's fs-verity file digest with SHA-256, 4 KiB blocks and no salt
    /// (Linux `Documentation/filesystems/fsverity.rst`).
    #[n(1)]
    FsVerity,
}

impl FileDigestAlg {
    /// The name in texts: `sha256`, `fs-verity`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Sha256 => "sha256",
            Self::FsVerity => "fs-verity",
        }
    }
}

/// A file's digest together with how it was computed. Shown as `sha256:…` or `fs-verity:…`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode)]
pub struct FileDigest {
    /// How it was computed.
    #[n(0)]
    pub alg: FileDigestAlg,
    /// The value.
    #[n(1)]
    pub value: Sha256,
}

impl FileDigest {
    /// A plain SHA-256.
    #[must_use]
    pub fn sha256(value: Sha256) -> Self {
        Self { alg: FileDigestAlg::Sha256, value }
    }
}

impl fmt::Display for FileDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.alg.name(), self.value)
    }
}

impl FromStr for FileDigest {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (alg, value) = text.split_once(':').ok_or("a file digest is ALGORITHM:HEX")?;
        let alg = match alg {
            "sha256" => FileDigestAlg::Sha256,
            "fs-verity" => FileDigestAlg::FsVerity,
            _ => return Err("the algorithm is not one of sha256, fs-verity"),
        };
        Ok(Self { alg, value: value.parse()? })
    }
}

/// A digest of one bank, as it is extended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BankDigest {
    /// The bank.
    pub alg: HashAlg,
    /// The digest, [`HashAlg::size`] bytes.
    pub value: Blob,
}

#[cfg(feature = "json")]
mod json {
    use super::{FileDigest, HashAlg};
    crate::id::serde_as_text!(FileDigest);
    crate::id::serde_as_text!(HashAlg);
}
