//! Whether each image is the one that QEMU has in its slot.
//!
//! QEMU names its images and the kernel names its descriptors, but nobody says which descriptor is whose. If two files of
//! one VM were exchanged with one another after QEMU had opened both, each name leads to a file that QEMU holds. What
//! such an exchange cannot hide, while the guest waits:
//!
//! - QEMU tells each file's size, and what it takes on disk, from its own descriptor (`query-named-block-nodes`): both must
//!   be those of the file that the name leads to.
//! - Where two files are alike in both, an exchange by renaming, or by turning links, leaves newer times of change
//!   (`ctime`) than QEMU's start: on the files, the links, or the folders in which only one of them is. If both have
//!   such, the VM is refused. Images with the same content can be exchanged by whoever likes.
//! - A file that is mounted over a name has another mount there than the descriptor has.
//!
//! What is left: file systems that were *moved* (`mount --move`) with equal files on them, and what happened within 50 ms
//! of QEMU's start.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};

use onequote_evidence::digest::FileDigest;
use rustix::fs::{AtFlags, CWD, StatxFlags, statx};
use serde::Deserialize;
use serde_json::json;

use super::{Held, Leaf, MeasureError, MeasureErrorKind, VmMeter, file::newest_link, vm::START_SLACK};

/// How often sizes are asked for again when a file's place on disk changes meanwhile.
const TRIES: u32 = 5;

/// A measured image.
#[derive(Debug, Clone)]
pub(super) struct Placed {
    pub(super) leaf: Leaf,
    pub(super) path: PathBuf,
    pub(super) held: Held,
    pub(super) file: Arc<File>,
    pub(super) digest: FileDigest,
}

/// What QEMU tells of one block node.
#[derive(Debug, Clone, Deserialize)]
struct Node {
    file: String,
    drv: String,
    image: Option<Sizes>,
}

#[derive(Debug, Clone, Copy, Deserialize)]
struct Sizes {
    #[serde(rename = "virtual-size")]
    size: u64,
    #[serde(rename = "actual-size")]
    on_disk: Option<u64>,
}

impl VmMeter<'_> {
    /// Checks all.
    ///
    /// # Errors
    /// The first image that may be in another slot.
    pub(super) async fn must_be_in_their_slots(&self, images: &[Placed]) -> Result<(), MeasureError> {
        for image in images {
            self.must_be_on_its_mount(image)?;
        }
        // A single image cannot be exchanged with another one that QEMU holds.
        if images.len() < 2 {
            return Ok(());
        }
        self.must_have_the_sizes(images).await?;
        let files: BTreeMap<(u64, u64), &Placed> = images.iter().map(|image| (image.held.id, image)).collect();
        let files: Vec<&Placed> = files.into_values().collect();
        for (n, one) in files.iter().enumerate() {
            for other in &files[n + 1..] {
                self.must_be_told_apart(one, other)?;
            }
        }
        Ok(())
    }

    async fn must_have_the_sizes(&self, images: &[Placed]) -> Result<(), MeasureError> {
        let sizes = |image: &Placed| image.file.metadata().map(|m| (m.size(), m.blocks() * 512));
        let sizes = || images.iter().map(sizes).collect::<io::Result<Vec<_>>>();
        let failed = |e: io::Error| MeasureError::of("open files", e);
        let mut wrong = None;
        for _ in 0..TRIES {
            let before = sizes().map_err(failed)?;
            let nodes = self.qmp.call::<Vec<Node>>("query-named-block-nodes", json!({"flat": true})).await;
            let nodes = nodes.map_err(|e| MeasureError::of("block graph", e))?;
            let different = images.iter().zip(&before).find(|(image, (size, on_disk))| {
                let own = |node: &&Node| node.file == image.leaf.name && node.drv == image.leaf.protocol;
                // Sizes of devices are not those of their nodes in the file system.
                image.leaf.protocol == "file"
                    && nodes.iter().filter(own).filter_map(|node| node.image).any(|told| {
                        told.size != size.next_multiple_of(512) || told.on_disk.is_some_and(|told| told != *on_disk)
                    })
            });
            wrong = different.map(|(image, _)| image);
            // File systems move blocks about when they like; QEMU and we must have looked at the same.
            if wrong.is_none() || before == sizes().map_err(failed)? {
                break;
            }
        }
        match wrong {
            None => Ok(()),
            Some(image) => Err(exchanged(image, "QEMU tells another size of it".to_owned())),
        }
    }

    /// Two files with other contents must be of other sizes, or one of them must be where it was when QEMU started.
    fn must_be_told_apart(&self, one: &Placed, other: &Placed) -> Result<(), MeasureError> {
        let failed = |e: io::Error| MeasureError::new(&one.leaf.slot, &one.path, e);
        let sizes = |p: &Placed| p.file.metadata().map(|m| (m.size(), m.blocks()));
        if one.digest == other.digest || sizes(one).map_err(failed)? != sizes(other).map_err(failed)? {
            return Ok(());
        }
        let started = self.process.started().map_err(failed)? + START_SLACK;
        let moved = |image: &Placed, from: &Placed| moved_since(&image.path, &image.file, &from.path, started);
        if moved(one, other).map_err(failed)? && moved(other, one).map_err(failed)? {
            let what =
                format!("it and {} ({}) were moved since QEMU was started", other.leaf.slot, other.path.display());
            return Err(exchanged(one, what));
        }
        Ok(())
    }

    /// The name must lead to the file over the mount over which QEMU opened it. Names are looked up as QEMU does, in its
    /// own mount namespace and root; where it has none any more, in a sandbox, there is nothing to compare.
    fn must_be_on_its_mount(&self, image: &Placed) -> Result<(), MeasureError> {
        let Ok(inside) = image.path.strip_prefix("/") else { return Ok(()) };
        let path = Path::new("/proc").join(self.process.pid().to_string()).join("root").join(inside);
        let Ok(now) = statx(CWD, &path, AtFlags::empty(), StatxFlags::MNT_ID) else { return Ok(()) };
        if now.stx_mask & StatxFlags::MNT_ID.bits() == 0 {
            return Ok(());
        }
        let held = self.process.mount_of(image.held);
        let held = held.map_err(|e| MeasureError::new(&image.leaf.slot, &image.path, e))?;
        if held == now.stx_mnt_id {
            return Ok(());
        }
        Err(exchanged(image, "something was mounted over its name, or above it, since QEMU opened it".to_owned()))
    }
}

