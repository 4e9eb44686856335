//! A VM's state that comes from elsewhere, or goes there.
//!
//! # In
//! A QEMU with `-incoming` waits in `inmigrate`. What it will run was started elsewhere: files that its arguments name
//! are not what its guest booted from, and its images may still be written by the QEMU that it comes from. So it is not
//! measured while it waits. Creation and `migrate-in` *started* are logged; when the state is there, `migrate-in`
//! *completed*, and everything is measured and logged as an attachment, never as a start.
//! - With `-S` QEMU then stands still (**gate**): it is let run only after measuring, comparing with the local references
//!   and logging have succeeded, as a VM that starts.
//! - Without, it runs on at once when it ran before (**observe**).
//!
//! # Out
//! QEMU tells of a migration by the event `MIGRATION`, if the capability `events` is set, which is done when its monitor
//! is connected. Saving a snapshot uses the same machinery and the same event, but never becomes `active`; so what
//! is completed without having been active was a snapshot. Where the event is missing the run state `postmigrate` tells
//! of the end.

use onequote_evidence::event::{MigrateIn, MigrateOut, MigrationStatus, RefuseCause};
use serde::Deserialize;
use serde_json::json;

use super::{
    facts::run_state,
    life::{Incoming, Out},
    session::Session,
    start::Occasion,
};
use crate::{intercept::Gate, measure::process::thread_ticks, qmp::Qmp};

/// QEMU's run state while it waits for a VM's state.
pub(super) const WAITING: &str = "inmigrate";

/// Asks QEMU to tell of migrations. Other capabilities stay as they are.
pub(super) async fn tell_of_migrations(qmp: &Qmp) {
    let events = json!({"capabilities": [{"capability": "events", "state": true}]});
    if let Err(e) = qmp.call::<serde_json::Value>("migrate-set-capabilities", events).await {
        // Refused while a migration runs; run states tell of its end.
        tracing::debug!("no migration events: {e}");
    }
}

impl Session {
    /// Whether the VM waits for its state, or had it before it was met; and if so, whether it is the proxy's to let it
    /// run. A VM whose state came before it was met stands still, and nobody knows since when: it is let run only if
    /// its processors have done nothing yet. One that somebody paused later is left alone.
    pub(super) async fn comes_from_elsewhere(&self, occasion: Occasion) -> Option<bool> {
        let held = self.has_option("-S");
        match self.facts.run_state.as_str() {
            WAITING => Some(held),
            "prelaunch" => None,
            // It was refused, and is looked at again.
            "paused" if self.life.held => Some(true),
            _ if occasion != Occasion::First || !self.has_option("-incoming") => None,
            state => Some(held && state == "paused" && self.processors_rested().await),
        }
    }

    /// Whether the threads of the VM's processors have used no time to speak of. What TCG tells of its translations does not
    /// serve here: it throws them away when it takes a state over.
    pub(super) async fn processors_rested(&self) -> bool {
        #[derive(Deserialize)]
        struct Cpu {
            #[serde(rename = "thread-id")]
            thread: u32,
        }
        let Ok(cpus) = self.qmp.call::<Vec<Cpu>>("query-cpus-fast", json!({})).await else { return false };
        cpus.iter().all(|cpu| thread_ticks(self.process.pid(), cpu.thread).is_ok_and(|ticks| ticks <= 1))
    }

    /// Logs that a VM waits for its state. Life goes on in [`Self::arrive`].
    pub(super) async fn await_state(&mut self, gated: bool, occasion: Occasion) {
        self.head(occasion);
        let source = self.argument_after("-incoming");
        if occasion == Occasion::First {
            self.log(MigrateIn { status: MigrationStatus::Started, source: source.clone() });
        }
        self.life.incoming = Some(Incoming { gated, source, arrived: self.life.held });
        self.flush().await;
        // Tools must be able to say where the state comes from, but not to let it run.
        let closed = || Gate::Closed(format!("{} waits for its state, which is then measured", self.name));
        self.set_gate(if gated { closed() } else { Gate::Open });
        self.meeting = None;
        if self.facts.run_state != WAITING {
            // What QEMU told of the arrival came before it told its run state.
            self.forget_migration_events();
            self.arrive_in_order().await;
        }
    }

    /// Looks whether the state that was waited for is there, in case no event told.
    pub(super) async fn look_for_arrival(&mut self) {
        if run_state(&self.qmp).await.is_ok_and(|state| state != WAITING) {
            self.arrive_in_order().await;
        }
    }

