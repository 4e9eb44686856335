//! VMs: finding them, deciding whether they may run, and logging what happens to them.
//!
//! # One socket
//! A VM is a QEMU process whose monitor is a socket `NAME.qmp` in the watched folder, or one named in the
//! configuration. For each socket that appears one task runs:
//!
//! *connecting*: QEMU makes the socket before it listens, so a refused connection is tried again until a deadline; a
//! silent monitor (another client holds it) and one that speaks something else stay visible as socket trouble and are
//! tried again for as long as the socket is the same. → *measuring*: the process is known from the socket's peer, the
//! VM from QEMU's UUID or else from host and name. Everything it starts from is measured.
//! - QEMU waits in `prelaunch` (`-S`): **gate**. The measurement is compared with the local references, if there are
//!   any; creation and start go to the log in one record, and only when that is on disk and in the TPM the VM is let
//!   run. → *watched*. If anything fails, the refusal is logged and the VM stays as it is. → *refused*.
//! - It runs already: **observe**. The same is logged as an attachment. → *watched*.
//!
//! *watched*: pauses, resumes, resets and the guest's power-off are logged as QEMU tells them; after other events, and
//! on a timer, configuration and block graph are compared with what was measured and differences logged.
//! The monitor ends → the process ends within a grace period → *ending*; or it lives on → *monitor lost*: that is
//! logged, the monitor is connected to again and all is measured again. → *watched*.
//! *ending*: the images that QEMU could write are measured through descriptors opened when it started, so that they
//! are the inodes it had, and the stop is logged with their digests. Then the session is gone.
//!
//! # What the log said before
//! The inventory tells which sessions the log left open before this start ([`open_sessions`]). One whose
//! process is gone is closed with what its images' paths hold now; one that lives is logged as a gap and measured
//! again once its monitor is there.
//!
//! # Two at once
//! One VM has one process. A second QEMU with the UUID of a live one is refused; one that comes while the first is
//! *ending* waits until that is logged, so that continuity is judged in order.
//!
//! # VMs without a monitor
//! Processes that run a QEMU program or hold `/dev/kvm` and are none of the above are logged once as unmanaged.

mod change;
mod changed;
mod commanders;
mod compare;
mod control;
mod facts;
mod intercepted;
mod life;
mod manager;
mod migrate;
mod open;
mod outbox;
mod pace;
mod past;
mod reference;
mod registry;
mod session;
mod start;
#[cfg(test)]
mod tests;
mod unmanaged;
mod watch;

pub use control::ControlError;
pub use manager::{Config, Manager};
pub use open::{OpenSession, open_sessions};
pub(crate) use outbox::Outbox;
pub use past::{Deleter, PastVm, PastVms};
pub(crate) use reference::fits as name_fits;
pub use reference::{Mismatch, ReferenceError, References};
pub use registry::{LiveVm, Notice, NoticeKind, Registry, RegistrySnapshot, SocketTrouble, Stage};
pub use unmanaged::{Scan, UnmanagedProcess};

/// Tells the time.
pub type Clock = fn() -> onequote_evidence::id::TimeMs;

/// Whether a VM's name can be a file name and stand in logs: 1 to 64 characters of `A-Z a-z 0-9 . _ -`, the first
/// one a letter or digit.
#[must_use]
pub fn is_valid_name(name: &str) -> bool {
    let bytes = name.as_bytes();
    (1..=64).contains(&bytes.len())
        && bytes[0].is_ascii_alphanumeric()
        && bytes.iter().all(|&b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
}
