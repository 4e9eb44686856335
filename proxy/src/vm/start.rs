//! The first look at a session, and each look anew after a gap: measure, log, let run.
//!
//! # What is asked when
//! Between QEMU's start with `-S` and `cont` each question costs some 0.4 ms, whether many are asked at once or not: it is QEMU's
//! own cost. So each thing is asked once, but for what must be known to be so *still*:
//!
//! - When the VM is met, all at once: who it is, what its machine loads, the outline and the block graph ([`Facts::ask`]). That is
//!   what is measured, and what later looks are held against; a block graph that changes before `cont` is found there.
//! - Then, since the arguments say how to take it: what executes it, whether it has run, and who else commands it.
//! - While it is measured: where in QEMU its memory lies, and its option ROMs.
//! - Before that is logged, its run state: the log must not say that a VM *starts* that somebody let run meanwhile.
//! - When it is in the log, block graph and run state once more: nothing else of what was measured can change while the guest
//!   waits (what QEMU has read it has read, arguments and program are the process's), and an answer before the log had it
//!   would leave open what happened while the TPM was waited for.

use std::{
    sync::PoisonError,
    time::{Duration, SystemTime},
};

use onequote_evidence::{
    event::{Depth, EventBody, GapReason, LogGap, RefuseCause, SnapshotLoad, VmAttach, VmCreate, VmRefuse, VmStart},
    id::SessionId,
};

use super::{
    commanders,
    facts::run_state,
    outbox::Ticket,
    registry::{LiveVm, NoticeKind, Stage},
    session::Session,
};
use crate::intercept::Gate;
use crate::measure::{self, Arguments, Execution, MeasureError, Measurement};

/// Why a session is looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Occasion {
    /// It is new.
    First,
    /// The log knows it from before a restart of the proxy.
    ProxyDown,
    /// Its monitor was lost and found.
    MonitorLost,
    /// It was refused, and somebody asks to look again.
    Retry,
}

/// What is known of a process before it is measured.
struct Introduced {
    /// It was started with `-S`: the proxy lets it run.
    should_wait: bool,
    /// Its guest has executed something.
    has_run: bool,
    given: Arguments,
}

impl Session {
    /// Takes the session into the registry, measures it, logs it and lets it run.
    pub(super) async fn assess(&mut self, occasion: Occasion) {
        let own = self.introduce().await;
        if matches!(occasion, Occasion::ProxyDown | Occasion::MonitorLost) {
            self.lose_track(&own.given).await;
        }
        let waits = self.facts.run_state == "prelaunch";
        let gate = waits && !own.has_run;
        let incoming = self.comes_from_elsewhere(occasion).await;
        let gated = gate || incoming == Some(true);
        self.depth = match (gated, &self.door) {
            (true, Some(_)) => Depth::Intercept,
            (true, None) => Depth::Gate,
            (false, _) => Depth::Observe,
        };
        self.measured = false;
        if gate {
            self.set_gate(Gate::Measuring);
        }
        let entered = self.enter().await;
        if let Err(other) = entered {
            self.head(occasion);
            let reason = format!(
                "{} (process {}) has the UUID {} of {} (process {}), which is there already",
                self.name,
                self.process.pid(),
                self.vm.vm,
                other.name,
                other.pid
            );
            return self.refuse(RefuseCause::Duplicate, reason, String::new()).await;
        }
        if incoming.is_some() {
            return self.await_state(gated, occasion).await;
        }
        if !gate {
            // It runs: until it is measured, the log says at least that it is there.
            self.head(occasion);
            if occasion == Occasion::First && own.should_wait && self.watched_from_its_start() {
                let how = if waits { "it ran, was stopped and reset" } else { "it runs already" };
                self.tell_continued(&format!("it was started with -S, but {how}"));
            }
            self.flush().await;
            self.set_gate(Gate::Open);
        }
        self.meeting = None;
        if gate {
            self.track(&own.given).await;
        }
        let (told, graph, program) = (self.facts.told(), self.graph.take(), self.program.take());
        let measured = tokio::select! {
            biased;
            // There is nothing left to measure or to let run; the life of the session goes on to its end.
            () = self.process.ended() => return,
            measured = async { self.meter(!gate).measure(&told, graph, program).await } => measured,
        };
        if gate {
            if !self.waits_still().await {
                return self.attach_continued(occasion).await;
            }
            self.head(occasion);
        }
        match measured {
            Ok(measurement) if gate => self.let_run(measurement).await,
            Ok(measurement) => {
                self.attach(measurement, occasion != Occasion::First).await;
            }
            Err(e) => self.refuse(e.cause(), e.to_string(), e.item).await,
        }
    }

