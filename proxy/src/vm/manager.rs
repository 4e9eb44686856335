//! The task that owns all sessions.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError, RwLock},
    time::{Duration, Instant},
};

use onequote_evidence::{
    digest::FileDigestAlg,
    event::{Depth, Event, StopCause, UnmanagedVm, VmStop},
    id::{BootId, HostId, SessionId},
};
use tokio::{
    sync::{mpsc, oneshot, watch},
    task::{JoinHandle, JoinSet},
    time::{MissedTickBehavior, interval, sleep},
};

use super::{
    Clock, LiveVm, OpenSession, References, Registry, Scan, SocketTrouble, Stage, UnmanagedProcess,
    changed::Writers,
    is_valid_name, open_sessions,
    outbox::Outbox,
    pace::Pace,
    session::Session,
    unmanaged,
    watch::{Socket, SocketId, Watch, socket_id},
};
use crate::{
    intercept,
    inventory::Inventory,
    measure::{self, Digester, MeasureError, Process, Program},
    qmp::{self, Events, Qmp, QmpError, listener},
    rate::Bucket,
    sink::EventSink,
};

/// How VMs are watched.
#[derive(Debug, Clone)]
pub struct Config {
    /// This host.
    pub host: HostId,
    /// Its kernel's boot id.
    pub boot: BootId,
    /// The watched folder.
    pub dir: PathBuf,
    /// Monitor sockets elsewhere, with their VMs' names. Their folders must exist.
    pub extra: Vec<(String, PathBuf)>,
    /// What a monitor's connection may use.
    pub limits: qmp::Limits,
    /// How long a socket may refuse connections before it is taken for the remains of a QEMU that ended.
    pub accept: Duration,
    /// How long a process may live on after its monitor ended before the monitor counts as lost.
    pub exit_grace: Duration,
    /// How often a VM's configuration is compared with what was measured, when nothing happens.
    pub recheck: Duration,
    /// How many VMs are looked at in a second for that at most; with more VMs each is looked at less often.
    pub looks_per_second: u32,
    /// How long to wait before something that failed is tried again.
    pub retry: Duration,
    /// What computes digests.
    pub digester: Digester,
    /// How the host is searched for VMs without a monitor; none to leave it.
    pub scan: Option<Scan>,
    /// The folder where trees of images are kept while VMs run, so that at their end only what changed is read; none to
    /// read all. It must exist.
    pub trees: Option<PathBuf>,
    /// Which monitors are served to management tools, and how; none to serve none.
    pub intercept: Option<intercept::Settings>,
}

impl Config {
    /// Usual values.
    #[must_use]
    pub fn new(host: HostId, boot: BootId, dir: PathBuf) -> Self {
        Self {
            host,
            boot,
            dir,
            extra: Vec::new(),
            limits: qmp::Limits::default(),
            accept: Duration::from_secs(10),
            exit_grace: Duration::from_secs(5),
            recheck: Duration::from_secs(10),
            looks_per_second: 20,
            retry: Duration::from_secs(1),
            digester: Digester::default(),
            scan: Some(Scan::default()),
            trees: None,
            intercept: None,
        }
    }
}

/// What every session needs.
pub(super) struct Env {
    pub(super) config: Config,
    pub(super) sink: Arc<dyn EventSink>,
    pub(super) clock: Clock,
    pub(super) inventory: Arc<RwLock<Inventory>>,
    pub(super) references: Option<References>,
    pub(super) registry: Registry,
    pub(super) digester: Digester,
    pub(super) pace: Pace,
    pub(super) writers: Writers,
    known: Mutex<BTreeMap<SessionId, OpenSession>>,
}

impl Env {
    /// What the connection to a VM's monitor may use.
    pub(super) fn limits(&self, name: &str) -> qmp::Limits {
        let oob = self.config.intercept.as_ref().is_some_and(|settings| settings.intercepts(name));
        qmp::Limits { oob, ..self.config.limits.clone() }
    }

    /// What the log said about a session before the proxy started, once.
    pub(super) fn take_known(&self, session: SessionId) -> Option<OpenSession> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner).remove(&session)
    }
}

