//! The rooms put together: what `run` starts, in which order, and when it ends.
//!
//! The log comes first: until it agrees with the TPM nothing is measured and nobody is answered. Then the guests'
//! room, so that a VM's guest finds its door open; then the VMs; then the verifiers' door. The process ends on SIGINT
//! or SIGTERM, and when the log begins a new epoch while it runs: whatever was measured is then in a log that
//! evidence no longer shows, and a new start measures everything again.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::{Arc, RwLock},
    time::{Duration, SystemTime},
};

use onequote_evidence::{
    digest::{FileDigestAlg, HashAlg},
    event::{Event, VmRef},
    id::{BootId, EpochId, HostId, TimeMs},
    pcr::QUOTED_PCRS,
    statement::Unmanaged,
    tpm::Public,
};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::broadcast::error::RecvError,
    task::JoinSet,
};
use tracing::{error, info, warn};

use crate::{
    attest::{Attester, Processes},
    config::{Config, ConfigError},
    folder,
    guest::{self, Listeners, Room, VmDirectory},
    identity::{Identity, IdentityError},
    inventory::Inventory,
    join::{self, Done, JoinError, Members, Membership, Wish},
    log::{
        Acknowledged, FileStore, LogFolder, LogHandle, LogRead as _, PcrRole, RecordStream, Recorder, RecorderConfig,
        RecorderError, StoreError, remembered,
    },
    measure, notify, report,
    serve::{
        AskError, Deleting, Doors, ReadPast, Releasing, TlsListener, publish_address, serve_admin, serve_verifiers,
        tell_json,
    },
    sink::{BoxFuture, EventSink, SinkError},
    status::{LiveStatus, StatusSource},
    tpm::{EsapiTpm, Tpm as _, TpmError},
    vm::{self, Deleter, LiveVm, Manager, NoticeKind, PastVms, ReferenceError, References, Registry, Stage},
};

