//! What the log says is there: the VMs, their run states and their guests' lists.
//!
//! The inventory is a fold over the log's events and nothing else, so that a statement about a log of N records is a
//! function of these N records. The recorder applies each record's events here in the moment in which the record is
//! on disk and in the TPM, before anybody is told; at start it applies the whole log.

use std::collections::{BTreeMap, VecDeque};

use minicbor::{
    Decode, Decoder, Encode, Encoder, decode,
    encode::{self, Write},
};

use onequote_evidence::{
    event::{Depth, Event, EventBody, Image, VmRef},
    id::{BootId, SessionId, Sha256, TimeMs, VmId},
};

use crate::measure::drive_of;

/// All VMs whose QEMU process has not ended, by the log.
#[derive(Debug, Clone, Default, Encode, Decode)]
#[cbor(map)]
pub struct Inventory {
    #[n(0)]
    since: Option<TimeMs>,
    #[cbor(n(1), encode_with = "encode_vms", decode_with = "decode_vms")]
    vms: BTreeMap<VmRef, LoggedVm>,
    /// The last VMs that have ended, oldest first: for a log whose beginning is dropped.
    #[n(2)]
    ended: VecDeque<EndedVm>,
}

/// VMs that have ended and are remembered.
const ENDED: usize = 4096;

/// A VM that has ended, by the log.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct EndedVm {
    /// The VM.
    #[n(0)]
    pub vm: VmId,
    /// Its last process.
    #[n(1)]
    pub session: SessionId,
    /// Its name then.
    #[n(2)]
    pub name: String,
    /// The images that it could write, as it left them.
    #[n(3)]
    pub images: Vec<Image>,
    /// Whether it was declared deleted since.
    #[n(4)]
    pub deleted: bool,
}

fn encode_vms<C, W: Write>(
    vms: &BTreeMap<VmRef, LoggedVm>,
    e: &mut Encoder<W>,
    ctx: &mut C,
) -> Result<(), encode::Error<W::Error>> {
    e.array(vms.len() as u64)?;
    for (key, vm) in vms {
        e.array(3)?.encode_with(key.vm, ctx)?.encode_with(key.session, ctx)?.encode_with(vm, ctx)?;
    }
    Ok(())
}

fn decode_vms<C>(d: &mut Decoder<'_>, ctx: &mut C) -> Result<BTreeMap<VmRef, LoggedVm>, decode::Error> {
    let at = d.position();
    let len = d.array()?.ok_or_else(|| decode::Error::message("VMs without their number").at(at))?;
    let mut vms = BTreeMap::new();
    for _ in 0..len {
        if d.array()? != Some(3) {
            return Err(decode::Error::message("a VM is an array of 3").at(d.position()));
        }
        let key = VmRef { vm: d.decode_with(ctx)?, session: d.decode_with(ctx)? };
        vms.insert(key, d.decode_with(ctx)?);
    }
    Ok(vms)
}

/// One VM by the log.
#[derive(Debug, Clone, Encode, Decode)]
#[cbor(map)]
pub struct LoggedVm {
    /// Its name.
    #[n(0)]
    pub name: String,
    /// QEMU's process id.
    #[n(1)]
    pub pid: u32,
    /// How it is watched.
    #[n(2)]
    pub depth: Depth,
    /// QEMU's run state.
    #[n(3)]
    pub run_state: String,
    /// Its images as last measured.
    #[n(4)]
    pub images: Vec<Image>,
    /// Events of its life so far; those of its guest's lists are not counted.
    #[n(5)]
    pub events: u64,
    /// Whether it was measured (a VM that was refused was not).
    #[n(6)]
    pub measured: bool,
    /// Its guest's lists, oldest first.
    #[n(7)]
    pub boots: Vec<LoggedBoot>,
    /// Whether a reset, or a time in which nobody watched, came after the last boot began: the next hello may begin
    /// a new one.
    #[n(8)]
    pub may_reboot: bool,
}

/// One boot of a guest by the log.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct LoggedBoot {
    /// Which boot of the session, from 0.
    #[n(0)]
    pub boot: u32,
    /// The boot id that the guest claimed.
    #[n(1)]
    pub boot_id: BootId,
    /// Size of the template hash in its list, in bytes.
    #[n(2)]
    pub hash_size: u32,
    /// Entries logged.
    #[n(3)]
    pub count: u64,
    /// The virtual PCR 10 over them.
    #[n(4)]
    pub aggregate: Sha256,
    /// Whether nothing more is taken: the guest claimed another past, or went over a limit.
    #[n(5)]
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
        if let EventBody::VmStop(stop) = &event.body {
            if let Some(vm) = self.vms.remove(&key) {
                self.end(key, vm, &stop.images);
            }
            return;
        }
        if let EventBody::VmDelete(_) = &event.body {
            self.ended.iter_mut().filter(|ended| ended.vm == key.vm).for_each(|ended| ended.deleted = true);
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

    fn end(&mut self, key: VmRef, vm: LoggedVm, left: &[Image]) {
        self.ended.retain(|ended| ended.vm != key.vm);
        if self.ended.len() == ENDED {
            self.ended.pop_front();
        }
        let newer = |image: &Image| left.iter().find(|l| l.slot == image.slot).unwrap_or(image).clone();
        let images = vm.images.iter().filter(|image| !image.read_only).map(newer).collect();
        let ended = EndedVm { vm: key.vm, session: key.session, name: vm.name, images, deleted: false };
        self.ended.push_back(ended);
    }

    /// The last VMs that have ended, oldest first.
    pub fn ended(&self) -> impl Iterator<Item = &EndedVm> {
        self.ended.iter()
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