/// Watches a host's VMs until it is stopped or dropped. QEMU goes on without it.
pub struct Manager {
    registry: Registry,
    scans: mpsc::Sender<oneshot::Sender<()>>,
    settled: watch::Receiver<bool>,
    task: JoinHandle<()>,
}

impl Manager {
    /// Begins to watch. `inventory` is kept by whoever takes the events of `sink` in, and has all of the log already; with `references`
    /// a VM that does not fit them is not let run.
    ///
    /// # Errors
    /// When the folder can be neither watched nor made.
    pub fn start(
        config: Config,
        sink: Arc<dyn EventSink>,
        clock: Clock,
        references: Option<References>,
        inventory: Arc<RwLock<Inventory>>,
    ) -> io::Result<Self> {
        let watch = Watch::new(&config.dir, &config.extra)?;
        let registry = Registry::default();
        let open = open_sessions(&inventory.read().unwrap_or_else(PoisonError::into_inner));
        let known = open.into_iter().map(|s| (s.vm.session, s)).collect();
        let digester = config.digester.clone();
        let pace = Pace::new(config.recheck, config.looks_per_second);
        let env = Env {
            config,
            sink,
            clock,
            inventory,
            references,
            registry: registry.clone(),
            digester,
            pace,
            writers: Writers::default(),
            known: Mutex::new(known),
        };
        let (scans, wanted) = mpsc::channel(16);
        let (settled, is_settled) = watch::channel(false);
        let env = Arc::new(env);
        let keeper = Keeper {
            env,
            watch,
            seen: HashMap::new(),
            told: HashSet::new(),
            telling: Bucket::new(256, Duration::from_secs(10), Instant::now()),
            tasks: JoinSet::new(),
            settled,
        };
        Ok(Self { registry, scans, settled: is_settled, task: tokio::spawn(keeper.run(wanted)) })
    }

    /// What is known of VMs.
    #[must_use]
    pub fn registry(&self) -> &Registry {
        &self.registry
    }

    /// Waits until every monitor that was there at the start has led to trouble, or to a VM that waits or is in the log.
    /// Before that nobody can say which VMs this host has.
    pub async fn settled(&self) {
        // Its end without an answer is the manager's end.
        let _ = self.settled.clone().wait_for(|settled| *settled).await;
    }

    /// Stops watching. Nothing is logged any more when this is done.
    pub async fn stop(self) {
        let Self { scans, task, .. } = self;
        drop(scans);
        // A task that failed has nothing left to wait for.
        let _ = task.await;
    }

    /// Searches the host for VMs without a monitor now, and logs new ones. Done when that is in the log.
    pub async fn scan(&self) {
        let (done, scanned) = oneshot::channel();
        if self.scans.send(done).await.is_ok() {
            // Its end without an answer is the manager's end.
            let _ = scanned.await;
        }
    }
}

struct Keeper {
    env: Arc<Env>,
    watch: Watch,
    seen: HashMap<PathBuf, SocketId>,
    /// Unmanaged processes that are in the log.
    told: HashSet<UnmanagedProcess>,
    /// How many may be logged: any user of the host can make some. The statement names them all.
    telling: Bucket,
    tasks: JoinSet<()>,
    /// Whether the monitors that were there at the start have been met.
    settled: watch::Sender<bool>,
}

