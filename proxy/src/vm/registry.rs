//! What the proxy knows of VMs at this moment, for the statement, the status and the guests' door.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use onequote_evidence::{
    event::{Depth, VmRef},
    id::{TimeMs, VmId},
};
use serde::Serialize;
use tokio::sync::{Notify, broadcast};

use super::{UnmanagedProcess, control::Control};
use crate::intercept::DoorStatus;

/// Notices that wait for one receiver. Who falls behind looks at [`Registry::snapshot`].
const NOTICES: usize = 1024;

/// Where a session is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Stage {
    /// Being measured; not in the log yet.
    Measuring,
    /// Measured and logged.
    Watched,
    /// Not let run, or running without having been measured. [`LiveVm::error`] says why.
    Refused,
    /// QEMU lives, its monitor doesn't answer.
    MonitorLost,
    /// QEMU has ended; its images are being measured.
    Ending,
}

impl std::fmt::Display for Stage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Measuring => "measuring",
            Self::Watched => "watched",
            Self::Refused => "refused",
            Self::MonitorLost => "monitor-lost",
            Self::Ending => "ending",
        })
    }
}

/// One session of a VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct LiveVm {
    /// The VM and its process.
    #[serde(flatten)]
    pub vm: VmRef,
    /// Its name.
    pub name: String,
    /// QEMU's process id.
    pub pid: u32,
    /// When its QEMU was started, where that is known.
    pub since: Option<TimeMs>,
    /// How it is watched.
    pub depth: Depth,
    /// Where it is in its life.
    pub stage: Stage,
    /// Whether the log has its creation: then it belongs to the inventory.
    pub logged: bool,
    /// QEMU's run state as last seen.
    pub run_state: String,
    /// The guest's vsock CID, where QEMU knows it.
    pub guest_cid: Option<u64>,
    /// Where its vhost-user vsock back end has its sockets (`uds-path`), if it has such a device: guest connections
    /// to port P arrive at this path followed by `_P`.
    pub vsock: Option<PathBuf>,
    /// Resets seen in this session.
    pub resets: u64,
    /// Its socket for management tools, if it is intercepted.
    pub monitor: Option<DoorStatus>,
    /// The last error, for people.
    pub error: Option<String>,
}

/// A monitor socket that leads to no VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct SocketTrouble {
    /// The VM's name.
    pub name: String,
    /// The socket.
    pub path: PathBuf,
    /// What is wrong, for people.
    pub error: String,
}

/// All that is known at one moment.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct RegistrySnapshot {
    /// Sessions, in ascending order of UUID and session.
    pub vms: Vec<LiveVm>,
    /// Sockets in trouble, in ascending order of their paths.
    pub sockets: Vec<SocketTrouble>,
    /// Processes that look like VMs and are not managed, in ascending order of pids.
    pub unmanaged: Vec<UnmanagedProcess>,
}

/// What happened to a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NoticeKind {
    /// It is logged and will run at once, or runs already.
    Started,
    /// Its guest begins a new boot.
    Reset,
    /// QEMU has ended.
    Stopped,
}

/// Told when a session's life changes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Notice {
    /// What happened.
    pub kind: NoticeKind,
    /// The session as it is now.
    pub status: LiveVm,
}

/// The registry. Clones share it.
#[derive(Debug, Clone)]
pub struct Registry {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    inner: Mutex<Inner>,
    left: Notify,
    notices: broadcast::Sender<Notice>,
}

#[derive(Debug, Default)]
struct Inner {
    vms: BTreeMap<VmRef, LiveVm>,
    controls: BTreeMap<VmRef, Control>,
    sockets: BTreeMap<PathBuf, SocketTrouble>,
    unmanaged: Vec<UnmanagedProcess>,
    /// Processes behind monitors, those among them that are not in `vms` yet, too.
    met: BTreeSet<u32>,
}

/// A process that was met at a monitor, as long as this lives.
pub(super) struct Met {
    registry: Registry,
    pid: u32,
}

impl Drop for Met {
    fn drop(&mut self) {
        self.registry.lock().met.remove(&self.pid);
    }
}

impl Default for Registry {
    fn default() -> Self {
        let notices = broadcast::Sender::new(NOTICES);
        Self { shared: Arc::new(Shared { inner: Mutex::default(), left: Notify::new(), notices }) }
    }
}

