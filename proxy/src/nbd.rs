//! Reading a dirty bitmap over NBD: as much of a client as that takes.
//!
//! QEMU tells a bitmap's content in one way only, as metadata of an NBD export (NBD `doc/proto.md`; QEMU
//! `docs/interop/nbd.txt`). Needed of the protocol is: the fixed newstyle handshake, structured replies, one metadata
//! context, and `NBD_CMD_BLOCK_STATUS`. No data is ever asked for.
//!
//! # Order
//! *greeting* → `STRUCTURED_REPLY` → `SET_META_CONTEXT` with one name → `GO` → `BLOCK_STATUS` from the export's start to its
//! end → `DISC`. Whatever else comes is an error, and who calls then reads the whole image.
//!
//! # Bounds
//! [`MAX_OPTION`] bytes of an option's answer, [`MAX_STATUS`] of a status, [`MAX_REQUESTS`] requests, each of which must
//! bring the reading on. How long a read may wait is the stream's own matter.
//!
//! This file needs nothing else of the proxy: the fuzz target has it as it is.

use std::{
    io::{self, Read, Write},
    ops::Range,
};

/// The longest answer to an option in bytes. QEMU's are far shorter.
const MAX_OPTION: u32 = 4096;

/// The longest answer to a request in bytes. QEMU tells at most 131,072 extents at a time, of 8 bytes each
/// (`nbd/server.c`, `NBD_MAX_BLOCK_STATUS_EXTENTS`).
const MAX_STATUS: u32 = 2 * 1024 * 1024;

/// The most requests for one bitmap.
const MAX_REQUESTS: u32 = 65_536;

/// The most answers to one option before its last.
const MAX_ANSWERS: u32 = 16;

/// Bytes that are asked about at a time: a length has 32 bits, and must be a multiple of the server's block size.
const STEP: u64 = 1 << 31;

const GREETING: u64 = u64::from_be_bytes(*b"NBDMAGIC");
const HAVE_OPTION: u64 = u64::from_be_bytes(*b"IHAVEOPT");
const OPTION_REPLY: u64 = 0x0003_e889_0455_65a9;
const REQUEST: u32 = 0x2560_9513;
const STRUCTURED: u32 = 0x668e_33ef;

/// `NBD_FLAG_FIXED_NEWSTYLE`, and the client's own.
const FIXED_NEWSTYLE: u16 = 1;
const OPT_GO: u32 = 7;
const OPT_STRUCTURED_REPLY: u32 = 8;
const OPT_SET_META_CONTEXT: u32 = 10;
const REP_ACK: u32 = 1;
const REP_INFO: u32 = 3;
const REP_META_CONTEXT: u32 = 4;
const INFO_EXPORT: u16 = 0;
const CMD_DISC: u16 = 2;
const CMD_BLOCK_STATUS: u16 = 7;
const REPLY_DONE: u16 = 1;
const REPLY_BLOCK_STATUS: u16 = 5;

/// `NBD_STATE_DIRTY` of QEMU's context.
const DIRTY: u32 = 1;

