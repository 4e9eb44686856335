//! IMA's binary measurement list and its replay.
//!
//! The kernel shows the list in `/sys/kernel/security/ima/binary_runtime_measurements`
//! (Linux `security/integrity/ima/ima_fs.c`, `ima_measurements_show`). One entry, all numbers little-endian:
//!
//! ```text
//! u32 pcr
//! template hash        20 bytes (SHA-1), or the bank's size in the per-bank files of newer kernels
//! u32 length, name     template name, no NUL
//! u32 length, data     template data; the template `ima` has no length here:
//!                      digest[20], u32 length, path without NUL
//! ```
//!
//! Template data is what is hashed and extended, as `H(data)` in each bank. Only the template `ima` is hashed in
//! another layout than it is listed in: digest[20], then the path padded with NUL to 256 bytes
//! (`ima_crypto.c`, `ima_calc_field_array_hash_tfm`). A *violation* (a file changed while it was measured) is listed
//! with a template hash of zeros and extended as all ones.
//!
//! What the register proves of an entry is its template data, and of a violation only that there was one. Register,
//! template name and listed hash are not extended: a list that replays can still lie in them. The hash is checked
//! against the data ([`Entry::hash_matches`]); whoever judges an entry checks the register and takes nothing from the
//! name that the data would not give as well (`ima-sig` and `ima-buf` have the same layout).
//!
//! Reading is in two steps. [`ListReader`] cuts a list into [`Entry`]s; [`Entry::fields`] reads the template data.
//! Replay needs only the first, so that a template unknown to us still replays to the register.

mod aggregate;
mod signature;
mod template;

pub use aggregate::Aggregate;
pub use signature::{FileSignature, KeyId, MAX_SIGNATURE, SignatureKind};
pub use template::{DigestKind, Fields, Template};

use crate::{
    Malformed, MalformedKind,
    digest::{HashAlg, MAX_DIGEST},
    reader::Reader,
};

/// Size of the template hash in the default list.
pub const SHA1_HASH_SIZE: usize = 20;

/// The longest template name that is read.
pub const MAX_NAME: usize = 63;

/// The longest template data that is read. Paths are at most 4 KiB; signatures and buffers are a few more.
pub const MAX_DATA: usize = 192 * 1024;

/// The shortest entry: header, a name of one letter, no data.
pub const MIN_ENTRY: usize = 4 + SHA1_HASH_SIZE + 4 + 1 + 4;

/// The longest entry: header, name, data.
pub const MAX_ENTRY: usize = 4 + 64 + 4 + MAX_NAME + 4 + MAX_DATA;

/// The longest path of the legacy template (`IMA_EVENT_NAME_LEN_MAX`).
const LEGACY_PATH_MAX: usize = 255;

/// One entry of a measurement list, as listed. Whether it is what a kernel measured is for a replay to show.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry<'a> {
    /// The register that the kernel extended.
    pub pcr: u32,
    /// The template hash as listed: SHA-1 of the template data, or zeros for a violation.
    pub template_hash: &'a [u8],
    /// The template's name.
    pub name: &'a [u8],
    /// The template data as listed.
    pub data: &'a [u8],
    /// The whole entry as listed.
    pub raw: &'a [u8],
}

impl<'a> Entry<'a> {
    /// Reads one entry that fills `bytes`.
    ///
    /// # Errors
    /// [`Malformed`].
    pub fn parse(bytes: &'a [u8], hash_size: usize) -> Result<Self, Malformed> {
        let (entry, len) = Self::parse_first(bytes, hash_size)?;
        if len != bytes.len() {
            return Err(Malformed::new(WHAT, len, MalformedKind::Trailing));
        }
        Ok(entry)
    }

    /// Reads the first entry of `bytes` and tells its length. `hash_size` is the size of the template hash in bytes.
    ///
    /// # Errors
    /// [`Malformed`]; [`Malformed::is_truncated`] holds when the input ends inside the entry.
    pub fn parse_first(bytes: &'a [u8], hash_size: usize) -> Result<(Self, usize), Malformed> {
        let mut r = Reader::new(WHAT, bytes);
        let pcr = r.u32_le()?;
        if pcr >= u32::from(crate::pcr::PCR_COUNT) {
            return Err(Malformed::invalid(WHAT, 0, "register out of range"));
        }
        let template_hash = r.take(hash_size)?;
        let name_len = r.u32_le()? as usize;
        if name_len == 0 || name_len > MAX_NAME {
            return Err(r.invalid("template name empty or too long"));
        }
        let name = r.take(name_len)?;
        if !name.iter().all(u8::is_ascii_graphic) {
            return Err(r.invalid("template name is not printable ASCII"));
        }
        let data = if name == b"ima" {
            let start = r.at();
            r.take(SHA1_HASH_SIZE)?;
            if template::without_nul(r.block_le(LEGACY_PATH_MAX + 1)?).len() > LEGACY_PATH_MAX {
                return Err(r.invalid("path of the legacy template is too long"));
            }
            &bytes[start..r.at()]
        } else {
            r.block_le(MAX_DATA)?
        };
        let raw = &bytes[..r.at()];
        Ok((Self { pcr, template_hash, name, data, raw }, raw.len()))
    }

