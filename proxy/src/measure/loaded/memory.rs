//! Reading a guest's physical memory before the guest runs.
//!
//! QEMU tells at which of its own addresses a physical one lies (`gpa2hva` of its human monitor, QEMU
//! `monitor/misc.c`, `hmp_gpa2hva`), and the bytes are read from `/proc/PID/mem`: from the kernel, not from QEMU. Where
//! the kernel does not allow that (reading memory needs more rights than looking at files, Linux
//! `Documentation/admin-guide/LSM/Yama.rst`), QEMU writes the bytes into files of a private folder (`pmemsave`), which
//! needs a QEMU of the proxy's own user. Memory is read piece by piece, and never held as a whole.

use std::{
    fs::{DirBuilder, File},
    io,
    os::unix::fs::{DirBuilderExt, FileExt},
    path::PathBuf,
    sync::Arc,
};

use serde_json::json;

use crate::{
    measure::{MeasureErrorKind, Process},
    qmp::{Qmp, QmpError},
};

/// Bytes that are compared at a time.
const BUFFER: u64 = 1024 * 1024;

/// The longest piece that is taken to lie together in QEMU when both its ends do.
const PIECE: u64 = 16 * 1024 * 1024;

/// Below this address regions can be as small as [`SMALL`]: video memory and the ROMs of a PC.
const LOW: u64 = 1024 * 1024;

const SMALL: u64 = 16 * 1024;

/// A guest's physical memory.
pub(super) struct Memory<'a> {
    qmp: &'a Qmp,
    way: Way,
}

/// How it is read.
enum Way {
    /// Through the kernel.
    Process(Arc<File>),
    /// QEMU saves it to files in this folder.
    Saved(Folder),
}

/// What memory says about a part of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Compared {
    /// It holds the same.
    Equal,
    /// It holds something else from this address on.
    DiffersAt(u64),
    /// There is no RAM or ROM at this address.
    NoneAt(u64),
}

impl<'a> Memory<'a> {
    /// Opens the memory of the guest of a QEMU process.
    pub(super) fn open(qmp: &'a Qmp, process: &Process) -> Result<Self, MeasureErrorKind> {
        match process.open_memory() {
            Ok(file) => Ok(Self { qmp, way: Way::Process(Arc::new(file)) }),
            Err(e) if e.kind() == io::ErrorKind::PermissionDenied => Self::saved(qmp),
            Err(e) => Err(e.into()),
        }
    }

    fn saved(qmp: &'a Qmp) -> Result<Self, MeasureErrorKind> {
        Ok(Self { qmp, way: Way::Saved(Folder::make()?) })
    }

    /// Compares `size` bytes of `file` from `offset` on with memory from `address` on.
    pub(super) async fn compare(
        &self,
        file: &Arc<File>,
        offset: u64,
        size: u64,
        address: u64,
    ) -> Result<Compared, MeasureErrorKind> {
        let mut done = 0;
        while done < size {
            let at = address.saturating_add(done);
            let piece = piece(at).min(size - done);
            let last = at.saturating_add(piece - 1);
            let (Some(first), Some(end)) = tokio::try_join!(self.place(at), self.place(last))? else {
                return Ok(Compared::NoneAt(at));
            };
            if end.checked_sub(first) != Some(piece - 1) {
                return Err(MeasureErrorKind::Unsupported(format!(
                    "guest memory from {at:#x} to {last:#x} does not lie together in QEMU"
                )));
            }
            let different = match &self.way {
                Way::Process(memory) => {
                    differs(Arc::clone(file), offset + done, Arc::clone(memory), first, piece).await?
                }
                Way::Saved(folder) => {
                    let saved = self.save(folder, at, piece).await?;
                    differs(Arc::clone(file), offset + done, Arc::new(saved), 0, piece).await?
                }
            };
            if let Some(different) = different {
                return Ok(Compared::DiffersAt(at + different));
            }
            done += piece;
        }
        Ok(Compared::Equal)
    }

    /// Where in QEMU a physical address lies; none where there is neither RAM nor ROM.
    async fn place(&self, address: u64) -> Result<Option<u64>, QmpError> {
        let command = json!({"command-line": format!("gpa2hva {address:#x}")});
        let answer: String = self.qmp.call("human-monitor-command", command).await?;
        Ok(place_in(&answer))
    }

    async fn save(&self, folder: &Folder, address: u64, size: u64) -> Result<File, MeasureErrorKind> {
        let path = folder.0.join("piece");
        let command = json!({"val": address, "size": size, "filename": path});
        let _: serde::de::IgnoredAny = self.qmp.call("pmemsave", command).await?;
        let file = File::open(&path)?;
        std::fs::remove_file(&path)?;
        Ok(file)
    }
}

/// The longest piece from an address on that is taken to lie together.
fn piece(address: u64) -> u64 {
    let most = if address < LOW { SMALL } else { PIECE };
    most - address % most
}

/// The address in an answer to `gpa2hva`.
fn place_in(answer: &str) -> Option<u64> {
    let (_, number) = answer.strip_prefix("Host virtual address for ")?.rsplit_once(" is 0x")?;
    u64::from_str_radix(number.trim_end(), 16).ok()
}

