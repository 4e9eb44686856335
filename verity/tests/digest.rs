//! Digests of files: against the definition, against Debian's `fsverity`, and of files that want to be trouble.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stdout)]

mod common;

use std::{
    fs::{File, OpenOptions},
    io::Write as _,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant},
};

use common::{BLOCK, content, definition, noise, sparse, threads};
use onequote_verity::{CHUNK, Digest, Options, Source, VerityError, measure};

/// Every size at which the tree's form changes, in bytes.
fn boundaries() -> Vec<u64> {
    let mut sizes = vec![0, 1, 4095, 4096, 4097];
    // A level is full at 128 and at 128 * 128 blocks; the pieces that threads take have 512.
    for blocks in [2, 127, 128, 129, 255, 256, 257, 511, 512, 513, 16383, 16384, 16385] {
        sizes.extend([blocks * BLOCK - 1, blocks * BLOCK, blocks * BLOCK + 1]);
    }
    sizes
}

fn digest(file: &File) -> Digest {
    measure(file, threads()).unwrap().digest
}

fn hex(digest: &Digest) -> String {
    digest.iter().map(|b| format!("{b:02x}")).collect()
}

/// What Debian's tool says; nothing where it is not installed.
fn tool(path: &Path) -> Option<String> {
    let ran = Command::new("fsverity").args(["digest", "--compact"]).arg(path).output();
    let Ok(output) = ran else {
        skipped("fsverity is not installed (Debian: apt-get install fsverity)");
        return None;
    };
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Some(String::from_utf8(output.stdout).unwrap().trim().to_owned())
}

/// Says so where people and `cargo xtask test` see it.
fn skipped(why: &str) {
    println!("skipped: {why}");
    if let Some(file) = std::env::var_os("ONEQUOTE_SKIPS") {
        let line = format!("skipped in verity/tests/digest.rs: {why}\n");
        let _ = OpenOptions::new().append(true).create(true).open(file).and_then(|mut f| f.write_all(line.as_bytes()));
    }
}

#[test]
fn every_boundary_is_as_the_definition_and_as_debians_tool_say() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("f");
    let all = noise(1, 16386 * 4096);
    for size in boundaries() {
        let data = &all[..usize::try_from(size).unwrap()];
        std::fs::write(&path, data).unwrap();
        let file = File::open(&path).unwrap();
        let one = measure(&file, Options::default()).unwrap();
        assert_eq!(one.digest, definition(data), "{size} bytes");
        assert_eq!((one.size, one.read, one.source), (size, size, Source::Read));
        assert_eq!(digest(&file), one.digest, "{size} bytes, several threads");
        if let Some(told) = tool(&path) {
            assert_eq!(hex(&one.digest), told, "{size} bytes");
        }
    }
}

#[test]
fn holes_anywhere_change_nothing_and_are_not_read() {
    let end = 3 * CHUNK * 4 + 100;
    let cases: [(u64, &[(u64, usize)]); 9] = [
        (end, &[]),
        (end, &[(0, 4096)]),
        (end, &[(CHUNK * 5, 70_000)]),
        (end, &[(end - 100, 100)]),
        (end, &[(4096 * 3, 4096), (CHUNK * 4 - 4096, 8192), (CHUNK * 8, 4096)]),
        (129 * CHUNK, &[(128 * CHUNK + 4096, 1)]),
        (40 * CHUNK, &[(0, 100), (20 * CHUNK, 3_000_000)]),
        (1, &[]),
        (4096, &[]),
    ];
    for (size, data) in cases {
        let file = sparse(size, data);
        let measured = measure(&file, threads()).unwrap();
        assert_eq!(measured.digest, definition(&content(&file)), "{size}: {data:?}");
        let there: usize = data.iter().map(|&(_, len)| len + 8192).sum();
        assert!(measured.read <= there as u64, "{size}: {data:?}: {} read", measured.read);
    }
}

#[test]
fn zeros_that_are_written_are_zeros() {
    let file = sparse(9 * CHUNK, &[(CHUNK, 5000)]);
    let written = tempfile::tempfile().unwrap();
    written.write_all_at(&content(&file), 0).unwrap();
    assert_eq!(digest(&written), digest(&file));
}

#[test]
fn images_that_qemu_made() {
    let dir = tempfile::tempdir().unwrap();
    let raw = dir.path().join("disk.raw");
    std::fs::write(&raw, noise(3, 5 << 20)).unwrap();
    OpenOptions::new().write(true).open(&raw).unwrap().set_len(700 << 20).unwrap();
    let qcow2 = dir.path().join("disk.qcow2");
    let ran = Command::new("qemu-img").args(["convert", "-O", "qcow2"]).args([&raw, &qcow2]).status();
    if !ran.is_ok_and(|status| status.success()) {
        return skipped("qemu-img is not installed (Debian: apt-get install qemu-utils)");
    }
    for path in [raw, qcow2] {
        let file = File::open(&path).unwrap();
        let told = tool(&path).unwrap_or_else(|| hex(&definition(&content(&file))));
        assert_eq!(hex(&digest(&file)), told, "{}", path.display());
    }
}

/// A loop device over a file, for root on a machine that has them.
struct Loop(PathBuf);

impl Loop {
    fn over(file: &Path) -> Result<Self, String> {
        let output = Command::new("losetup").args(["--find", "--show", "--read-only"]).arg(file).output();
        let output = output.map_err(|e| format!("losetup: {e}"))?;
        if !output.status.success() {
            return Err(String::from_utf8_lossy(&output.stderr).trim().to_owned());
        }
        Ok(Self(String::from_utf8_lossy(&output.stdout).trim().into()))
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("--detach").arg(&self.0).stderr(Stdio::null()).status();
    }
}

