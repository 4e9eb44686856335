//! Waiting for conditions, with a deadline and without fixed sleeps.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

/// How often a condition is looked at. Short: the wait must not show in measured times.
const STEP: Duration = Duration::from_millis(5);

/// Polls `condition` until it gives a value.
///
/// # Errors
/// What the condition's own error was, or, after `limit`, that `what` did not come.
pub fn until<T>(what: &str, limit: Duration, mut condition: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let start = Instant::now();
    loop {
        if let Some(value) = condition()? {
            return Ok(value);
        }
        if start.elapsed() >= limit {
            bail!("waited {} s in vain for {what}", limit.as_secs_f32());
        }
        std::thread::sleep(STEP);
    }
}

/// Polls `condition` until it holds.
///
/// # Errors
/// As [`until`].
pub fn for_true(what: &str, limit: Duration, mut condition: impl FnMut() -> Result<bool>) -> Result<()> {
    until(what, limit, || Ok(condition()?.then_some(())))
}

/// Whether somebody listens at a Unix socket bound to this very path: between bind and listen the file is there and a
/// connection is refused. Looks without connecting, since some servers take one client only. The flag is the kernel's
/// `__SO_ACCEPTCON` (Linux `include/linux/net.h`, shown by `net/unix/af_unix.c`, `unix_seq_show`).
///
/// # Errors
/// `/proc/net/unix` cannot be read.
pub fn listens(socket: &Path) -> Result<bool> {
    let sockets = fs::read("/proc/net/unix").context("/proc/net/unix")?;
    let path = format!(" {}", socket.display());
    let listening = |line: &[u8]| {
        line.ends_with(path.as_bytes())
            && String::from_utf8_lossy(line).split_ascii_whitespace().nth(3).is_some_and(|flags| flags == "00010000")
    };
    Ok(sockets.split(|&b| b == b'\n').any(listening))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_that_is_bound_only_is_not_listened_at() {
        use nix::sys::socket::{self, AddressFamily, Backlog, SockFlag, SockType, UnixAddr};
        use std::os::fd::AsRawFd as _;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        assert!(!listens(&path).unwrap());
        let fd = socket::socket(AddressFamily::Unix, SockType::Stream, SockFlag::empty(), None).unwrap();
        socket::bind(fd.as_raw_fd(), &UnixAddr::new(&path).unwrap()).unwrap();
        assert!(path.exists() && !listens(&path).unwrap());
        socket::listen(&fd, Backlog::new(1).unwrap()).unwrap();
        assert!(listens(&path).unwrap());
        drop(fd);
        assert!(path.exists() && !listens(&path).unwrap());
    }
}
