//! Becoming QEMU, and what this host offers it.

use std::{
    fs::{self, DirBuilder},
    os::unix::{fs::DirBuilderExt, net::UnixStream, process::CommandExt},
    process::Command,
};

use super::{LaunchError, Planned};
use crate::measure::process::LAUNCHED;

/// The kernel's vhost device for vsock.
pub(super) const VHOST_VSOCK: &str = "/dev/vhost-vsock";

/// Whether the host's kernel offers vsock to guests, and this process may use it.
#[must_use]
pub fn host_has_vsock() -> bool {
    fs::OpenOptions::new().read(true).write(true).open(VHOST_VSOCK).is_ok()
}

impl Planned {
    /// Turns this process into QEMU. Comes back only with an error.
    #[must_use]
    pub fn exec(&self) -> LaunchError {
        if let Some(dir) = self.socket.parent().filter(|d| !d.is_dir())
            && let Err(source) = DirBuilder::new().recursive(true).mode(0o700).create(dir)
        {
            return LaunchError::Io { path: dir.to_owned(), source };
        }
        // QEMU takes the path of a monitor away from a VM that runs.
        if UnixStream::connect(&self.socket).is_ok() {
            return LaunchError::Running(self.name.clone(), self.socket.clone());
        }
        let Some((program, args)) = self.command.split_first() else { return LaunchError::Empty };
        let mut command = Command::new(program);
        command.args(args).env(LAUNCHED, "1");
        if let Some(folder) = &self.folder {
            command.current_dir(folder);
        }
        LaunchError::Io { path: program.into(), source: command.exec() }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::super::{HostVsock, Launch, TakenCids, VsockWish};
    use super::*;

    #[test]
    fn a_running_vm_keeps_its_monitor() {
        let dir = tempfile::tempdir().unwrap();
        let launch = Launch {
            name: Some("x".to_owned()),
            dir: dir.path().to_owned(),
            command: vec!["qemu-system-x86_64".into()],
            vsock: VsockWish::Off,
            host: HostVsock { device: false, taken: Ok(TakenCids::new()) },
            folder: None,
            notes: Vec::new(),
        };
        let planned = launch.plan().unwrap();
        let _listener = std::os::unix::net::UnixListener::bind(&planned.socket).unwrap();
        assert!(matches!(planned.exec(), LaunchError::Running(..)));
    }
}
