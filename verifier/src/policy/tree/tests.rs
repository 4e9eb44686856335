//! The same files, listed alike from a folder, a tar archive and an initramfs.

use std::{fs, io::Write as _, os::unix::fs::symlink};

use onequote_evidence::digest::sha256;
use proptest::prelude::*;

use super::*;
use crate::policy::{AllowList, Judgement, Policy};

/// A system with a merged `/usr`: folders, links and files as `(path, Err(link) | Ok(content))`.
const SYSTEM: [(&str, Result<&str, &str>); 8] = [
    ("bin", Err("usr/bin")),
    ("lib", Err("/usr/lib")),
    ("usr/bin/sh", Ok("a shell")),
    ("usr/bin/my sh", Ok("another shell")),
    ("usr/bin/ash", Err("sh")),
    ("usr/lib/libc.so.6", Ok("a library")),
    ("etc/empty", Ok("")),
    ("proc/hidden", Ok("beneath a mount")),
];

fn listing(tree: &Path, options: &Options) -> Result<Listing, TreeError> {
    let mut listing = Listing::default();
    listing.add(tree, options).map(|()| listing)
}

fn list(tree: &Path) -> AllowList {
    toml::from_str(&listing(tree, &Options::default()).unwrap().toml(&[tree.to_owned()])).unwrap()
}

fn allows(list: &AllowList, path: &str, content: &str) -> bool {
    list.judge(path.as_bytes(), "sha256", sha256(&[content.as_bytes()]).as_bytes()) == Judgement::Allowed
}

fn is_the_system(list: &AllowList) {
    for (path, content) in [
        ("/usr/bin/sh", "a shell"),
        ("/usr/bin/my_sh", "another shell"),
        ("/usr/lib/libc.so.6", "a library"),
        ("/etc/empty", ""),
    ] {
        assert!(allows(list, path, content), "{path}");
        assert!(!allows(list, path, "changed"), "{path}");
    }
    // Not by the names that a program was called by.
    for path in ["/bin/sh", "/usr/bin/ash", "/lib/libc.so.6", "/proc/hidden"] {
        assert!(matches!(list.judge(path.as_bytes(), "sha256", b""), Judgement::UnknownFile(_)), "{path}");
    }
}

fn folder() -> tempfile::TempDir {
    let root = tempfile::tempdir().unwrap();
    for (path, member) in SYSTEM {
        let path = root.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        match member {
            Ok(content) => fs::write(path, content).unwrap(),
            Err(target) => symlink(target, path).unwrap(),
        }
    }
    root
}

/// As mmdebstrap writes it: names begin with a dot.
fn tar() -> tar::Builder<Vec<u8>> {
    let mut tar = tar::Builder::new(Vec::new());
    for (path, member) in SYSTEM {
        let mut header = tar::Header::new_gnu();
        let path = format!("./{path}");
        match member {
            Ok(content) => {
                header.set_size(content.len() as u64);
                tar.append_data(&mut header, path, content.as_bytes()).unwrap();
            }
            Err(target) => {
                header.set_size(0);
                header.set_entry_type(tar::EntryType::Symlink);
                tar.append_link(&mut header, path, target).unwrap();
            }
        }
    }
    tar
}

fn cpio_member(out: &mut Vec<u8>, path: &str, mode: u32, inode: u32, links: u32, content: &[u8]) {
    let (size, name) = (content.len(), path.len() + 1);
    write!(out, "070701{inode:08X}{mode:08X}{0:08X}{0:08X}{links:08X}{0:08X}{size:08X}", 0).unwrap();
    write!(out, "{0:08X}{0:08X}{0:08X}{0:08X}{name:08X}{0:08X}{path}\0", 0).unwrap();
    out.resize(out.len().next_multiple_of(4), 0);
    out.extend_from_slice(content);
    out.resize(out.len().next_multiple_of(4), 0);
}

fn cpio() -> Vec<u8> {
    let mut out = Vec::new();
    for (path, member) in SYSTEM {
        match member {
            Ok(content) => cpio_member(&mut out, path, 0o100_755, 1, 1, content.as_bytes()),
            Err(target) => cpio_member(&mut out, path, 0o120_777, 1, 1, target.as_bytes()),
        }
    }
    cpio_member(&mut out, "TRAILER!!!", 0, 0, 1, b"");
    out
}

fn file(bytes: &[u8]) -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(bytes).unwrap();
    file
}

#[test]
fn a_folder_a_tar_and_an_initramfs_give_the_same_list() {
    is_the_system(&list(folder().path()));
    let tar = tar().into_inner().unwrap();
    is_the_system(&list(file(&tar).path()));
    is_the_system(&list(file(&zstd::encode_all(&tar[..], 1).unwrap()).path()));
    is_the_system(&list(file(&cpio()).path()));
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(&cpio()).unwrap();
    is_the_system(&list(file(&gzip.finish().unwrap()).path()));
}

#[test]
fn an_initramfs_has_segments() {
    let mut early = Vec::new();
    cpio_member(&mut early, "kernel/x86/microcode/GenuineIntel.bin", 0o100_644, 1, 1, b"microcode");
    cpio_member(&mut early, "etc/empty", 0o100_644, 2, 1, b"replaced by the next segment");
    cpio_member(&mut early, "TRAILER!!!", 0, 0, 1, b"");
    early.resize(4096, 0);
    early.extend(zstd::encode_all(&cpio()[..], 1).unwrap());
    let list = list(file(&early).path());
    is_the_system(&list);
    assert!(allows(&list, "/kernel/x86/microcode/GenuineIntel.bin", "microcode"));
}

