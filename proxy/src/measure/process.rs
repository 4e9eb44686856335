//! A QEMU process as the kernel shows it in `/proc` (Linux `Documentation/filesystems/proc.rst`).

use std::{
    ffi::OsString,
    fs::{self, File},
    io,
    os::{
        fd::OwnedFd,
        unix::{
            ffi::OsStringExt,
            fs::{MetadataExt, OpenOptionsExt},
        },
    },
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use onequote_evidence::id::{BootId, SessionId};
use rustix::{
    fs::OFlags,
    process::{Pid, PidfdFlags, pidfd_open},
};
use tokio::io::{Interest, unix::AsyncFd};

/// The longest argument vector in bytes (the kernel's own limit is a quarter of the stack, 2 MiB by default).
const MAX_ARGUMENTS: u64 = 8 * 1024 * 1024;

/// The environment variable by which `launch` says that it started a QEMU.
pub(crate) const LAUNCHED: &str = "ONEQUOTE_LAUNCHED";

/// The longest list of mappings in bytes.
const MAX_MAPS: u64 = 16 * 1024 * 1024;

/// Clock ticks a second in `/proc`: part of the kernel's interface on x86 and ARM, whatever its own rate.
pub(crate) const TICKS: u64 = 100;

/// One process, told from a later one with the same pid by its start time and a pidfd.
#[derive(Debug)]
pub struct Process {
    pid: u32,
    start_time: u64,
    pidfd: AsyncFd<OwnedFd>,
}

/// An open regular file or block device of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Held {
    /// The descriptor's number in that process.
    pub fd: u32,
    /// Device and inode.
    pub id: (u64, u64),
}

impl Process {
    /// Takes hold of a running process. Needs a tokio runtime.
    ///
    /// # Errors
    /// When there is none with that pid.
    pub fn open(pid: u32) -> io::Result<Self> {
        let start_time = start_time(pid)?;
        let raw = i32::try_from(pid).ok().and_then(Pid::from_raw).ok_or(io::ErrorKind::InvalidInput)?;
        let pidfd = pidfd_open(raw, PidfdFlags::empty())?;
        #[expect(unsafe_code, reason = "tokio asks for a promise about the descriptor")]
        // SAFETY: an `OwnedFd` is open and the same descriptor as long as it lives, and `AsyncFd` owns it.
        let pidfd = unsafe { AsyncFd::register_with_interest(pidfd, Interest::READABLE) }?;
        let process = Self { pid, start_time, pidfd };
        // The pidfd is of the process whose start time was read, if that is still the same now.
        if self::start_time(pid)? == start_time { Ok(process) } else { Err(io::ErrorKind::NotFound.into()) }
    }

    /// Its id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Whether its environment, as it was when its program began, says that `launch` started it. Anybody can say so of a
    /// QEMU of his own; it gives nothing but a wait at its end.
    #[must_use]
    pub fn was_launched(&self) -> bool {
        use std::io::Read as _;
        let mut text = Vec::new();
        let read = File::open(format!("/proc/{}/environ", self.pid))
            .and_then(|file| file.take(MAX_ARGUMENTS).read_to_end(&mut text));
        let said = format!("{LAUNCHED}=1");
        read.is_ok() && text.split(|&b| b == 0).any(|variable| variable == said.as_bytes())
    }

    /// Its session on a host with this boot id.
    #[must_use]
    pub fn session(&self, boot: BootId) -> SessionId {
        SessionId::of_process(boot, self.pid, self.start_time)
    }

    /// When it started, by the host's clock as it is set now; up to 20 ms early.
    ///
    /// # Errors
    /// When `/proc` is not to be read.
    pub fn started(&self) -> io::Result<SystemTime> {
        let since_boot = Duration::from_millis(self.start_time.saturating_mul(1000 / TICKS));
        let age = uptime()?.saturating_sub(since_boot);
        Ok(SystemTime::now().checked_sub(age).unwrap_or(SystemTime::UNIX_EPOCH))
    }