/// Why a bitmap could not be read.
#[derive(Debug, thiserror::Error)]
pub enum NbdError {
    /// The connection failed, or ended.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// The server says what the protocol, or the little of it that is understood here, does not have.
    #[error("the NBD server's {0}")]
    Unexpected(&'static str),
    /// The server refuses.
    #[error("the NBD server refuses {what}: error {code:#x}")]
    Refused {
        /// What was asked for.
        what: &'static str,
        /// Its code.
        code: u32,
    },
}

/// Tells `found` every dirty range of an export's bitmap, in ascending order, and gives the export's size in bytes. `context`
/// is `qemu:dirty-bitmap:NAME`. When it fails, what was found so far is worth nothing.
///
/// # Errors
/// [`NbdError`].
pub fn dirty_ranges(
    stream: &mut (impl Read + Write),
    export: &str,
    context: &str,
    mut found: impl FnMut(Range<u64>),
) -> Result<u64, NbdError> {
    let (size, context) = negotiate(stream, export, context)?;
    let mut at = 0;
    for cookie in 0..u64::from(MAX_REQUESTS) {
        if at >= size {
            return Ok(size);
        }
        request(stream, CMD_BLOCK_STATUS, cookie, at, (size - at).min(STEP))?;
        let mut end = at;
        for extent in status(stream, cookie, context)?.as_chunks::<8>().0 {
            let (length, flags) = (be32(extent, 0), be32(extent, 4));
            // The last one may reach beyond what was asked for, but nothing is beyond the end.
            let next = end.saturating_add(length.into()).min(size);
            if flags & DIRTY != 0 && next > end {
                found(end..next);
            }
            end = next;
        }
        if end == at {
            return Err(NbdError::Unexpected("status tells of nothing"));
        }
        at = end;
    }
    if at >= size { Ok(size) } else { Err(NbdError::Unexpected("statuses do not come to an end")) }
}

/// Says goodbye. The server ends without it, too.
pub fn disconnect(stream: &mut (impl Read + Write)) {
    // Whatever becomes of it, nothing more is read.
    let _ = request(stream, CMD_DISC, 0, 0, 0);
}

/// The export's size and the context's number.
fn negotiate(stream: &mut (impl Read + Write), export: &str, context: &str) -> Result<(u64, u32), NbdError> {
    let greeting: [u8; 18] = read(stream)?;
    if be64(&greeting, 0) != GREETING || be64(&greeting, 8) != HAVE_OPTION {
        return Err(NbdError::Unexpected("greeting is not that of the newstyle handshake"));
    }
    if u16::from_be_bytes([greeting[16], greeting[17]]) & FIXED_NEWSTYLE == 0 {
        return Err(NbdError::Unexpected("handshake is too old"));
    }
    stream.write_all(&u32::from(FIXED_NEWSTYLE).to_be_bytes())?;

    option(stream, OPT_STRUCTURED_REPLY, &[])?;
    let (kind, data) = answer(stream, OPT_STRUCTURED_REPLY)?;
    acknowledged(kind, &data, "structured replies")?;

    let mut wish = text(export)?;
    wish.extend(1_u32.to_be_bytes());
    wish.extend(text(context)?);
    option(stream, OPT_SET_META_CONTEXT, &wish)?;
    let (kind, data) = answer(stream, OPT_SET_META_CONTEXT)?;
    if kind != REP_META_CONTEXT {
        // Acknowledged without a context: there is none of that name.
        acknowledged(kind, &data, "the bitmap")?;
        return Err(NbdError::Unexpected("export has no such bitmap"));
    }
    if data.get(4..) != Some(context.as_bytes()) {
        return Err(NbdError::Unexpected("context is not the one that was asked for"));
    }
    let number = be32(&data, 0);
    let (kind, data) = answer(stream, OPT_SET_META_CONTEXT)?;
    acknowledged(kind, &data, "the bitmap")?;

    let mut wish = text(export)?;
    wish.extend(0_u16.to_be_bytes());
    option(stream, OPT_GO, &wish)?;
    let mut size = None;
    for _ in 0..MAX_ANSWERS {
        let (kind, data) = answer(stream, OPT_GO)?;
        match (kind, data.as_slice()) {
            (REP_INFO, [a, b, rest @ ..]) if u16::from_be_bytes([*a, *b]) == INFO_EXPORT && rest.len() == 10 => {
                size = Some(be64(rest, 0));
            }
            (REP_INFO, [_, _, ..]) => {}
            _ => {
                acknowledged(kind, &data, "the export")?;
                return Ok((size.ok_or(NbdError::Unexpected("export has no size"))?, number));
            }
        }
    }
    Err(NbdError::Unexpected("answers to an option do not come to an end"))
}

fn text(text: &str) -> Result<Vec<u8>, NbdError> {
    let length = u32::try_from(text.len()).ok().filter(|&length| length <= MAX_OPTION);
    let length = length.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
    Ok([&length.to_be_bytes()[..], text.as_bytes()].concat())
}

fn option(stream: &mut impl Write, option: u32, data: &[u8]) -> io::Result<()> {
    let length = u32::try_from(data.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    let head = [&HAVE_OPTION.to_be_bytes()[..], &option.to_be_bytes(), &length.to_be_bytes(), data].concat();
    stream.write_all(&head)
}

/// Kind and data of one answer to an option.
fn answer(stream: &mut impl Read, option: u32) -> Result<(u32, Vec<u8>), NbdError> {
    let head: [u8; 20] = read(stream)?;
    if be64(&head, 0) != OPTION_REPLY || be32(&head, 8) != option {
        return Err(NbdError::Unexpected("answer is to no option that was given"));
    }
    let data = body(stream, be32(&head, 16), MAX_OPTION)?;
    Ok((be32(&head, 12), data))
}

fn acknowledged(kind: u32, data: &[u8], what: &'static str) -> Result<(), NbdError> {
    match kind {
        REP_ACK if data.is_empty() => Ok(()),
        code if code >> 31 == 1 => Err(NbdError::Refused { what, code }),
        _ => Err(NbdError::Unexpected("answer to an option is of another kind")),
    }
}

fn request(stream: &mut impl Write, command: u16, cookie: u64, at: u64, length: u64) -> io::Result<()> {
    let length = u32::try_from(length).map_err(|_| io::ErrorKind::InvalidInput)?;
    let flags = 0_u16;
    let request = [
        &REQUEST.to_be_bytes()[..],
        &flags.to_be_bytes(),
        &command.to_be_bytes(),
        &cookie.to_be_bytes(),
        &at.to_be_bytes(),
        &length.to_be_bytes(),
    ];
    stream.write_all(&request.concat())
}

/// The extents of one status: one chunk, maybe an empty one behind it.
fn status(stream: &mut impl Read, cookie: u64, context: u32) -> Result<Vec<u8>, NbdError> {
    let mut extents = None;
    loop {
        let head: [u8; 20] = read(stream)?;
        if be32(&head, 0) != STRUCTURED || be64(&head, 8) != cookie {
            return Err(NbdError::Unexpected("reply is none to the request"));
        }
        let (flags, kind) = (u16::from_be_bytes([head[4], head[5]]), u16::from_be_bytes([head[6], head[7]]));
        let data = body(stream, be32(&head, 16), MAX_STATUS)?;
        let done = flags & REPLY_DONE != 0;
        match kind {
            0 if done && data.is_empty() => {}
            REPLY_BLOCK_STATUS if extents.is_none() && data.len() % 8 == 4 && be32(&data, 0) == context => {
                extents = Some(data[4..].to_vec());
            }
            kind if kind >> 15 == 1 && data.len() >= 4 => {
                return Err(NbdError::Refused { what: "a status", code: be32(&data, 0) });
            }
            _ => return Err(NbdError::Unexpected("reply is of another kind")),
        }
        if done {
            return extents.ok_or(NbdError::Unexpected("reply has no status"));
        }
    }
}

fn read<const N: usize>(stream: &mut impl Read) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    stream.read_exact(&mut bytes)?;
    Ok(bytes)
}

fn body(stream: &mut impl Read, length: u32, most: u32) -> Result<Vec<u8>, NbdError> {
    if length > most {
        return Err(NbdError::Unexpected("message is too long"));
    }
    let mut data = Vec::new();
    stream.take(length.into()).read_to_end(&mut data)?;
    if data.len() as u64 == u64::from(length) {
        Ok(data)
    } else {
        Err(io::Error::from(io::ErrorKind::UnexpectedEof).into())
    }
}

/// Four bytes of what is known to be long enough; zeros count for bytes that are not there.
fn be32(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_be_bytes)
}

