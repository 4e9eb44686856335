//! One host: a TPM, a disk, guests, and the proxy's own rooms between them: recorder and journal, inventory, attester. What
//! is left out is what meets real VMs: monitors, measuring, vsock. Their events are made here.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError, RwLock,
        atomic::{AtomicI64, Ordering},
    },
    time::{Duration, SystemTime},
};

use anyhow::{Context as _, Result};
use onequote_evidence::{
    digest::{HashAlg, sha256},
    event::{
        Depth, Event, EventBody, GapReason, GuestHello, LogGap, StopCause, VmAttach, VmCreate, VmRef, VmResume,
        VmStart, VmStop,
    },
    id::{BootId, EpochId, HostId, SessionId, TimeMs, VmId},
    statement::Unmanaged,
};
use onequote_proxy::{
    attest::{AttestHandle, Attester, Processes},
    inventory::Inventory,
    log::{LogHandle, PcrRole, Recorder, RecorderConfig},
};

use super::{
    catalogue::{self, Catalogue, HASH_SIZE, KINDS},
    disk::{Disk, SavedDisk},
    guests::GuestLists,
    tpm::{self, Chip, SavedChip},
};
use crate::lab::Random;

/// What all hosts share.
pub struct Surroundings {
    /// What may run.
    pub catalogue: Arc<Catalogue>,
    /// The list of every host's own kernel, in a file.
    pub host_list: PathBuf,
}

impl Surroundings {
    /// Writes what hosts read into this folder.
    ///
    /// # Errors
    /// Of the file system.
    pub fn new(catalogue: Catalogue, folder: &Path) -> Result<Self> {
        let host_list = folder.join("binary_runtime_measurements");
        let bytes: Vec<u8> = catalogue.host.iter().flat_map(|listed| listed.raw.iter().copied()).collect();
        std::fs::write(&host_list, bytes).with_context(|| format!("writing {}", host_list.display()))?;
        Ok(Self { catalogue: Arc::new(catalogue), host_list })
    }
}

/// A host.
pub struct Host {
    /// Its id.
    pub id: HostId,
    /// Its TPM.
    pub chip: Chip,
    /// Where its log is.
    pub disk: Disk,
    /// Its guests' lists.
    pub guests: Arc<GuestLists>,
    /// What the log says is there.
    pub inventory: Arc<RwLock<Inventory>>,
    /// Processes that the proxy does not manage.
    pub unmanaged: Arc<Mutex<Vec<Unmanaged>>>,
    /// The registers that its quotes cover.
    pub quoted_pcrs: Vec<u8>,
    /// An attacker's: what TPM and disk held at an earlier time.
    pub saved: Option<(SavedChip, SavedDisk)>,
    /// An attacker's: the machine at an earlier time.
    pub saved_copy: Option<Box<Host>>,
    around: Arc<Surroundings>,
    /// Every VM that there ever was, running or not.
    vms: Vec<Vm>,
    /// Counts the boots of the host, and the processes in each.
    boots: u32,
    processes: u32,
    running: Option<Running>,
}

/// A VM.
#[derive(Clone)]
struct Vm {
    id: VmId,
    kind: usize,
    /// Its process and its boots in it, while it runs.
    session: Option<SessionId>,
    /// How often its image was left other than it was.
    changes: u64,
}

/// The proxy's rooms.
struct Running {
    log: LogHandle,
    attest: AttestHandle,
    recorder: tokio::task::JoinHandle<()>,
}

/// What a host has, for comparison with what a verifier says of it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Truth {
    /// The number of the log's epoch.
    pub epoch: u64,
    /// Records in it.
    pub records: u64,
    /// For each VM its session, and its entries by all boots.
    pub vms: BTreeMap<VmId, (SessionId, u64)>,
}

