//! What the proxy tells people of itself.

use std::{
    collections::BTreeMap,
    sync::{Arc, PoisonError, RwLock},
};

use onequote_evidence::{
    event::Depth,
    id::{Epoch, HostId, SessionId, TimeMs, VmId},
};
use serde::Serialize;

use crate::{
    guest::Room,
    intercept::DoorStatus,
    inventory::Inventory,
    log::{Acknowledged, Acknowledgement, LogHandle, LogPlace},
    measure::{Digester, Reading},
    rate, report,
    vm::{Registry, SocketTrouble, Stage, UnmanagedProcess},
};

/// The proxy's state, for `status` and `GET /v1/status`.
#[derive(Debug, Serialize)]
pub struct Status {
    /// The host.
    pub host: HostId,
    /// The proxy's version.
    pub version: &'static str,
    /// The log's epoch.
    pub epoch: Option<Epoch>,
    /// Records in the log.
    pub log_len: u64,
    /// Its size in bytes, with what was dropped of it.
    pub log_bytes: u64,
    /// Where the files that it is in begin, oldest first.
    pub segments: Vec<LogPlace>,
    /// How much of it each verifier has accepted.
    pub verifiers: Vec<Acknowledgement>,
    /// The TPM, for people.
    pub tpm: String,
    /// Whether the TPM is software: no root of trust.
    pub software_tpm: bool,
    /// Quotes that the TPM was asked for since the proxy started.
    pub quotes: u64,
    /// What keeps log or TPM from working.
    pub failure: Option<String>,
    /// Managed VMs.
    pub vms: Vec<VmStatus>,
    /// Files that are being measured.
    pub measuring: Vec<Reading>,
    /// Monitor sockets that lead to no VM.
    pub sockets: Vec<SocketTrouble>,
    /// QEMU processes that are not managed.
    pub unmanaged: Vec<UnmanagedProcess>,
    /// Reports to verifiers that were joined.
    pub reports: Vec<report::Shown>,
    /// Lines in the proxy's own log that guests and peers caused, by kind.
    pub messages: BTreeMap<&'static str, rate::Count>,
}

/// One VM.
#[derive(Debug, Serialize)]
pub struct VmStatus {
    /// Its name.
    pub name: String,
    /// Its UUID.
    pub uuid: VmId,
    /// Its QEMU process.
    pub session: SessionId,
    /// QEMU's process id.
    pub pid: u32,
    /// When it was started, in milliseconds since 1970, where that is known.
    pub since: Option<TimeMs>,
    /// QEMU's run state.
    pub run_state: String,
    /// Where it is in its life.
    pub stage: Stage,
    /// How it is watched.
    pub depth: Depth,
    /// The guest's vsock CID, where QEMU knows it.
    pub guest_cid: Option<u64>,
    /// Guest boots in this session.
    pub boots: usize,
    /// Entries of the current boot that are in the log.
    pub entries: u64,
    /// Milliseconds since the guest's last frame.
    pub last_contact_ms: Option<u64>,
    /// Its socket for management tools, if it is intercepted.
    pub monitor: Option<DoorStatus>,
    /// What went wrong last.
    pub error: Option<String>,
}

/// Who knows the state.
pub trait StatusSource: Send + Sync + 'static {
    /// The state now.
    fn status(&self) -> Status;
}

/// The state of the running proxy.
pub struct LiveStatus {
    /// The host.
    pub host: HostId,
    /// The log.
    pub log: LogHandle,
    /// What the log says is there.
    pub inventory: Arc<RwLock<Inventory>>,
    /// The VMs.
    pub registry: Registry,
    /// The guests.
    pub room: Arc<Room>,
    /// What verifiers have accepted.
    pub acknowledged: Arc<Acknowledged>,
    /// What computes digests.
    pub digester: Digester,
    /// Reports to verifiers that were joined.
    pub reports: Arc<report::Reports>,
}

impl StatusSource for LiveStatus {
    fn status(&self) -> Status {
        let head = self.log.head().ok();
        let tpm = self.log.tpm().ok();
        let live = self.registry.snapshot();
        let inventory = self.inventory.read().unwrap_or_else(PoisonError::into_inner);
        let vms = live.vms.into_iter().map(|vm| {
            let boots = inventory.vm(&vm.vm).map(|logged| logged.boots.as_slice()).unwrap_or_default();
            VmStatus {
                name: vm.name,
                uuid: vm.vm.vm,
                session: vm.vm.session,
                pid: vm.pid,
                since: vm.since,
                run_state: vm.run_state,
                stage: vm.stage,
                depth: vm.depth,
                guest_cid: vm.guest_cid,
                boots: boots.len(),
                entries: boots.last().map_or(0, |boot| boot.count),
                last_contact_ms: self.room.last_contact(&vm.vm).and_then(|age| u64::try_from(age.as_millis()).ok()),
                monitor: vm.monitor,
                error: vm.error,
            }
        });
        Status {
            host: self.host.clone(),
            version: env!("CARGO_PKG_VERSION"),
            epoch: head.as_ref().map(|head| head.epoch),
            log_len: head.as_ref().map_or(0, |head| head.log_len),
            log_bytes: head.map_or(0, |head| head.bytes),
            segments: self.log.segments(),
            verifiers: self.acknowledged.all(),
            tpm: tpm.as_ref().map(|tpm| tpm.model.to_string()).unwrap_or_default(),
            software_tpm: tpm.is_some_and(|tpm| tpm.software),
            quotes: self.log.quotes(),
            failure: self.log.failure().map(|e| e.to_string()),
            vms: vms.collect(),
            measuring: self.digester.readings(),
            sockets: live.sockets,
            unmanaged: live.unmanaged,
            reports: self.reports.shown(),
            messages: rate::LOG.counts(),
        }
    }
}