#[test]
fn hard_links_share_their_content() {
    let mut archive = tar();
    let mut header = tar::Header::new_gnu();
    header.set_size(0);
    header.set_entry_type(tar::EntryType::Link);
    archive.append_link(&mut header, "./usr/bin/perl", "./usr/bin/sh").unwrap();
    // Stored beneath a link to its folder, and the link's target too.
    archive.append_link(&mut header, "./bin/dash", "bin/perl").unwrap();
    let made = list(file(&archive.into_inner().unwrap()).path());
    assert!(allows(&made, "/usr/bin/perl", "a shell") && allows(&made, "/usr/bin/dash", "a shell"));

    let mut bytes = Vec::new();
    cpio_member(&mut bytes, "bin/a", 0o100_755, 7, 2, b"");
    cpio_member(&mut bytes, "bin/b", 0o100_755, 7, 2, b"content");
    cpio_member(&mut bytes, "TRAILER!!!", 0, 0, 1, b"");
    let made = list(file(&bytes).path());
    assert!(allows(&made, "/bin/a", "content") && allows(&made, "/bin/b", "content") && !allows(&made, "/bin/a", ""));
}

#[test]
fn where_it_is_mounted_and_what_is_left_out() {
    let root = folder();
    let options = Options {
        at: vec!["/".into(), "/root/".into()],
        skip: vec![Pattern("/root/etc/*".into())],
        algorithms: vec![HashAlg::Sha1, HashAlg::Sha512],
    };
    let text = listing(root.path(), &options).unwrap().toml(&[]);
    let list: AllowList = toml::from_str(&text).unwrap();
    let shell = |alg: HashAlg, path: &[u8]| list.judge(path, alg.name(), &alg.hash(b"a shell")) == Judgement::Allowed;
    for path in [&b"/usr/bin/sh"[..], b"/root/usr/bin/sh"] {
        assert!(shell(HashAlg::Sha1, path) && shell(HashAlg::Sha512, path) && !shell(HashAlg::Sha256, path));
    }
    assert!(text.contains("\"/etc/empty\"") && !text.contains("/root/etc/empty"));
    let wrong = Options { at: vec!["root".into()], ..Options::default() };
    assert!(matches!(listing(root.path(), &wrong), Err(TreeError::At(_))));
}

#[test]
fn names_that_no_policy_can_hold() {
    use std::os::unix::ffi::OsStrExt as _;
    let root = folder();
    fs::write(root.path().join(std::ffi::OsStr::from_bytes(b"etc/\xff\n")), "x").unwrap();
    let listing = listing(root.path(), &Options::default()).unwrap();
    assert_eq!(listing.unsayable().len(), 1);
    is_the_system(&toml::from_str(&listing.toml(&[])).unwrap());
}

#[test]
fn what_cannot_be_read_is_an_error() {
    let why = |bytes: &[u8]| listing(file(bytes).path(), &Options::default()).unwrap_err().to_string();
    assert!(why(b"").contains("empty"));
    assert!(why(&[0; 2048]).contains("empty"));
    assert!(why(&[0x53; 2048]).contains("mount"));
    assert!(why(b"\xfd7zXZ\0rest").contains("xz"));
    assert!(
        why(b"07070112345678not hexadecimal, but as long as a header has to be, which is one hundred and ten bytes")
            .contains("cannot read")
    );
    let whole = cpio();
    for end in [1, 50, 120, 130, whole.len() - 4] {
        listing(file(&whole[..end]).path(), &Options::default()).unwrap_err();
    }
    let whole = tar().into_inner().unwrap();
    // Within the content of a file. (SYSTEM begins with two links of one block.)
    listing(file(&whole[..3 * 512 + 3]).path(), &Options::default()).unwrap_err();
    let mut loops = Vec::new();
    for (name, target) in [("a", "b"), ("b", "a")] {
        cpio_member(&mut loops, name, 0o120_777, 1, 1, target.as_bytes());
    }
    cpio_member(&mut loops, "a/file", 0o100_644, 1, 1, b"x");
    cpio_member(&mut loops, "TRAILER!!!", 0, 0, 1, b"");
    assert!(why(&loops).contains("too many symbolic links"));
    let mut up = Vec::new();
    cpio_member(&mut up, "a/../../etc/shadow", 0o100_644, 1, 1, b"x");
    cpio_member(&mut up, "TRAILER!!!", 0, 0, 1, b"");
    assert!(why(&up).contains("not a path"));
}

#[test]
fn the_lines_for_a_rule_are_a_rule() {
    let dir = tempfile::tempdir().unwrap();
    let root = folder();
    let listing = listing(root.path(), &Options::default()).unwrap();
    let path = dir.path().join("a \"list\".toml");
    fs::write(&path, listing.toml(&[])).unwrap();
    let policy = dir.path().join("policy.toml");
    fs::write(&policy, format!("[[vm]]\nname = \"a\"\n{}", rule_lines(&path))).unwrap();
    let rule = Policy::load(&policy).unwrap().0.vms.remove(0);
    is_the_system(rule.ima.allow.as_ref().unwrap());
    assert_eq!(rule.ima.ignore.len(), RUN_TIME_FILES.len());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn damaged_archives_never_panic(
        at in any::<prop::sample::Index>(),
        byte in any::<u8>(),
        cut in any::<prop::sample::Index>(),
    ) {
        for whole in [cpio(), tar().into_inner().unwrap()] {
            let mut bytes = whole.clone();
            let at = at.index(bytes.len());
            bytes[at] = byte;
            bytes.truncate(cut.index(bytes.len()) + 1);
            let _ = listing(file(&bytes).path(), &Options::default());
        }
    }
}
