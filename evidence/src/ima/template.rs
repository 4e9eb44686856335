//! Template data: what an entry says was measured.
//!
//! Fields of all templates but `ima` are blocks of u32 little-endian length and bytes
//! (Linux `ima_template_lib.c`): `d-ng` algorithm name ‖ `:` ‖ NUL ‖ digest; `n-ng` path ‖ NUL; `sig` the file's
//! `security.ima` signature or nothing; `buf` the measured buffer; `d-modsig` as `d-ng`; `modsig` a PKCS #7 signature.

use crate::{Malformed, digest::HashAlg, reader::Reader};

use super::{LEGACY_PATH_MAX, MAX_DATA, SHA1_HASH_SIZE};

const WHAT: &str = "IMA template data";

/// The templates whose data we read (Linux `ima_template.c`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Template {
    /// `ima`: SHA-1 digest and path, in fixed layout. (With `ima_hash=md5` the kernel lists 16 bytes of digest without
    /// a length; such a list cannot be told from a damaged one and is not read.)
    Ima,
    /// `ima-ng`: digest and path.
    ImaNg,
    /// `ima-sig`: digest, path, signature.
    ImaSig,
    /// `ima-buf`: digest, name, buffer.
    ImaBuf,
    /// `ima-modsig`: digest, path, signature, appended-signature digest, appended signature.
    ImaModsig,
}

impl Template {
    /// The template of a name as listed.
    #[must_use]
    pub fn from_name(name: &[u8]) -> Option<Self> {
        Some(match name {
            b"ima" => Self::Ima,
            b"ima-ng" => Self::ImaNg,
            b"ima-sig" => Self::ImaSig,
            b"ima-buf" => Self::ImaBuf,
            b"ima-modsig" => Self::ImaModsig,
            _ => return None,
        })
    }
}

/// The fields of an entry's template data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fields<'a> {
    /// Which template it was.
    pub template: Template,
    /// Algorithm of the file digest, as named in the data; `sha1` for the legacy template.
    pub digest_alg: &'a str,
    /// Digest of the file or buffer. Zeros for a violation.
    pub digest: &'a [u8],
    /// The path, or the name of what was measured (`boot_aggregate`, `kexec-cmdline`), without NUL. The kernel lists
    /// an underscore for each space in it.
    pub path: &'a [u8],
    /// The signature of `ima-sig` and `ima-modsig`; empty when the file has none.
    pub signature: &'a [u8],
    /// The buffer of `ima-buf`.
    pub buffer: &'a [u8],
    /// The digest without the appended signature, of `ima-modsig`: algorithm and value.
    pub modsig_digest: Option<(&'a str, &'a [u8])>,
    /// The appended signature of `ima-modsig`.
    pub modsig: &'a [u8],
}

impl Fields<'_> {
    /// The path for people: bytes that are not UTF-8 are replaced, control characters escaped, so that a file's name
    /// cannot rewrite the screen that it is shown on.
    #[must_use]
    pub fn path_lossy(&self) -> String {
        let mut out = String::with_capacity(self.path.len());
        for c in String::from_utf8_lossy(self.path).chars() {
            if c.is_control() { out.extend(c.escape_default()) } else { out.push(c) }
        }
        out
    }
}

pub(super) fn fields<'a>(name: &[u8], data: &'a [u8]) -> Result<Fields<'a>, Malformed> {
    let Some(template) = Template::from_name(name) else {
        return Err(Malformed::invalid(WHAT, 0, "unknown template"));
    };
    let mut r = Reader::new(WHAT, data);
    let mut fields = Fields {
        template,
        digest_alg: "sha1",
        digest: &[],
        path: &[],
        signature: &[],
        buffer: &[],
        modsig_digest: None,
        modsig: &[],
    };
    if template == Template::Ima {
        fields.digest = r.take(SHA1_HASH_SIZE)?;
        fields.path = without_nul(r.block_le(LEGACY_PATH_MAX + 1)?);
        if fields.path.contains(&0) {
            return Err(r.invalid("NUL in a path"));
        }
        r.end()?;
        return Ok(fields);
    }
    (fields.digest_alg, fields.digest) = algorithm_and_digest(&mut r)?;
    fields.path = path(&mut r)?;
    match template {
        Template::Ima | Template::ImaNg => {}
        Template::ImaSig => fields.signature = r.block_le(MAX_DATA)?,
        Template::ImaBuf => fields.buffer = r.block_le(MAX_DATA)?,
        Template::ImaModsig => {
            fields.signature = r.block_le(MAX_DATA)?;
            // A file without an appended signature has both of these empty.
            let before = r.at();
            if r.block_le(MAX_DATA)?.is_empty() {
                fields.modsig = r.block_le(MAX_DATA)?;
            } else {
                r = Reader::new(WHAT, data);
                r.take(before)?;
                fields.modsig_digest = Some(algorithm_and_digest(&mut r)?);
                fields.modsig = r.block_le(MAX_DATA)?;
            }
        }
    }
    r.end()?;
    Ok(fields)
}

/// `d-ng`: algorithm name, colon, NUL, digest. The digest's size must be that of the algorithm where we know it, but
/// for a violation: some kernels since 5.18 name the default algorithm there and list 20 zeros
/// (`ima_template_lib.c`, `ima_eventdigest_init_common`, from Linux commit 09091c44cb73 until it was corrected).
fn algorithm_and_digest<'a>(r: &mut Reader<'a>) -> Result<(&'a str, &'a [u8]), Malformed> {
    let field = r.block_le(256)?;
    let Some(end) = field.windows(2).position(|pair| pair == b":\0") else {
        return Err(r.invalid("digest without algorithm"));
    };
    let alg = std::str::from_utf8(&field[..end]).map_err(|_| r.invalid("algorithm name is not UTF-8"))?;
    let digest = &field[end + 2..];
    if alg.is_empty() || !alg.bytes().all(|c| c.is_ascii_alphanumeric() || c == b'-' || c == b'_') {
        return Err(r.invalid("algorithm name is not a word"));
    }
    let violation = digest == [0; SHA1_HASH_SIZE];
    if !violation && alg.parse::<HashAlg>().is_ok_and(|known| known.size() != digest.len()) {
        return Err(r.invalid("digest size is not that of its algorithm"));
    }
    Ok((alg, digest))
}

/// `n-ng`: path with its NUL.
fn path<'a>(r: &mut Reader<'a>) -> Result<&'a [u8], Malformed> {
    let field = r.block_le(MAX_DATA)?;
    match field.split_last() {
        Some((0, path)) if !path.contains(&0) => Ok(path),
        _ => Err(r.invalid("path does not end in its only NUL")),
    }
}

/// The legacy template's path: some writers count the NUL in the length, the kernel does not.
pub(super) fn without_nul(path: &[u8]) -> &[u8] {
    path.strip_suffix(&[0]).unwrap_or(path)
}