    /// Enters the registry. Waits for an earlier session of the same VM that is ending.
    async fn enter(&mut self) -> Result<(), Box<LiveVm>> {
        loop {
            let Err(other) = self.env.registry.enter(self.status(Stage::Measuring)) else { return Ok(()) };
            let lives = measure::process::start_time(other.pid)
                .is_ok_and(|start| SessionId::of_process(self.env.config.boot, other.pid, start) == other.vm.session);
            if lives && other.stage != Stage::Ending {
                let _ = self.env.registry.enter(self.status(Stage::Refused));
                return Err(other);
            }
            // That may take long.
            self.graph = None;
            tokio::select! {
                () = self.env.registry.gone(other.vm) => {}
                // Whoever ends while waiting has nothing to be logged; the next call of anything finds that out.
                () = self.process.ended() => {
                    let _ = self.env.registry.enter(self.status(Stage::Refused));
                    return Ok(());
                }
            }
        }
    }

    /// What is logged before the outcome.
    pub(super) fn head(&mut self, occasion: Occasion) {
        let depth = *self.logged_depth.get_or_insert(self.depth);
        // Where tools could go round the proxy from now on, the log must not look as if they had not.
        let open = if depth == Depth::Intercept && self.door.is_none() {
            "; its monitor is not served to tools any more, and what they command is not in the log"
        } else {
            ""
        };
        match occasion {
            Occasion::First => self.log(VmCreate {
                name: self.name.clone(),
                pid: self.process.pid(),
                depth: self.depth,
                uuid_given: self.facts.uuid.is_some(),
                qemu: self.qmp.version(),
                machine: self.facts.machine.machine.clone(),
                memory: self.facts.memory,
                cpus: self.facts.cpus,
                accelerator: self.facts.accelerator.clone(),
                guest_cid: self.facts.guest_cid,
                devices: self.facts.devices.clone(),
                monitors: self.monitors.clone(),
            }),
            Occasion::ProxyDown => self.log(LogGap {
                reason: GapReason::ProxyDown,
                detail: format!("{} was there while the proxy was not; it is measured again{open}", self.name),
            }),
            Occasion::MonitorLost | Occasion::Retry => {}
        }
        self.created = true;
    }

    /// Measures it once more, while it may run.
    async fn measure_running(&self) -> Result<Measurement, MeasureError> {
        self.meter(true).measure(&self.facts.told(), None, None).await
    }

    async fn let_run(&mut self, measurement: Measurement) {
        let (env, name) = (std::sync::Arc::clone(&self.env), self.name.clone());
        if let Some(Err(mismatch)) = env.references.as_ref().map(|r| r.check(&name, &measurement)) {
            self.keep(&measurement);
            return self.refuse(RefuseCause::Reference, mismatch.to_string(), mismatch.item).await;
        }
        self.keep(&measurement);
        let tag = self.argument_after("-loadvm");
        let writable = measurement.images.iter().filter(|image| !image.read_only).cloned().collect();
        let start = self.put(VmStart { components: measurement.components, images: measurement.images });
        let load = (!tag.is_empty()).then(|| self.put(SnapshotLoad { tag, images: writable }));
        if !self.flush().await {
            // What is not in the log has not happened: neither later may it say that the VM started.
            [Some(start), load].into_iter().flatten().for_each(|ticket| self.outbox.withdraw(ticket));
            let reason = self.log_error.clone().unwrap_or_default();
            return self.refuse(RefuseCause::Log, reason, String::new()).await;
        }
        self.release().await;
    }

    /// Lets a VM run that is measured and logged, if it is still what it was then.
    pub(super) async fn release(&mut self) {
        // Another monitor may have changed it since it was measured.
        let (leaves, waits) = tokio::join!(async { self.meter(false).leaves(&[]).await }, self.waits_still());
        match leaves {
            Ok(leaves) if leaves == self.leaves => {}
            Ok(_) => {
                let reason = "its images changed since they were measured".to_owned();
                return self.refuse(RefuseCause::Changed, reason, String::new()).await;
            }
            Err(e) => return self.refuse(RefuseCause::Changed, e.to_string(), e.item).await,
        }
        if self.facts.run_state == "prelaunch" && !waits {
            self.tell_continued("it was let run after it had been measured, but not by the proxy");
            match self.measure_running().await {
                Ok(measurement) => {
                    if self.attach(measurement, false).await {
                        self.set_gate(Gate::Open);
                    }
                }
                Err(e) => self.refuse(e.cause(), e.to_string(), e.item).await,
            }
            return;
        }
        self.measured = true;
        self.stage(Stage::Watched);
        self.env.registry.tell(self.vm, NoticeKind::Started);
        // Whatever another monitor did since the last look, or does before QEMU takes this command, is looked for at once.
        self.recheck = true;
        self.set_gate(Gate::Open);
        match self.qmp.execute(qapi::qmp::cont {}).await {
            Ok(_) => tracing::info!(vm = %self.name, "measured, logged and let run"),
            Err(e) => self.fail(format!("{} is measured and logged, but does not run: {e}", self.name)),
        }
    }