fn exchanged(image: &Placed, what: String) -> MeasureError {
    MeasureError::new(&image.leaf.slot, &image.path, MeasureErrorKind::Exchanged(what))
}

/// Whether a file, a link on the way to it, or a folder on its way that is not on the way to `other`, changed.
fn moved_since(path: &Path, file: &File, other: &Path, time: SystemTime) -> io::Result<bool> {
    if changed(&file.metadata()?) > time || newest_link(path)?.is_some_and(|link| link > time) {
        return Ok(true);
    }
    let (path, other) = (fs::canonicalize(path)?, fs::canonicalize(other)?);
    for folder in path.ancestors().skip(1).take_while(|folder| !other.starts_with(folder)) {
        if changed(&fs::metadata(folder)?) > time {
            return Ok(true);
        }
    }
    Ok(false)
}

fn changed(m: &fs::Metadata) -> SystemTime {
    let seconds = Duration::from_secs(u64::try_from(m.ctime()).unwrap_or(0));
    SystemTime::UNIX_EPOCH + seconds + Duration::from_nanos(u64::try_from(m.ctime_nsec()).unwrap_or(0))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;

    #[test]
    fn what_was_moved() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        for folder in ["a", "b", "c"] {
            fs::create_dir(at(folder)).unwrap();
            fs::write(at(folder).join("f"), folder).unwrap();
        }
        // The clock of files is coarser than ours.
        std::thread::sleep(Duration::from_millis(30));
        let time = SystemTime::now();
        std::thread::sleep(Duration::from_millis(30));
        let moved =
            |path: &str, other: &str| moved_since(&at(path), &File::open(at(path)).unwrap(), &at(other), time).unwrap();
        assert!(!moved("a/f", "b/f"));
        fs::rename(at("a"), at("x")).unwrap();
        fs::rename(at("b"), at("a")).unwrap();
        assert!(moved("a/f", "c/f") && moved("x/f", "c/f") && !moved("c/f", "a/f"));
        // What happens in a folder that has both says nothing of either.
        fs::write(at("c/g"), "").unwrap();
        assert!(!moved("c/f", "c/g"));
        fs::rename(at("c/f"), at("c/h")).unwrap();
        assert!(moved("c/h", "c/g"));
    }
}