/// Why the proxy does not run.
#[derive(Debug, thiserror::Error)]
pub enum AppError {
    /// The configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The identity.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// The log.
    #[error(transparent)]
    Recorder(#[from] RecorderError),
    /// The log's folder.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The TPM.
    #[error(transparent)]
    Tpm(#[from] TpmError),
    /// The reference list of `enforce`.
    #[error(transparent)]
    References(#[from] ReferenceError),
    /// A file or socket.
    #[error("{what}: {error}")]
    Io {
        /// What.
        what: String,
        /// Why.
        error: io::Error,
    },
    /// Joining a verifier.
    #[error(transparent)]
    Join(#[from] JoinError),
    /// The proxy that runs.
    #[error(transparent)]
    Running(#[from] AskError),
    /// The state folder is another host's.
    #[error(
        "the verifier {verifier} was joined with the attestation key of another TPM: this state folder was copied from \
         another host, or the TPM was cleared or exchanged; join again with a new token"
    )]
    OtherTpm {
        /// The verifier's name.
        verifier: String,
    },
    /// The host has another name.
    #[error("the verifier {verifier} was joined as {joined}, and host_id is {host} now; join again with a new token")]
    OtherHost {
        /// The verifier's name.
        verifier: String,
        /// As which host.
        joined: HostId,
        /// Now.
        host: HostId,
    },
    /// The log began anew while VMs ran.
    #[error("the log began a new epoch while the proxy ran; start it again, so that everything is measured anew")]
    NewEpoch,
}

fn io_error(what: impl Into<String>) -> impl FnOnce(io::Error) -> AppError {
    let what = what.into();
    move |error| AppError::Io { what, error }
}

/// Makes identity and attestation key, and writes `certificate.pem` and `ak.pub` for the verifier. Gives their paths.
///
/// # Errors
/// [`AppError`].
pub fn init(config: &Config) -> Result<[PathBuf; 2], AppError> {
    folder::private(&config.state_dir).map_err(io_error(config.state_dir.display().to_string()))?;
    Identity::open(&config.state_dir, &config.host_id)?;
    // Opening a TPM without a resource manager takes its key from a proxy that runs: the log's lock says that none does.
    let _alone = FileStore::open(config.log_dir())?;
    let tpm = EsapiTpm::open_with(&config.tpm.options().map_err(io_error("tpm.auth"))?)?;
    let ak = config.state_dir.join("ak.pub");
    fs::write(&ak, tpm.ak_public()).map_err(io_error(ak.display().to_string()))?;
    Ok([config.state_dir.join("certificate.pem"), ak])
}

/// Joins a verifier: has the running proxy do it, if one runs.
///
/// # Errors
/// [`AppError`].
pub async fn join(config: &Config, wish: Wish) -> Result<Done, AppError> {
    match tell_json(&config.admin_socket(), "/v1/join", &wish).await {
        Err(AskError::Unreachable { error, .. })
            if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => {}
        told => return Ok(told?),
    }
    folder::private(&config.state_dir).map_err(io_error(config.state_dir.display().to_string()))?;
    // As for `init`: the log's lock says that no proxy runs which uses the TPM.
    let _alone = FileStore::open(config.log_dir())?;
    Ok(join::join(config, wish, now()).await?)
}

/// A state folder that was copied, or a TPM that was cleared or exchanged: what was joined is not this host any more.
fn check_memberships(config: &Config, memberships: &[Membership], ak: &[u8]) -> Result<(), AppError> {
    let ak = Public::parse(ak).map(|ak| ak.name()).unwrap_or_default();
    for Membership { name, details, .. } in memberships {
        if details.ak.0 != ak {
            return Err(AppError::OtherTpm { verifier: name.clone() });
        }
        if details.host != config.host_id {
            let (verifier, joined) = (name.clone(), details.host.clone());
            return Err(AppError::OtherHost { verifier, joined, host: config.host_id.clone() });
        }
    }
    Ok(())
}

/// Runs until told to end.
///
/// # Errors
/// [`AppError`].
pub async fn run(config: Config) -> Result<(), AppError> {
    let monitors = config.intercept.is_some().then(|| config.monitors_dir());
    for dir in [config.state_dir.clone(), config.run_dir.clone(), config.vms_dir()].into_iter().chain(monitors) {
        folder::private(&dir).map_err(io_error(dir.display().to_string()))?;
    }
    raise_descriptors();
    let identity = Identity::open(&config.state_dir, &config.host_id)?;
    let memberships = Membership::all(&config.state_dir).map_err(io_error("verifiers that were joined"))?;
    let references = match &config.enforce {
        Some(enforce) => Some(References::load(&enforce.references)?),
        None => None,
    };
    let boot_id = boot_id()?;
    let inventory = Arc::new(RwLock::new(Inventory::default()));
    let (recorder, log) = start_recorder(&config, boot_id, &inventory).await?;
    let tpm = log.tpm()?;
    info!(tpm = %tpm.model, software = tpm.software, "log and TPM agree");
    if tpm.software {
        warn!("the TPM is software: good for tests, no root of trust");
    }
    check_memberships(&config, &memberships, &tpm.ak_public)?;
    let ak = config.state_dir.join("ak.pub");
    fs::write(&ak, &tpm.ak_public).map_err(io_error(ak.display().to_string()))?;
    let members = Members::new(&config, identity, &memberships, log.clone(), now)?;

    let enrolled = config.verifiers.iter().map(|v| v.name.clone()).chain(memberships.iter().map(|m| m.name.clone()));
    let acknowledged = Arc::new(Acknowledged::open(&config.log_dir(), log.head()?.epoch, enrolled.collect()));

    let guest_sink: Arc<dyn EventSink> = Arc::new(LogSink { log: log.clone(), role: PcrRole::Guest });
    let limits =
        guest::Limits { entries: config.guest.max_entries, bytes: config.guest.max_bytes, ..guest::Limits::default() };
    let (room, writer) = guest::open(&config.guests_dir(), limits, now, Arc::clone(&inventory), guest_sink)
        .map_err(io_error(config.guests_dir().display().to_string()))?;

    let digester = measure::Digester::new(config.measure.limits());
    let mut watched = vm::Config::new(config.host_id.clone(), boot_id, config.vms_dir());
    watched.recheck = Duration::from_millis(config.vms.look_ms);
    watched.looks_per_second = config.vms.looks_per_second;
    watched.extra = config.monitors.iter().map(|m| (m.name.clone(), m.socket.clone())).collect();
    watched.digester = digester.clone();
    watched.trees = config.trees_dir();
    if let Some(dir) = &watched.trees {
        folder::private(dir).map_err(io_error(dir.display().to_string()))?;
    }
    watched.intercept = config.intercept();
    let manager = Manager::start(
        watched,
        Arc::new(LogSink { log: log.clone(), role: PcrRole::Vm }),
        now,
        references,
        Arc::clone(&inventory),
    )
    .map_err(io_error("the folder of a monitor"))?;
    let registry = manager.registry().clone();
    let commanded = registry.clone();

    let mut tasks: JoinSet<Result<(), AppError>> = JoinSet::new();
    let directory = Arc::new(Directory(registry.clone()));
    let listeners = Listeners::new(Arc::clone(&room), directory, config.vms_dir(), config.guest.port);
    listen_vsock(&listeners, config.guest.vsock)?;
    tasks.spawn(follow(registry.clone(), Arc::clone(&room), config.guest.unix.then_some(listeners)));

    let processes = registry.clone();
    let attest = Attester {
        host: config.host_id.clone(),
        log: log.clone(),
        inventory: Arc::clone(&inventory),
        room: Arc::<Room>::clone(&room),
        processes: Arc::new(move || processes_now(&processes)),
        wait: config.collect_wait(),
        clock: now,
        firmware_log: config.firmware_log(),
        ima_list: config.host.ima_list.clone(),
        acknowledged: Some(Arc::clone(&acknowledged)),
    }
    .start();
    let deleting = Deleting {
        deleter: Deleter {
            registry: commanded.clone(),
            sink: Arc::new(LogSink { log: log.clone(), role: PcrRole::Vm }),
            digester: digester.clone(),
            clock: now,
        },
        past: past_vms(config.log_dir(), log.clone()),
    };
    let status: Arc<dyn StatusSource> = Arc::new(LiveStatus {
        host: config.host_id.clone(),
        log: log.clone(),
        inventory,
        registry,
        room,
        acknowledged: Arc::clone(&acknowledged),
        digester,
        reports: members.reports(),
    });
    let releasing = Releasing { acknowledged, log: log.clone() };
    let reporting = config.report.enabled.then(|| report::Proxy {
        attest: attest.clone(),
        log: log.clone(),
        releasing: Some(releasing.clone()),
        verifier: String::new(),
    });
    let doors = Doors { attest, status, releasing };
    let (admin, admin_doors, joining) = (config.admin_socket(), doors.clone(), Arc::clone(&members));
    tasks.spawn(async move {
        let served = serve_admin(&admin, admin_doors, commanded, deleting, joining).await;
        served.map_err(io_error("the proxy's own socket"))
    });
    // Nobody is answered before it is known which VMs there are: a host must not look complete because it was asked early.
    tokio::select! {
        () = async { manager.settled().await; manager.scan().await } => {}
        told = told_to_end() => return told,
    }
    let listener = TlsListener::bind(config.listen, members.access()).await.map_err(io_error("verifiers' door"))?;
    let address = listener.address();
    let published = config.state_dir.join("listen.addr");
    publish_address(&published, address).map_err(io_error(published.display().to_string()))?;
    tasks.spawn(async move { serve_verifiers(listener, doors).await.map_err(io_error("verifiers' door")) });
    match config.verifiers.len() + memberships.len() {
        0 => warn!(%address, "ready, but nobody can ask: the configuration names no verifier, and none was joined"),
        verifiers => info!(%address, verifiers, "ready"),
    }
    members.start(memberships, address.port(), reporting).await;
    tasks.spawn(watch_epoch(log));
    if let Err(e) = notify::ready() {
        warn!("the service manager cannot be told that the proxy is ready: {e}");
    }

    let ended = tokio::select! {
        ended = tasks.join_next() => ended,
        told = told_to_end() => { told?; None }
    };
    // In order: nothing new comes, what was taken is logged, the TPM is closed.
    drop(manager);
    tasks.shutdown().await;
    members.stop().await;
    drop(members);
    writer.abort();
    let _ = writer.await;
    let _ = tokio::task::spawn_blocking(move || recorder.join()).await;
    info!("ended");
    match ended {
        Some(Ok(Err(e))) => Err(e),
        Some(Err(e)) => Err(AppError::Io { what: "a task".to_owned(), error: io::Error::other(e) }),
        _ => Ok(()),
    }
}

/// Every VM takes some descriptors (monitor, process, images, guest): as many as we may have.
fn raise_descriptors() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    if let Err(e) = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }) {
        warn!(?current, "the limit of open files cannot be raised: {e}");
    }
}

