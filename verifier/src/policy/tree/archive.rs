//! A file: a tar archive, or the cpio segments of an initramfs, as it is or compressed with gzip or Zstandard.

use std::{
    fs::File,
    io::{self, BufRead, BufReader, Read},
    path::Path,
};

use onequote_evidence::digest::HashAlg;

use super::{
    Files, TreeError,
    cpio::{self, Error},
    digests,
    members::Members,
};

/// Where a tar header has its magic, and the magic.
const USTAR: (usize, &[u8]) = (257, b"ustar");

const GZIP: &[u8] = &[0x1f, 0x8b];
const ZSTD: &[u8] = &[0x28, 0xb5, 0x2f, 0xfd];

/// Compressions that are refused by name.
const OTHERS: [(&[u8], &str); 4] =
    [(b"\xfd7zXZ\0", "xz"), (b"BZh", "bzip2"), (b"\x02\x21\x4c\x18", "lz4"), (b"\x04\x22\x4d\x18", "lz4")];

const READ_AHEAD: usize = 256 * 1024;

/// Digests of the files in an archive.
pub(super) fn files(path: &Path, algorithms: &[HashAlg]) -> Result<Files, TreeError> {
    let read = || {
        let mut reader = BufReader::with_capacity(READ_AHEAD, File::open(path)?);
        let mut members = Members::default();
        layer(&mut reader, algorithms, &mut members, true)?;
        Ok(members.files()?)
    };
    read().map_err(|e| match e {
        Error::Io(source) => TreeError::Read { path: path.to_owned(), source },
        Error::Form(why) => TreeError::Archive { path: path.to_owned(), why },
    })
}

/// Reads what is in `reader`, which may be compressed where `outer`.
fn layer(reader: &mut dyn BufRead, algorithms: &[HashAlg], members: &mut Members, outer: bool) -> Result<(), Error> {
    let mut any = false;
    loop {
        // Between the segments of an initramfs there may be zeros, and after the last of any archive.
        let mut start = skip_zeros(reader)?;
        if start.is_empty() {
            return if any { Ok(()) } else { Err(Error::Form("it is empty".into())) };
        }
        if cpio::MAGICS.iter().any(|magic| start.starts_with(magic)) {
            cpio::read(&mut Started { start: &mut start, rest: reader }, algorithms, members)?;
        } else if outer && start.starts_with(GZIP) {
            let started = BufReader::new(Started { start: &mut start, rest: reader });
            let mut plain = BufReader::with_capacity(READ_AHEAD, flate2::bufread::MultiGzDecoder::new(started));
            return layer(&mut plain, algorithms, members, false);
        } else if outer && start.starts_with(ZSTD) {
            let started = BufReader::new(Started { start: &mut start, rest: reader });
            let mut plain = BufReader::with_capacity(READ_AHEAD, zstd::Decoder::with_buffer(started)?);
            return layer(&mut plain, algorithms, members, false);
        } else if let Some((_, name)) = OTHERS.iter().find(|(magic, _)| outer && start.starts_with(magic)) {
            return Err(Error::Form(format!("{name} is not read: unpack it first")));
        } else {
            fill(reader, &mut start, USTAR.0 + USTAR.1.len())?;
            if any || !start.get(USTAR.0..).is_some_and(|rest| rest.starts_with(USTAR.1)) {
                let why = "neither a folder, nor a tar archive, nor an initramfs: mount an image of a file system \
                           read-only (mount -o loop,ro IMAGE FOLDER) and give the folder";
                return Err(Error::Form(why.into()));
            }
            return tar(&mut Started { start: &mut start, rest: reader }, algorithms, members);
        }
        any = true;
    }
}

fn tar(reader: &mut dyn Read, algorithms: &[HashAlg], members: &mut Members) -> Result<(), Error> {
    let mut archive = tar::Archive::new(reader);
    for entry in archive.entries()? {
        let mut entry = entry?;
        let name = entry.path_bytes().into_owned();
        let kind = entry.header().entry_type();
        if kind.is_file() || kind.is_contiguous() || kind.is_gnu_sparse() {
            let (hashes, size) = digests(&mut entry, algorithms)?;
            if !kind.is_gnu_sparse() && size != entry.size() {
                return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
            }
            members.file(&name, hashes)?;
        } else if kind.is_hard_link() || kind.is_symlink() {
            let target = entry.link_name_bytes();
            let target =
                target.ok_or_else(|| Error::Form(format!("{} links to nothing", String::from_utf8_lossy(&name))))?;
            if kind.is_symlink() {
                members.symbolic_link(&name, &target)?;
            } else {
                members.hard_link(&name, &target)?;
            }
        } else if !(kind.is_pax_global_extensions() || kind.is_pax_local_extensions()) {
            members.other(&name)?;
        }
    }
    Ok(())
}

/// The first bytes after zeros, at least six unless the input ends before.
fn skip_zeros(reader: &mut dyn BufRead) -> io::Result<Vec<u8>> {
    loop {
        let buffer = reader.fill_buf()?;
        if buffer.is_empty() {
            return Ok(Vec::new());
        }
        let zeros = buffer.iter().take_while(|&&byte| byte == 0).count();
        let found = zeros < buffer.len();
        reader.consume(zeros);
        if found {
            break;
        }
    }
    let mut start = Vec::new();
    fill(reader, &mut start, 6)?;
    Ok(start)
}

/// Reads on until `start` has `size` bytes or the input ends.
fn fill(reader: &mut dyn BufRead, start: &mut Vec<u8>, size: usize) -> io::Result<()> {
    reader.take(size.saturating_sub(start.len()) as u64).read_to_end(start)?;
    Ok(())
}

/// A reader, some of which was read before.
struct Started<'a> {
    start: &'a mut Vec<u8>,
    rest: &'a mut dyn BufRead,
}

impl Read for Started<'_> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        if self.start.is_empty() {
            return self.rest.read(out);
        }
        let n = out.len().min(self.start.len());
        out[..n].copy_from_slice(&self.start[..n]);
        self.start.drain(..n);
        Ok(n)
    }
}