/// How far into a piece the first bytes are that differ between a file and memory, to one buffer's length.
async fn differs(
    file: Arc<File>,
    file_at: u64,
    memory: Arc<File>,
    memory_at: u64,
    size: u64,
) -> Result<Option<u64>, MeasureErrorKind> {
    // At most one piece is read, whether somebody waits for it or not.
    let work = move || {
        let mut done = 0;
        let buffer = usize::try_from(BUFFER.min(size)).unwrap_or_default();
        let (mut ours, mut theirs) = (vec![0; buffer], vec![0; buffer]);
        while done < size {
            let n = usize::try_from((size - done).min(BUFFER)).unwrap_or_default();
            file.read_exact_at(&mut ours[..n], file_at + done)?;
            memory.read_exact_at(&mut theirs[..n], memory_at + done)?;
            if ours[..n] != theirs[..n] {
                let first = ours[..n].iter().zip(&theirs[..n]).take_while(|(a, b)| a == b).count();
                return Ok(Some(done + first as u64));
            }
            done += n as u64;
        }
        Ok::<_, io::Error>(None)
    };
    Ok(tokio::task::spawn_blocking(work).await.map_err(io::Error::other)??)
}

/// A folder that only this user can look into, gone with the value.
struct Folder(PathBuf);

impl Folder {
    fn make() -> io::Result<Self> {
        let path = std::env::temp_dir().join(format!("onequote-{:032x}", rand::random::<u128>()));
        DirBuilder::new().mode(0o700).create(&path)?;
        Ok(Self(path))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        if let Err(e) = std::fs::remove_dir_all(&self.0) {
            tracing::warn!("cannot remove {}: {e}", self.0.display());
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;
    use crate::qmp::Limits;

    #[test]
    fn answers_of_the_human_monitor() {
        let answer = "Host virtual address for 0xffff0000 (pc.bios) is 0x7fdab8200000\r\n";
        assert_eq!(place_in(answer), Some(0x7fda_b820_0000));
        assert_eq!(place_in("Host virtual address for 0x0 (a is 0x1) is 0x2\n"), Some(2));
        for none in ["Memory at address 0xfee00000 is not RAM\r\n", "No memory is mapped at address 0x1", "", " is 0x7"]
        {
            assert_eq!(place_in(none), None, "{none}");
        }
    }

    #[test]
    fn pieces_end_where_regions_can() {
        assert_eq!(piece(0), SMALL);
        assert_eq!(piece(0xa_0000 - 1), 1);
        assert_eq!(piece(LOW), PIECE - LOW);
        assert_eq!(piece(0xffff_0000), 0x1_0000);
    }

    /// Both ways, and all outcomes, on a real QEMU.
    #[tokio::test(flavor = "multi_thread")]
    async fn memory_is_read_both_ways() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("m");
        let content: Vec<u8> = (0..3_000_000_u32).map(|n| (n % 251) as u8).collect();
        std::fs::write(dir.path().join("blob"), &content).unwrap();
        let mut qemu = tokio::process::Command::new("qemu-system-x86_64")
            .args(["-nodefaults", "-display", "none", "-m", "64", "-M", "q35", "-S", "-qmp"])
            .arg(format!("unix:{},server=on,wait=off", socket.display()))
            .args(["-device", "loader,file=blob,addr=0x200000,force-raw=on"])
            .current_dir(dir.path())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let (qmp, _events) = loop {
            match Qmp::connect(&socket, &Limits::default()).await {
                Err(e) if e.is_not_listening() => tokio::task::yield_now().await,
                other => break other.unwrap(),
            }
        };
        let process = Process::open(qemu.id().unwrap()).unwrap();
        let same = Arc::new(File::open(dir.path().join("blob")).unwrap());
        let mut other = content.clone();
        other[2_500_000] ^= 1;
        std::fs::write(dir.path().join("other"), &other).unwrap();
        let other = Arc::new(File::open(dir.path().join("other")).unwrap());
        let size = content.len() as u64;
        for memory in [Memory::open(&qmp, &process).unwrap(), Memory::saved(&qmp).unwrap()] {
            assert_eq!(memory.compare(&same, 0, size, 0x20_0000).await.unwrap(), Compared::Equal);
            assert_eq!(memory.compare(&same, 5, 100, 0x20_0005).await.unwrap(), Compared::Equal);
            let different = Compared::DiffersAt(0x20_0000 + 2_500_000);
            assert_eq!(memory.compare(&other, 0, size, 0x20_0000).await.unwrap(), different);
            assert_eq!(memory.compare(&same, 0, size, 0x8000_0000).await.unwrap(), Compared::NoneAt(0x8000_0000));
            // It goes beyond the file's end.
            assert!(memory.compare(&same, 1, size, 0x20_0001).await.is_err());
            if let Way::Saved(folder) = &memory.way {
                let folder = folder.0.clone();
                assert!(folder.exists());
                drop(memory);
                assert!(!folder.exists());
            }
        }
        qemu.kill().await.unwrap();
    }
}