    /// Logs a VM that was not measured before it ran. Whether it fits the local references.
    pub(super) async fn attach(&mut self, measurement: Measurement, again: bool) -> bool {
        let env = std::sync::Arc::clone(&self.env);
        let mismatch = env.references.as_ref().and_then(|r| r.check(&self.name, &measurement).err());
        self.keep(&measurement);
        self.measured = true;
        // As the log has it, which takes a VM that is attached for running. The next look sees what it really does.
        let logged = if self.depth == Depth::Observe { "running" } else { "prelaunch" };
        self.life.run_state.get_or_insert_with(|| logged.to_owned());
        self.log(VmAttach { components: measurement.components, images: measurement.images, again });
        self.stage(Stage::Watched);
        let fits = mismatch.is_none();
        match mismatch {
            Some(mismatch) => {
                let reason = format!("it was running already, but should not: {mismatch}");
                self.refuse(RefuseCause::Reference, reason, mismatch.item).await;
            }
            None => {
                self.flush().await;
                // One that still stands still is let run by whoever called this.
                if self.depth == Depth::Observe {
                    self.set_gate(Gate::Open);
                }
                tracing::info!(vm = %self.name, again, "measured while it runs");
            }
        }
        self.env.registry.tell(self.vm, NoticeKind::Started);
        fits
    }

    /// What can be known of the process without measuring it.
    async fn introduce(&mut self) -> Introduced {
        let meter = self.meter(true);
        // What cannot be read is an error when it is measured.
        let given = meter.given().await.unwrap_or_default();
        let dir = self.process.working_dir().unwrap_or_default();
        let qmp = &self.qmp;
        let asked = tokio::join!(Execution::ask(qmp, &given), commanders::ask(qmp, &given, &self.socket, &dir));
        let (execution, monitors) = asked;
        let execution = execution.unwrap_or(Execution { accelerator: "unknown".to_owned(), has_run: None });
        self.facts.accelerator = execution.accelerator;
        self.monitors = monitors.unwrap_or_else(|e| vec![format!("unknown: {e}")]);
        let has_run =
            execution.has_run == Some(true) && !(given.names.contains("loadvm") && self.processors_rested().await);
        Introduced { should_wait: given.names.contains("S"), has_run, given }
    }

    /// Whether the log that is written now was written when the process started: then nobody else than the proxy was to
    /// let it run. A VM that was let run in an older log is there without a trace in this one.
    fn watched_from_its_start(&self) -> bool {
        let since = self.env.inventory.read().unwrap_or_else(PoisonError::into_inner).since();
        let since = SystemTime::UNIX_EPOCH + Duration::from_millis(since.map_or(0, |time| time.0));
        self.process.started().is_ok_and(|started| started > since)
    }

    /// Whether it is still in `prelaunch`. A guest that ran leaves that state, and does not come back to it without a
    /// reset.
    async fn waits_still(&self) -> bool {
        // What is wrong with a monitor that does not answer shows in the next command.
        run_state(&self.qmp).await.map_or(true, |state| state == "prelaunch")
    }

    /// Logs that somebody else let it run.
    fn tell_continued(&mut self, how: &str) {
        let reason = format!("{how}: somebody else let it run");
        self.fail(format!("{}: {reason}", self.name));
        self.log(VmRefuse { reason, item: String::new(), cause: RefuseCause::Continued });
    }

    /// Somebody let it run while it was measured: what was measured is worth no more than of one that ran before.
    async fn attach_continued(&mut self, occasion: Occasion) {
        self.depth = Depth::Observe;
        self.head(occasion);
        self.tell_continued("it was let run while it was measured");
        self.flush().await;
        match self.measure_running().await {
            Ok(measurement) => {
                self.attach(measurement, occasion != Occasion::First).await;
            }
            Err(e) => self.refuse(e.cause(), e.to_string(), e.item).await,
        }
    }

    /// Logs that the VM is not let run, and leaves it as it is.
    pub(super) async fn refuse(&mut self, cause: RefuseCause, reason: String, item: String) {
        self.fail(format!("{} is not let run: {reason}", self.name));
        self.stage(Stage::Refused);
        let closed = format!("{} is not let run: {reason}", self.name);
        self.log(VmRefuse { reason, item, cause });
        self.flush().await;
        // One that runs already is not held up.
        self.set_gate(if self.depth == Depth::Observe { Gate::Open } else { Gate::Closed(closed) });
    }

    fn keep(&mut self, measurement: &Measurement) {
        self.kept.clone_from(&measurement.kept);
        self.leaves.clone_from(&measurement.leaves);
        self.images.clone_from(&measurement.images);
        self.writers.clear();
        self.note_writers();
    }

    /// Adds an event to those that wait to be logged.
    pub(super) fn log(&mut self, body: impl Into<EventBody>) {
        self.put(body);
    }

    fn put(&mut self, body: impl Into<EventBody>) -> Ticket {
        let (time, vm) = ((self.env.clock)(), Some(self.vm));
        self.outbox.push(onequote_evidence::event::Event { time, vm, body: body.into() })
    }
}
