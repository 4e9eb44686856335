//! A bounded reader over bytes: every read is checked, the end is checked.

use crate::{Malformed, MalformedKind};

/// Reads fixed and length-prefixed fields from a slice, keeping the offset for errors.
pub(crate) struct Reader<'a> {
    what: &'static str,
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    pub(crate) fn new(what: &'static str, bytes: &'a [u8]) -> Self {
        Self { what, bytes, at: 0 }
    }

    pub(crate) fn at(&self) -> usize {
        self.at
    }

    pub(crate) fn remaining(&self) -> usize {
        self.bytes.len() - self.at
    }

    pub(crate) fn take(&mut self, len: usize) -> Result<&'a [u8], Malformed> {
        let end = self.at.checked_add(len).filter(|&end| end <= self.bytes.len());
        let Some(end) = end else {
            return Err(self.err(MalformedKind::Truncated));
        };
        let taken = &self.bytes[self.at..end];
        self.at = end;
        Ok(taken)
    }

    pub(crate) fn array<const N: usize>(&mut self) -> Result<[u8; N], Malformed> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N)?);
        Ok(out)
    }

    pub(crate) fn u8(&mut self) -> Result<u8, Malformed> {
        Ok(self.array::<1>()?[0])
    }

    pub(crate) fn u16_be(&mut self) -> Result<u16, Malformed> {
        Ok(u16::from_be_bytes(self.array()?))
    }

    pub(crate) fn u32_be(&mut self) -> Result<u32, Malformed> {
        Ok(u32::from_be_bytes(self.array()?))
    }

    pub(crate) fn u64_be(&mut self) -> Result<u64, Malformed> {
        Ok(u64::from_be_bytes(self.array()?))
    }

    pub(crate) fn u16_le(&mut self) -> Result<u16, Malformed> {
        Ok(u16::from_le_bytes(self.array()?))
    }

    pub(crate) fn u64_le(&mut self) -> Result<u64, Malformed> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    pub(crate) fn u32_le(&mut self) -> Result<u32, Malformed> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    /// A TPM2B: big-endian u16 length, then that many bytes, at most `limit`.
    pub(crate) fn tpm2b(&mut self, limit: usize) -> Result<&'a [u8], Malformed> {
        let len = usize::from(self.u16_be()?);
        self.limited(len, limit)
    }

    /// Little-endian u32 length, then that many bytes, at most `limit`.
    pub(crate) fn block_le(&mut self, limit: usize) -> Result<&'a [u8], Malformed> {
        let len = self.u32_le()? as usize;
        self.limited(len, limit)
    }

    fn limited(&mut self, len: usize, limit: usize) -> Result<&'a [u8], Malformed> {
        if len > limit {
            return Err(self.err(MalformedKind::TooLarge { limit }));
        }
        self.take(len)
    }

    pub(crate) fn end(&self) -> Result<(), Malformed> {
        match self.remaining() {
            0 => Ok(()),
            _ => Err(self.err(MalformedKind::Trailing)),
        }
    }

    pub(crate) fn err(&self, kind: MalformedKind) -> Malformed {
        Malformed::new(self.what, self.at, kind)
    }

    pub(crate) fn invalid(&self, why: &'static str) -> Malformed {
        self.err(MalformedKind::Invalid(why))
    }
}
