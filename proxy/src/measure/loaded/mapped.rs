//! Files that a process has mapped (Linux `Documentation/filesystems/proc.rst`, `/proc/PID/maps`).

use std::{fs, os::unix::fs::MetadataExt as _, path::Path};

/// One file's mapping.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Mapping<'a> {
    device: (u32, u32),
    inode: u64,
    /// As the kernel names it now, with ` (deleted)` behind it when nothing does.
    path: &'a [u8],
}

/// Whether one of the mappings in the text of `/proc/PID/maps` is of this file: by device and inode, or, on file systems
/// that show others there than `stat` does (btrfs, overlayfs), by the one name that the kernel has for it now.
pub(super) fn maps(text: &[u8], path: &Path, file: &fs::Metadata) -> bool {
    use std::os::unix::ffi::OsStrExt as _;
    let device = (rustix::fs::major(file.dev()), rustix::fs::minor(file.dev()));
    let canonical = fs::canonicalize(path).ok();
    mappings(text).any(|m| {
        (m.device == device && m.inode == file.ino())
            || canonical.as_ref().is_some_and(|canonical| canonical.as_os_str().as_bytes() == m.path)
    })
}

/// `start-end perms offset major:minor inode path`
fn mappings(text: &[u8]) -> impl Iterator<Item = Mapping<'_>> {
    text.split(|&b| b == b'\n').filter_map(|line| {
        let mut rest = line;
        let mut field = || {
            rest = rest.trim_ascii_start();
            let (field, more) = rest.split_at(rest.iter().position(|&b| b == b' ').unwrap_or(rest.len()));
            rest = more;
            std::str::from_utf8(field).ok()
        };
        let (_range, _permissions, _offset) = (field()?, field()?, field()?);
        let (major, minor) = field()?.split_once(':')?;
        let inode = field()?.parse().ok().filter(|&inode| inode != 0)?;
        let device = (u32::from_str_radix(major, 16).ok()?, u32::from_str_radix(minor, 16).ok()?);
        Some(Mapping { device, inode, path: rest.trim_ascii_start() })
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn lines_of_the_kernel() {
        let text = b"55d0-55d1 r--p 00000000 fe:00 1234   /usr/bin/a b (deleted)\n\
                     7f00-7f01 rw-p 00000000 00:00 0 \n7f01-7f02 rw-p 00000000 00:00 0 [heap]\nrubbish\n";
        let found: Vec<_> = mappings(text).collect();
        assert_eq!(found, [Mapping { device: (0xfe, 0), inode: 1234, path: b"/usr/bin/a b (deleted)" }]);
    }

    #[test]
    fn our_own_program_is_mapped_and_another_file_is_not() {
        let text = fs::read("/proc/self/maps").unwrap();
        let own = std::env::current_exe().unwrap();
        assert!(maps(&text, &own, &fs::metadata(&own).unwrap()));
        let other = tempfile::NamedTempFile::new().unwrap();
        assert!(!maps(&text, other.path(), &fs::metadata(other.path()).unwrap()));
    }

    proptest! {
        #[test]
        fn no_text_panics(text in prop::collection::vec(prop::sample::select(b"0a:- \n/xf".as_slice()), 0..200)) {
            for mapping in mappings(&text) {
                prop_assert!(mapping.inode != 0);
            }
        }
    }
}
