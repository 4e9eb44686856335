//! One VM's socket for management tools.

use std::{
    io,
    os::unix::fs::{FileTypeExt as _, MetadataExt as _},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use onequote_evidence::event::VmRef;
use serde::Serialize;
use tokio::{
    net::UnixListener,
    sync::{Notify, OnceCell, Semaphore, mpsc, oneshot, watch},
    task::JoinSet,
};

use super::{Settings, client, outbound::Fanout, schema::Schema};
use crate::{
    measure::Digester,
    qmp::{Qmp, QmpError, Tap as _},
    rate::{Bucket, Kind, limited},
    vm::{Clock, Outbox, Registry},
};

/// Commands of clients that QEMU has at a time. QEMU takes 8 before it stops reading (QEMU `monitor/qmp.c`,
/// `QMP_REQ_QUEUE_LEN_MAX`), and then out-of-band commands could not overtake; the proxy itself sends one at a time.
const IN_FLIGHT: usize = 5;

/// Changing commands of one VM that pass as fast as the log takes them, and how long one more then takes.
const COMMANDS: u32 = 2048;
const COMMANDS_REFILL: Duration = Duration::from_millis(20);

/// Refusals of one VM that are logged one by one, and how long one more then takes.
const REFUSALS: u32 = 256;
const REFUSALS_REFILL: Duration = Duration::from_secs(5);

/// How long to wait when a connection cannot be accepted.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

/// Whether the VM may be let run by a client.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Gate {
    /// It is being measured: what changes something waits.
    Measuring,
    /// It runs, or may run.
    Open,
    /// It must not run, and why.
    Closed(String),
    /// The session has ended, or its monitor is lost.
    Gone,
}

/// The VM behind a door.
pub(crate) struct Vm {
    pub(crate) name: String,
    pub(crate) vm: VmRef,
    pub(crate) pid: u32,
    pub(crate) qmp: Qmp,
    pub(crate) outbox: Outbox,
    pub(crate) clock: Clock,
    pub(crate) digester: Digester,
    pub(crate) registry: Registry,
    /// Who is to do something before QEMU ends, and says when it is done.
    pub(crate) before_quit: mpsc::Sender<oneshot::Sender<()>>,
}

/// What clients have taken into their own hands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Hands {
    /// What QEMU does at power-off.
    Shutdown,
    /// What QEMU does when its guest panics.
    Panic,
    /// The images' nodes or files, by this command, which may do what a dirty bitmap does not show.
    Images(String),
}

/// What is known of a door.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct DoorStatus {
    /// The socket.
    pub socket: PathBuf,
    /// Clients that are connected.
    pub clients: usize,
    /// Commands that change something and were passed to QEMU in this session.
    pub commands: u64,
    /// Commands that were not, because they are forbidden, name what cannot be measured, or could not be logged.
    pub refused: u64,
}

/// A VM's socket, served for as long as this lives.
pub struct Door {
    hub: Arc<Hub>,
    id: Option<(u64, u64)>,
}

/// What the clients of one door share.
pub(super) struct Hub {
    pub(super) vm: Vm,
    pub(super) settings: Settings,
    pub(super) fanout: Arc<Fanout>,
    pub(super) gate: watch::Sender<Gate>,
    /// Told after each command that may have changed something.
    pub(super) ran: Notify,
    pub(super) in_flight: Semaphore,
    /// Held by the one command that hands a descriptor over.
    pub(super) handing_over: tokio::sync::Mutex<()>,
    pub(super) flood: Mutex<Flood>,
    /// At most one of each kind.
    hands: Mutex<Vec<Hands>>,
    schema: OnceCell<Schema>,
    status: Mutex<DoorStatus>,
}

/// How often clients may do what is logged.
pub(super) struct Flood {
    pub(super) commands: Bucket,
    pub(super) refusals: Bucket,
    /// Refusals since the last one that was logged.
    pub(super) silent: u64,
}

impl Door {
    /// Begins to serve. What a QEMU that ended left under the same name is replaced.
    ///
    /// # Errors
    /// Of the socket.
    pub(crate) fn open(settings: &Settings, vm: Vm, gate: Gate) -> io::Result<Self> {
        let path = settings.dir.join(format!("{}.sock", vm.name));
        if std::fs::symlink_metadata(&path).is_ok_and(|m| m.file_type().is_socket()) {
            std::fs::remove_file(&path)?;
        }
        let listener = UnixListener::bind(&path)?;
        let fanout = Arc::new(Fanout::default());
        vm.qmp.tap(&(Arc::clone(&fanout) as _));
        let now = Instant::now();
        let flood = Flood {
            commands: Bucket::new(COMMANDS, COMMANDS_REFILL, now),
            refusals: Bucket::new(REFUSALS, REFUSALS_REFILL, now),
            silent: 0,
        };
        let hub = Arc::new(Hub {
            vm,
            settings: settings.clone(),
            fanout,
            gate: watch::Sender::new(gate),
            ran: Notify::new(),
            in_flight: Semaphore::new(IN_FLIGHT),
            handing_over: tokio::sync::Mutex::new(()),
            flood: Mutex::new(flood),
            hands: Mutex::default(),
            schema: OnceCell::new(),
            status: Mutex::new(DoorStatus { socket: path.clone(), ..DoorStatus::default() }),
        });
        tokio::spawn(accept(listener, Arc::clone(&hub)));
        Ok(Self { hub, id: inode(&path) })
    }

