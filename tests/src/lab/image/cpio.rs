//! A cpio archive in the "newc" format (Linux, `Documentation/driver-api/early-userspace/buffer-format.rst`), the same
//! bytes for the same members: owner root, time zero, inode numbers in order.

/// An archive being written.
#[derive(Default)]
pub(crate) struct Archive {
    bytes: Vec<u8>,
    members: u32,
}

impl Archive {
    pub(crate) fn folder(&mut self, path: &str) {
        self.member(path, 0o040_755, &[], (0, 0));
    }

    pub(crate) fn program(&mut self, path: &str, content: &[u8]) {
        self.member(path, 0o100_755, content, (0, 0));
    }

    pub(crate) fn file(&mut self, path: &str, content: &[u8]) {
        self.member(path, 0o100_644, content, (0, 0));
    }

    pub(crate) fn link(&mut self, path: &str, target: &str) {
        self.member(path, 0o120_777, target.as_bytes(), (0, 0));
    }

    /// A character device.
    pub(crate) fn device(&mut self, path: &str, major: u32, minor: u32) {
        self.member(path, 0o020_600, &[], (major, minor));
    }

    /// The archive, ended and padded to whole sectors.
    pub(crate) fn finish(mut self) -> Vec<u8> {
        self.member("TRAILER!!!", 0, &[], (0, 0));
        self.pad(512);
        self.bytes
    }

    fn member(&mut self, path: &str, mode: u32, content: &[u8], device: (u32, u32)) {
        self.members += 1;
        let fields = [
            self.members,
            mode,
            0, // user
            0, // group
            1, // links
            0, // time
            content.len() as u32,
            0, // device of the file, major and minor
            0,
            device.0,
            device.1,
            path.len() as u32 + 1,
            0, // checksum, unused
        ];
        self.bytes.extend(b"070701");
        for field in fields {
            self.bytes.extend(format!("{field:08X}").as_bytes());
        }
        self.bytes.extend(path.as_bytes());
        self.bytes.push(0);
        self.pad(4);
        self.bytes.extend(content);
        self.pad(4);
    }

    fn pad(&mut self, unit: usize) {
        let length = self.bytes.len().next_multiple_of(unit);
        self.bytes.resize(length, 0);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;

    #[test]
    fn members_are_laid_out_to_the_byte() {
        let mut archive = Archive::default();
        archive.file("a", b"hello");
        let bytes = archive.finish();
        assert_eq!(bytes.len(), 512);
        assert_eq!(&bytes[..14], b"07070100000001");
        assert_eq!(&bytes[14..22], b"000081A4");
        assert_eq!(&bytes[54..62], b"00000005");
        assert_eq!(&bytes[110..112], b"a\0");
        assert_eq!(&bytes[112..117], b"hello");
        assert_eq!(&bytes[120..126], b"070701");
    }
}
