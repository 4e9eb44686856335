//! What the proxy says of its host at the moment of a quote. The quote's qualifying data has its SHA-256.
//!
//! A statement is a claim of the proxy. What it says of registers, log and guests can be computed from the evidence
//! and is checked; what it says of run state, contact and unmanaged processes is believed as far as the proxy's own
//! binary is trusted.

use minicbor::{Decode, Encode};

use crate::{
    Malformed, cbor,
    event::Depth,
    id::{Epoch, HostId, SessionId, Sha256, TimeMs, VmId},
    pcr::{self, MAX_REGISTERS, RegisterValue},
};

/// The version of this form.
pub const VERSION: u32 = 1;

/// The longest statement in bytes.
pub const MAX_STATEMENT: usize = 4 * 1024 * 1024;

macro_rules! stated {
    ($($(#[$doc:meta])* pub struct $name:ident { $($fields:tt)* })*) => {
        $(
            $(#[$doc])*
            #[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
            #[cfg_attr(feature = "json", derive(serde::Serialize))]
            #[cbor(map)]
            pub struct $name { $($fields)* }
        )*
    };
}

stated! {
    /// The statement.
    pub struct Statement {
        /// [`VERSION`].
        #[n(0)] pub version: u32,
        /// The host.
        #[n(1)] pub host: HostId,
        /// The log's epoch.
        #[n(2)] pub epoch: Epoch,
        /// Number of records in the log.
        #[n(3)] pub log_len: u64,
        /// Values of the log's two registers in every bank, after those records; in ascending order of bank and index.
        #[cbor(n(4), decode_with = "cbor::at_most::<MAX_REGISTERS, _, _>")] pub registers: Vec<RegisterValue>,
        /// Every VM that the proxy manages, in ascending order of UUID and session. A UUID can stand more than once: a
        /// second process with the UUID of a VM that runs is refused, but it is there.
        #[n(5)] pub vms: Vec<VmState>,
        /// Every QEMU process that it knows of and does not manage, in ascending order of pid.
        #[n(6)] pub unmanaged: Vec<Unmanaged>,
        /// When the guests' state was collected.
        #[n(7)] pub time: TimeMs,
    }

    /// One VM.
    pub struct VmState {
        /// Its UUID.
        #[n(0)] pub vm: VmId,
        /// Its QEMU process.
        #[n(1)] pub session: SessionId,
        /// Its name on the host.
        #[n(2)] pub name: String,
        /// QEMU's run state: `running`, `paused`, `prelaunch`, …
        #[n(3)] pub run_state: String,
        /// How it is watched.
        #[n(4)] pub depth: Depth,
        /// Its guest's lists, one for each boot in this session that a shim spoke of, oldest first.
        #[n(5)] pub boots: Vec<GuestBoot>,
        /// Milliseconds since the guest's last frame; none when there was no contact in this boot.
        #[n(6)] pub last_contact: Option<u64>,
        /// Whether the guest did not answer in time when this quote was made.
        #[n(7)] pub late: bool,
    }

    /// One boot of a guest.
    pub struct GuestBoot {
        /// Which boot of the session, from 0.
        #[n(0)] pub boot: u32,
        /// Entries that the host holds and has logged.
        #[n(1)] pub count: u64,
        /// The virtual PCR 10 over them.
        #[n(2)] pub aggregate: Sha256,
    }

    /// A QEMU process that is not managed.
    pub struct Unmanaged {
        /// Its process id.
        #[n(0)] pub pid: u32,
        /// Its program's path.
        #[n(1)] pub program: String,
    }
}

impl Statement {
    /// The statement's bytes.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        cbor::encode(self)
    }

    /// Reads a statement that fills `bytes`.
    ///
    /// # Errors
    /// [`Malformed`], also when registers, VMs or processes are doubled or out of order, or the version is another.
    pub fn parse(bytes: &[u8]) -> Result<Self, Malformed> {
        let invalid = |why| Malformed::invalid("statement", 0, why);
        let statement: Self = cbor::decode("statement", bytes, MAX_STATEMENT)?;
        if statement.version != VERSION {
            return Err(invalid("unknown version"));
        }
        if !pcr::from_list(&statement.registers).is_some_and(|sorted| pcr::to_list(&sorted) == statement.registers) {
            return Err(invalid("a register stands twice, is out of order or has not its bank's size"));
        }
        if !statement.vms.is_sorted_by(|a, b| (a.vm, a.session) < (b.vm, b.session)) {
            return Err(invalid("a VM's process stands twice or the VMs are out of order"));
        }
        if !statement.unmanaged.is_sorted_by(|a, b| a.pid < b.pid) {
            return Err(invalid("unmanaged processes are out of order"));
        }
        if statement.vms.iter().any(|vm| !vm.boots.is_sorted_by(|a, b| a.boot < b.boot)) {
            return Err(invalid("a VM's boots are out of order"));
        }
        Ok(statement)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests;