    /// Says whether the VM may run.
    pub(crate) fn set_gate(&self, gate: Gate) {
        self.hub.gate.send_replace(gate);
    }

    /// Waits for the end of a command that may have changed something. Safe to cancel.
    pub(crate) async fn ran(&self) {
        self.hub.ran.notified().await;
    }

    /// What clients have taken into their own hands.
    pub(crate) fn hands(&self) -> Vec<Hands> {
        self.hub.hands().clone()
    }

    /// Says whether QEMU stands still at power-off only because it is asked something then: clients do not see that.
    pub(crate) fn hold_end(&self, holds: bool) {
        self.hub.fanout.hold_end(holds);
    }

    /// Says that the VM is stopped because QEMU is about to end.
    pub(crate) fn end_begins(&self) {
        self.hub.fanout.end_begins();
    }

    /// What is known of it.
    pub(crate) fn status(&self) -> DoorStatus {
        self.hub.status().clone()
    }
}

impl Drop for Door {
    fn drop(&mut self) {
        // Commands that wait need not wait any more; clients get the answers that there are, and then the end.
        self.set_gate(Gate::Gone);
        self.hub.fanout.closed();
        let path = self.hub.status().socket.clone();
        // A door that was opened after this one may have the name by now.
        if self.id.is_some() && inode(&path) == self.id {
            // If it stays, the next one of that name replaces it.
            let _ = std::fs::remove_file(path);
        }
    }
}

fn inode(path: &Path) -> Option<(u64, u64)> {
    std::fs::symlink_metadata(path).ok().map(|m| (m.dev(), m.ino()))
}

async fn accept(listener: UnixListener, hub: Arc<Hub>) {
    let mut clients = JoinSet::new();
    let mut number = 0;
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => {
                    number += 1;
                    let Some(outbound) = hub.fanout.enter(number, hub.settings.limits.clients) else {
                        limited!(Kind::MonitorClient, warn, vm = %hub.vm.name, "a client too many of the monitor is turned away");
                        continue;
                    };
                    hub.tell(|_| {});
                    clients.spawn(client::serve(Arc::clone(&hub), stream, number, outbound));
                }
                Err(e) => {
                    limited!(Kind::Accept, error, vm = %hub.vm.name, "a client of the monitor cannot be accepted: {e}");
                    tokio::time::sleep(ACCEPT_RETRY).await;
                }
            },
            () = hub.fanout.ended() => break,
            Some(ended) = clients.join_next() => {
                if let Err(e) = ended && e.is_panic() {
                    tracing::error!(vm = %hub.vm.name, "a client's task failed: {e}");
                }
            }
        }
    }
    // Each knows by itself when it has to end.
    clients.detach_all();
}

impl Hub {
    /// QEMU's schema, asked for once.
    pub(super) async fn schema(&self) -> Result<&Schema, QmpError> {
        let ask = async {
            let entities: Vec<super::schema::Entity> =
                self.vm.qmp.call("query-qmp-schema", serde_json::json!({})).await?;
            let schema = Schema::new(&entities);
            for pattern in &self.settings.refuse {
                if !schema.names().any(|name| crate::vm::name_fits(pattern, name)) {
                    tracing::warn!(vm = %self.vm.name, "{pattern:?} is to be refused, but this QEMU has no such command");
                }
            }
            Ok(schema)
        };
        self.schema.get_or_try_init(|| ask).await
    }

    /// Changes the status and shows it.
    pub(super) fn tell(&self, change: impl FnOnce(&mut DoorStatus)) {
        let status = {
            let mut status = self.status();
            change(&mut status);
            status.clients = self.fanout.len();
            status.clone()
        };
        self.vm.registry.update(self.vm.vm, |vm| vm.monitor = Some(status));
    }

    /// Notes what a command takes into the client's hands.
    pub(super) fn note(&self, taken: Vec<Hands>) {
        let mut hands = self.hands();
        for new in taken {
            if new == Hands::Shutdown {
                self.fanout.hold_end(false);
            }
            if hands.iter().all(|known| std::mem::discriminant(known) != std::mem::discriminant(&new)) {
                hands.push(new);
            }
        }
    }

    fn hands(&self) -> MutexGuard<'_, Vec<Hands>> {
        // As below.
        self.hands.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn flood(&self) -> MutexGuard<'_, Flood> {
        // Numbers, each of which is right by itself.
        self.flood.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn status(&self) -> MutexGuard<'_, DoorStatus> {
        // As above.
        self.status.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
