//! Which socket is at the other end of a Unix socket (Linux `include/uapi/linux/unix_diag.h`, `net/unix/diag.c`).
//!
//! `SO_PEERCRED` names the process that listened. Who holds the accepted end now can be another one: the listening
//! descriptor, or the accepted one, can have been handed on. The kernel tells the other end's inode over `NETLINK_SOCK_DIAG`,
//! and `/proc/PID/fd` shows whether a process has it.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
};

use rustix::{
    fs::fstat,
    net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, netlink, recv, send, socket_with, sockopt},
};

/// `SOCK_DIAG_BY_FAMILY`.
const BY_FAMILY: u16 = 20;

/// `NLMSG_ERROR`.
const ERROR: u16 = 2;

/// `NLM_F_REQUEST`.
const REQUEST: u16 = 1;

/// `UDIAG_SHOW_PEER`, and the attribute `UNIX_DIAG_PEER` of the answer.
const SHOW_PEER: u32 = 4;
const PEER: u16 = 2;

/// Bytes of a netlink header, and of `struct unix_diag_msg`.
const HEADER: usize = 16;
const MESSAGE: usize = 16;

/// The inode of the socket that is connected to this one.
///
/// # Errors
/// When the kernel does not tell: it was built without the module `unix_diag`, or the other end is gone.
pub(super) fn peer_inode(socket: &impl AsFd) -> io::Result<u64> {
    let own = u32::try_from(fstat(socket)?.st_ino).map_err(io::Error::other)?;
    let diag: OwnedFd =
        socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, Some(netlink::SOCK_DIAG))?;
    // The kernel answers at once; a kernel that does not must not be waited for.
    sockopt::set_socket_timeout(&diag, sockopt::Timeout::Recv, Some(std::time::Duration::from_secs(1)))?;
    send(&diag, &question(own), SendFlags::empty())?;
    let mut answer = [0; 4096];
    let (read, _) = recv(&diag, &mut answer, RecvFlags::empty())?;
    peer_in(answer.get(..read).unwrap_or_default(), own)
}

/// `struct nlmsghdr` and `struct unix_diag_req` for one socket, in any state, without a cookie.
fn question(inode: u32) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEADER + 24);
    bytes.extend(40_u32.to_ne_bytes());
    bytes.extend(BY_FAMILY.to_ne_bytes());
    bytes.extend(REQUEST.to_ne_bytes());
    bytes.extend([0; 8]);
    // Family, protocol, padding.
    bytes.extend([1, 0, 0, 0]);
    for word in [u32::MAX, inode, SHOW_PEER, u32::MAX, u32::MAX] {
        bytes.extend(word.to_ne_bytes());
    }
    bytes
}

/// The peer's inode in an answer about socket `own`.
fn peer_in(answer: &[u8], own: u32) -> io::Result<u64> {
    let strange = || io::Error::new(io::ErrorKind::InvalidData, "the kernel's answer about a socket is not understood");
    let u16_at = |at: usize| answer.get(at..).and_then(|b| b.first_chunk()).map(|b| u16::from_ne_bytes(*b));
    let u32_at = |at: usize| answer.get(at..).and_then(|b| b.first_chunk()).map(|b| u32::from_ne_bytes(*b));
    if u16_at(4) == Some(ERROR) {
        let error = u32_at(HEADER).ok_or_else(strange)?.cast_signed();
        return Err(io::Error::from_raw_os_error(error.saturating_neg()));
    }
    // Behind family, type, state and padding stands the inode that was asked for.
    if u16_at(4) != Some(BY_FAMILY) || u32_at(HEADER + 4) != Some(own) {
        return Err(strange());
    }
    let mut at = HEADER + MESSAGE;
    while let (Some(length), Some(kind)) = (u16_at(at), u16_at(at + 2)) {
        if kind == PEER && length >= 8 {
            return match u32_at(at + 4).ok_or_else(strange)? {
                0 => Err(io::Error::new(io::ErrorKind::NotConnected, "nobody holds the other end")),
                peer => Ok(u64::from(peer)),
            };
        }
        // Each attribute begins at a multiple of four.
        at += usize::from(length.max(4)).next_multiple_of(4);
    }
    Err(io::Error::new(io::ErrorKind::NotConnected, "there is no other end"))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use std::os::unix::{fs::MetadataExt as _, net::UnixStream};

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_kernel_tells_the_other_end() {
        let (a, b) = UnixStream::pair().unwrap();
        let inode = |s: &UnixStream| {
            use std::os::fd::AsRawFd as _;
            std::fs::metadata(format!("/proc/self/fd/{}", s.as_raw_fd())).unwrap().ino()
        };
        assert_eq!(peer_inode(&a).unwrap(), inode(&b));
        assert_eq!(peer_inode(&b).unwrap(), inode(&a));
        drop(b);
        assert!(peer_inode(&a).is_err());
    }

    #[test]
    fn errors_of_the_kernel_are_ours() {
        let mut answer = question(7);
        answer[4..6].copy_from_slice(&ERROR.to_ne_bytes());
        answer[HEADER..HEADER + 4].copy_from_slice(&(-2_i32).to_ne_bytes());
        assert_eq!(peer_in(&answer, 7).unwrap_err().kind(), io::ErrorKind::NotFound);
        assert_eq!(peer_in(&[], 7).unwrap_err().kind(), io::ErrorKind::InvalidData);
    }

    proptest! {
        #[test]
        fn no_answer_panics_or_hangs(mut bytes in prop::collection::vec(0..4_u8, 0..200), own: u32) {
            if bytes.len() > 24 {
                bytes[4..6].copy_from_slice(&BY_FAMILY.to_ne_bytes());
                bytes[HEADER + 4..HEADER + 8].copy_from_slice(&own.to_ne_bytes());
            }
            // Whatever it is: it ends.
            let _ = peer_in(&bytes, own);
        }
    }
}