async fn start_recorder(
    config: &Config,
    boot_id: BootId,
    inventory: &Arc<RwLock<Inventory>>,
) -> Result<(Recorder, LogHandle), AppError> {
    let store = FileStore::open(config.log_dir())?;
    let binary = fs::File::open("/proc/self/exe").map_err(io_error("/proc/self/exe"))?;
    let path = fs::read_link("/proc/self/exe").map_err(io_error("/proc/self/exe"))?;
    let wanted = measure::Wanted { alg: FileDigestAlg::Sha256, stamp: None, progress: None };
    let measured = measure::Digester::default().digest(Arc::new(binary), wanted).await;
    let (_, binary) = measured.map_err(|e| io_error("/proc/self/exe")(io::Error::other(e)))?;
    let options = config.tpm.options().map_err(io_error("tpm.auth"))?;
    let recorder = RecorderConfig {
        host: config.host_id.clone(),
        boot_id,
        version: env!("CARGO_PKG_VERSION").to_owned(),
        binary: Some(binary),
        path: Some(path.to_string_lossy().into_owned()),
        pcr_vm: config.pcr_vm,
        pcr_guest: config.pcr_guest,
        quoted_pcrs: QUOTED_PCRS.to_vec(),
        quoted_banks: vec![HashAlg::Sha256],
        inventory: Arc::clone(inventory),
        segment_bytes: config.log.segment_bytes,
        now: Box::new(now),
        new_epoch_id: Box::new(|| EpochId(rand::random())),
    };
    let open_tpm = Box::new(move || EsapiTpm::open_with(&options).map(|tpm| Box::new(tpm) as _));
    let started = tokio::task::spawn_blocking(move || Recorder::start(recorder, Box::new(store), open_tpm)).await;
    started
        .map_err(|e| AppError::Io { what: "the recorder".to_owned(), error: io::Error::other(e) })?
        .map_err(Into::into)
}