    /// Waits for its end. Safe to cancel.
    pub async fn ended(&self) {
        // A pidfd becomes readable when its process ends, and stays so. Waiting fails only when the runtime ends.
        let _ = self.pidfd.readable().await;
    }

    /// The program's path as the kernel shows it, for people: ` (deleted)` at its end when it was replaced.
    ///
    /// # Errors
    /// When the process is gone or not ours to look at.
    pub fn program(&self) -> io::Result<PathBuf> {
        fs::read_link(self.path("exe"))
    }

    /// Opens the program that it runs, even if its path names another by now.
    ///
    /// # Errors
    /// When the process is gone or not ours to look at.
    pub fn open_program(&self) -> io::Result<File> {
        File::open(self.path("exe"))
    }

    /// Its arguments, the program's name first.
    ///
    /// # Errors
    /// When the process is gone, or has more than 8 MiB of them.
    pub fn arguments(&self) -> io::Result<Vec<OsString>> {
        arguments(self.pid)
    }

    /// Opens its memory for reading. Needs more rights than looking at its files (`PTRACE_MODE_ATTACH_FSCREDS`).
    ///
    /// # Errors
    /// When the process is gone, or its memory not ours to read.
    pub fn open_memory(&self) -> io::Result<File> {
        File::open(self.path("mem"))
    }

    /// The text of `/proc/PID/maps`.
    ///
    /// # Errors
    /// When the process is gone or not ours to look at, or has more than 16 MiB of it.
    pub fn maps(&self) -> io::Result<Vec<u8>> {
        use std::io::Read as _;
        let mut text = Vec::new();
        File::open(self.path("maps"))?.take(MAX_MAPS + 1).read_to_end(&mut text)?;
        if text.len() as u64 > MAX_MAPS {
            return Err(io::Error::other(format!("process {} has more than {MAX_MAPS} bytes of maps", self.pid)));
        }
        Ok(text)
    }

    /// Its working directory.
    ///
    /// # Errors
    /// When the process is gone or not ours to look at.
    pub fn working_dir(&self) -> io::Result<PathBuf> {
        fs::read_link(self.path("cwd"))
    }

    /// Regular files and block devices that it holds open.
    ///
    /// # Errors
    /// When the process is gone or not ours to look at.
    pub fn held(&self) -> io::Result<Vec<Held>> {
        let mut held = Vec::new();
        for entry in fs::read_dir(self.path("fd"))? {
            let entry = entry?;
            let Some(fd) = entry.file_name().to_str().and_then(|n| n.parse().ok()) else { continue };
            match fs::metadata(entry.path()) {
                Ok(m) if is_file_or_block(&m) => held.push(Held { fd, id: (m.dev(), m.ino()) }),
                // Closed meanwhile, or something else: a socket, an event.
                Ok(_) | Err(_) => {}
            }
        }
        held.sort_by_key(|h| h.fd);
        Ok(held)
    }

    /// The mount over which it opened a file (`mnt_id` in `/proc/PID/fdinfo`).
    ///
    /// # Errors
    /// When the process is gone or not ours to look at.
    pub fn mount_of(&self, held: Held) -> io::Result<u64> {
        let text = fs::read_to_string(self.path("fdinfo").join(held.fd.to_string()))?;
        let id = text.lines().find_map(|line| line.strip_prefix("mnt_id:")).and_then(|id| id.trim().parse().ok());
        id.ok_or_else(|| io::Error::other(format!("fdinfo of descriptor {} has no mnt_id", held.fd)))
    }

