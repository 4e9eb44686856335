//! A folder of monitors, a manager, and a log that can be broken.

use std::{
    ffi::OsStr,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{
        Arc, Mutex, RwLock,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use onequote_evidence::{
    event::{Event, EventBody},
    id::{BootId, Sha256, TimeMs},
};
use tempfile::TempDir;
use tokio::{process::Child, sync::watch, time::timeout};

use crate::{
    inventory::Inventory,
    qmp::{Limits, Qmp},
    sink::{BoxFuture, EventSink, SinkError},
    vm::*,
};

/// Longer than anything takes on a busy machine.
pub(super) const LONG: Duration = Duration::from_secs(60);

pub(super) struct World {
    pub(super) dir: TempDir,
    pub(super) log: Arc<Log>,
    pub(super) manager: Option<Manager>,
    pub(super) intercept: Option<crate::intercept::Settings>,
}

/// Something that happens while events are logged.
pub(super) type Meanwhile = BoxFuture<'static, ()>;

/// A log in memory: one list of events for each record.
#[derive(Default)]
pub(super) struct Log {
    records: Mutex<Vec<Vec<Event>>>,
    grown: watch::Sender<usize>,
    pub(super) inventory: Arc<RwLock<Inventory>>,
    /// Nothing is logged, and whoever asks is told so.
    pub(super) broken: AtomicBool,
    /// Everything is logged, and whoever asks is told that it is not.
    pub(super) lying: AtomicBool,
    /// Done once, when the next events come.
    pub(super) meanwhile: Mutex<Option<Meanwhile>>,
}

impl EventSink for Log {
    fn append(&self, events: Vec<Event>) -> BoxFuture<'_, Result<(), SinkError>> {
        Box::pin(async {
            self.ready().await?;
            let meanwhile = self.meanwhile.lock().unwrap().take();
            if let Some(meanwhile) = meanwhile {
                meanwhile.await;
            }
            for event in &events {
                self.inventory.write().unwrap().apply(event);
            }
            self.records.lock().unwrap().push(events);
            self.grown.send_modify(|n| *n += 1);
            if self.lying.load(Ordering::SeqCst) { Err(failure("no TPM")) } else { Ok(()) }
        })
    }

    fn ready(&self) -> BoxFuture<'_, Result<(), SinkError>> {
        let broken = self.broken.load(Ordering::SeqCst);
        Box::pin(async move { if broken { Err(failure("no space left on device")) } else { Ok(()) } })
    }
}

impl Log {
    pub(super) fn records(&self) -> Vec<Vec<Event>> {
        self.records.lock().unwrap().clone()
    }

    pub(super) fn events(&self) -> Vec<Event> {
        self.records().concat()
    }

    pub(super) fn kinds(&self) -> Vec<String> {
        self.events().iter().map(|e| e.body.kind().to_owned()).collect()
    }

    /// Waits until what is looked for is in the log.
    pub(super) async fn wait<T>(&self, look: impl Fn(&EventBody) -> Option<T>) -> T {
        let mut grown = self.grown.subscribe();
        let found = async {
            loop {
                if let Some(found) = self.events().iter().find_map(|e| look(&e.body)) {
                    return found;
                }
                grown.changed().await.unwrap();
            }
        };
        let found = timeout(LONG, found).await;
        found.unwrap_or_else(|_| panic!("not in the log: {:#?}", self.events()))
    }

    /// Waits for an event of this kind.
    pub(super) async fn wait_kind(&self, kind: &str) -> EventBody {
        self.wait(|body| (body.kind() == kind).then(|| body.clone())).await
    }
}

fn failure(what: &str) -> SinkError {
    SinkError(Arc::new(std::io::Error::other(what.to_owned())))
}

impl World {
    pub(super) fn new() -> Self {
        Self::with(None)
    }

    pub(super) fn with(references: Option<&str>) -> Self {
        let mut world = Self { dir: tempfile::tempdir().unwrap(), log: Arc::default(), manager: None, intercept: None };
        world.start(references);
        world
    }