impl Keeper {
    async fn run(mut self, mut wanted: mpsc::Receiver<oneshot::Sender<()>>) {
        self.close_open_sessions();
        // Every task of the first look holds a sender until it has met its monitor.
        let (meeting, mut met) = mpsc::channel::<()>(1);
        self.look(Some(&meeting));
        drop(meeting);
        let mut look = interval(self.env.config.recheck);
        let mut scan = interval(self.env.config.scan.as_ref().map_or(Duration::from_secs(3600), |s| s.every));
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        scan.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                changed = self.watch.changed() => {
                    if let Err(e) = changed {
                        // The timer still looks.
                        tracing::error!("watching {}: {e}", self.env.config.dir.display());
                        sleep(self.env.config.retry).await;
                    }
                    self.look(None);
                }
                _ = met.recv(), if !*self.settled.borrow() => {
                    self.settled.send_replace(true);
                }
                _ = look.tick() => self.look(None),
                _ = scan.tick() => self.scan().await,
                done = wanted.recv() => {
                    let Some(done) = done else { break };
                    self.scan().await;
                    // Who asked may have gone.
                    let _ = done.send(());
                }
                Some(ended) = self.tasks.join_next() => {
                    if let Err(e) = ended && e.is_panic() {
                        tracing::error!("a VM's task failed: {e}");
                    }
                }
            }
        }
        // The manager is gone.
        self.tasks.shutdown().await;
    }

    /// Starts a task for each socket that is new.
    fn look(&mut self, meeting: Option<&mpsc::Sender<()>>) {
        let sockets = match self.watch.sockets() {
            Ok(sockets) => sockets,
            Err(e) => {
                tracing::error!("cannot look for monitors in {}: {e}", self.env.config.dir.display());
                return;
            }
        };
        let registry = &self.env.registry;
        self.seen.retain(|path, _| {
            let there = sockets.iter().any(|s| s.path == *path);
            if !there {
                registry.trouble(path, None);
            }
            there
        });
        for socket in sockets {
            if self.seen.insert(socket.path.clone(), socket.id) != Some(socket.id) {
                self.tasks.spawn(serve(Arc::clone(&self.env), socket, meeting.cloned()));
            }
        }
    }

    /// Closes the sessions whose processes are gone; waits for the end of those that live on without a monitor.
    fn close_open_sessions(&mut self) {
        let known: Vec<_> = self.env.known.lock().unwrap_or_else(PoisonError::into_inner).values().cloned().collect();
        for session in known {
            let boot = self.env.config.boot;
            let process = Process::open(session.pid).ok().filter(|p| p.session(boot) == session.vm.session);
            if process.is_none() {
                // In the registry from now on, so that a next session of the same VM waits for this one's end.
                self.env.take_known(session.vm.session);
                let _ = self.env.registry.enter(ending(&session));
            }
            self.tasks.spawn(close_open_session(Arc::clone(&self.env), session, process));
        }
    }

    async fn scan(&mut self) {
        let Some(scan) = self.env.config.scan.clone() else { return };
        if !*self.settled.borrow() {
            // Monitors that were there before are still being connected to.
            return;
        }
        let managed = self.env.registry.managed();
        let found = tokio::task::spawn_blocking(move || unmanaged::find(&managed, scan.older_than)).await;
        let found = match found.map_err(io::Error::other).and_then(|found| found) {
            Ok(found) => found,
            Err(e) => return tracing::error!("cannot search for VMs without a monitor: {e}"),
        };
        self.env.registry.set_unmanaged(found.clone());
        self.told.retain(|p| found.contains(p));
        let (now, rate) = (Instant::now(), &mut self.telling);
        let new: Vec<_> = found.into_iter().filter(|p| !self.told.contains(p)).take_while(|_| rate.take(now)).collect();
        if new.is_empty() {
            return;
        }
        let time = (self.env.clock)();
        let event = |p: &UnmanagedProcess| {
            tracing::warn!(pid = p.pid, program = p.program, "a VM that is not managed");
            let (program, arguments) = (p.program.clone(), p.arguments.clone());
            Event { time, vm: None, body: UnmanagedVm { pid: p.pid, program, arguments }.into() }
        };
        match self.env.sink.append(new.iter().map(event).collect()).await {
            Ok(()) => self.told.extend(new),
            // Tried again at the next search.
            Err(e) => tracing::error!("{e}"),
        }
    }
}