    /// Whether it holds a socket open.
    ///
    /// # Errors
    /// When the process is gone or not ours to look at.
    pub fn holds_socket(&self, inode: u64) -> io::Result<bool> {
        let name = format!("socket:[{inode}]");
        for entry in fs::read_dir(self.path("fd"))? {
            // One that was closed meanwhile has no name.
            if fs::read_link(entry?.path()).is_ok_and(|to| to.as_os_str() == name.as_str()) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Opens for reading the file behind one of its descriptors, whatever names it now.
    ///
    /// # Errors
    /// When it cannot be read or is something else by now.
    pub fn open_held(&self, held: Held) -> io::Result<File> {
        // It may have become a FIFO since, whose opening would wait for somebody at the other end.
        let flags = i32::try_from(OFlags::NONBLOCK.bits()).unwrap_or_default();
        let file = File::options().read(true).custom_flags(flags).open(self.path("fd").join(held.fd.to_string()))?;
        let m = file.metadata()?;
        if (m.dev(), m.ino()) == held.id {
            Ok(file)
        } else {
            Err(io::Error::other(format!("descriptor {} is another file by now", held.fd)))
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        Path::new("/proc").join(self.pid.to_string()).join(name)
    }
}

/// Time since the host's boot.
pub(crate) fn uptime() -> io::Result<Duration> {
    let text = fs::read_to_string("/proc/uptime")?;
    let seconds: Option<f64> = text.split_ascii_whitespace().next().and_then(|s| s.parse().ok());
    let time = seconds.and_then(|s| Duration::try_from_secs_f64(s).ok());
    time.ok_or_else(|| io::Error::other("/proc/uptime is not understood"))
}

/// Field 22 of `/proc/PID/stat`: clock ticks from the host's boot to the process' start.
pub(crate) fn start_time(pid: u32) -> io::Result<u64> {
    stat_field(&format!("/proc/{pid}/stat"), 22)
}

/// Fields 14 and 15 of a thread's `stat`: clock ticks that it has run.
pub(crate) fn thread_ticks(pid: u32, thread: u32) -> io::Result<u64> {
    let path = format!("/proc/{pid}/task/{thread}/stat");
    Ok(stat_field(&path, 14)?.saturating_add(stat_field(&path, 15)?))
}

/// A number in a `stat` file, by the field's number from 3 on.
fn stat_field(path: &str, field: usize) -> io::Result<u64> {
    let stat = fs::read(path)?;
    // The second field, the program's name in parentheses, may itself hold anything.
    let after = stat.iter().rposition(|&b| b == b')').map(|at| &stat[at + 1..]);
    after
        .and_then(|rest| std::str::from_utf8(rest).ok())
        .and_then(|rest| rest.split_ascii_whitespace().nth(field.saturating_sub(3)))
        .and_then(|field| field.parse().ok())
        .ok_or_else(|| io::Error::other(format!("{path} is not understood")))
}

/// The arguments of a process.
pub(crate) fn arguments(pid: u32) -> io::Result<Vec<OsString>> {
    use std::io::Read as _;
    let mut raw = Vec::new();
    File::open(format!("/proc/{pid}/cmdline"))?.take(MAX_ARGUMENTS + 1).read_to_end(&mut raw)?;
    if raw.len() as u64 > MAX_ARGUMENTS {
        return Err(io::Error::other(format!("process {pid} has more than {MAX_ARGUMENTS} bytes of arguments")));
    }
    if raw.last() == Some(&0) {
        raw.pop();
    }
    Ok(raw.split(|&b| b == 0).map(|arg| OsString::from_vec(arg.to_vec())).collect())
}

fn is_file_or_block(m: &fs::Metadata) -> bool {
    use std::os::unix::fs::FileTypeExt as _;
    m.is_file() || m.file_type().is_block_device()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use std::{os::fd::AsRawFd, process::Command};

    use super::*;

    #[tokio::test]
    async fn a_descriptor_that_became_a_fifo_is_an_error_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("fifo");
        assert!(Command::new("mkfifo").arg(&path).status().unwrap().success());
        let flags = i32::try_from(OFlags::NONBLOCK.bits()).unwrap();
        // Nobody writes: opening it to read would wait for ever.
        let fifo = File::options().read(true).custom_flags(flags).open(&path).unwrap();
        let own = Process::open(std::process::id()).unwrap();
        let held = Held { fd: u32::try_from(fifo.as_raw_fd()).unwrap(), id: (0, 0) };
        let e = own.open_held(held).unwrap_err();
        assert!(e.to_string().contains("another file by now"), "{e}");
    }
}
