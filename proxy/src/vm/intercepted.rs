//! A session whose monitor is served to management tools.

use super::session::Session;
pub(super) use crate::intercept::Hands;
use crate::intercept::{Door, Gate, Vm};

impl Session {
    /// Opens the VM's door, if it is to have one. Without it the VM is watched all the same.
    pub(super) fn open_door(&mut self) {
        let Some(settings) = self.env.config.intercept.as_ref().filter(|s| s.intercepts(&self.name)) else { return };
        let vm = Vm {
            name: self.name.clone(),
            vm: self.vm,
            pid: self.process.pid(),
            qmp: self.qmp.clone(),
            outbox: self.outbox.clone(),
            clock: self.env.clock,
            digester: self.env.digester.clone(),
            registry: self.env.registry.clone(),
            before_quit: self.quits.clone(),
        };
        // An earlier one has the same socket.
        self.door = None;
        match Door::open(settings, vm, Gate::Measuring) {
            Ok(door) => self.door = Some(door),
            Err(e) => self.fail(format!("the monitor of {} cannot be served to others: {e}", self.name)),
        }
    }

    /// Says whether clients may let the VM run.
    pub(super) fn set_gate(&self, gate: Gate) {
        if let Some(door) = &self.door {
            door.set_gate(gate);
        }
    }
}

/// Waits until a client's command may have changed something; for ever without a door.
pub(super) async fn ran(door: Option<&Door>) {
    match door {
        Some(door) => door.ran().await,
        None => std::future::pending().await,
    }
}
