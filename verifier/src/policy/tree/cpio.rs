//! A cpio archive in the formats that an initramfs has, `newc` and `crc`
//! (Linux `Documentation/driver-api/early-userspace/buffer-format.rst`).
//!
//! A member is a header of 110 bytes, a magic and thirteen numbers of eight hexadecimal digits each; its name with a
//! NUL, padded so that header and name are a multiple of four; its content, padded likewise. The last is called
//! `TRAILER!!!`. Names of one inode, which have its number and a count of links over one, share the content, which
//! comes with only one of them.

use std::{
    collections::HashMap,
    io::{self, Read},
};

use onequote_evidence::digest::HashAlg;

use super::{FileHash, digests, members::Members};

/// The first bytes of a member.
pub(super) const MAGICS: [&[u8]; 2] = [b"070701", b"070702"];

const HEADER: usize = 110;

/// The longest name, with its NUL (`PATH_MAX`).
const MAX_NAME: u32 = 4096;

const TRAILER: &[u8] = b"TRAILER!!!";

/// File types in a mode (`S_IFMT`, `S_IFREG`, `S_IFLNK`).
const TYPE: u32 = 0o170_000;
const REGULAR: u32 = 0o100_000;
const LINK: u32 = 0o120_000;

/// Device numbers and inode.
type Inode = (u32, u32, u32);

/// A file with several names.
#[derive(Default)]
struct Shared {
    names: Vec<Vec<u8>>,
    content: Vec<FileHash>,
}

/// Why an archive cannot be read.
#[derive(Debug)]
pub(super) enum Error {
    Io(io::Error),
    Form(String),
}

impl From<io::Error> for Error {
    fn from(e: io::Error) -> Self {
        Self::Io(e)
    }
}

impl From<String> for Error {
    fn from(why: String) -> Self {
        Self::Form(why)
    }
}

struct Header {
    inode: Inode,
    mode: u32,
    links: u32,
    size: u32,
    name: u32,
}

/// Reads one archive up to its trailer and leaves `reader` behind it.
pub(super) fn read(reader: &mut dyn Read, algorithms: &[HashAlg], members: &mut Members) -> Result<(), Error> {
    let mut shared: HashMap<Inode, Shared> = HashMap::new();
    loop {
        let header = header(reader)?;
        let mut name = vec![0; header.name as usize];
        reader.read_exact(&mut name)?;
        skip(reader, padding(HEADER as u64 + u64::from(header.name)))?;
        match name.pop() {
            Some(0) if !name.contains(&0) => {}
            _ => return Err(Error::Form("a member's name does not end in its only NUL".into())),
        }
        if name == TRAILER {
            break;
        }
        let size = u64::from(header.size);
        match header.mode & TYPE {
            REGULAR => {
                let (hashes, read) = digests(&mut (&mut *reader).take(size), algorithms)?;
                if read != size {
                    return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
                }
                if header.links > 1 {
                    let file = shared.entry(header.inode).or_default();
                    file.names.push(name);
                    if size > 0 || file.content.is_empty() {
                        file.content = hashes;
                    }
                } else {
                    members.file(&name, hashes)?;
                }
            }
            LINK => {
                if header.size > MAX_NAME {
                    return Err(Error::Form("a symbolic link is too long".into()));
                }
                let mut target = vec![0; header.size as usize];
                reader.read_exact(&mut target)?;
                members.symbolic_link(&name, &target)?;
            }
            _ => {
                skip(reader, size)?;
                members.other(&name)?;
            }
        }
        skip(reader, padding(size))?;
    }
    for file in shared.into_values() {
        for name in &file.names {
            members.file(name, file.content.clone())?;
        }
    }
    Ok(())
}

fn header(reader: &mut dyn Read) -> Result<Header, Error> {
    let mut bytes = [0; HEADER];
    reader.read_exact(&mut bytes)?;
    if !MAGICS.contains(&&bytes[..6]) {
        return Err(Error::Form("a member does not begin as one".into()));
    }
    let mut numbers = [0; 13];
    for (number, digits) in numbers.iter_mut().zip(bytes[6..].chunks(8)) {
        let text = std::str::from_utf8(digits).ok().filter(|text| text.bytes().all(|c| c.is_ascii_hexdigit()));
        let value = text.and_then(|text| u32::from_str_radix(text, 16).ok());
        *number = value.ok_or_else(|| Error::Form("a number in a member's header is none".into()))?;
    }
    let [inode, mode, _, _, links, _, size, major, minor, _, _, name, _] = numbers;
    if name == 0 || name > MAX_NAME {
        return Err(Error::Form("a member's name is empty or too long".into()));
    }
    Ok(Header { inode: (major, minor, inode), mode, links, size, name })
}

/// Bytes up to the next multiple of four.
fn padding(size: u64) -> u64 {
    size.next_multiple_of(4) - size
}

fn skip(reader: &mut dyn Read, size: u64) -> io::Result<()> {
    let skipped = io::copy(&mut reader.take(size), &mut io::sink())?;
    if skipped == size { Ok(()) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
}
