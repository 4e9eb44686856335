//! `launch`: starts QEMU so that the proxy meets it before its guest runs.
//!
//! The user's arguments stay as they are; what is missing is added behind them: `-S`, so that QEMU waits; a monitor in
//! the watched folder, named after the VM; `-name`; and a vsock device, so that the guest's shim reaches the host,
//! where the kernel offers `/dev/vhost-vsock` and the arguments have none. Then this process becomes QEMU: it stays in
//! the foreground, and whoever started it sees its end. The proxy lets the VM run once it is measured and logged.

mod exec;
mod plan;

use std::{io, path::PathBuf};

pub use exec::host_has_vsock;
pub use plan::{Launch, Planned};

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
    #[error("the VM is called {0} by --name and {1} by -name: leave one out")]
    TwoNames(String, String),
    /// An argument does not go together with being measured before the start.
    #[error("{0} cannot be launched: {1}")]
    Conflict(String, &'static str),
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