impl Registry {
    /// All that is known now.
    #[must_use]
    pub fn snapshot(&self) -> RegistrySnapshot {
        let inner = self.lock();
        RegistrySnapshot {
            vms: inner.vms.values().cloned().collect(),
            sockets: inner.sockets.values().cloned().collect(),
            unmanaged: inner.unmanaged.clone(),
        }
    }

    /// Tells of every change from now on. A receiver that falls behind by more than 1,024 is told that it lags, and
    /// finds sessions and their number of resets in [`Registry::snapshot`].
    #[must_use]
    pub fn notices(&self) -> broadcast::Receiver<Notice> {
        self.shared.notices.subscribe()
    }

    /// Takes a session in. If another one of the same VM is there that is not refused, gives that one instead.
    /// Entered again, it keeps its count of resets and whether it is logged.
    pub(super) fn enter(&self, mut status: LiveVm) -> Result<(), Box<LiveVm>> {
        let mut inner = self.lock();
        if let Some(before) = inner.vms.get(&status.vm) {
            (status.resets, status.logged) = (before.resets, before.logged);
        }
        let other = inner.claim(status.vm.vm).filter(|other| other.vm != status.vm);
        match other.filter(|_| status.stage != Stage::Refused) {
            Some(other) => Err(Box::new(other.clone())),
            None => {
                inner.vms.insert(status.vm, status);
                Ok(())
            }
        }
    }

    /// Waits until the session is gone.
    pub(super) async fn gone(&self, vm: VmRef) {
        loop {
            let mut left = std::pin::pin!(self.shared.left.notified());
            left.as_mut().enable();
            if !self.lock().vms.contains_key(&vm) {
                return;
            }
            left.await;
        }
    }

    /// Changes a session's status.
    pub(crate) fn update(&self, vm: VmRef, change: impl FnOnce(&mut LiveVm)) {
        if let Some(status) = self.lock().vms.get_mut(&vm) {
            change(status);
        }
    }

    /// Tells of a session.
    pub(super) fn tell(&self, vm: VmRef, kind: NoticeKind) {
        let status = self.lock().vms.get(&vm).cloned();
        if let Some(status) = status {
            // Without a receiver there is nobody to tell.
            let _ = self.shared.notices.send(Notice { kind, status });
        }
    }

    /// Takes a session out.
    pub(super) fn leave(&self, vm: VmRef) {
        let mut inner = self.lock();
        inner.vms.remove(&vm);
        inner.controls.remove(&vm);
        drop(inner);
        self.shared.left.notify_waiters();
    }

    /// Makes a session reachable for people.
    pub(super) fn offer(&self, vm: VmRef, control: Control) {
        self.lock().controls.insert(vm, control);
    }

    pub(super) fn control_of(&self, vm: &LiveVm) -> Option<Control> {
        self.lock().controls.get(&vm.vm).cloned()
    }

    pub(super) fn stage(&self, vm: VmRef) -> Option<Stage> {
        self.lock().vms.get(&vm).map(|status| status.stage)
    }

    /// Notes that a process has a monitor, and so is not unmanaged.
    pub(super) fn meet(&self, pid: u32) -> Met {
        self.lock().met.insert(pid);
        Met { registry: self.clone(), pid }
    }

    /// Processes that are not unmanaged.
    pub(super) fn managed(&self) -> HashSet<u32> {
        let inner = self.lock();
        inner.met.iter().copied().chain(inner.vms.values().map(|vm| vm.pid)).collect()
    }

    /// Sets or clears a socket's trouble. Says whether that is new.
    pub(super) fn trouble(&self, path: &std::path::Path, trouble: Option<&SocketTrouble>) -> bool {
        let mut inner = self.lock();
        let before = match trouble {
            Some(trouble) => inner.sockets.insert(path.to_owned(), trouble.clone()),
            None => inner.sockets.remove(path),
        };
        before.as_ref() != trouble
    }

    pub(super) fn set_unmanaged(&self, unmanaged: Vec<UnmanagedProcess>) {
        self.lock().unmanaged = unmanaged;
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Nothing in here can panic between two changes that belong together.
        self.shared.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn claim(&self, vm: VmId) -> Option<&LiveVm> {
        self.vms.values().find(|other| other.vm.vm == vm && other.stage != Stage::Refused)
    }
}