fn be64(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..at + 8).and_then(|b| b.try_into().ok()).map_or(0, u64::from_be_bytes)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const CONTEXT: &str = "qemu:dirty-bitmap:b";

    /// A server that says its lines whatever it is told.
    struct Said<'a> {
        lines: &'a [u8],
        heard: Vec<u8>,
    }

    impl Read for Said<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            self.lines.read(buffer)
        }
    }

    impl Write for Said<'_> {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.heard.extend(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn reply(option: u32, kind: u32, data: &[u8]) -> Vec<u8> {
        let length = u32::try_from(data.len()).unwrap().to_be_bytes();
        [&OPTION_REPLY.to_be_bytes()[..], &option.to_be_bytes(), &kind.to_be_bytes(), &length, data].concat()
    }

    fn chunk(cookie: u64, flags: u16, kind: u16, data: &[u8]) -> Vec<u8> {
        let length = u32::try_from(data.len()).unwrap().to_be_bytes();
        let (flags, kind) = (flags.to_be_bytes(), kind.to_be_bytes());
        [&STRUCTURED.to_be_bytes()[..], &flags, &kind, &cookie.to_be_bytes(), &length, data].concat()
    }

    fn extents(extents: &[(u32, u32)]) -> Vec<u8> {
        let extents = extents.iter().flat_map(|(length, flags)| [length.to_be_bytes(), flags.to_be_bytes()].concat());
        7_u32.to_be_bytes().into_iter().chain(extents).collect()
    }

    fn handshake(size: u64) -> Vec<u8> {
        let context = [&7_u32.to_be_bytes()[..], CONTEXT.as_bytes()].concat();
        let export = [&[0, 0][..], &size.to_be_bytes(), &[0, 3]].concat();
        [
            [&b"NBDMAGICIHAVEOPT"[..], &[0, 3]].concat(),
            reply(OPT_STRUCTURED_REPLY, REP_ACK, &[]),
            reply(OPT_SET_META_CONTEXT, REP_META_CONTEXT, &context),
            reply(OPT_SET_META_CONTEXT, REP_ACK, &[]),
            // A block size, which nobody needs.
            reply(OPT_GO, REP_INFO, &[0, 3, 0, 0, 0, 1]),
            reply(OPT_GO, REP_INFO, &export),
            reply(OPT_GO, REP_ACK, &[]),
        ]
        .concat()
    }

    fn ask(lines: &[u8]) -> Result<(u64, Vec<Range<u64>>), NbdError> {
        let (mut ranges, mut said) = (Vec::new(), Said { lines, heard: Vec::new() });
        let size = dirty_ranges(&mut said, "x", CONTEXT, |range| ranges.push(range))?;
        Ok((size, ranges))
    }

    #[test]
    fn dirty_ranges_are_told_in_order() {
        let first = chunk(0, 0, REPLY_BLOCK_STATUS, &extents(&[(10, 0), (20, 1)]));
        let second = chunk(1, REPLY_DONE, REPLY_BLOCK_STATUS, &extents(&[(5, 1), (100, 0), (1000, 1)]));
        let lines = [handshake(200), first, chunk(0, REPLY_DONE, 0, &[]), second].concat();
        assert_eq!(ask(&lines).unwrap(), (200, vec![10..30, 30..35, 135..200]));
        assert_eq!(ask(&handshake(0)).unwrap(), (0, Vec::new()));
        // Every shorter one is an error, and none hangs.
        for end in 0..lines.len() {
            assert!(matches!(ask(&lines[..end]), Err(NbdError::Io(_))), "{end}");
        }
    }

    #[test]
    fn what_the_protocol_does_not_have_is_an_error() {
        let status = |cookie, flags, kind, data: &[u8]| ask(&[handshake(9), chunk(cookie, flags, kind, data)].concat());
        let good = extents(&[(4, 1), (5, 1)]);
        assert_eq!(status(0, 1, 5, &good).unwrap().1, [0..4, 4..9]);
        for wrong in [
            status(1, 1, 5, &good),
            status(0, 1, 5, &good[..8]),
            status(0, 1, 5, &extents(&[])),
            status(0, 1, 5, &extents(&[(0, 1)])),
            status(0, 1, 1, &good),
            status(0, 1, 0, &[]),
            status(0, 1, 5, &[&9_u32.to_be_bytes()[..], &good[4..]].concat()),
        ] {
            assert!(matches!(wrong, Err(NbdError::Unexpected(_))), "{wrong:?}");
        }
        let refused = status(0, 1, 0x8001, &[0, 0, 0, 22, 0, 0]);
        assert!(matches!(refused, Err(NbdError::Refused { code: 22, .. })), "{refused:?}");
        let hello = [&b"NBDMAGICIHAVEOPT"[..], &[0, 1]].concat();
        let refused = ask(&[hello.clone(), reply(8, 0x8000_0001, b"no")].concat());
        assert!(matches!(refused, Err(NbdError::Refused { .. })), "{refused:?}");
        let none = ask(&[hello, reply(8, 1, &[]), reply(10, 1, &[])].concat());
        assert!(none.unwrap_err().to_string().contains("no such bitmap"));
        let mut long = reply(8, 1, &[]);
        long[16..20].copy_from_slice(&u32::MAX.to_be_bytes());
        assert!(ask(&[&b"NBDMAGICIHAVEOPT"[..], &[0, 1], &long].concat()).unwrap_err().to_string().contains("long"));
    }

    proptest! {
        #[test]
        fn no_server_makes_it_fall(at in 0_usize..300, bytes in prop::collection::vec(any::<u8>(), 0..40)) {
            let mut lines =
                [handshake(200), chunk(0, 1, REPLY_BLOCK_STATUS, &extents(&[(200, 1)]))].concat();
            let at = at.min(lines.len());
            let end = (at + bytes.len()).min(lines.len());
            lines.splice(at..end, bytes);
            if let Ok((size, ranges)) = ask(&lines) {
                prop_assert!(ranges.iter().all(|r| r.start < r.end && r.end <= size));
            }
        }
    }
}
