//! What the log says is there: the VMs, their run states and their guests' lists.
//!
//! The inventory is a fold over the log's events and nothing else, so that a statement about a log of N records is a
//! function of these N records. The recorder applies each record's events here in the moment in which the record is
//! on disk and in the TPM, before anybody is told; at start it applies the whole log.

use std::collections::BTreeMap;

use onequote_evidence::{
    event::{Depth, Event, EventBody, Image, VmRef},
    id::{BootId, Sha256, TimeMs},
};

use crate::measure::drive_of;

/// All VMs whose QEMU process has not ended, by the log.
#[derive(Debug, Clone, Default)]
pub struct Inventory {
    since: Option<TimeMs>,
    vms: BTreeMap<VmRef, LoggedVm>,
}

/// One VM by the log.
#[derive(Debug, Clone)]
pub struct LoggedVm {
    /// Its name.
    pub name: String,
    /// QEMU's process id.
    pub pid: u32,
    /// How it is watched.
    pub depth: Depth,
    /// QEMU's run state.
    pub run_state: String,
    /// Its images as last measured.
    pub images: Vec<Image>,
    /// Events of its life so far; those of its guest's lists are not counted.
    pub events: u64,
    /// Whether it was measured (a VM that was refused was not).
    pub measured: bool,
    /// Its guest's lists, oldest first.
    pub boots: Vec<LoggedBoot>,
    /// Whether a reset, or a time in which nobody watched, came after the last boot began: the next hello may begin
    /// a new one.
    pub may_reboot: bool,
}

/// One boot of a guest by the log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LoggedBoot {
    /// Which boot of the session, from 0.
    pub boot: u32,
    /// The boot id that the guest claimed.
    pub boot_id: BootId,
    /// Size of the template hash in its list, in bytes.
    pub hash_size: u32,
    /// Entries logged.
    pub count: u64,
    /// The virtual PCR 10 over them.
    pub aggregate: Sha256,
    /// Whether nothing more is taken: the guest claimed another past, or went over a limit.
    pub closed: bool,
}

impl Inventory {
    /// When the log began, by the host's clock.
    #[must_use]
    pub fn since(&self) -> Option<TimeMs> {
        self.since
    }

    /// Takes in the next event of the log.
    pub fn apply(&mut self, event: &Event) {
        if let EventBody::ProxyStart(_) = &event.body {
            self.since.get_or_insert(event.time);
        }
        let Some(key) = event.vm else { return };
        if let EventBody::VmCreate(body) = &event.body {
            let vm = self.vms.entry(key).or_insert_with(|| LoggedVm {
                name: body.name.clone(),
                pid: body.pid,
                depth: body.depth,
                run_state: match body.depth {
                    Depth::Gate | Depth::Intercept => "prelaunch".to_owned(),
                    Depth::Observe => "running".to_owned(),
                },
                images: Vec::new(),
                events: 0,
                measured: false,
                boots: Vec::new(),
                may_reboot: false,
            });
            vm.events += 1;
            return;
        }
        if let EventBody::VmStop(_) = &event.body {
            self.vms.remove(&key);
            return;
        }
        let Some(vm) = self.vms.get_mut(&key) else { return };
        vm.events += u64::from(!event.body.is_guest());
        match &event.body {
            EventBody::VmStart(body) => {
                vm.images.clone_from(&body.images);
                vm.measured = true;
            }
            EventBody::VmAttach(body) => {
                vm.images.clone_from(&body.images);
                vm.measured = true;
                vm.may_reboot = true;
            }
            // Images that went, as they were left.
            EventBody::ConfigChange(body) if body.after.is_empty() => {
                vm.images.retain(|old| body.images.iter().all(|gone| gone.slot != old.slot));
            }
            EventBody::ConfigChange(body) => vm.exchange(&body.images),
            EventBody::MediumChange(body) => {
                vm.images.retain(|old| drive_of(&old.slot) != body.slot);
                vm.exchange(&body.images);
            }
            EventBody::SnapshotSave(body) => vm.exchange(&body.images),
            EventBody::SnapshotLoad(body) => {
                vm.exchange(&body.images);
                vm.may_reboot = true;
            }
            EventBody::MigrateOut(body) => vm.exchange(&body.images),
            EventBody::MigrateIn(_) => vm.may_reboot = true,
            EventBody::VmPause(body) => vm.run_state.clone_from(&body.run_state),
            EventBody::VmResume(body) => vm.run_state.clone_from(&body.run_state),
            EventBody::VmReset(_) | EventBody::LogGap(_) => vm.may_reboot = true,
            // A hello of a boot that is known is the same boot connecting again.
            EventBody::GuestHello(body) if vm.boots.last().is_none_or(|last| last.boot < body.boot) => {
                vm.boots.push(LoggedBoot {
                    boot: body.boot,
                    boot_id: body.boot_id,
                    hash_size: body.hash_size,
                    count: 0,
                    aggregate: Sha256::ZERO,
                    closed: false,
                });
                vm.may_reboot = false;
            }
            EventBody::GuestEntries(body) => {
                if let Some(boot) = vm.boots.iter_mut().find(|b| b.boot == body.boot) {
                    boot.count = body.first + body.count;
                    boot.aggregate = body.aggregate;
                }
            }
            EventBody::GuestRewind(body) => close(vm, body.boot),
            EventBody::GuestOverflow(body) => close(vm, body.boot),
            _ => {}
        }
    }

    /// The VMs, in ascending order of UUID and session.
    pub fn vms(&self) -> impl Iterator<Item = (&VmRef, &LoggedVm)> {
        self.vms.iter()
    }

    /// One VM.
    #[must_use]
    pub fn vm(&self, key: &VmRef) -> Option<&LoggedVm> {
        self.vms.get(key)
    }
}

impl LoggedVm {
    /// Takes in images as they are now.
    fn exchange(&mut self, images: &[Image]) {
        self.images.retain(|old| images.iter().all(|new| new.slot != old.slot));
        self.images.extend_from_slice(images);
        self.images.sort_by(|a, b| a.slot.cmp(&b.slot));
    }
}

fn close(vm: &mut LoggedVm, boot: u32) {
    if let Some(boot) = vm.boots.iter_mut().find(|b| b.boot == boot) {
        boot.closed = true;
    }
}
