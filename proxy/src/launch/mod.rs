//! `launch`: starts QEMU so that the proxy meets it before its guest runs.
//!
//! The user's arguments stay as they are; what is missing is added behind them: `-S`, so that QEMU waits; a monitor in
//! the watched folder, named after the VM; `-name`; and a vsock device, so that the guest's shim reaches the host,
//! where the kernel offers `/dev/vhost-vsock` and the arguments have none. Instead of arguments there may be a
//! [`Description`], which is first put into QEMU's words. Then this process becomes QEMU: it stays in
//! the foreground, and whoever started it sees its end. The proxy lets the VM run once it is measured and logged.

mod accel;
mod cid;
mod description;
mod exec;
mod plan;

use std::{io, path::PathBuf};

pub use accel::try_accelerator;
pub use cid::{TakenCids, taken_cids};
pub use description::{Description, DescriptionError};
pub use exec::host_has_vsock;
pub use plan::{HostVsock, Launch, Planned, VsockWish};

/// Why a VM is not launched.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// Nothing was given to run.
    #[error("no QEMU command line: onequote-proxy launch --name NAME -- qemu-system-x86_64 …")]
    Empty,
    /// No name was given.
    #[error("the VM has no name: give --name, or -name to QEMU")]
    NoName,
    /// The name cannot be a file's.
    #[error("{0:?} is no name for a VM: 1 to 64 of A-Z a-z 0-9 . _ -, a letter or digit first")]
    BadName(String),
    /// Two names were given.
    #[error("the VM is called {0} by --name and {1} by -name or its description: leave one out")]
    TwoNames(String, String),
    /// An argument does not go together with being measured before the start.
    #[error("{0} cannot be launched: {1}")]
    Conflict(String, &'static str),
    /// The description.
    #[error(transparent)]
    Description(#[from] DescriptionError),
    /// KVM was asked for.
    #[error("{file}: accelerator = \"kvm\": KVM does not work here: {why}")]
    Kvm {
        /// The description.
        file: PathBuf,
        /// Why.
        why: String,
    },
    /// The kernel's vsock was asked for.
    #[error(
        "vsock.type = \"vhost\": /dev/vhost-vsock is not to be had; load vhost_vsock, or see vhost-user in the operations manual"
    )]
    NoVsock,
    /// The CID that was asked for.
    #[error("vsock.cid = {0}: the VM {1} of this host has that CID")]
    CidTaken(u32, String),
    /// None was free.
    #[error("no free CID was found for the VM: give one as vsock.cid, or a vsock device")]
    NoCid,
    /// A VM of that name is there.
    #[error("a VM named {0} is running: its monitor {1} answers")]
    Running(String, PathBuf),
    /// A file or folder failed.
    #[error("{path}: {source}")]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}
