//! The digest of an image at the end of a run, from what QEMU says the run changed.
//!
//! # When it is right
//! The digest before is known and its tree is kept. QEMU has said which bytes it wrote since ([`Dirty`]), and nothing wrote
//! the file after it said so. For the last part the kernel is asked: the file's stamp just before QEMU was asked must be
//! its stamp when QEMU is gone and everything has been read. QEMU writes when it closes an image, too (a qcow2 image with
//! lazy refcounts is marked clean, persistent bitmaps are stored), and that shows there.
//!
//! # When it is not even tried
//! Where a stamp would say nothing: a block device has none for its content; a file system that is none of those known
//! to stamp by this kernel's clock may stamp by another one's; and one that keeps whole seconds is too coarse.

use std::{
    fs::File,
    os::fd::AsFd,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use onequote_evidence::event::Image;
use onequote_verity::Changed;
use rustix::{
    fs::FsWord,
    time::{ClockId, clock_gettime},
};

use super::{Digester, Kept, MeasureError, MeasureErrorKind, Stamp};

/// How long the clock may take to go on: far longer than its tick, which is 10 ms at most.
const TICK: Duration = Duration::from_secs(1);

/// File systems that stamp by this kernel's clock (Linux `include/uapi/linux/magic.h`): ext2 to ext4, XFS, Btrfs, F2FS,
/// tmpfs, overlayfs, bcachefs.
const STAMPS: [FsWord; 7] = [0xef53, 0x5846_5342, 0x9123_683e, 0xf2f5_2010, 0x0102_1994, 0x794c_7630, 0xca45_1a4e];

/// A file that nothing has written since a moment in the past, as far as its stamp tells; whatever writes it from now on
/// gives it another one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Quiet {
    stamp: Stamp,
}

impl Quiet {
    /// The file's size in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.stamp.size
    }
}

/// What QEMU told of one image.
#[derive(Debug, Clone)]
pub struct Dirty {
    /// What changed since its tree was kept.
    pub changed: Changed,
    /// The file, before QEMU was asked.
    pub quiet: Quiet,
}

/// How a digest was made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reread {
    /// Bytes that were read; or why the whole image was.
    pub read: Result<u64, String>,
}