/// This machine's clock.
pub fn now() -> TimeMs {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    TimeMs(u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
}

/// By how many milliseconds the clocks of all hosts of this process are ahead of the machine's.
static AHEAD: AtomicI64 = AtomicI64::new(0);

/// Steps the clocks of all hosts of this process.
pub fn step_clocks(by_ms: i64) {
    AHEAD.fetch_add(by_ms, Ordering::Relaxed);
}

/// Every host's clock.
pub(super) fn host_now() -> TimeMs {
    TimeMs(now().0.saturating_add_signed(AHEAD.load(Ordering::Relaxed)))
}

impl Host {
    /// A host that was never switched on.
    ///
    /// # Errors
    /// No key can be made, or the name is none.
    pub fn new(name: &str, around: Arc<Surroundings>) -> Result<Self> {
        Ok(Self {
            id: name.parse().map_err(anyhow::Error::msg)?,
            chip: Chip::new()?,
            disk: Disk::default(),
            guests: Arc::new(GuestLists::new(Arc::clone(&around.catalogue))),
            inventory: Arc::default(),
            unmanaged: Arc::default(),
            quoted_pcrs: tpm::quoted(),
            saved: None,
            saved_copy: None,
            around,
            vms: Vec::new(),
            boots: 0,
            processes: 0,
            running: None,
        })
    }

    /// Switches it on: the kernel measures its files, the proxy starts. Must be called in a runtime.
    ///
    /// # Errors
    /// The proxy does not start.
    pub fn boot(&mut self) -> Result<()> {
        self.boots += 1;
        self.processes = 0;
        for listed in &self.around.catalogue.host {
            self.chip.extend_digest(10, &listed.digest);
        }
        self.start_proxy()
    }

    /// Starts the proxy.
    ///
    /// # Errors
    /// It does not start.
    pub fn start_proxy(&mut self) -> Result<()> {
        let chip = self.chip.clone();
        let mut seed = [0_u8; EpochId::SIZE];
        seed.copy_from_slice(&uuid::Uuid::new_v4().into_bytes());
        let config = RecorderConfig {
            host: self.id.clone(),
            boot_id: self.boot_id(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            binary: Some(catalogue::host_file(0)),
            path: Some(catalogue::PROXY.to_owned()),
            pcr_vm: 12,
            pcr_guest: 13,
            quoted_pcrs: self.quoted_pcrs.clone(),
            quoted_banks: vec![HashAlg::Sha256],
            inventory: Arc::clone(&self.inventory),
            segment_bytes: u64::MAX,
            now: Box::new(host_now),
            new_epoch_id: Box::new(move || EpochId(seed)),
        };
        let (recorder, log) =
            Recorder::start_in_memory(config, self.disk.store(), Box::new(move || Ok(chip.connect())))?;
        let unmanaged = Arc::clone(&self.unmanaged);
        let processes = move || {
            let unmanaged = unmanaged.lock().unwrap_or_else(PoisonError::into_inner).clone();
            Processes { unmanaged, running: Vec::new() }
        };
        let recorder = tokio::spawn(recorder);
        let attest = Attester {
            host: self.id.clone(),
            log: log.clone(),
            inventory: Arc::clone(&self.inventory),
            room: Arc::clone(&self.guests) as _,
            processes: Arc::new(processes),
            wait: Duration::ZERO,
            clock: host_now,
            firmware_log: None,
            ima_list: Some(self.around.host_list.clone()),
            acknowledged: None,
        }
        .start();
        self.running = Some(Running { log, attest, recorder });
        Ok(())
    }

    /// Ends the proxy, VMs run on. What it was doing is not done.
    pub async fn kill_proxy(&mut self) {
        if let Some(Running { log, attest, recorder }) = self.running.take() {
            drop((log, attest));
            recorder.abort();
            let _ = recorder.await;
        }
    }

    /// Starts a proxy that was ended: it looks at every VM again.
    ///
    /// # Errors
    /// It does not start, or the log takes nothing.
    pub async fn restart_proxy(&mut self) -> Result<()> {
        self.kill_proxy().await;
        self.start_proxy()?;
        let mut events = Vec::new();
        for vm in self.vms.iter().filter(|vm| vm.session.is_some()) {
            let Some(key) = vm.key() else { continue };
            let gap = LogGap { reason: GapReason::ProxyDown, detail: "the proxy was started again".to_owned() };
            events.push(event(Some(key), gap));
            let images = vec![catalogue::image(vm.kind, &vm.name(), vm.changes)];
            let attach = VmAttach { components: catalogue::components(vm.kind), images, again: true };
            events.push(event(Some(key), attach));
        }
        for part in events.chunks(64) {
            self.log()?.append(PcrRole::Vm, part.to_vec()).await?;
        }
        Ok(())
    }

    /// The way to the log.
    ///
    /// # Errors
    /// The proxy does not run.
    pub fn log(&self) -> Result<&LogHandle> {
        Ok(&self.running.as_ref().context("the host's proxy does not run")?.log)
    }

    /// Where challenges go.
    ///
    /// # Errors
    /// The proxy does not run.
    pub fn attest(&self) -> Result<&AttestHandle> {
        Ok(&self.running.as_ref().context("the host's proxy does not run")?.attest)
    }

    fn boot_id(&self) -> BootId {
        let whole = sha256(&[b"boot", self.id.as_str().as_bytes(), &self.boots.to_le_bytes()]);
        let mut id = BootId::ZERO;
        id.0.copy_from_slice(&whole.0[..BootId::SIZE]);
        id
    }

    /// How many VMs run.
    #[must_use]
    pub fn running_vms(&self) -> usize {
        self.vms.iter().filter(|vm| vm.session.is_some()).count()
    }

    /// A running VM.
    #[must_use]
    pub fn any_running(&self, random: &mut Random) -> Option<VmRef> {
        let running: Vec<VmRef> = self.vms.iter().filter_map(Vm::key).collect();
        (!running.is_empty()).then(|| running[random.below(running.len() as u64) as usize])
    }

    /// Starts VMs: such as are off, else new ones, all in one record and their guests' first entries in another.
    ///
    /// # Errors
    /// The log does not take them.
    pub async fn start_vms(&mut self, count: usize) -> Result<()> {
        let (mut life, mut guests) = (Vec::new(), Vec::new());
        let boot_id = self.boot_id();
        for _ in 0..count {
            let at = self.vms.iter().position(|vm| vm.session.is_none()).unwrap_or_else(|| {
                let number = self.vms.len();
                let id = sha256(&[b"vm", self.id.as_str().as_bytes(), &number.to_le_bytes()]);
                let id = VmId(uuid::Builder::from_random_bytes(first_16(&id.0)).into_uuid());
                self.vms.push(Vm { id, kind: number % KINDS.len(), session: None, changes: 0 });
                number
            });
            self.processes += 1;
            let session = SessionId::of_process(boot_id, 1000 + self.processes, u64::from(self.processes));
            let pid = 1000 + self.processes;
            let vm = &mut self.vms[at];
            vm.session = Some(session);
            let key = VmRef { vm: vm.id, session };
            let create = VmCreate {
                name: vm.name(),
                pid,
                depth: Depth::Gate,
                uuid_given: true,
                qemu: "7.2.22".to_owned(),
                machine: "pc-q35-7.2".to_owned(),
                memory: 1 << 30,
                cpus: 2,
                accelerator: "kvm".to_owned(),
                guest_cid: Some(u64::from(pid)),
                devices: Vec::new(),
                monitors: Vec::new(),
            };
            life.push(event(Some(key), create));
            let images = vec![catalogue::image(vm.kind, &vm.name(), vm.changes)];
            life.push(event(Some(key), VmStart { components: catalogue::components(vm.kind), images }));
            life.push(event(Some(key), VmResume { run_state: "running".to_owned() }));
            let hello =
                GuestHello { boot: 0, boot_id: BootId(first_16(&session.0.repeat(2))), hash_size: HASH_SIZE, count: 0 };
            guests.push(event(Some(key), hello));
            let entries = self.guests.add(key, 0, self.around.catalogue.boot());
            guests.push(event(Some(key), entries));
        }
        // A record has its bounds.
        for (role, events) in [(PcrRole::Vm, life), (PcrRole::Guest, guests)] {
            for part in events.chunks(600) {
                self.log()?.append(role, part.to_vec()).await?;
            }
        }
        Ok(())
    }

    /// Stops a VM; its image is left other than it was.
    ///
    /// # Errors
    /// The log does not take it.
    pub async fn stop_vm(&mut self, key: VmRef) -> Result<()> {
        let Some(vm) = self.vms.iter_mut().find(|vm| vm.id == key.vm) else { return Ok(()) };
        vm.session = None;
        vm.changes += 1;
        let images = vec![catalogue::image(vm.kind, &vm.name(), vm.changes)];
        let stop = VmStop { cause: StopCause::GuestShutdown, images, unmeasured: Vec::new(), read: Vec::new() };
        self.log()?.append(PcrRole::Vm, vec![event(Some(key), stop)]).await?;
        self.guests.end(key);
        Ok(())
    }

    /// A guest runs programs, by the catalogue's numbers. What it ran before is not listed again.
    ///
    /// # Errors
    /// The log does not take it.
    pub async fn run_programs(&mut self, key: VmRef, programs: &[usize]) -> Result<()> {
        let mut new: Vec<usize> = programs.iter().copied().filter(|&n| !self.guests.has(key, 0, n)).collect();
        new.sort_unstable();
        new.dedup();
        if new.is_empty() {
            return Ok(());
        }
        let entries = self.guests.add(key, 0, new);
        self.log()?.append(PcrRole::Guest, vec![event(Some(key), entries)]).await?;
        Ok(())
    }

    /// Another machine with the same TPM, disk and VMs: a copy of this one as it is now. Its proxy does not run yet.
    #[must_use]
    pub fn copy(&self) -> Self {
        Self {
            id: self.id.clone(),
            chip: self.chip.copy(),
            disk: self.disk.copy(),
            guests: Arc::new(self.guests.copy()),
            inventory: Arc::default(),
            unmanaged: Arc::default(),
            quoted_pcrs: self.quoted_pcrs.clone(),
            saved: None,
            saved_copy: None,
            around: Arc::clone(&self.around),
            vms: self.vms.clone(),
            boots: self.boots,
            processes: self.processes,
            running: None,
        }
    }

    /// Logs something that an attacker wants there.
    ///
    /// # Errors
    /// The log does not take it.
    pub async fn say(&mut self, role: PcrRole, key: Option<VmRef>, body: impl Into<EventBody>) -> Result<()> {
        self.log()?.append(role, vec![event(key, body)]).await?;
        Ok(())
    }

    /// Stops all VMs in good order.
    ///
    /// # Errors
    /// The log does not take it.
    pub async fn stop_all(&mut self) -> Result<()> {
        let running: Vec<VmRef> = self.vms.iter().filter_map(Vm::key).collect();
        let mut events = Vec::new();
        for key in running {
            let Some(vm) = self.vms.iter_mut().find(|vm| vm.id == key.vm) else { continue };
            vm.session = None;
            let images = vec![catalogue::image(vm.kind, &vm.name(), vm.changes)];
            let stop = VmStop { cause: StopCause::HostShutdown, images, unmeasured: Vec::new(), read: Vec::new() };
            events.push(event(Some(key), stop));
            self.guests.end(key);
        }
        for part in events.chunks(600) {
            self.log()?.append(PcrRole::Vm, part.to_vec()).await?;
        }
        Ok(())
    }

    /// Boots it again. VMs that run then are gone without a word.
    ///
    /// # Errors
    /// The proxy does not start.
    pub async fn reboot(&mut self) -> Result<()> {
        self.kill_proxy().await;
        self.chip.reset();
        self.guests.clear();
        self.vms.iter_mut().for_each(|vm| vm.session = None);
        self.boot()
    }

    /// What a verifier should come to know.
    ///
    /// # Errors
    /// The proxy does not run.
    pub fn truth(&self) -> Result<Truth> {
        let inventory = self.inventory.read().unwrap_or_else(PoisonError::into_inner);
        let head = self.log()?.head()?;
        let entries = |vm: &onequote_proxy::inventory::LoggedVm| vm.boots.iter().map(|boot| boot.count).sum();
        let vms = inventory.vms().map(|(key, vm)| (key.vm, (key.session, entries(vm)))).collect();
        Ok(Truth { epoch: head.epoch.number, records: head.log_len, vms })
    }

    /// Bytes of its log, its kernel's list and its guests' lists, each of these whole.
    #[must_use]
    pub fn list_bytes(&self) -> u64 {
        let own: usize = self.around.catalogue.host.iter().map(|listed| listed.raw.len()).sum();
        (self.disk.len() + own) as u64 + self.guests.bytes()
    }

    /// An attacker's: a VM that is off is started from an image that somebody has changed meanwhile.
    pub fn change_image(&mut self) -> Option<VmId> {
        let vm = self.vms.iter_mut().find(|vm| vm.session.is_none())?;
        vm.changes += 1000;
        Some(vm.id)
    }

    /// The number of an entry that no guest may have.
    #[must_use]
    pub fn forbidden(&self, random: &mut Random) -> usize {
        let catalogue = &self.around.catalogue;
        let count = (catalogue.entries.len() - catalogue.allowed) as u64;
        catalogue.allowed + random.below(count) as usize
    }
}

impl Vm {
    fn name(&self) -> String {
        format!("{}-{}", KINDS[self.kind % KINDS.len()], &self.id.to_string()[..8])
    }

    fn key(&self) -> Option<VmRef> {
        Some(VmRef { vm: self.id, session: self.session? })
    }
}

fn event(vm: Option<VmRef>, body: impl Into<EventBody>) -> Event {
    Event { time: host_now(), vm, body: body.into() }
}

fn first_16(bytes: &[u8]) -> [u8; 16] {
    let mut out = [0; 16];
    out.iter_mut().zip(bytes).for_each(|(to, from)| *to = *from);
    out
}
