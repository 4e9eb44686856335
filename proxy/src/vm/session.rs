//! One session: a QEMU process from when its monitor answers until it has ended and its stop is logged.

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use onequote_evidence::{
    event::{Depth, GapReason, Image, LogGap, StopCause, VmRef, VmReset, VmStop},
    id::{TimeMs, VmId},
};
use tokio::{
    sync::{mpsc, oneshot},
    time::{MissedTickBehavior, interval, sleep_until, timeout},
};

use super::{
    changed::{Tracker, Writer},
    control::Retry,
    facts::Facts,
    intercepted,
    life::{Life, next_event},
    manager::Env,
    migrate::tell_of_migrations,
    outbox::Outbox,
    registry::{LiveVm, Met, NoticeKind, Stage},
    start::Occasion,
};
use crate::{
    intercept::Door,
    measure::{BlockGraph, Kept, Leaf, MeasureError, Process, Program},
    qmp::{Events, Qmp, QmpError},
    rate::Bucket,
};

/// Events that wait to be logged. With more, QEMU's events are left waiting.
pub(super) const MAX_PENDING: usize = 1024;

/// Resets of one session that are logged as fast as they come. Firmware makes two or three of one of the guest's; the
/// boots that a guest may make in one session are far fewer.
const RESETS: u32 = 1024;

/// How long it takes until one more is logged.
const RESETS_REFILL: Duration = Duration::from_secs(5);

/// How long a process that has ended is listened to, should somebody else hold its end of the monitor.
const LAST_WORDS: Duration = Duration::from_secs(30);

pub(super) struct Session {
    pub(super) env: Arc<Env>,
    pub(super) name: String,
    pub(super) socket: PathBuf,
    pub(super) vm: VmRef,
    pub(super) process: Process,
    pub(super) qmp: Qmp,
    pub(super) events: Events,
    pub(super) facts: Facts,
    /// The block graph as it belongs to `facts`, until it was measured.
    pub(super) graph: Option<BlockGraph>,
    /// The digest of its program, until it was measured.
    pub(super) program: Option<Program>,
    /// How far it is in the proxy's hand now: whether it is let run by it.
    pub(super) depth: Depth,
    /// How it was watched when the log first had it, which stays true: what was missed later is a gap in the log.
    pub(super) logged_depth: Option<Depth>,
    /// Other ways to command it, as they were when it was met.
    pub(super) monitors: Vec<String>,
    /// Whether the current block graph and outline are in the log.
    pub(super) measured: bool,
    /// Whether the log has the VM's creation, or will have.
    pub(super) created: bool,
    pub(super) leaves: Vec<Leaf>,
    pub(super) kept: Vec<Kept>,
    /// Every image as it was last measured.
    pub(super) images: Vec<Image>,
    pub(super) outbox: Outbox,
    /// Where management tools give their commands, if the VM is intercepted.
    pub(super) door: Option<Door>,
    /// What is wrong with the VM, and with logging it.
    pub(super) error: Option<String>,
    pub(super) log_error: Option<String>,
    pub(super) cause: Option<StopCause>,
    /// Images that the log has from before a restart of the proxy, in case they cannot be measured any more.
    expected: Vec<Image>,
    /// Something happened after which to look.
    pub(super) recheck: bool,
    /// When to look although nothing happened.
    pub(super) look_at: Instant,
    pub(super) life: Life,
    /// A guest can reset itself as often as it likes: what of that is logged.
    pub(super) resets: Bucket,
    pub(super) last_reset: Option<VmReset>,
    pub(super) unlogged_resets: u64,
    _met: Met,
    /// What QEMU is to tell at its end, if it is.
    pub(super) tracker: Option<Tracker>,
    /// The files that QEMU writes, by slot.
    pub(super) writers: BTreeMap<String, Arc<Writer>>,
    /// Who is about to end QEMU, and where that is said.
    ends: mpsc::Receiver<oneshot::Sender<()>>,
    pub(super) quits: mpsc::Sender<oneshot::Sender<()>>,
    /// Retries that people ask for, and where they ask.
    retries: mpsc::Receiver<Retry>,
    pub(super) asks: mpsc::Sender<Retry>,
    /// Held until the log says that the VM is there, if it runs; see [`super::Manager::settled`].
    pub(super) meeting: Option<mpsc::Sender<()>>,
}