#[test]
fn a_block_device_has_the_digest_of_its_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    // A whole number of sectors and not of blocks.
    let data = noise(4, 3 * 512 * 1024 + 512);
    std::fs::write(&path, &data).unwrap();
    let device = match Loop::over(&path) {
        Ok(device) => device,
        Err(why) => return skipped(&format!("no loop device: {why}")),
    };
    let measured = measure(&File::open(&device.0).unwrap(), threads()).unwrap();
    assert_eq!((measured.size, measured.digest), (data.len() as u64, definition(&data)));
}

#[test]
fn the_kernels_digest_is_ours() {
    // On a file system on which fs-verity can be enabled: `ONEQUOTE_VERITY_DIR` names a folder there.
    let dir = match std::env::var_os("ONEQUOTE_VERITY_DIR") {
        Some(dir) => tempfile::tempdir_in(dir).unwrap(),
        None => tempfile::tempdir().unwrap(),
    };
    for (salt, block, ours) in [(None, "4096", true), (Some("abcd"), "4096", false), (None, "1024", false)] {
        let path = dir.path().join("f");
        let data = noise(5, 700_000);
        std::fs::write(&path, &data).unwrap();
        let mut enable = Command::new("fsverity");
        enable.args(["enable", "--hash-alg=sha256", "--block-size", block]).arg(&path);
        if let Some(salt) = salt {
            enable.args(["--salt", salt]);
        }
        match enable.output() {
            Ok(output) if output.status.success() => {}
            Ok(output) => {
                let why = String::from_utf8_lossy(&output.stderr).trim().to_owned();
                return skipped(&format!("fs-verity cannot be enabled here: {why}"));
            }
            Err(e) => return skipped(&format!("fsverity: {e}")),
        }
        let measured = measure(&File::open(&path).unwrap(), threads()).unwrap();
        assert_eq!(measured.digest, definition(&data), "salt {salt:?}, blocks of {block}");
        let source = if ours { Source::Kernel } else { Source::Read };
        assert_eq!(measured.source, source, "salt {salt:?}, blocks of {block}");
        std::fs::remove_file(&path).unwrap();
    }
}

#[test]
fn eight_exbibytes_of_hole_take_no_time() {
    // The largest file there can be; ext4 has smaller ones only, tmpfs does not.
    let size = i64::MAX.unsigned_abs();
    let file = tempfile::tempfile_in("/dev/shm").unwrap();
    if let Err(e) = file.set_len(size) {
        return skipped(&format!("no file of 8 EiB in /dev/shm: {e}"));
    }
    file.write_all_at(b"data far out", size - 100_000).unwrap();
    let begun = Instant::now();
    let measured = measure(&file, threads()).unwrap();
    assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", begun.elapsed());
    assert_eq!(measured.size, size);
    assert!(measured.read <= 3 * 4096, "{} read", measured.read);
    // Of another hole: another digest.
    file.write_all_at(b"data", 1 << 60).unwrap();
    assert_ne!(digest(&file), measured.digest);
}

#[test]
fn a_file_that_shrinks_is_an_error() {
    for to in [0, 5 * CHUNK + 3] {
        let file = sparse(64 * CHUNK, &[]);
        (0..64).for_each(|n| file.write_all_at(&noise(n, 4096), n * CHUNK).unwrap());
        let done = AtomicU64::new(0);
        let progress = |now| {
            if done.swap(now, Ordering::SeqCst) == 0 {
                file.set_len(to).unwrap();
            }
            true
        };
        let e = measure(&file, Options { progress: &progress, ..Options::default() }).unwrap_err();
        assert!(matches!(e, VerityError::Shrunk), "{e}");
    }
}

#[test]
fn a_file_whose_size_means_nothing_is_an_error() {
    let e = measure(&File::open("/proc/self/status").unwrap(), Options::default()).unwrap_err();
    assert!(matches!(e, VerityError::Unsized), "{e}");
}

#[test]
fn only_files_and_block_devices_have_a_digest() {
    let dir = tempfile::tempdir().unwrap();
    let fifo = dir.path().join("fifo");
    assert!(Command::new("mkfifo").arg(&fifo).status().unwrap().success());
    // Open for both, since opening one end of a FIFO waits for the other.
    let fifo = OpenOptions::new().read(true).write(true).open(fifo).unwrap();
    for file in [fifo, File::open("/proc").unwrap(), File::open("/dev/zero").unwrap()] {
        let e = measure(&file, Options::default()).unwrap_err();
        assert!(matches!(e, VerityError::NotAFile), "{e}");
    }
}

#[test]
fn reading_ends_when_it_is_told_to() {
    let file = sparse(1 << 40, &[(0, 5 << 20)]);
    let calls = AtomicU64::new(0);
    let progress = |_| calls.fetch_add(1, Ordering::SeqCst) < 1;
    let e = measure(&file, Options { progress: &progress, ..threads() }).unwrap_err();
    assert!(matches!(e, VerityError::Stopped), "{e}");
    assert!(calls.load(Ordering::SeqCst) < 10);
}

#[test]
fn progress_grows_to_the_files_size() {
    let size = 30 * CHUNK + 5;
    let file = sparse(size, &[(0, 5 << 20), (20 * CHUNK, 100)]);
    let last = AtomicU64::new(0);
    let progress = |now| {
        assert!(last.swap(now, Ordering::SeqCst) < now);
        true
    };
    measure(&file, Options { progress: &progress, idle_io: true, ..threads() }).unwrap();
    assert_eq!(last.load(Ordering::SeqCst), size);
}
