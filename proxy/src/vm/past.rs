//! VMs that are not there any more: what the log says of them, and how they are declared deleted.
//!
//! A VM that has ended is expected to come back with the images that it left. Deleting says that it will not: the event
//! `vm-delete` has the digests of the images that it could write, as they are now, so that whoever finds one of them later
//! can tell whose it was. The files themselves are not touched. While that is measured and logged, no new session of the VM
//! can begin.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
    sync::Arc,
};

use onequote_evidence::{
    digest::FileDigestAlg,
    event::{Depth, Event, EventBody, Image, VmDelete, VmRef},
    id::VmId,
};

use super::{
    Clock,
    control::ControlError,
    registry::{LiveVm, Registry, Stage},
};
use crate::{
    inventory::{Inventory, LoggedVm},
    measure::{self, Digester, MeasureError},
    sink::EventSink,
};

/// A VM's last session, as the log has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PastVm {
    /// The VM and its last process.
    pub vm: VmRef,
    /// Its name then.
    pub name: String,
    /// The images that it could write, as last logged.
    pub images: Vec<Image>,
    /// Whether it was declared deleted since.
    pub deleted: bool,
}

/// All VMs that a host's logs speak of: a fold over their events, oldest epoch first.
#[derive(Debug, Default)]
pub struct PastVms {
    inventory: Inventory,
    last: BTreeMap<VmId, PastVm>,
    /// Names, newest last.
    names: BTreeMap<String, Vec<VmId>>,
}

impl PastVms {
    /// An epoch's log begins, with what is remembered of records that are there no more.
    pub fn begin_epoch(&mut self, before: &Inventory) {
        self.inventory = before.clone();
        for ended in before.ended() {
            let vm = VmRef { vm: ended.vm, session: ended.session };
            self.keep(vm, &ended.name, ended.images.clone(), ended.deleted);
        }
    }

    /// Takes in the next event.
    pub fn apply(&mut self, event: &Event) {
        let Some(vm) = event.vm else { return };
        match &event.body {
            EventBody::VmStop(stop) => {
                let ended = self.inventory.vm(&vm).cloned();
                self.inventory.apply(event);
                if let Some(ended) = ended {
                    self.note(vm, &ended, &stop.images);
                }
            }
            EventBody::VmDelete(_) => {
                if let Some(last) = self.last.get_mut(&vm.vm) {
                    last.deleted = true;
                }
            }
            _ => self.inventory.apply(event),
        }
    }

    /// An epoch's log ends, or what is recorded of it so far. What it left open ended with its host.
    pub fn end_epoch(&mut self) {
        let open = std::mem::take(&mut self.inventory);
        for (vm, logged) in open.vms() {
            self.note(*vm, logged, &[]);
        }
    }

    /// The VM of that UUID, or else the last one that had that name.
    #[must_use]
    pub fn find(&self, name: &str) -> Option<&PastVm> {
        let id = name.parse().ok().or_else(|| self.names.get(name)?.last().copied())?;
        self.last.get(&id)
    }

    fn note(&mut self, vm: VmRef, logged: &LoggedVm, left: &[Image]) {
        let newer = |image: &Image| left.iter().find(|l| l.slot == image.slot).unwrap_or(image).clone();
        let images = logged.images.iter().filter(|i| !i.read_only).map(newer).collect();
        self.keep(vm, &logged.name, images, false);
    }

    fn keep(&mut self, vm: VmRef, name: &str, images: Vec<Image>, deleted: bool) {
        let names = self.names.entry(name.to_owned()).or_default();
        names.retain(|id| *id != vm.vm);
        names.push(vm.vm);
        self.last.insert(vm.vm, PastVm { vm, name: name.to_owned(), images, deleted });
    }
}

/// Declares VMs deleted.
#[derive(Clone)]
pub struct Deleter {
    /// Who lives.
    pub registry: Registry,
    /// The log.
    pub sink: Arc<dyn EventSink>,
    /// What computes the digests.
    pub digester: Digester,
    /// Tells the time.
    pub clock: Clock,
}

impl Deleter {
    /// Measures what a VM left, and logs that it will not come back.
    ///
    /// # Errors
    /// [`ControlError::Alive`], [`ControlError::Deleted`], [`ControlError::Log`].
    pub async fn delete(&self, past: &PastVm) -> Result<VmDelete, ControlError> {
        if past.deleted {
            return Err(ControlError::Deleted(past.name.clone()));
        }
        let _held = Held::take(&self.registry, past)?;
        let (mut images, mut unmeasured, mut seen) = (Vec::new(), Vec::new(), BTreeSet::new());
        for image in past.images.iter().filter(|image| seen.insert(&image.slot)) {
            let path = PathBuf::from(&image.path);
            match measure::measure_path(&self.digester, &path, FileDigestAlg::FsVerity, None).await {
                Ok(now) => images.push(Image { size: now.size, digest: now.digest, ..image.clone() }),
                Err(kind) => unmeasured.push(MeasureError::new(&image.slot, &path, kind).to_string()),
            }
        }
        let deleted = VmDelete { name: past.name.clone(), images, unmeasured };
        let event = Event { time: (self.clock)(), vm: Some(past.vm), body: deleted.clone().into() };
        self.sink.append(vec![event]).await.map_err(|e| ControlError::Log(e.to_string()))?;
        tracing::info!(vm = %past.name, "deleted");
        Ok(deleted)
    }
}