/// Events of one register.
struct LogSink {
    log: LogHandle,
    role: PcrRole,
}

impl EventSink for LogSink {
    fn append(&self, events: Vec<Event>) -> BoxFuture<'_, Result<(), SinkError>> {
        Box::pin(async move { self.log.append(self.role, events).await.map(drop).map_err(|e| SinkError(Arc::new(e))) })
    }

    fn ready(&self) -> BoxFuture<'_, Result<(), SinkError>> {
        Box::pin(async move { self.log.ready().await.map_err(|e| SinkError(Arc::new(e))) })
    }
}

/// The VM at the other end of a guest's connection, by the live registry.
struct Directory(Registry);

impl VmDirectory for Directory {
    fn by_name(&self, name: &str) -> Option<VmRef> {
        self.find(|vm| vm.name == name)
    }

    fn by_cid(&self, cid: u32) -> Option<VmRef> {
        self.find(|vm| vm.guest_cid == Some(cid.into()))
    }
}

impl Directory {
    fn find(&self, fits: impl Fn(&LiveVm) -> bool) -> Option<VmRef> {
        let live = |vm: &&LiveVm| matches!(vm.stage, Stage::Watched | Stage::MonitorLost);
        self.0.snapshot().vms.iter().filter(live).find(|vm| fits(vm)).map(|vm| vm.vm)
    }
}

/// Reads all logs that are there, the current one as far as it is recorded.
fn past_vms(dir: PathBuf, log: LogHandle) -> ReadPast {
    Arc::new(move || {
        let (head, folder) = (log.head()?, LogFolder::new(&dir));
        let mut past = PastVms::default();
        for epoch in folder.epochs()? {
            let current = epoch == head.epoch.number;
            let records = if current { head.log_len } else { u64::MAX };
            past.begin_epoch(&remembered(&folder, epoch)?);
            for record in RecordStream::oldest(&folder, epoch)? {
                if record.as_ref().is_ok_and(|record| record.recnum >= records) {
                    break;
                }
                let events = record.map(|record| record.events());
                match events {
                    Ok(Ok(events)) => events.iter().for_each(|event| past.apply(event)),
                    Err(e) if current => return Err(e),
                    // What is damaged of an old log is not recorded.
                    Ok(Err(_)) | Err(_) => break,
                }
            }
            past.end_epoch();
        }
        Ok(past)
    })
}