/// Serves one socket: connects, again where that may help, and lives with the VM behind it. `meeting` is let go when the
/// first try has led to a VM that waits or is in the log, or to trouble.
async fn serve(env: Arc<Env>, socket: Socket, mut meeting: Option<mpsc::Sender<()>>) {
    let since = Instant::now();
    let Socket { name, path, id } = socket;
    let trouble = |error: String| {
        let trouble = SocketTrouble { name: name.clone(), path: path.clone(), error };
        if env.registry.trouble(&path, Some(&trouble)) {
            tracing::error!(vm = %name, socket = %path.display(), "{}", trouble.error);
        }
    };
    if !is_valid_name(&name) {
        return trouble(format!("{name:?} is no name for a VM: 1 to 64 of A-Z a-z 0-9 . _ -, a letter or digit first"));
    }
    if let Some((_, named)) = env.config.extra.iter().find(|(other, socket)| *other == name && *socket != path) {
        return trouble(format!("the configuration says that {name} has the monitor {}", named.display()));
    }
    let mut first = true;
    while socket_id(&path) == Some(id) {
        match connect(&env, &name, &path, std::mem::take(&mut first)).await {
            Ok((monitor, program)) => match Session::meet(&env, name.clone(), path.clone(), monitor, program).await {
                Ok(mut session) => {
                    env.registry.trouble(&path, None);
                    session.meeting = meeting;
                    return session.live().await;
                }
                Err(e) => trouble(e.to_string()),
            },
            Err(e) if e.is_not_listening() => {
                first = true;
                meeting = None;
                if since.elapsed() > env.config.accept {
                    tracing::debug!(socket = %path.display(), "nobody listens: left over from a QEMU that ended");
                    env.registry.trouble(&path, None);
                    return;
                }
                // Between QEMU's bind and listen there is nothing to wait for but time.
                sleep(Duration::from_millis(5)).await;
                continue;
            }
            Err(e) => trouble(e.to_string()),
        }
        meeting = None;
        sleep(env.config.retry).await;
    }
    // The last trouble may have come after the socket went; one that was made anew has a task of its own.
    if socket_id(&path).is_none() {
        env.registry.trouble(&path, None);
    }
}

/// Connects to a monitor. QEMU listens long before it answers: if this is the `first` try, the digest of its program is begun
/// meanwhile. Monitors that stay silent are tried again and again.
async fn connect(
    env: &Env,
    name: &str,
    path: &Path,
    first: bool,
) -> Result<((Qmp, Events), Option<Program>), QmpError> {
    let limits = env.limits(name);
    let stream = Qmp::open(path, &limits).await?;
    let process = if first { listener(&stream)?.and_then(|pid| Process::open(pid).ok()) } else { None };
    let program = process.map(|process| Program::begin(&process, &env.digester));
    Ok((Qmp::negotiate(stream, &limits).await?, program))
}

/// Logs the end of a session that the log left open, when nobody else will.
async fn close_open_session(env: Arc<Env>, session: OpenSession, process: Option<Process>) {
    if let Some(process) = process {
        process.ended().await;
        if env.take_known(session.vm.session).is_none() {
            // Its monitor was found: the session's own task logs its end.
            return;
        }
        let _ = env.registry.enter(ending(&session));
    }
    let (mut images, mut unmeasured) = (Vec::new(), Vec::new());
    for image in session.images.iter().filter(|i| !i.read_only) {
        let path = PathBuf::from(&image.path);
        match measure::measure_path(&env.digester, &path, FileDigestAlg::FsVerity, None).await {
            Ok(now) => {
                let mut image = image.clone();
                (image.size, image.digest) = (now.size, now.digest);
                images.push(image);
            }
            Err(kind) => unmeasured.push(MeasureError::new(&image.slot, &path, kind).to_string()),
        }
    }
    let body = VmStop { cause: StopCause::Unwatched, images, unmeasured, read: Vec::new() }.into();
    let outbox = Outbox::new(session.vm, Arc::clone(&env.sink), Arc::clone(&env.inventory));
    outbox.push(Event { time: (env.clock)(), vm: Some(session.vm), body });
    while let Err(e) = outbox.flush().await {
        tracing::error!(vm = %session.name, "{e}");
        sleep(env.config.retry).await;
    }
    env.registry.leave(session.vm);
}

fn ending(session: &OpenSession) -> LiveVm {
    LiveVm {
        vm: session.vm,
        name: session.name.clone(),
        pid: session.pid,
        since: None,
        depth: Depth::Observe,
        stage: Stage::Ending,
        logged: true,
        run_state: "shutdown".to_owned(),
        guest_cid: None,
        vsock: None,
        resets: 0,
        monitor: None,
        error: None,
    }
}