impl Session {
    /// Learns who is behind a monitor.
    pub(super) async fn meet(
        env: &Arc<Env>,
        name: String,
        socket: PathBuf,
        (qmp, events): (Qmp, Events),
        program: Option<Program>,
    ) -> Result<Self, MeasureError> {
        let env = Arc::clone(env);
        let gone = || std::io::Error::other("the monitor's process is not to be found");
        let pid = qmp.peer_pid().ok_or_else(|| MeasureError::of("process", gone()))?;
        let process = Process::open(pid).map_err(|e| MeasureError::of("process", e))?;
        let program = program.unwrap_or_else(|| Program::begin(&process, &env.digester));
        let met = env.registry.meet(pid);
        let ((), facts) = tokio::join!(tell_of_migrations(&qmp), Facts::ask(&qmp));
        let (facts, graph) = facts.map_err(|e| MeasureError::of("monitor", e))?;
        let vm = facts.uuid.unwrap_or_else(|| VmId::from_name(&env.config.host, &name));
        let vm = VmRef { vm, session: process.session(env.config.boot) };
        let (asks, retries) = mpsc::channel(1);
        let (quits, ends) = mpsc::channel(1);
        let outbox = Outbox::new(vm, Arc::clone(&env.sink), Arc::clone(&env.inventory));
        let now = Instant::now();
        let look_at = env.pace.next(now);
        Ok(Self {
            env,
            name,
            socket,
            vm,
            process,
            qmp,
            events,
            facts,
            graph: Some(graph),
            program: Some(program),
            depth: Depth::Observe,
            logged_depth: None,
            monitors: Vec::new(),
            measured: false,
            created: false,
            leaves: Vec::new(),
            kept: Vec::new(),
            images: Vec::new(),
            outbox,
            door: None,
            error: None,
            log_error: None,
            cause: None,
            expected: Vec::new(),
            recheck: false,
            look_at,
            life: Life::new(now),
            resets: Bucket::new(RESETS, RESETS_REFILL, now),
            last_reset: None,
            unlogged_resets: 0,
            tracker: None,
            writers: BTreeMap::new(),
            ends,
            quits,
            _met: met,
            retries,
            asks,
            meeting: None,
        })
    }

    /// Lives until the process has ended and that is logged.
    pub(super) async fn live(mut self) {
        let known = self.env.take_known(self.vm.session);
        self.offer_control();
        self.created = known.is_some();
        let occasion = if known.is_some() { Occasion::ProxyDown } else { Occasion::First };
        self.life.run_state = known.as_ref().map(|k| k.run_state.clone());
        self.logged_depth = known.as_ref().map(|k| k.depth);
        self.expected = known.map(|k| k.images).unwrap_or_default();
        self.open_door();
        self.assess(occasion).await;
        let mut tick = interval(self.env.config.recheck);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        tick.reset();
        loop {
            if std::mem::take(&mut self.life.to_end) {
                self.end_after_power_off().await;
            }
            tokio::select! {
                biased;
                event = next_event(&mut self.life, &mut self.events), if self.outbox.len() < MAX_PENDING => match event {
                    Ok(event) => self.take_events(event).await,
                    Err(why) => if !self.find_again(&why).await {
                        break;
                    },
                },
                () = intercepted::ran(self.door.as_ref()) => self.recheck = true,
                () = self.process.ended() => {
                    // What it said last may still be on the way; its end closes the monitor.
                    let rest = async { while let Ok(event) = self.events.next().await { self.take_event(event).await; } };
                    if timeout(LAST_WORDS, rest).await.is_err() {
                        tracing::warn!(vm = %self.name, "QEMU is gone, and its monitor did not close: its last events may be missing");
                    }
                    break;
                }
                Some(answer) = self.retries.recv() => self.retry(answer).await,
                Some(done) = self.ends.recv() => {
                    self.conclude().await;
                    // Who asked may have given up.
                    let _ = done.send(());
                }
                _ = tick.tick() => {
                    if let Some(reset) = self.last_reset.take() {
                        self.reset(reset);
                    }
                    self.flush().await;
                }
                () = sleep_until(self.look_at.into()) => {}
            }
            if !self.life.off {
                self.look().await;
            }
        }
        self.finish().await;
    }

