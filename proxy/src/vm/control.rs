//! What people ask of a VM through the proxy, which holds its monitor.
//!
//! Powering down and ending go to the monitor at once, whatever the session's task does at that moment: a VM whose images
//! are being measured for minutes can be ended. A retry is the task's own work, and waits until the task is free.

use std::{fmt, time::Duration};

use onequote_evidence::id::{SessionId, VmId};
use tokio::{
    sync::{mpsc, oneshot},
    time::timeout,
};

use super::{
    facts::{Facts, run_state},
    registry::{LiveVm, Registry, Stage},
    session::Session,
    start::Occasion,
};
use crate::qmp::{Qmp, QmpError, WeakQmp};

/// Where a session's task tells what came of a retry: why the VM is still not let run.
pub(super) type Retry = oneshot::Sender<Result<(), String>>;

/// The way to a session.
#[derive(Clone)]
pub(super) struct Control {
    monitor: WeakQmp,
    retries: mpsc::Sender<Retry>,
}

impl fmt::Debug for Control {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Control").finish_non_exhaustive()
    }
}

/// Why a VM does not do what it was asked for.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ControlError {
    /// There is none of that name or UUID.
    #[error("no VM {name} is there{hint}; `onequote-proxy list` shows what there is")]
    NoVm {
        /// The name or UUID.
        name: String,
        /// What is known of it, or nothing.
        hint: String,
    },
    /// A UUID that several processes have.
    #[error("several VMs have the UUID {0}: {1}; say which by its name")]
    Several(VmId, String),
    /// Its guest does not run.
    #[error("{0} is {1}: its guest cannot hear that it is to power down; `onequote-proxy kill {0}` ends QEMU")]
    NotRunning(String, String),
    /// It was not refused.
    #[error("{0} was not refused ({1}): there is nothing to try again")]
    NotRefused(String, String),
    /// Only who is gone can be deleted.
    #[error("{0} is there ({1}): `onequote-proxy stop {0}` or `kill {0}` first")]
    Alive(String, String),
    /// It is so already.
    #[error("{0} was deleted already")]
    Deleted(String),
    /// The log takes nothing.
    #[error("{0}")]
    Log(String),
    /// It was refused again.
    #[error("{0}")]
    RefusedAgain(String),
    /// Its monitor does not answer.
    #[error(
        "the monitor of {name} does not do it: {error}; if QEMU hangs, `kill -9 {pid}` ends it, and its end is logged"
    )]
    Monitor {
        /// The VM.
        name: String,
        /// QEMU's process.
        pid: u32,
        /// Why.
        error: String,
    },
}

impl Registry {
    /// The VM of that name or UUID. One that is about to be gone is only meant when no other is.
    ///
    /// # Errors
    /// [`ControlError::NoVm`], [`ControlError::Several`].
    pub fn find(&self, name: &str) -> Result<LiveVm, ControlError> {
        let uuid = name.parse::<VmId>().ok();
        let known = self.snapshot();
        let meant = |vm: &LiveVm| vm.name == name || Some(vm.vm.vm) == uuid;
        let (ending, mut there): (Vec<_>, Vec<_>) =
            known.vms.into_iter().filter(meant).partition(|vm| vm.stage == Stage::Ending);
        if let (Some(uuid), [_, _, ..]) = (uuid, there.as_slice()) {
            let names: Vec<_> = there.iter().map(|vm| format!("{} (process {})", vm.name, vm.pid)).collect();
            return Err(ControlError::Several(uuid, names.join(", ")));
        }
        there.pop().or_else(|| ending.into_iter().next_back()).ok_or_else(|| {
            let trouble = known.sockets.iter().find(|socket| socket.name == name);
            let hint = trouble.map(|t| format!(" ({}: {})", t.path.display(), t.error)).unwrap_or_default();
            ControlError::NoVm { name: name.to_owned(), hint }
        })
    }

    /// Asks a VM's guest to power down (`system_powerdown`). It may take its time, or not do it at all.
    ///
    /// # Errors
    /// [`ControlError`].
    pub async fn power_down(&self, name: &str) -> Result<LiveVm, ControlError> {
        let (vm, monitor) = self.monitor_of(name)?;
        if vm.stage == Stage::Ending {
            return Ok(vm);
        }
        let fails = |error: QmpError| monitor_error(&vm, &error);
        let state = run_state(&monitor).await.map_err(fails)?;
        // A guest that sleeps is woken by it.
        if !matches!(state.as_str(), "running" | "suspended") {
            return Err(ControlError::NotRunning(vm.name, state));
        }
        monitor.execute(qapi::qmp::system_powerdown {}).await.map_err(fails)?;
        tracing::info!(vm = %vm.name, "asked to power down");
        Ok(vm)
    }

