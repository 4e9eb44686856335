//! Sessions that a log leaves open.

use std::collections::BTreeMap;

use onequote_evidence::event::{Event, EventBody, Image, VmRef};

/// A VM's process that the log says was there when the proxy ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OpenSession {
    /// The VM and its process.
    pub vm: VmRef,
    /// The VM's name.
    pub name: String,
    /// QEMU's process id.
    pub pid: u32,
    /// Whether it was measured; otherwise it was refused.
    pub measured: bool,
    /// Its images as last logged, in ascending order of slots.
    pub images: Vec<Image>,
}

/// Folds the log's events, in order, into the sessions that have no stop. The caller must trust the log: only events
/// that were replayed to the registers' values.
pub fn open_sessions<'a>(events: impl IntoIterator<Item = &'a Event>) -> Vec<OpenSession> {
    let mut open: BTreeMap<VmRef, OpenSession> = BTreeMap::new();
    for event in events {
        let Some(vm) = event.vm else { continue };
        match &event.body {
            EventBody::VmCreate(e) => {
                let (name, pid) = (e.name.clone(), e.pid);
                open.insert(vm, OpenSession { vm, name, pid, measured: false, images: Vec::new() });
            }
            EventBody::VmStop(_) => {
                open.remove(&vm);
            }
            body => {
                let Some(session) = open.get_mut(&vm) else { continue };
                match body {
                    EventBody::VmStart(e) => session.measured(&e.images),
                    EventBody::VmAttach(e) => session.measured(&e.images),
                    EventBody::ConfigChange(e) => session.changed(&e.images),
                    _ => {}
                }
            }
        }
    }
    open.into_values().collect()
}

impl OpenSession {
    fn measured(&mut self, images: &[Image]) {
        self.measured = true;
        self.images = images.to_vec();
    }

    fn changed(&mut self, images: &[Image]) {
        self.images.retain(|old| images.iter().all(|new| new.slot != old.slot));
        self.images.extend_from_slice(images);
        self.images.sort_by(|a, b| a.slot.cmp(&b.slot));
    }
}