fn listen_vsock(listeners: &Listeners, wanted: Option<bool>) -> Result<(), AppError> {
    if wanted == Some(false) {
        return Ok(());
    }
    match listeners.listen_vsock() {
        Ok(_) => info!("guests are heard on AF_VSOCK"),
        Err(error) if wanted == Some(true) => return Err(io_error("AF_VSOCK")(error)),
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            warn!("guests are not heard on AF_VSOCK: its port is taken; is another proxy running?");
        }
        Err(error) => info!("guests are not heard on AF_VSOCK: {error}"),
    }
    Ok(())
}

/// Opens and closes guests' doors as VMs come and go.
async fn follow(registry: Registry, room: Arc<Room>, mut listeners: Option<Listeners>) -> Result<(), AppError> {
    let mut notices = registry.notices();
    let open = |listeners: &mut Option<Listeners>, name: &str| {
        if let Some(Err(e)) = listeners.as_mut().map(|l| l.listen_unix(name)) {
            error!(vm = name, "the guest's door cannot be opened: {e}");
        }
    };
    for vm in registry.snapshot().vms {
        open(&mut listeners, &vm.name);
    }
    loop {
        match notices.recv().await {
            Ok(notice) => match notice.kind {
                NoticeKind::Started => open(&mut listeners, &notice.status.name),
                NoticeKind::Reset => {}
                NoticeKind::Stopped => {
                    room.ended(notice.status.vm).await;
                    let name = &notice.status.name;
                    if !registry.snapshot().vms.iter().any(|vm| &vm.name == name && vm.vm != notice.status.vm)
                        && let Some(listeners) = &mut listeners
                    {
                        listeners.stop_unix(name);
                    }
                }
            },
            Err(RecvError::Lagged(missed)) => {
                warn!(missed, "notices of VMs were missed; looking at all of them");
                for vm in registry.snapshot().vms {
                    open(&mut listeners, &vm.name);
                }
            }
            Err(RecvError::Closed) => return Ok(()),
        }
    }
}

async fn watch_epoch(mut log: LogHandle) -> Result<(), AppError> {
    let epoch = log.head()?.epoch;
    loop {
        if log.changed().await?.epoch != epoch {
            return Err(AppError::NewEpoch);
        }
    }
}

async fn told_to_end() -> Result<(), AppError> {
    let mut terminate = signal(SignalKind::terminate()).map_err(io_error("SIGTERM"))?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(io_error("SIGINT"))?;
    tokio::select! { _ = terminate.recv() => {}, _ = interrupt.recv() => {} }
    Ok(())
}

fn processes_now(registry: &Registry) -> Processes {
    let snapshot = registry.snapshot();
    let unmanaged = snapshot.unmanaged.into_iter().map(|p| Unmanaged { pid: p.pid, program: p.program });
    // One that waits for us has not begun; one that ends is out of the log a moment before it is out of the registry.
    let runs = |vm: &LiveVm| vm.run_state != "prelaunch" && vm.stage != Stage::Ending;
    let running = snapshot.vms.into_iter().filter(runs);
    let process = |vm: LiveVm| (vm.vm, Unmanaged { pid: vm.pid, program: format!("{} (not in the log)", vm.name) });
    Processes { unmanaged: unmanaged.collect(), running: running.map(process).collect() }
}

fn boot_id() -> Result<BootId, AppError> {
    let path = Path::new("/proc/sys/kernel/random/boot_id");
    let text = fs::read_to_string(path).map_err(io_error(path.display().to_string()))?;
    BootId::from_kernel(&text).ok_or_else(|| io_error(path.display().to_string())(io::ErrorKind::InvalidData.into()))
}

/// The host's clock.
fn now() -> TimeMs {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    TimeMs(u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
}
