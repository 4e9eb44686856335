//! Signatures of files, as the extended attribute `security.ima` holds them and the field `sig` lists them.
//!
//! ```text
//! u8   type          3 EVM_IMA_XATTR_DIGSIG, 5 EVM_XATTR_PORTABLE_DIGSIG, 6 IMA_VERITY_DIGSIG
//! u8   version       2 or 3
//! u8   algorithm     enum hash_algo of the kernel's uapi/linux/hash_info.h
//! u8×4 key id        the last four bytes of the subject key identifier, which is SHA-1 of the subject's public key
//! u16  size          big-endian
//! u8×n signature     RSA PKCS #1 v1.5, or ECDSA in DER
//! ```
//!
//! (`struct signature_v2_hdr` in Linux `security/integrity/integrity.h`, `digsig_asymmetric.c`.) Version 2 signs the
//! file's digest. Version 3 signs the digest of `struct ima_file_id`, which is type, algorithm and file digest
//! (`ima_appraise.c`, `calc_file_id_hash`), so that an fs-verity digest cannot be taken for that of a file's bytes.
//! Version 1 is a format of keys that IMA does not have any more.

use crate::{Malformed, digest::HashAlg, reader::Reader};

use super::template::{DigestKind, Fields};

const WHAT: &str = "IMA signature";

/// The longest signature in bytes: one made with RSA of 16,384 bits.
pub const MAX_SIGNATURE: usize = 2048;

/// What a signature says that it is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SignatureKind {
    /// The file's digest.
    File,
    /// The file's fs-verity digest.
    Verity,
    /// The file's metadata, its digest among them: a portable signature of EVM. A measurement list does not have what
    /// it signs.
    Metadata,
}

/// A file's signature. Whether it is good is for whoever has the key to say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileSignature<'a> {
    /// What it is for.
    pub kind: SignatureKind,
    /// 2 or 3.
    pub version: u8,
    /// The hash algorithm, by its number in the kernel.
    pub algorithm: u8,
    /// Which key.
    pub key: KeyId,
    /// The signature itself.
    pub signature: &'a [u8],
}

/// Which key made a signature, in four bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KeyId(pub [u8; 4]);

impl KeyId {
    /// That of a key: the last four bytes of SHA-1 of its `subjectPublicKey`, without tag, length and unused bits.
    #[must_use]
    pub fn of(subject_public_key: &[u8]) -> Self {
        Self::of_identifier(&HashAlg::Sha1.hash(subject_public_key)).unwrap_or(Self([0; 4]))
    }

    /// That of a subject key identifier; none when it is shorter.
    #[must_use]
    pub fn of_identifier(identifier: &[u8]) -> Option<Self> {
        identifier.last_chunk().copied().map(Self)
    }
}

impl std::fmt::Display for KeyId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl<'a> FileSignature<'a> {
    /// Reads the field `sig`, which must not be empty.
    ///
    /// # Errors
    /// [`Malformed`].
    pub fn parse(bytes: &'a [u8]) -> Result<Self, Malformed> {
        let mut r = Reader::new(WHAT, bytes);
        let kind = match r.u8()? {
            3 => SignatureKind::File,
            5 => SignatureKind::Metadata,
            6 => SignatureKind::Verity,
            _ => return Err(Malformed::invalid(WHAT, 0, "not a type of signature")),
        };
        let version = r.u8()?;
        if !matches!((kind, version), (SignatureKind::Verity, 3) | (SignatureKind::File, 2 | 3))
            && !matches!((kind, version), (SignatureKind::Metadata, 2 | 3))
        {
            return Err(r.invalid("not a version that its type has"));
        }
        let algorithm = r.u8()?;
        let key = KeyId(r.array()?);
        let size = usize::from(u16::from_be_bytes(r.array()?));
        if size == 0 || size > MAX_SIGNATURE {
            return Err(r.invalid("no signature, or one that is too long"));
        }
        let signature = r.take(size)?;
        r.end()?;
        Ok(Self { kind, version, algorithm, key, signature })
    }

    /// The algorithm, if it is one of ours. Whoever checks the signature must not take SHA-1.
    #[must_use]
    pub fn hash_alg(&self) -> Option<HashAlg> {
        Some(match self.algorithm {
            2 => HashAlg::Sha1,
            4 => HashAlg::Sha256,
            5 => HashAlg::Sha384,
            6 => HashAlg::Sha512,
            _ => return None,
        })
    }