    /// As [`Self::arrive`], after what QEMU told before it told its run state.
    async fn arrive_in_order(&mut self) {
        while let Some(event) = self.waiting_event() {
            self.take_event(event).await;
        }
        self.arrive().await;
    }

    /// Logs that the state that was waited for is there, once.
    pub(super) fn arrived(&mut self) {
        if let Some(incoming) = self.life.incoming.as_mut().filter(|incoming| !incoming.arrived) {
            incoming.arrived = true;
            let source = incoming.source.clone();
            self.log(MigrateIn { status: MigrationStatus::Completed, source });
        }
    }

    /// The state that was waited for is there: measures the VM, logs it, and lets it run if that is the proxy's to do.
    pub(super) async fn arrive(&mut self) {
        self.arrived();
        let Some(Incoming { gated, .. }) = self.life.incoming.take() else { return };
        self.flush().await;
        let state = run_state(&self.qmp).await.unwrap_or_else(|_| "running".to_owned());
        let runs = state == "running";
        self.set_run_state(&state);
        self.life.held = gated;
        if gated {
            self.set_gate(Gate::Measuring);
        }
        // What it said when it was met is true still, but for the block graph.
        let (told, program) = (self.facts.told(), self.program.take());
        self.graph = None;
        let measured = tokio::select! {
            biased;
            () = self.process.ended() => return,
            measured = async { self.meter(runs).measure_arrived(&told, program).await } => measured,
        };
        match measured {
            Err(e) => self.refuse(e.cause(), e.to_string(), e.item).await,
            Ok(measurement) => {
                let fits = self.attach(measurement, false).await;
                if !gated || !fits {
                    return;
                }
                if runs {
                    let reason = "it was let run by somebody else before it was measured".to_owned();
                    return self.refuse(RefuseCause::Continued, reason, String::new()).await;
                }
                if !self.flush().await {
                    let reason = self.log_error.clone().unwrap_or_default();
                    return self.refuse(RefuseCause::Log, reason, String::new()).await;
                }
                self.release().await;
            }
        }
    }

    /// Takes in a migration's state (QEMU `qapi/migration.json`, `MigrationStatus`).
    pub(super) async fn migration(&mut self, status: &str) {
        if let Some(incoming) = &self.life.incoming {
            match status {
                "completed" => self.arrive().await,
                "failed" => {
                    let source = incoming.source.clone();
                    self.log(MigrateIn { status: MigrationStatus::Failed, source });
                }
                _ => {}
            }
            return;
        }
        match (status, self.life.out) {
            ("setup", _) => self.life.out = Out::Setup,
            ("active" | "device" | "pre-switchover" | "postcopy-active", Out::No | Out::Setup) => {
                self.life.out = Out::Active;
                self.migrate_out(MigrationStatus::Started);
            }
            ("completed", Out::Setup) => {
                self.life.out = Out::No;
                self.life.saved = true;
            }
            ("completed", Out::Active) => self.migrated().await,
            ("failed", Out::Setup | Out::Active) => {
                self.life.out = Out::No;
                self.migrate_out(MigrationStatus::Failed);
            }
            ("cancelled", Out::Setup | Out::Active) => {
                self.life.out = Out::No;
                self.migrate_out(MigrationStatus::Cancelled);
            }
            _ => {}
        }
        self.recheck = true;
    }

    /// All state has gone over: logs the images as this QEMU left them.
    pub(super) async fn migrated(&mut self) {
        self.life.out = Out::Done;
        let (images, unmeasured) = self.measure_kept().await;
        let target = String::new();
        self.log(MigrateOut { status: MigrationStatus::Completed, target, images, unmeasured });
    }

    /// QEMU does not tell where to.
    fn migrate_out(&mut self, status: MigrationStatus) {
        self.log(MigrateOut { status, target: String::new(), images: Vec::new(), unmeasured: Vec::new() });
    }

    /// The argument behind an option of QEMU's command line; empty when there is none.
    pub(super) fn argument_after(&self, option: &str) -> String {
        let arguments = self.process.arguments().unwrap_or_default();
        let mut rest = arguments.iter().skip_while(|argument| !is_option(argument, option));
        rest.nth(1).map(|value| value.to_string_lossy().into_owned()).unwrap_or_default()
    }

    /// Whether QEMU was given this option.
    pub(super) fn has_option(&self, option: &str) -> bool {
        self.process.arguments().unwrap_or_default().iter().any(|argument| is_option(argument, option))
    }
}

/// QEMU takes options with one hyphen and with two.
fn is_option(argument: &std::ffi::OsStr, option: &str) -> bool {
    argument == option || argument.to_str().and_then(|a| a.strip_prefix('-')) == Some(option)
}
