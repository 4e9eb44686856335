//! Template data: what an entry says was measured.
//!
//! Fields of all templates but `ima` are blocks of u32 little-endian length and bytes
//! (Linux `ima_template_lib.c`): `d-ng` algorithm name ‖ `:` ‖ NUL ‖ digest; `d-ngv2` the same after `ima:` or
//! `verity:`; `n-ng` path ‖ NUL; `sig` the file's `security.ima` signature or nothing; `buf` the measured buffer;
//! `d-modsig` as `d-ng`; `modsig` a PKCS #7 signature; those of `evm-sig` the file's metadata.

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
    /// `ima-ngv2`: digest with its kind, and path.
    ImaNgV2,
    /// `ima-sig`: digest, path, signature.
    ImaSig,
    /// `ima-sigv2`: digest with its kind, path, signature.
    ImaSigV2,
    /// `ima-buf`: digest, name, buffer.
    ImaBuf,
    /// `ima-modsig`: digest, path, signature, appended-signature digest, appended signature.
    ImaModsig,
    /// `evm-sig`: digest, path, a portable signature of EVM, and the metadata that it signs.
    EvmSig,
}

/// The template fields that we read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Field {
    /// `d-ng`, `d-ngv2`: the data tell which.
    Digest,
    /// `n-ng`.
    Name,
    /// `sig`, `evmsig`.
    Signature,
    /// `buf`.
    Buffer,
    /// `d-modsig`.
    ModsigDigest,
    /// `modsig`.
    Modsig,
    /// `xattrnames`, `xattrlengths`, `xattrvalues`, `iuid`, `igid`, `imode`.
    Metadata,
}

impl Template {
    /// The template of a name as listed.
    #[must_use]
    pub fn from_name(name: &[u8]) -> Option<Self> {
        Some(match name {
            b"ima" => Self::Ima,
            b"ima-ng" => Self::ImaNg,
            b"ima-ngv2" => Self::ImaNgV2,
            b"ima-sig" => Self::ImaSig,
            b"ima-sigv2" => Self::ImaSigV2,
            b"ima-buf" => Self::ImaBuf,
            b"ima-modsig" => Self::ImaModsig,
            b"evm-sig" => Self::EvmSig,
            _ => return None,
        })
    }

    fn fields(self) -> &'static [Field] {
        use Field::{Buffer, Digest, Metadata, Modsig, ModsigDigest, Name, Signature};
        match self {
            // It has a layout of its own.
            Self::Ima => &[],
            Self::ImaNg | Self::ImaNgV2 => &[Digest, Name],
            Self::ImaSig | Self::ImaSigV2 => &[Digest, Name, Signature],
            Self::ImaBuf => &[Digest, Name, Buffer],
            Self::ImaModsig => &[Digest, Name, Signature, ModsigDigest, Modsig],
            Self::EvmSig => &[Digest, Name, Signature, Metadata, Metadata, Metadata, Metadata, Metadata, Metadata],
        }
    }
}

/// What a file's digest is of. Read from the data and not from the template's name, which is not extended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum DigestKind {
    /// The entry does not tell: of the file's bytes, or its fs-verity digest where the kernel's IMA policy says
    /// `digest_type=verity`.
    Untold,
    /// `ima`: of the file's bytes.
    File,
    /// `verity`: its fs-verity digest.
    Verity,
}

/// The fields of an entry's template data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fields<'a> {
    /// Which template it was.
    pub template: Template,
    /// What the digest is of.
    pub digest_kind: DigestKind,
    /// Algorithm of the file digest, as named in the data; `sha1` for the legacy template.
    pub digest_alg: &'a str,
    /// Digest of the file or buffer. Zeros for a violation.
    pub digest: &'a [u8],
    /// The path, or the name of what was measured (`boot_aggregate`, `kexec-cmdline`), without NUL. The kernel lists
    /// an underscore for each space in it.
    pub path: &'a [u8],
    /// The signature of the templates with one, see [`super::FileSignature`]; empty when the file has none.
    pub signature: &'a [u8],
    /// The buffer of `ima-buf`.
    pub buffer: Option<&'a [u8]>,
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

    /// Whether `digest` is that of `buffer`; none when there is no buffer, or the algorithm is not one of ours.
    #[must_use]
    pub fn buffer_matches(&self) -> Option<bool> {
        let alg: HashAlg = self.digest_alg.parse().ok()?;
        Some(alg.hash(self.buffer?) == self.digest)
    }
}