    /// The digest that was signed, if this is the signature of a file with these fields: none when the list does not
    /// have what was signed, or has it in another algorithm.
    #[must_use]
    pub fn signed_digest(&self, fields: &Fields<'_>) -> Option<(HashAlg, Vec<u8>)> {
        let alg = self.hash_alg()?;
        if fields.digest_alg != alg.name() || fields.digest.len() != alg.size() {
            return None;
        }
        let kind = match (self.kind, fields.digest_kind) {
            (SignatureKind::File, DigestKind::File | DigestKind::Untold) => 3,
            (SignatureKind::Verity, DigestKind::Verity | DigestKind::Untold) => 6,
            _ => return None,
        };
        Some(match self.version {
            2 => (alg, fields.digest.to_vec()),
            _ => (alg, alg.hash_parts(&[&[kind, self.algorithm], fields.digest])),
        })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::ima::{Entry, tests as samples};

    fn bytes(kind: u8, version: u8, algorithm: u8, signature: &[u8]) -> Vec<u8> {
        let size = (signature.len() as u16).to_be_bytes();
        [&[kind, version, algorithm, 1, 2, 3, 4], &size[..], signature].concat()
    }

    #[test]
    fn the_form() {
        let whole = bytes(3, 2, 4, &[9; 70]);
        let read = FileSignature::parse(&whole).unwrap();
        assert_eq!((read.kind, read.version, read.hash_alg()), (SignatureKind::File, 2, Some(HashAlg::Sha256)));
        assert_eq!((read.key.to_string().as_str(), read.signature), ("01020304", &[9; 70][..]));
        for cut in 0..whole.len() {
            assert!(FileSignature::parse(&whole[..cut]).is_err(), "{cut}");
        }
        assert!(FileSignature::parse(&[whole.as_slice(), &[0]].concat()).is_err());
        for (kind, version) in [(1, 2), (2, 2), (4, 2), (7, 3), (3, 1), (3, 4), (6, 2), (5, 1)] {
            assert!(FileSignature::parse(&bytes(kind, version, 4, &[9])).is_err(), "{kind} {version}");
        }
        assert!(FileSignature::parse(&bytes(3, 2, 4, &[])).is_err());
        assert!(FileSignature::parse(&bytes(3, 2, 4, &[0; MAX_SIGNATURE + 1])).is_err());
    }

    #[test]
    fn what_is_signed() {
        let digest = [7; 32];
        let entry = |name: &str, alg: &str| {
            let data = [samples::d_ng(alg, &digest), samples::block(b"/bin/a\0")].concat();
            let data = if name.contains("sig") { [data, samples::block(&[])].concat() } else { data };
            samples::listed(10, name, &data)
        };
        let signed = |signature: &[u8], entry: &[u8]| {
            let fields = Entry::parse(entry, 20).unwrap().fields().unwrap();
            FileSignature::parse(signature).unwrap().signed_digest(&fields)
        };
        let file = entry("ima-sig", "sha256");
        let typed = entry("ima-sigv2", "ima:sha256");
        let verity = entry("ima-sigv2", "verity:sha256");
        let id = |kind: u8| HashAlg::Sha256.hash(&[&[kind, 4], &digest[..]].concat());
        for (signature, entry, expected) in [
            (bytes(3, 2, 4, &[9]), &file, Some(digest.to_vec())),
            (bytes(3, 2, 4, &[9]), &typed, Some(digest.to_vec())),
            (bytes(3, 3, 4, &[9]), &file, Some(id(3))),
            (bytes(6, 3, 4, &[9]), &verity, Some(id(6))),
            // The older template does not tell which digest it lists.
            (bytes(6, 3, 4, &[9]), &file, Some(id(6))),
            // One kind of digest does not stand for the other.
            (bytes(6, 3, 4, &[9]), &typed, None),
            (bytes(3, 2, 4, &[9]), &verity, None),
            // Another algorithm than the listed digest's; metadata, which no list has.
            (bytes(3, 2, 5, &[9]), &file, None),
            (bytes(3, 2, 7, &[9]), &file, None),
            (bytes(5, 2, 4, &[9]), &file, None),
        ] {
            assert_eq!(signed(&signature, entry).map(|(_, digest)| digest), expected, "{signature:?}");
        }
    }

    proptest! {
        #[test]
        fn rubbish_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..100)) {
            let _ = FileSignature::parse(&bytes);
        }
    }
}
