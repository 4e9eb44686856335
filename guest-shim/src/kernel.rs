//! What the shim needs of the kernel: the list, a connection to the host, and the way out of root's powers.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::fs::FileExt as _;
use std::os::unix::net::UnixStream;
use std::path::Path;

use nix::mount::{MsFlags, mount};
use nix::sys::prctl;
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, VsockAddr, connect as connect_socket, setsockopt, socket, sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike as _};
use nix::unistd::{Gid, Uid, geteuid, setgid, setgroups, setuid};
use onequote_evidence::guest_frame::{DEFAULT_PORT, HOST_CID};
use onequote_evidence::id::BootId;
use onequote_evidence::ima::SHA1_HASH_SIZE;

use crate::list::List;
use crate::session::Count;

const SECURITYFS: &str = "/sys/kernel/security";
const LIST: &str = "/sys/kernel/security/ima/binary_runtime_measurements";
const COUNT: &str = "/sys/kernel/security/ima/runtime_measurements_count";

/// The user and group without rights (`nobody`, `nogroup`).
const NOBODY: u32 = 65534;

/// A host that takes nothing for so long is gone.
const SEND_LIMIT_SECONDS: i64 = 20;

/// All that has to be opened or read as root.
pub(crate) struct Opened {
    pub(crate) list: List<File>,
    pub(crate) count: CountFile,
    pub(crate) boot_id: BootId,
    pub(crate) port: u32,
}

/// Opens everything; mounts securityfs if it is not there.
///
/// # Errors
/// With the file's name; worth another try, since the shim may start before the file systems are mounted.
pub(crate) fn open() -> io::Result<Opened> {
    if !Path::new(LIST).exists() {
        // Without the right to mount, opening the list says what is wrong.
        let _ = mount(Some("securityfs"), SECURITYFS, Some("securityfs"), MsFlags::empty(), None::<&str>);
    }
    let name = fs::read_link(LIST).unwrap_or_else(|_| LIST.into());
    let boot_id = "/proc/sys/kernel/random/boot_id";
    let boot_id_text = fs::read_to_string(boot_id).map_err(|error| named(boot_id, &error))?;
    Ok(Opened {
        list: List::new(open_file(LIST)?, hash_size(&name.to_string_lossy())),
        count: CountFile(open_file(COUNT)?),
        boot_id: BootId::from_kernel(&boot_id_text)
            .ok_or_else(|| named(boot_id, &io::ErrorKind::InvalidData.into()))?,
        port: fs::read_to_string("/proc/cmdline").map_or(DEFAULT_PORT, |cmdline| port(&cmdline)),
    })
}

fn open_file(path: &str) -> io::Result<File> {
    File::open(path).map_err(|error| named(path, &error))
}

fn named(path: &str, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{path}: {error}"))
}

/// Newer kernels make the list a link to one with the template hashes of one bank.
fn hash_size(name: &str) -> usize {
    match name.rsplit_once('_') {
        Some((_, "sha256")) => 32,
        Some((_, "sha384")) => 48,
        Some((_, "sha512")) => 64,
        _ => SHA1_HASH_SIZE,
    }
}

/// `onequote.port=` of the kernel's command line; what is no port is not taken.
fn port(cmdline: &str) -> u32 {
    cmdline
        .split_whitespace()
        .filter_map(|word| word.strip_prefix("onequote.port=")?.parse().ok())
        .next_back()
        .unwrap_or(DEFAULT_PORT)
}

/// `runtime_measurements_count`.
pub(crate) struct CountFile(File);

impl Count for CountFile {
    fn count(&mut self) -> io::Result<u64> {
        let mut buffer = [0; 32];
        let length = self.0.read_at(&mut buffer, 0)?;
        std::str::from_utf8(&buffer[..length])
            .ok()
            .and_then(|text| text.trim().parse().ok())
            .ok_or_else(|| named(COUNT, &io::ErrorKind::InvalidData.into()))
    }
}

/// Becomes `nobody`, without groups, and for ever: what is open stays open, and nothing else can be had.
///
/// # Errors
/// The kernel refuses; the shim works all the same.
pub(crate) fn drop_privileges() -> nix::Result<()> {
    if geteuid().is_root() {
        setgroups(&[])?;
        setgid(Gid::from_raw(NOBODY))?;
        // Gives up every capability, too.
        setuid(Uid::from_raw(NOBODY))?;
    }
    prctl::set_no_new_privs()?;
    prctl::set_dumpable(false)
}

/// Connects to the host.
///
/// # Errors
/// No vsock (yet), or nobody listens there.
pub(crate) fn connect(port: u32) -> io::Result<UnixStream> {
    let socket: OwnedFd = socket(AddressFamily::Vsock, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    setsockopt(&socket, sockopt::SendTimeout, &TimeVal::seconds(SEND_LIMIT_SECONDS))?;
    connect_socket(socket.as_raw_fd(), &VsockAddr::new(HOST_CID, port))?;
    // Only reads and writes follow, which are the same for every stream socket.
    Ok(UnixStream::from(socket))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;

    #[test]
    fn the_last_sound_port_counts() {
        assert_eq!(port("quiet"), DEFAULT_PORT);
        assert_eq!(port("a onequote.port=7 b onequote.port=9\n"), 9);
        assert_eq!(port("onequote.port=7 onequote.port=x"), 7);
        assert_eq!(port("xonequote.port=7"), DEFAULT_PORT);
    }

    #[test]
    fn the_hash_size_follows_the_lists_name() {
        assert_eq!(hash_size(LIST), 20);
        assert_eq!(hash_size("binary_runtime_measurements_sha1"), 20);
        assert_eq!(hash_size("binary_runtime_measurements_sha256"), 32);
    }
}