pub(super) fn fields<'a>(name: &[u8], data: &'a [u8]) -> Result<Fields<'a>, Malformed> {
    let Some(template) = Template::from_name(name) else {
        return Err(Malformed::invalid(WHAT, 0, "unknown template"));
    };
    let mut r = Reader::new(WHAT, data);
    let mut fields = Fields {
        template,
        digest_kind: DigestKind::Untold,
        digest_alg: "sha1",
        digest: &[],
        path: &[],
        signature: &[],
        buffer: None,
        modsig_digest: None,
        modsig: &[],
    };
    if template == Template::Ima {
        fields.digest = r.take(SHA1_HASH_SIZE)?;
        fields.path = without_nul(r.block_le(LEGACY_PATH_MAX + 1)?);
        if fields.path.contains(&0) {
            return Err(r.invalid("NUL in a path"));
        }
    }
    for field in template.fields() {
        match field {
            Field::Digest => {
                let block = r.block_le(MAX_DIGEST)?;
                (fields.digest_kind, fields.digest_alg, fields.digest) = digest(&r, block)?;
            }
            Field::Name => fields.path = path(&mut r)?,
            Field::Signature => fields.signature = r.block_le(MAX_DATA)?,
            Field::Buffer => fields.buffer = Some(r.block_le(MAX_DATA)?),
            // A file without an appended signature has both of these empty.
            Field::ModsigDigest => {
                let block = r.block_le(MAX_DIGEST)?;
                if !block.is_empty() {
                    let (_, alg, value) = digest(&r, block)?;
                    fields.modsig_digest = Some((alg, value));
                }
            }
            Field::Modsig => fields.modsig = r.block_le(MAX_DATA)?,
            Field::Metadata => {
                r.block_le(MAX_DATA)?;
            }
        }
    }
    r.end()?;
    Ok(fields)
}

/// The longest field with a digest: kind, algorithm, colons, NUL, value.
const MAX_DIGEST: usize = 256;

/// `d-ng`: algorithm name, colon, NUL, digest; `d-ngv2` has the kind and a colon before. The digest's size must be that
/// of the algorithm where we know it, but for a violation: some kernels since 5.18 name the default algorithm there and
/// list 20 zeros (`ima_template_lib.c`, `ima_eventdigest_init_common`, from Linux commit 09091c44cb73 until it was
/// corrected).
fn digest<'a>(r: &Reader<'_>, field: &'a [u8]) -> Result<(DigestKind, &'a str, &'a [u8]), Malformed> {
    let Some(end) = field.windows(2).position(|pair| pair == b":\0") else {
        return Err(r.invalid("digest without algorithm"));
    };
    let words = std::str::from_utf8(&field[..end]).map_err(|_| r.invalid("algorithm name is not UTF-8"))?;
    let (kind, alg) = match words.split_once(':') {
        None => (DigestKind::Untold, words),
        Some(("ima", alg)) => (DigestKind::File, alg),
        Some(("verity", alg)) => (DigestKind::Verity, alg),
        Some(_) => return Err(r.invalid("a digest of an unknown kind")),
    };
    let digest = &field[end + 2..];
    if alg.is_empty() || !alg.bytes().all(|c| c.is_ascii_alphanumeric() || c == b'-' || c == b'_') {
        return Err(r.invalid("algorithm name is not a word"));
    }
    let violation = digest == [0; SHA1_HASH_SIZE];
    if !violation && alg.parse::<HashAlg>().is_ok_and(|known| known.size() != digest.len()) {
        return Err(r.invalid("digest size is not that of its algorithm"));
    }
    Ok((kind, alg, digest))
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
