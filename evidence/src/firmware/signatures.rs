//! Secure Boot's databases: `PK`, `KEK`, `db`, `dbx` (UEFI 2.10, section 32.4.1).
//!
//! A variable's content is a sequence of lists, each `EFI_SIGNATURE_LIST`: GUID of the kind, u32 length of the list, u32
//! length of a header, u32 length of each entry, the header, then entries: GUID of the owner and data.

use crate::{Malformed, digest::sha256, id::Sha256, reader::Reader};

use super::Guid;

const WHAT: &str = "signature list";

/// GUID, and three lengths.
const LIST_HEAD: usize = 16 + 3 * 4;

const CERT_X509: Guid = Guid::from_fields(0xa5c0_59a1, 0x94e4, 0x4aa7, 0x87b5_ab15_5c2b_f072);
const CERT_SHA256: Guid = Guid::from_fields(0xc1c4_1626, 0x504c, 0x4092, 0xaca9_41f9_3693_4328);
const CERT_X509_SHA256: Guid = Guid::from_fields(0x3bd2_a492, 0x96c0, 0x4079, 0xb420_fcf9_8ef1_03ed);

/// What kind of entry it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SignatureKind {
    /// An X.509 certificate.
    Certificate,
    /// The SHA-256 digest of an image.
    ImageSha256,
    /// The SHA-256 digest of a certificate's signed part, and a time.
    CertificateSha256,
    /// Another.
    Other(Guid),
}

/// An entry of a database.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Signature<'a> {
    /// Its kind.
    pub kind: SignatureKind,
    /// Who put it there.
    pub owner: Guid,
    /// The certificate (DER), the digest, or other data.
    pub data: &'a [u8],
}

impl Signature<'_> {
    /// The digest that stands for it: that of an image as listed, for everything else SHA-256 of the data. Of a certificate that
    /// is what `openssl x509 -fingerprint -sha256` prints.
    #[must_use]
    pub fn digest(&self) -> Sha256 {
        match (self.kind, <[u8; 32]>::try_from(self.data)) {
            (SignatureKind::ImageSha256, Ok(digest)) => Sha256(digest),
            _ => sha256(&[self.data]),
        }
    }
}

/// The entries of a variable's content. After an error it ends.
pub struct SignatureLists<'a> {
    content: Reader<'a>,
    list: Option<List<'a>>,
    failed: bool,
}

struct List<'a> {
    kind: SignatureKind,
    entries: &'a [u8],
    size: usize,
}

impl<'a> SignatureLists<'a> {
    /// Reads a variable's content.
    #[must_use]
    pub fn new(content: &'a [u8]) -> Self {
        Self { content: Reader::new(WHAT, content), list: None, failed: false }
    }

    fn step(&mut self) -> Result<Option<Signature<'a>>, Malformed> {
        loop {
            if let Some(list) = &mut self.list
                && let Some((entry, rest)) =
                    list.entries.split_at_checked(list.size).filter(|_| !list.entries.is_empty())
            {
                list.entries = rest;
                let (owner, data) = entry.split_at(16);
                let mut guid = Guid([0; 16]);
                guid.0.copy_from_slice(owner);
                return Ok(Some(Signature { kind: list.kind, owner: guid, data }));
            }
            if self.content.remaining() == 0 {
                return Ok(None);
            }
            self.list = Some(self.next_list()?);
        }
    }

    fn next_list(&mut self) -> Result<List<'a>, Malformed> {
        let r = &mut self.content;
        let kind = match Guid(r.array()?) {
            CERT_X509 => SignatureKind::Certificate,
            CERT_SHA256 => SignatureKind::ImageSha256,
            CERT_X509_SHA256 => SignatureKind::CertificateSha256,
            other => SignatureKind::Other(other),
        };
        let (list, header, size) = (r.u32_le()? as usize, r.u32_le()? as usize, r.u32_le()? as usize);
        let entries = list.checked_sub(LIST_HEAD).and_then(|rest| rest.checked_sub(header));
        let Some(entries) = entries.filter(|entries| size >= 16 && entries.is_multiple_of(size)) else {
            return Err(r.invalid("lengths contradict each other"));
        };
        r.take(header)?;
        Ok(List { kind, entries: r.take(entries)?, size })
    }
}

impl<'a> Iterator for SignatureLists<'a> {
    type Item = Result<Signature<'a>, Malformed>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.failed {
            return None;
        }
        let step = self.step();
        self.failed = step.is_err();
        step.transpose()
    }
}