/// Keeps a VM's place, so that a new session of it waits.
struct Held<'a> {
    registry: &'a Registry,
    vm: VmRef,
}

impl<'a> Held<'a> {
    fn take(registry: &'a Registry, past: &PastVm) -> Result<Self, ControlError> {
        let alive = |vm: &LiveVm| ControlError::Alive(vm.name.clone(), vm.stage.to_string());
        // One that was refused keeps no place, but is there.
        if let Some(vm) = registry.snapshot().vms.iter().find(|vm| vm.vm.vm == past.vm.vm) {
            return Err(alive(vm));
        }
        let place = LiveVm {
            vm: past.vm,
            name: past.name.clone(),
            pid: 0,
            since: None,
            depth: Depth::Observe,
            stage: Stage::Ending,
            logged: false,
            run_state: "shutdown".to_owned(),
            guest_cid: None,
            vsock: None,
            resets: 0,
            monitor: None,
            error: None,
        };
        registry.enter(place).map_err(|other| alive(&other))?;
        Ok(Self { registry, vm: past.vm })
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        self.registry.leave(self.vm);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use onequote_evidence::{
        digest::{FileDigest, sha256},
        event::{StopCause, VmCreate, VmStart, VmStop},
        id::{SessionId, TimeMs},
    };

    use super::*;

    fn vm(id: u8, session: u8) -> VmRef {
        VmRef { vm: format!("{id:032x}").parse().unwrap(), session: SessionId([session; 8]) }
    }

    fn image(slot: &str, content: u8, read_only: bool) -> Image {
        Image {
            slot: slot.to_owned(),
            path: format!("/{slot}"),
            format: "raw".to_owned(),
            read_only,
            size: 1,
            digest: FileDigest::sha256(sha256(&[&[content]])),
        }
    }

    fn event(vm: VmRef, body: impl Into<EventBody>) -> Event {
        Event { time: TimeMs(1), vm: Some(vm), body: body.into() }
    }

    fn create(name: &str) -> VmCreate {
        VmCreate {
            name: name.to_owned(),
            pid: 1,
            depth: Depth::Gate,
            uuid_given: true,
            qemu: String::new(),
            machine: String::new(),
            memory: 0,
            cpus: 1,
            accelerator: String::new(),
            guest_cid: None,
            devices: Vec::new(),
            monitors: Vec::new(),
        }
    }

    fn run(past: &mut PastVms, vm: VmRef, name: &str, disk: u8) {
        past.apply(&event(vm, create(name)));
        let images = vec![image("disk0", disk, false), image("disk0/1", 0, true)];
        past.apply(&event(vm, VmStart { components: Vec::new(), images }));
    }

    fn stop(past: &mut PastVms, vm: VmRef, disk: u8) {
        let images = vec![image("disk0", disk, false)];
        past.apply(&event(vm, VmStop { cause: StopCause::Lost, images, unmeasured: Vec::new(), read: Vec::new() }));
    }

    #[test]
    fn the_last_session_counts_in_whatever_epoch_it_was() {
        let mut past = PastVms::default();
        run(&mut past, vm(1, 1), "web", 1);
        stop(&mut past, vm(1, 1), 2);
        run(&mut past, vm(2, 2), "db", 3);
        // The host went down under the second one.
        past.end_epoch();
        assert_eq!(past.find("web").unwrap().images, [image("disk0", 2, false)]);
        assert_eq!(past.find("db").unwrap().images, [image("disk0", 3, false)]);

        run(&mut past, vm(1, 3), "web", 2);
        assert_eq!(past.find("web").unwrap().vm, vm(1, 1), "a session that has not ended is none of the past");
        stop(&mut past, vm(1, 3), 4);
        let deleted = VmDelete { name: "web".into(), images: Vec::new(), unmeasured: Vec::new() };
        past.apply(&event(vm(1, 3), deleted));
        past.end_epoch();
        let web = past.find("web").unwrap();
        assert!(web.deleted && web.vm == vm(1, 3) && web.images == [image("disk0", 4, false)]);
        assert_eq!(past.find(&vm(1, 3).vm.to_string()), Some(web));

        // Another VM has the name now.
        run(&mut past, vm(5, 5), "web", 5);
        stop(&mut past, vm(5, 5), 5);
        past.end_epoch();
        assert_eq!(past.find("web").unwrap().vm, vm(5, 5));
        assert!(past.find(&vm(1, 1).vm.to_string()).unwrap().deleted);
        assert_eq!(past.find("mail"), None);
    }
}