    /// Ends a VM's QEMU (`quit`).
    ///
    /// # Errors
    /// [`ControlError`].
    pub async fn quit(&self, name: &str) -> Result<LiveVm, ControlError> {
        let (vm, monitor) = self.monitor_of(name)?;
        if vm.stage == Stage::Ending {
            return Ok(vm);
        }
        match monitor.execute(qapi::qmp::quit {}).await {
            Ok(_) => {}
            // It may be gone before it answers.
            Err(QmpError::Closed) if vm.stage != Stage::MonitorLost => {}
            Err(e) => return Err(monitor_error(&vm, &e)),
        }
        tracing::info!(vm = %vm.name, "told to end");
        Ok(vm)
    }

    /// Looks again at a VM that was refused, and lets it run if nothing is wrong with it any more.
    ///
    /// # Errors
    /// [`ControlError`]; [`ControlError::RefusedAgain`] says what is still wrong.
    pub async fn retry(&self, name: &str) -> Result<LiveVm, ControlError> {
        let vm = self.find(name)?;
        let not_refused = |stage: Stage| ControlError::NotRefused(vm.name.clone(), stage.to_string());
        if vm.stage != Stage::Refused {
            return Err(not_refused(vm.stage));
        }
        let ended = || ControlError::NoVm { name: name.to_owned(), hint: " any more".to_owned() };
        let control = self.control_of(&vm).ok_or_else(ended)?;
        let (answer, answered) = oneshot::channel();
        control.retries.send(answer).await.map_err(|_| ended())?;
        match answered.await {
            Ok(Ok(())) => self.find(name),
            Ok(Err(why)) => Err(ControlError::RefusedAgain(why)),
            Err(_) => Err(ended()),
        }
    }

    /// Waits until a session has ended and that is logged, but not longer than `limit`. Gives what it is then, or
    /// nothing when it is gone.
    pub async fn ended_within(&self, session: SessionId, limit: Duration) -> Option<LiveVm> {
        let now = || self.snapshot().vms.into_iter().find(|vm| vm.vm.session == session);
        let vm = now()?.vm;
        match timeout(limit, self.gone(vm)).await {
            Ok(()) => None,
            Err(_) => now(),
        }
    }

    fn monitor_of(&self, name: &str) -> Result<(LiveVm, Qmp), ControlError> {
        let vm = self.find(name)?;
        let monitor = self.control_of(&vm).and_then(|control| control.monitor.upgrade());
        match monitor {
            Some(monitor) => Ok((vm, monitor)),
            None => Err(monitor_error(&vm, &QmpError::Closed)),
        }
    }
}

fn monitor_error(vm: &LiveVm, error: &QmpError) -> ControlError {
    ControlError::Monitor { name: vm.name.clone(), pid: vm.pid, error: error.to_string() }
}

impl Session {
    /// Makes the session reachable for people, by the monitor that it has now.
    pub(super) fn offer_control(&self) {
        let control = Control { monitor: self.qmp.downgrade(), retries: self.asks.clone() };
        self.env.registry.offer(self.vm, control);
    }

    /// Is looked at again, if it was refused.
    pub(super) async fn retry(&mut self, answer: Retry) {
        let outcome = self.try_again().await;
        // Who asked may have gone.
        let _ = answer.send(outcome);
    }

    async fn try_again(&mut self) -> Result<(), String> {
        let stage = |s: &Self| s.env.registry.stage(s.vm);
        if stage(self) != Some(Stage::Refused) {
            // Another retry came before.
            return Ok(());
        }
        // First what is known to have happened: a start that could not be logged must not come after a new one.
        if !self.flush().await {
            return Err(self.log_error.clone().unwrap_or_default());
        }
        let asked = Facts::ask(&self.qmp).await;
        let (facts, graph) = asked.map_err(|e| format!("the monitor of {}: {e}", self.name))?;
        (self.facts, self.graph) = (facts, Some(graph));
        tracing::info!(vm = %self.name, "looked at again");
        self.error = None;
        self.assess(Occasion::Retry).await;
        match (&self.error, stage(self)) {
            (None, Some(Stage::Watched)) => Ok(()),
            (Some(error), _) => Err(error.clone()),
            (None, _) => Err(format!("{} ended while it was looked at again", self.name)),
        }
    }
}