    /// Whether the kernel listed a violation: a template hash of zeros.
    #[must_use]
    pub fn is_violation(&self) -> bool {
        self.template_hash.iter().all(|&byte| byte == 0)
    }

    /// What the kernel extended for this entry in a bank: the digest of the template data, all ones for a violation.
    ///
    /// Kernels before 5.8 extended other banks than SHA-1 with the SHA-1 digest padded with zeros; see
    /// [`Entry::padded_sha1`].
    #[must_use]
    pub fn extended(&self, bank: HashAlg) -> Vec<u8> {
        if self.is_violation() {
            return vec![0xff; bank.size()];
        }
        self.template_digest(bank)
    }

    /// What kernels before Linux 5.8 extended in a bank other than SHA-1.
    #[must_use]
    pub fn padded_sha1(&self, bank: HashAlg) -> Vec<u8> {
        let mut digest = self.extended(HashAlg::Sha1);
        digest.resize(bank.size(), if self.is_violation() { 0xff } else { 0 });
        digest
    }

    /// Whether the listed template hash is that of the template data. True for a violation, which has none.
    #[must_use]
    pub fn hash_matches(&self) -> bool {
        let bank = HashAlg::ALL.into_iter().find(|alg| alg.size() == self.template_hash.len());
        let mut out = [0; MAX_DIGEST];
        let mut matches = |bank| self.template_digest_into(bank, &mut out) == self.template_hash;
        bank.is_some_and(&mut matches) || self.is_violation()
    }

    /// Reads the template data.
    ///
    /// # Errors
    /// [`Malformed`] for a template that is none of [`Template`] or data that does not have its form.
    pub fn fields(&self) -> Result<Fields<'a>, Malformed> {
        template::fields(self.name, self.data)
    }

    fn template_digest(&self, bank: HashAlg) -> Vec<u8> {
        let mut out = [0; MAX_DIGEST];
        self.template_digest_into(bank, &mut out).to_vec()
    }

    fn template_digest_into<'o>(&self, bank: HashAlg, out: &'o mut [u8; MAX_DIGEST]) -> &'o [u8] {
        if self.name != b"ima" {
            return bank.hash_into(&[self.data], out);
        }
        // The hashed layout of the legacy template: path padded to a fixed size, no length.
        let (digest, path) = self.data.split_at_checked(SHA1_HASH_SIZE).unwrap_or((self.data, &[]));
        let path = template::without_nul(path.get(4..).unwrap_or_default());
        let padding = [0; LEGACY_PATH_MAX + 1];
        bank.hash_into(&[digest, path, &padding[path.len().min(padding.len())..]], out)
    }
}

const WHAT: &str = "IMA entry";

/// Cuts a measurement list into entries.
///
/// After an error the iterator ends. A list that ends inside an entry gives an error for which
/// [`Malformed::is_truncated`] holds; [`ListReader::offset`] is then where that entry begins.
pub struct ListReader<'a> {
    rest: &'a [u8],
    offset: usize,
    hash_size: usize,
}

impl<'a> ListReader<'a> {
    /// Reads `list`, whose template hashes have `hash_size` bytes.
    #[must_use]
    pub fn new(list: &'a [u8], hash_size: usize) -> Self {
        Self { rest: list, offset: 0, hash_size }
    }

    /// Bytes read so far as whole entries.
    #[must_use]
    pub fn offset(&self) -> usize {
        self.offset
    }
}

impl<'a> Iterator for ListReader<'a> {
    type Item = Result<Entry<'a>, Malformed>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.rest.is_empty() {
            return None;
        }
        match Entry::parse_first(self.rest, self.hash_size) {
            Ok((entry, len)) => {
                self.rest = &self.rest[len..];
                self.offset += len;
                Some(Ok(entry))
            }
            Err(mut e) => {
                self.rest = &[];
                e.offset += self.offset;
                Some(Err(e))
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
pub(crate) mod tests;