    /// Starts a manager in place of the old one.
    pub(super) fn start(&mut self, references: Option<&str>) {
        self.manager = None;
        let mut config = Config::new("host-1".parse().unwrap(), BootId([7; 16]), self.path("vms"));
        config.recheck = Duration::from_millis(200);
        config.retry = Duration::from_millis(50);
        config.exit_grace = Duration::from_millis(300);
        config.limits.greeting = Duration::from_secs(2);
        config.accept = LONG;
        // Other tests run VMs at the same time.
        config.scan = None;
        config.intercept.clone_from(&self.intercept);
        let references = references.map(|text| toml::from_str(text).unwrap());
        let sink = Arc::clone(&self.log) as Arc<dyn EventSink>;
        let inventory = Arc::clone(&self.log.inventory);
        self.manager = Some(Manager::start(config, sink, || TimeMs(1), references, inventory).unwrap());
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(super) fn socket(&self, vm: &str) -> PathBuf {
        self.path("vms").join(format!("{vm}.qmp"))
    }

    pub(super) fn file(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        std::fs::write(self.path(name), content).unwrap();
        self.path(name)
    }

    pub(super) fn qemu_img<S: AsRef<OsStr>>(&self, args: &[S]) {
        let done = Command::new("qemu-img").args(args).current_dir(self.dir.path()).stdout(Stdio::null()).status();
        assert!(done.unwrap().success());
    }

    /// Starts QEMU in the world's folder with its monitor where the manager looks.
    pub(super) fn qemu(&self, vm: &str, args: &[&str]) -> Child {
        tokio::process::Command::new("qemu-system-x86_64")
            .args(["-nodefaults", "-display", "none", "-m", "64", "-qmp"])
            .arg(format!("unix:{},server=on,wait=off", self.socket(vm).display()))
            .args(args)
            .current_dir(self.dir.path())
            .kill_on_drop(true)
            .spawn()
            .unwrap()
    }

    /// Starts QEMU where the manager doesn't look.
    pub(super) fn qemu_elsewhere(&self, monitor: &str, args: &[&str]) -> Child {
        tokio::process::Command::new("qemu-system-x86_64")
            .args(["-nodefaults", "-display", "none", "-m", "64", "-S", "-qmp", &second_monitor(monitor)])
            .args(args)
            .current_dir(self.dir.path())
            .kill_on_drop(true)
            .spawn()
            .unwrap()
    }

    /// A second monitor, since the manager holds the first.
    pub(super) async fn monitor(&self, name: &str) -> Qmp {
        let path = self.path(name);
        let connect = async {
            loop {
                match Qmp::connect(&path, &Limits::default()).await {
                    Err(e) if e.is_not_listening() => tokio::task::yield_now().await,
                    other => return other.unwrap().0,
                }
            }
        };
        timeout(LONG, connect).await.unwrap()
    }

    pub(super) fn registry(&self) -> RegistrySnapshot {
        self.manager.as_ref().unwrap().registry().snapshot()
    }

    /// Waits until the registry is as it should be.
    pub(super) async fn until(&self, what: impl Fn(&RegistrySnapshot) -> bool) {
        let wait = async {
            while !what(&self.registry()) {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        let done = timeout(LONG, wait).await;
        assert!(done.is_ok(), "{:#?}\n{:#?}", self.registry(), self.log.kinds());
    }
}

pub(super) fn second_monitor(name: &str) -> String {
    format!("unix:{name},server=on,wait=off")
}

/// The digest of a disk image, as it is logged.
pub(super) fn verity_of(path: &Path) -> String {
    let file = std::fs::File::open(path).unwrap();
    let digest = onequote_verity::measure(&file, onequote_verity::Options::default()).unwrap().digest;
    format!("fs-verity:{}", Sha256(digest))
}

/// The digest of any other file, as it is logged.
pub(super) fn sha256_of(path: &Path) -> String {
    let sum = Command::new("sha256sum").arg(path).output().unwrap().stdout;
    format!("sha256:{}", String::from_utf8_lossy(&sum[..64]))
}