    /// The monitor ended. Whether it was found again; otherwise the process has ended.
    async fn find_again(&mut self, why: &QmpError) -> bool {
        self.door = None;
        if timeout(self.env.config.exit_grace, self.process.ended()).await.is_ok() {
            return false;
        }
        if self.created {
            let detail = format!("{}: {why}; it is measured again when its monitor is back", self.name);
            self.log(LogGap { reason: GapReason::MonitorLost, detail });
        }
        self.fail(format!("the monitor of {} is lost: {why}", self.name));
        self.stage(Stage::MonitorLost);
        self.flush().await;
        let mut tick = interval(self.env.config.retry);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = self.process.ended() => return false,
                _ = tick.tick() => {}
            }
            self.flush().await;
            let Ok((qmp, events)) = Qmp::connect(&self.socket, &self.env.limits(&self.name)).await else { continue };
            if qmp.peer_pid() != Some(self.process.pid()) {
                continue;
            }
            tell_of_migrations(&qmp).await;
            let Ok((facts, graph)) = Facts::ask(&qmp).await else { continue };
            (self.qmp, self.events, self.facts, self.graph) = (qmp, events, facts, Some(graph));
            self.error = None;
            self.offer_control();
            self.open_door();
            let occasion = if self.created { Occasion::MonitorLost } else { Occasion::First };
            self.assess(occasion).await;
            return true;
        }
    }

    /// The process has ended: measures what it could write, logs its stop and leaves.
    async fn finish(mut self) {
        self.door = None;
        self.stage(Stage::Ending);
        self.env.registry.tell(self.vm, NoticeKind::Stopped);
        if self.created {
            let (images, read, mut unmeasured) = self.measure_left().await;
            let missed = self.expected.iter().filter(|i| !i.read_only && self.leaves.is_empty());
            unmeasured.extend(missed.map(|i| format!("{} ({}): QEMU ended before it was opened", i.slot, i.path)));
            let cause = self.cause.unwrap_or(StopCause::Lost);
            self.log(VmStop { cause, images, unmeasured, read });
            let mut tick = interval(self.env.config.retry);
            tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
            while !self.flush().await {
                tick.tick().await;
            }
            tracing::info!(vm = %self.name, %cause, "ended");
        }
        self.env.registry.leave(self.vm);
    }

    /// Every image that QEMU can write as it is now, and what cannot be measured.
    pub(super) async fn measure_kept(&self) -> (Vec<Image>, Vec<String>) {
        let (mut images, mut unmeasured) = (Vec::new(), Vec::new());
        for kept in &self.kept {
            match kept.measure_again(&self.env.digester).await {
                Ok(image) => images.push(image),
                Err(e) => unmeasured.push(e.to_string()),
            }
        }
        (images, unmeasured)
    }

    /// Logs what waits. Whether nothing waits any more.
    pub(super) async fn flush(&mut self) -> bool {
        match self.outbox.flush().await {
            Ok(()) => {
                self.log_error = None;
                let created = self.created;
                self.env.registry.update(self.vm, |s| s.logged |= created);
            }
            Err(e) => {
                tracing::error!(vm = %self.name, "{e}");
                self.log_error = Some(e.to_string());
            }
        }
        self.show_error();
        self.outbox.len() == 0
    }

    /// Shows an error at the VM.
    pub(super) fn fail(&mut self, error: String) {
        if self.error.as_ref() != Some(&error) {
            tracing::error!(vm = %self.name, "{error}");
        }
        self.error = Some(error);
        self.show_error();
    }

    fn show_error(&self) {
        let error = self.error.clone().or_else(|| self.log_error.clone());
        self.env.registry.update(self.vm, |s| s.error = error);
    }

    pub(super) fn stage(&self, stage: Stage) {
        self.env.registry.update(self.vm, |s| s.stage = stage);
    }

    pub(super) fn set_run_state(&self, state: &str) {
        self.env.registry.update(self.vm, |s| state.clone_into(&mut s.run_state));
    }

    pub(super) fn status(&self, stage: Stage) -> LiveVm {
        LiveVm {
            vm: self.vm,
            name: self.name.clone(),
            pid: self.process.pid(),
            since: self.process.started().ok().map(time_ms),
            depth: self.logged_depth.unwrap_or(self.depth),
            stage,
            logged: false,
            run_state: self.facts.run_state.clone(),
            guest_cid: self.facts.guest_cid,
            vsock: self.facts.vhost_user_vsock.then(|| self.env.config.dir.join(format!("{}.vsock", self.name))),
            resets: 0,
            monitor: self.door.as_ref().map(Door::status),
            error: self.error.clone(),
        }
    }
}

fn time_ms(time: SystemTime) -> TimeMs {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    TimeMs(u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
}
