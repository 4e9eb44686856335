//! What the shim in a guest and the proxy on its host say to each other over vsock.
//!
//! A connection carries frames in both directions: u32 little-endian length, then that many bytes of canonical CBOR,
//! an array of two: the frame's number and the array of its fields. The guest connects; the host's end knows which VM
//! it is from the connection itself (CID, or the socket's path), never from a frame.
//!
//! ```text
//! guest                                   host
//! Hello {boot id, hash size, count}   →
//!                                     ←   Have {count, aggregate}      what the host holds of this boot's list
//! Resume {count, aggregate}           →                                the guest's own list up to there
//! Entries {first, entries}            →                                from then on, whenever the list grew
//! Heartbeat {count}                   →                                when it did not, every HEARTBEAT_SECONDS
//!                                     ←   Collect {id}                 send what is new now
//! Collected {id, count}               →                                all entries up to count were sent before this
//! ```
//!
//! `Resume` has `Have`'s count and the aggregate of the guest's first that many entries; a guest whose list is
//! shorter answers with its own count and aggregate. If count or aggregate differ from `Have`, the guest claims
//! another past than the one it told before: the host logs `guest-rewind` and takes nothing more in that boot.
//! Entries follow without gap or overlap: `first` is the index after the last one sent. A frame that breaks these
//! rules ends the connection.

use minicbor::{Decode, Encode};

use crate::{
    Malformed, cbor,
    id::{Blob, BootId, Sha256},
    ima,
};

/// The vsock port on which the host listens, unless `onequote.port=` on the guest's kernel command line says other.
pub const DEFAULT_PORT: u32 = 20305;

/// The vsock CID of the host (`VMADDR_CID_HOST`, Linux `include/uapi/linux/vm_sockets.h`).
pub const HOST_CID: u32 = 2;

/// This description's version, in [`GuestFrame::Hello`].
pub const VERSION: u32 = 1;

/// The longest frame in bytes, without its length.
pub const MAX_FRAME: usize = 256 * 1024;

/// The most bytes of entries in one [`GuestFrame::Entries`]; a single longer entry stands alone.
pub const ENTRIES_TARGET: usize = 48 * 1024;

/// A guest that has nothing to say sends a heartbeat this often.
pub const HEARTBEAT_SECONDS: u64 = 5;

/// A frame from the guest.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum GuestFrame {
    /// First frame of a connection.
    #[n(0)]
    Hello {
        /// [`VERSION`].
        #[n(0)]
        version: u32,
        /// The guest kernel's boot id, so that a reboot is told from a rewind. Only a claim.
        #[n(1)]
        boot_id: BootId,
        /// Size of the template hash in the list, in bytes: 20 unless the kernel shows bank-sized hashes.
        #[n(2)]
        hash_size: u32,
        /// Entries in the guest's list now.
        #[n(3)]
        count: u64,
    },
    /// Answer to [`HostFrame::Have`].
    #[n(1)]
    Resume {
        /// The smaller of the host's count and the list's length.
        #[n(0)]
        count: u64,
        /// Aggregate of the first `count` entries of the guest's list.
        #[n(1)]
        aggregate: Sha256,
    },
    /// New entries.
    #[n(2)]
    Entries {
        /// Index of the first of them, from 0.
        #[n(0)]
        first: u64,
        /// Whole entries as the kernel lists them, at least one.
        #[n(1)]
        entries: Blob,
    },
    /// Nothing new.
    #[n(3)]
    Heartbeat {
        /// Entries sent so far.
        #[n(0)]
        count: u64,
    },
    /// Answer to [`HostFrame::Collect`].
    #[n(4)]
    Collected {
        /// The request's id.
        #[n(0)]
        id: u64,
        /// Entries sent so far.
        #[n(1)]
        count: u64,
    },
}

/// A frame from the host.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum HostFrame {
    /// What the host holds of this boot's list.
    #[n(0)]
    Have {
        /// Entries.
        #[n(0)]
        count: u64,
        /// Their aggregate.
        #[n(1)]
        aggregate: Sha256,
    },
    /// Send what is new now.
    #[n(1)]
    Collect {
        /// Chosen by the host, comes back in [`GuestFrame::Collected`].
        #[n(0)]
        id: u64,
    },
}

/// A frame with its length, ready to be sent.
pub fn to_wire<F: Encode<()>>(frame: &F) -> Vec<u8> {
    let body = cbor::encode(frame);
    let mut out = Vec::with_capacity(4 + body.len());
    // Frames are far below 4 GiB: the shim cuts entries at ENTRIES_TARGET.
    out.extend_from_slice(&u32::try_from(body.len()).unwrap_or(u32::MAX).to_le_bytes());
    out.extend_from_slice(&body);
    out
}

/// Checks the length in front of a frame.
///
/// # Errors
/// [`Malformed`] for an empty frame or one over [`MAX_FRAME`].
pub fn body_len(prefix: [u8; 4]) -> Result<usize, Malformed> {
    let len = u32::from_le_bytes(prefix) as usize;
    if len == 0 || len > MAX_FRAME {
        return Err(Malformed::invalid("frame", 0, "length is zero or over the limit"));
    }
    Ok(len)
}

/// Index of the first entry, and the entries, of a body that is [`GuestFrame::Entries`] and nothing else: what
/// [`GuestFrame::parse`] gives, without a copy. `None` for any other body.
#[must_use]
pub fn entries(body: &[u8]) -> Option<(u64, &[u8])> {
    if body.len() > MAX_FRAME {
        return None;
    }
    let mut decoder = minicbor::Decoder::new(body);
    let fits = decoder.array().ok()? == Some(2) && decoder.u32().ok()? == 2 && decoder.array().ok()? == Some(2);
    let (first, entries) = (decoder.u64().ok()?, decoder.bytes().ok()?);
    // One value has one encoding: the head in front of the entries is the shortest.
    let head = body.len().checked_sub(entries.len())?;
    let without = cbor::encode(&GuestFrame::Entries { first, entries: Blob(Vec::new()) }).len() - 1;
    (fits
        && decoder.position() == body.len()
        && head == without + cbor::head_len(entries.len() as u64)
        && !entries.is_empty())
    .then_some((first, entries))
}

impl GuestFrame {
    /// Reads a frame's body (without the length).
    ///
    /// # Errors
    /// [`Malformed`].
    pub fn parse(body: &[u8]) -> Result<Self, Malformed> {
        let frame: Self = cbor::decode("guest frame", body, MAX_FRAME)?;
        if let Self::Hello { hash_size, .. } = &frame
            && !crate::digest::HashAlg::ALL.iter().any(|alg| alg.size() == *hash_size as usize)
        {
            return Err(Malformed::invalid("guest frame", 0, "hash size is that of no algorithm"));
        }
        if matches!(&frame, Self::Entries { entries, .. } if entries.0.is_empty()) {
            return Err(Malformed::invalid("guest frame", 0, "entries without an entry"));
        }
        Ok(frame)
    }
}

impl HostFrame {
    /// Reads a frame's body (without the length).
    ///
    /// # Errors
    /// [`Malformed`].
    pub fn parse(body: &[u8]) -> Result<Self, Malformed> {
        cbor::decode("host frame", body, MAX_FRAME)
    }
}

// One entry of the largest size must fit a frame.
const _: () = assert!(ima::MAX_ENTRY + 32 <= MAX_FRAME);

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests;
