//! Sessions that the log leaves open when the proxy starts.

use onequote_evidence::event::{Depth, Image, VmRef};

use crate::inventory::Inventory;

/// A VM's process that the log says was there when the proxy ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OpenSession {
    /// The VM and its process.
    pub vm: VmRef,
    /// The VM's name.
    pub name: String,
    /// QEMU's process id.
    pub pid: u32,
    /// How it was watched when it was logged first.
    pub depth: Depth,
    /// QEMU's run state as last logged.
    pub run_state: String,
    /// Its images as last logged, in ascending order of slots.
    pub images: Vec<Image>,
}

/// The sessions of an inventory, all of which have no stop.
#[must_use]
pub fn open_sessions(inventory: &Inventory) -> Vec<OpenSession> {
    let session = |(vm, logged): (&VmRef, &crate::inventory::LoggedVm)| OpenSession {
        vm: *vm,
        name: logged.name.clone(),
        pid: logged.pid,
        depth: logged.depth,
        run_state: logged.run_state.clone(),
        images: logged.images.clone(),
    };
    inventory.vms().map(session).collect()
}