/// Waits until the next change of a file must show in its stamp. Blocks for a clock's tick at most, usually for nothing.
///
/// # Errors
/// Why its stamp says nothing.
pub fn quiet(file: &File) -> Result<Quiet, String> {
    let unknown = |e: std::io::Error| format!("its state is not known: {e}");
    let kind = file.metadata().map_err(unknown)?;
    if !kind.is_file() {
        return Err("a block device has no time of change".to_owned());
    }
    let system = rustix::fs::fstatfs(file.as_fd()).map_err(|e| unknown(e.into()))?;
    if !STAMPS.contains(&system.f_type) {
        return Err("its file system may not tell each change at once".to_owned());
    }
    let begun = Instant::now();
    loop {
        let stamp = Stamp::from(&file.metadata().map_err(unknown)?);
        if stamp.ctime.1 == 0 {
            return Err("its file system keeps whole seconds".to_owned());
        }
        // The clock by which the kernel stamps.
        let now = clock_gettime(ClockId::RealtimeCoarse);
        if (now.tv_sec, now.tv_nsec) > stamp.ctime {
            return Ok(Quiet { stamp });
        }
        if begun.elapsed() > TICK {
            return Err("it is still being written, or was in the future".to_owned());
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

impl Kept {
    /// Measures it again when QEMU is gone, reading only what QEMU told; the whole image wherever that is not certain to be
    /// right.
    ///
    /// # Errors
    /// As [`Kept::measure_again`].
    pub async fn measure_changed(
        &self,
        digester: &Digester,
        told: Result<Dirty, String>,
    ) -> Result<(Image, Reread), MeasureError> {
        let why = match self.try_changed(digester, told).await {
            Ok(known) => return Ok(known),
            Err(why) => why,
        };
        let image = self.measure_again(digester).await?;
        Ok((image, Reread { read: Err(why) }))
    }

    async fn try_changed(&self, digester: &Digester, told: Result<Dirty, String>) -> Result<(Image, Reread), String> {
        let Dirty { changed, quiet } = told?;
        let saved = self.saved.clone().ok_or("its tree was not kept")?;
        let unreadable =
            |kind: MeasureErrorKind| MeasureError::new(&self.image.slot, Path::new(&self.image.path), kind).to_string();
        let stamp = || Ok::<_, String>(Stamp::from(&self.file.metadata().map_err(|e| unreadable(e.into()))?));
        if stamp()? != quiet.stamp {
            return Err("it was written after QEMU had said what changed".to_owned());
        }
        if changed.bytes() == 0 && quiet.stamp != saved.stamp {
            return Err("it was written, but QEMU says that it did not write it".to_owned());
        }
        let (file, known) = (Arc::clone(&self.file), self.image.digest);
        let updated = digester.digest_changed(file, saved.tree, known, changed).await.map_err(unreadable)?;
        if stamp()? != quiet.stamp {
            return Err("it was written while it was read".to_owned());
        }
        let (size, digest) = updated.digested;
        Ok((Image { size, digest, ..self.image.clone() }, Reread { read: updated.read }))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use std::os::unix::fs::FileExt as _;

    use onequote_evidence::digest::FileDigestAlg;

    use super::{
        super::file::{measure_and_save, measure_open},
        *,
    };

    async fn kept(dir: &Path) -> (File, Kept) {
        let path = dir.join("disk");
        std::fs::write(&path, vec![7; 3 << 20]).unwrap();
        let file = File::options().read(true).write(true).open(&path).unwrap();
        let tree = tempfile::tempfile().unwrap();
        let measured = measure_and_save(&Digester::default(), file.try_clone().unwrap(), tree).await.unwrap();
        let image = Image {
            slot: "disk".to_owned(),
            path: path.display().to_string(),
            format: "raw".to_owned(),
            read_only: false,
            size: measured.size,
            digest: measured.digest,
        };
        (file, Kept { image, file: measured.file, saved: measured.saved })
    }

    fn told(file: &File, range: std::ops::Range<u64>) -> Dirty {
        let mut changed = Changed::default();
        changed.add(range);
        Dirty { changed, quiet: quiet(file).unwrap() }
    }

    #[tokio::test]
    async fn only_what_changed_is_read_if_nothing_else_did() {
        let dir = tempfile::tempdir().unwrap();
        let (file, kept) = kept(dir.path()).await;
        let digester = Digester::default();
        let full = async || {
            let file = file.try_clone().unwrap();
            measure_open(&digester, file, FileDigestAlg::FsVerity, false, None).await.unwrap().digest
        };
        file.write_all_at(b"changed", 1 << 20).unwrap();
        let said = told(&file, 1 << 20..(1 << 20) + 1);
        assert_eq!(said.quiet.size(), 3 << 20);
        let (image, how) = kept.measure_changed(&digester, Ok(said.clone())).await.unwrap();
        assert_eq!((image.digest, how.read), (full().await, Ok(4096)));
        assert_ne!(image.digest, kept.image.digest);

        // Whatever is not certain is read.
        let why = async |kept: &Kept, told| {
            let (image, how) = kept.measure_changed(&digester, told).await.unwrap();
            assert_eq!(image.digest, full().await);
            how.read.unwrap_err()
        };
        assert_eq!(why(&kept, Err("no word".to_owned())).await, "no word");
        let nothing = Dirty { changed: Changed::default(), ..said.clone() };
        assert!(why(&kept, Ok(nothing)).await.contains("QEMU says that it did not"));
        let treeless = Kept { saved: None, ..kept.clone() };
        assert!(why(&treeless, Ok(said.clone())).await.contains("not kept"));
        // At once: the stamp shows it all the same.
        file.write_all_at(b"behind its back", 2 << 20).unwrap();
        assert!(why(&kept, Ok(said)).await.contains("was written after"));
    }

    #[tokio::test]
    async fn a_change_right_after_it_was_quiet_shows() {
        let dir = tempfile::tempdir().unwrap();
        let (file, kept) = kept(dir.path()).await;
        for n in 0..200_u8 {
            let before = quiet(&kept.file).unwrap();
            file.write_all_at(&[n], 0).unwrap();
            assert_ne!(Stamp::from(&kept.file.metadata().unwrap()), before.stamp, "{n}");
        }
    }

    #[test]
    fn where_a_stamp_says_nothing_there_is_no_quiet() {
        assert!(quiet(&File::open("/proc/self/status").unwrap()).unwrap_err().contains("file system"));
        assert!(quiet(&File::open("/dev/zero").unwrap()).unwrap_err().contains("block device"));
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("old");
        std::fs::write(&path, "x").unwrap();
        assert!(quiet(&File::open(&path).unwrap()).is_ok());
    }
}
