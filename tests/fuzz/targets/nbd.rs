//! An NBD server's words: whatever they are, ranges come in order and lie within the export.
#![no_main]

use std::io::{self, Read, Write};

use libfuzzer_sys::fuzz_target;

#[allow(dead_code)]
#[path = "../../../proxy/src/nbd.rs"]
mod nbd;

/// What a server says, whatever it is told.
struct Said<'a>(&'a [u8]);

impl Read for Said<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read(buffer)
    }
}

impl Write for Said<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The handshake of a good server with an export of 1 GiB: inputs that begin with 1 are what comes behind it.
fn handshake() -> Vec<u8> {
    let reply = |option: u32, kind: u32, data: &[u8]| {
        let length = data.len() as u32;
        let words = [option, kind, length].map(u32::to_be_bytes).concat();
        [&0x0003_e889_0455_65a9_u64.to_be_bytes()[..], &words, data].concat()
    };
    let context = [&7_u32.to_be_bytes()[..], b"qemu:dirty-bitmap:b"].concat();
    let export = [&[0, 0][..], &(1_u64 << 30).to_be_bytes(), &[0, 3]].concat();
    let hello = [&b"NBDMAGICIHAVEOPT"[..], &[0, 3]].concat();
    [hello, reply(8, 1, &[]), reply(10, 4, &context), reply(10, 1, &[]), reply(7, 3, &export), reply(7, 1, &[])].concat()
}

fuzz_target!(|data: &[u8]| {
    let said = match data.split_first() {
        Some((1, rest)) => [&handshake(), rest].concat(),
        _ => data.to_vec(),
    };
    let (mut end, mut bytes) = (0, 0);
    let read = nbd::dirty_ranges(&mut Said(&said), "x", "qemu:dirty-bitmap:b", |range| {
        assert!(range.start >= end && range.start < range.end);
        end = range.end;
        bytes += range.end - range.start;
    });
    if let Ok(size) = read {
        assert!(end <= size && bytes <= size);
    }
});
