//! One session: a QEMU process from when its monitor answers until it has ended and its stop is logged.

use std::{
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use onequote_evidence::{
    event::{ConfigChange, Depth, GapReason, Image, LogGap, StopCause, VmPause, VmRef, VmReset, VmResume, VmStop},
    id::VmId,
};
use qapi::qmp::Event as Known;
use tokio::{
    sync::mpsc,
    time::{MissedTickBehavior, interval, timeout},
};

use super::{
    change::{self, LeafChanges},
    facts::{Facts, run_state},
    manager::Env,
    outbox::Outbox,
    registry::{LiveVm, Met, NoticeKind, Stage},
    start::Occasion,
};
use crate::{
    measure::{Kept, Leaf, MeasureError, Process, VmMeter},
    qmp::{self, Events, Qmp, QmpError},
    rate::Bucket,
};

/// Events that wait to be logged. With more, QEMU's events are left waiting.
const MAX_PENDING: usize = 1024;

/// Resets of one session that are logged as fast as they come. Firmware makes two or three of one of the guest's; the
/// boots that a guest may make in one session are far fewer.
const RESETS: u32 = 1024;

/// How long it takes until one more is logged.
const RESETS_REFILL: Duration = Duration::from_secs(5);

/// How long QEMU may take to tell its run state when it just changed.
const STATE_TIMEOUT: Duration = Duration::from_secs(2);

/// Events that say nothing about configuration, some of them as often as a guest likes.
const CHATTER: [&str; 5] =
    ["RTC_CHANGE", "BALLOON_CHANGE", "NIC_RX_FILTER_CHANGED", "VSERPORT_CHANGE", "BLOCK_IO_ERROR"];

pub(super) struct Session {
    pub(super) env: Arc<Env>,
    pub(super) name: String,
    pub(super) socket: PathBuf,
    pub(super) vm: VmRef,
    pub(super) process: Process,
    pub(super) qmp: Qmp,
    pub(super) events: Events,
    pub(super) facts: Facts,
    pub(super) depth: Depth,
    /// Whether the current block graph and outline are in the log.
    pub(super) measured: bool,
    /// Whether the log has the VM's creation, or will have.
    pub(super) created: bool,
    pub(super) leaves: Vec<Leaf>,
    pub(super) kept: Vec<Kept>,
    pub(super) outbox: Outbox,
    /// What is wrong with the VM, and with logging it.
    error: Option<String>,
    pub(super) log_error: Option<String>,
    cause: Option<StopCause>,
    /// Images that the log has from before a restart of the proxy, in case they cannot be measured any more.
    expected: Vec<Image>,
    recheck: bool,
    /// A guest can reset itself as often as it likes: what of that is logged.
    resets: Bucket,
    last_reset: Option<VmReset>,
    unlogged_resets: u64,
    _met: Met,
    /// Held until the log says that the VM is there, if it runs; see [`super::Manager::settled`].
    pub(super) meeting: Option<mpsc::Sender<()>>,
}

impl Session {
    /// Learns who is behind a monitor.
    pub(super) async fn meet(
        env: Arc<Env>,
        name: String,
        socket: PathBuf,
        (qmp, events): (Qmp, Events),
    ) -> Result<Self, MeasureError> {
        let gone = || std::io::Error::other("the monitor's process is not to be found");
        let pid = qmp.peer_pid().ok_or_else(|| MeasureError::of("process", gone()))?;
        let process = Process::open(pid).map_err(|e| MeasureError::of("process", e))?;
        let met = env.registry.meet(pid);
        let facts = Facts::ask(&qmp).await.map_err(|e| MeasureError::of("monitor", e))?;
        let vm = facts.uuid.unwrap_or_else(|| VmId::from_name(&env.config.host, &name));
        let vm = VmRef { vm, session: process.session(env.config.boot) };
        let outbox = Outbox::new(vm, Arc::clone(&env.sink), Arc::clone(&env.inventory));
        Ok(Self {
            env,
            name,
            socket,
            vm,
            process,
            qmp,
            events,
            facts,
            depth: Depth::Observe,
            measured: false,
            created: false,
            leaves: Vec::new(),
            kept: Vec::new(),
            outbox,
            error: None,
            log_error: None,
            cause: None,
            expected: Vec::new(),
            recheck: false,
            resets: Bucket::new(RESETS, RESETS_REFILL, Instant::now()),
            last_reset: None,
            unlogged_resets: 0,
            _met: met,
            meeting: None,
        })
    }

    /// Lives until the process has ended and that is logged.
    pub(super) async fn live(mut self) {
        let known = self.env.take_known(self.vm.session);
        self.created = known.is_some();
        let occasion = if known.is_some() { Occasion::ProxyDown } else { Occasion::First };
        self.expected = known.map(|k| k.images).unwrap_or_default();
        self.assess(occasion).await;
        let mut tick = interval(self.env.config.recheck);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        tick.reset();
        loop {
            tokio::select! {
                biased;
                event = self.events.next(), if self.outbox.len() < MAX_PENDING => match event {
                    Ok(event) => self.take_events(event).await,
                    Err(why) => if !self.find_again(&why).await {
                        break;
                    },
                },
                () = self.process.ended() => {
                    // What it said last may still be on the way; its end closes the monitor.
                    let rest = async { while let Ok(event) = self.events.next().await { self.take_event(event).await; } };
                    let _ = timeout(STATE_TIMEOUT, rest).await;
                    break;
                }
                _ = tick.tick() => {
                    if let Some(reset) = self.last_reset.take() {
                        self.reset(reset);
                    }
                    self.flush().await;
                    self.recheck = true;
                }
            }
            if self.recheck {
                self.recheck = false;
                self.compare().await;
            }
        }
        self.finish().await;
    }

    /// Takes an event and those that came with it, and logs them together.
    async fn take_events(&mut self, first: qmp::Event) {
        let mut next = Some(first);
        while let Some(event) = next {
            self.take_event(event).await;
            next = if self.outbox.len() < MAX_PENDING { self.events.waiting() } else { None };
        }
        self.flush().await;
    }

    async fn take_event(&mut self, event: qmp::Event) {
        let known = match event {
            qmp::Event::Known(known) => *known,
            qmp::Event::Other { name, .. } => {
                self.recheck |= !CHATTER.contains(&name.as_str());
                return;
            }
            qmp::Event::Missed(n) => {
                self.recheck = true;
                let detail = format!("{n} events of {} came faster than they could be logged", self.name);
                return self.log(LogGap { reason: GapReason::MonitorLost, detail });
            }
        };
        match known {
            Known::STOP { .. } => {
                let state = timeout(STATE_TIMEOUT, run_state(&self.qmp)).await;
                let run_state = state.ok().and_then(Result::ok).unwrap_or_else(|| "paused".to_owned());
                self.set_run_state(&run_state);
                self.log(VmPause { run_state });
            }
            Known::RESUME { .. } => {
                self.cause = None;
                self.set_run_state("running");
                self.log(VmResume { run_state: "running".to_owned() });
            }
            Known::RESET { data, .. } => {
                self.env.registry.update(self.vm, |s| s.resets += 1);
                self.env.registry.tell(self.vm, NoticeKind::Reset);
                let reason = serde_json::to_value(data.reason).ok();
                let reason = reason.and_then(|r| r.as_str().map(str::to_owned)).unwrap_or_default();
                self.reset(VmReset { by_guest: data.guest, reason });
            }
            Known::SHUTDOWN { data, .. } => {
                self.cause = Some(if data.guest { StopCause::GuestShutdown } else { StopCause::HostShutdown });
                self.set_run_state("shutdown");
            }
            Known::RTC_CHANGE { .. }
            | Known::BALLOON_CHANGE { .. }
            | Known::NIC_RX_FILTER_CHANGED { .. }
            | Known::VSERPORT_CHANGE { .. }
            | Known::BLOCK_IO_ERROR { .. } => {}
            _ => self.recheck = true,
        }
    }

    /// Logs a reset, or counts it when there were too many: it is then logged with the next one that is, at the latest
    /// when the configuration is compared.
    fn reset(&mut self, reset: VmReset) {
        if self.resets.take(Instant::now()) {
            let VmReset { by_guest, reason } = reset;
            let kept = u64::from(self.last_reset.take().is_some());
            let reason = match std::mem::take(&mut self.unlogged_resets) + kept {
                0 => reason,
                n => format!("{reason}, and {n} resets before that were not logged one by one"),
            };
            self.log(VmReset { by_guest, reason });
        } else {
            // The one that is kept is counted when it is replaced.
            self.unlogged_resets += u64::from(self.last_reset.replace(reset).is_some());
        }
    }

    /// The monitor ended. Whether it was found again; otherwise the process has ended.
    async fn find_again(&mut self, why: &QmpError) -> bool {
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
            let Ok((qmp, events)) = Qmp::connect(&self.socket, &self.env.config.limits).await else { continue };
            if qmp.peer_pid() != Some(self.process.pid()) {
                continue;
            }
            let Ok(facts) = Facts::ask(&qmp).await else { continue };
            (self.qmp, self.events, self.facts) = (qmp, events, facts);
            self.error = None;
            let occasion = if self.created { Occasion::MonitorLost } else { Occasion::First };
            self.assess(occasion).await;
            return true;
        }
    }

    /// Compares configuration and block graph with what the log has, and logs what is different.
    async fn compare(&mut self) {
        if !self.measured {
            return;
        }
        match self.differences().await {
            Ok(changes) => changes.into_iter().for_each(|change| self.log(change)),
            // A monitor that ended says so itself, and a VM that is about to end has no graph any more.
            Err(e) if e.is_monitor() || self.ends().await => {
                tracing::debug!(vm = %self.name, "cannot compare: {e}");
            }
            Err(e) => {
                let error = format!("a change in {} cannot be measured: {e}", self.name);
                // What cannot be measured must not look as if nothing had happened; once is enough.
                if self.error.as_ref() != Some(&error) {
                    let (what, before) = (change::UNMEASURED.to_owned(), String::new());
                    self.log(ConfigChange { what, before, after: e.to_string(), images: Vec::new() });
                }
                self.fail(error);
            }
        }
        self.flush().await;
    }

    /// Whether the process is about to end: it closes its files before.
    async fn ends(&self) -> bool {
        timeout(STATE_TIMEOUT, self.process.ended()).await.is_ok()
    }

    async fn differences(&mut self) -> Result<Vec<ConfigChange>, MeasureError> {
        let facts = Facts::ask(&self.qmp).await.map_err(|e| MeasureError::of("monitor", e))?;
        let meter = VmMeter { qmp: &self.qmp, process: &self.process, digester: &self.env.digester, hot: true };
        let leaves = meter.leaves(&self.leaves).await?;
        let mut changes = change::outline(&self.facts, &facts);
        let different = LeafChanges::between(&self.leaves, &leaves);
        if !different.is_empty() {
            let mut kept = Vec::new();
            for leaf in &different.other {
                let before = self.leaves.iter().find(|l| l.slot == leaf.slot).map(change::in_words);
                let (before, mut after) = (before.unwrap_or_default(), change::in_words(leaf));
                if before == after {
                    after += ", another file of that name";
                }
                let (what, images) = match meter.measure_leaves(std::slice::from_ref(leaf)).await {
                    Ok((images, new)) => {
                        kept.extend(new);
                        ("image", images)
                    }
                    Err(e) if e.is_monitor() || self.ends().await => return Err(e),
                    // A disk that cannot be measured is a disk nevertheless.
                    Err(e) => {
                        after += &format!(": {e}");
                        (change::UNMEASURED, Vec::new())
                    }
                };
                changes.push(ConfigChange { what: what.to_owned(), before, after, images });
            }
            for gone in &different.gone {
                let (what, before) = ("image".to_owned(), change::in_words(gone));
                changes.push(ConfigChange { what, before, after: String::new(), images: Vec::new() });
            }
            let changed = |slot: &str| different.other.iter().chain(&different.gone).any(|l| l.slot == slot);
            self.kept.retain(|k| !changed(&k.image.slot));
            self.kept.extend(kept);
            self.kept.sort_by(|a, b| a.image.slot.cmp(&b.image.slot));
        }
        let run_state = facts.run_state.clone();
        (self.facts, self.leaves) = (facts, leaves);
        self.set_run_state(&run_state);
        Ok(changes)
    }

    /// The process has ended: measures what it could write, logs its stop and leaves.
    async fn finish(mut self) {
        self.stage(Stage::Ending);
        self.env.registry.tell(self.vm, NoticeKind::Stopped);
        if self.created {
            let (mut images, mut unmeasured) = (Vec::new(), Vec::new());
            for kept in &self.kept {
                match kept.measure_again(&self.env.digester).await {
                    Ok(image) => images.push(image),
                    Err(e) => unmeasured.push(e.to_string()),
                }
            }
            let missed = self.expected.iter().filter(|i| !i.read_only && self.leaves.is_empty());
            unmeasured.extend(missed.map(|i| format!("{} ({}): QEMU ended before it was opened", i.slot, i.path)));
            let cause = self.cause.unwrap_or(StopCause::Lost);
            self.log(VmStop { cause, images, unmeasured });
            let mut tick = interval(self.env.config.retry);
            tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
            while !self.flush().await {
                tick.tick().await;
            }
            tracing::info!(vm = %self.name, %cause, "ended");
        }
        self.env.registry.leave(self.vm);
    }

    /// Logs what waits. Whether nothing waits any more.
    pub(super) async fn flush(&mut self) -> bool {
        if self.outbox.len() == 0 {
            return true;
        }
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

    fn set_run_state(&self, state: &str) {
        self.env.registry.update(self.vm, |s| state.clone_into(&mut s.run_state));
    }

    pub(super) fn status(&self, stage: Stage) -> LiveVm {
        LiveVm {
            vm: self.vm,
            name: self.name.clone(),
            pid: self.process.pid(),
            depth: self.depth,
            stage,
            logged: false,
            run_state: self.facts.run_state.clone(),
            guest_cid: self.facts.guest_cid,
            vsock: self.facts.vhost_user_vsock.then(|| self.env.config.dir.join(format!("{}.vsock", self.name))),
            resets: 0,
            error: self.error.clone(),
        }
    }
}
