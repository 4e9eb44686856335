//! What QEMU tells of a VM's life, as it comes to the log.
//!
//! Some of it a guest can cause as often as it likes: resets, panics that QEMU is told to pass over, suspends, trays. All of
//! that has a bound for each session, beyond which it is counted and told in sum.

use std::{
    collections::{BTreeMap, VecDeque},
    time::{Duration, Instant, SystemTime},
};

use onequote_evidence::event::{CrashCause, GapReason, LogGap, StopCause, VmCrash, VmPause, VmReset, VmResume};
use qapi::qmp::Event as Known;
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::{
    facts::run_state,
    registry::NoticeKind,
    session::{MAX_PENDING, Session},
};
use crate::{measure::Stamp, qmp, rate::Bucket};

/// Events that say nothing about configuration, some of them as often as a guest likes.
const CHATTER: [&str; 5] =
    ["RTC_CHANGE", "BALLOON_CHANGE", "NIC_RX_FILTER_CHANGED", "VSERPORT_CHANGE", "BLOCK_IO_ERROR"];

/// Panics, suspends and the like of one guest that are logged as fast as they come.
const TAME: u32 = 256;

/// Looks after events that come as fast as events do. With more, the timer looks.
const LOOKS: u32 = 64;

/// How long it takes until one more of either is allowed.
const REFILL: Duration = Duration::from_secs(5);

/// QEMU's run state while the last of a VM's state goes elsewhere.
const FINISHING: &str = "finish-migrate";

/// How long ago a file was last written for the next write to show; far longer than a tick of any clock.
const SETTLED: Duration = Duration::from_secs(2);

/// Jobs of one QEMU that are told apart.
const MAX_JOBS: usize = 64;

/// What is known of a session between two events.
pub(super) struct Life {
    /// The run state as the log has it, once it has one.
    pub(super) run_state: Option<String>,
    /// A guest can panic, suspend and wake up as often as it likes: what of that is logged.
    tame: Bucket,
    untold: u64,
    /// Looks after events.
    pub(super) looks: Bucket,
    /// Events that were taken from the monitor and are not treated yet.
    ahead: VecDeque<qmp::Event>,
    /// Types of jobs by id, as far as they are about snapshots, and whether they have ended.
    jobs: BTreeMap<String, Job>,
    /// The VM's state is waited for.
    pub(super) incoming: Option<Incoming>,
    /// The VM's state came, and it stands still because the proxy has not let it run.
    pub(super) held: bool,
    /// The VM's state goes elsewhere.
    pub(super) out: Out,
    /// The VM's state was saved, and the snapshot is still to be found.
    pub(super) saved: bool,
    /// The VM is stopped for its end: nothing is compared any more.
    pub(super) off: bool,
    /// It powered off and stands still, and QEMU is the proxy's to end.
    pub(super) to_end: bool,
    /// The VM may have been put back to a snapshot, and that is not logged yet.
    pub(super) loaded: bool,
    /// How the images that hold a VM's state were at the last look, if they had not just been written.
    resting: Option<Vec<Stamp>>,
}

/// A VM's state that is waited for.
#[derive(Debug, Clone)]
pub(super) struct Incoming {
    /// Whether the proxy decides whether it runs then.
    pub(super) gated: bool,
    /// Where it comes from, as far as the command line tells.
    pub(super) source: String,
    /// Whether it is there, and that is logged.
    pub(super) arrived: bool,
}

/// How far a migration to elsewhere is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Out {
    No,
    Setup,
    Active,
    Done,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Job {
    Loads,
    HasLoaded,
    Other,
}

impl Life {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            run_state: None,
            tame: Bucket::new(TAME, REFILL, now),
            untold: 0,
            looks: Bucket::new(LOOKS, REFILL, now),
            ahead: VecDeque::new(),
            jobs: BTreeMap::new(),
            incoming: None,
            held: false,
            out: Out::No,
            saved: false,
            off: false,
            to_end: false,
            loaded: false,
            resting: None,
        }
    }

    /// Whether a snapshot is being loaded: its end is still to be told.
    pub(super) fn loading(&self) -> bool {
        self.jobs.values().any(|job| *job == Job::Loads)
    }
}

/// The next event. Safe to cancel.
pub(super) async fn next_event(life: &mut Life, events: &mut qmp::Events) -> Result<qmp::Event, qmp::QmpError> {
    match life.ahead.pop_front() {
        Some(event) => Ok(event),
        None => events.next().await,
    }
}

impl Session {
    /// An event that has come already.
    pub(super) fn waiting_event(&mut self) -> Option<qmp::Event> {
        self.life.ahead.pop_front().or_else(|| self.events.waiting())
    }

    /// Takes an event and those that came with it, and logs them together.
    pub(super) async fn take_events(&mut self, first: qmp::Event) {
        let mut next = Some(first);
        while let Some(event) = next {
            self.take_event(event).await;
            next = if self.outbox.len() < MAX_PENDING { self.waiting_event() } else { None };
        }
        self.flush().await;
    }

    pub(super) async fn take_event(&mut self, event: qmp::Event) {
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
        self.recheck |= !is_chatter(&known);
        match known {
            // Its end is logged, not how it came to it.
            Known::STOP { .. } if self.life.off => {}
            Known::STOP { .. } => {
                // Not by a time: while QEMU saves or loads a VM's state it answers nothing, however long that takes.
                let state = match run_state(&self.qmp).await {
                    Ok(state) if state != "running" => state,
                    // It was over before QEMU could be asked, or QEMU does not answer at all.
                    Ok(_) | Err(_) => self.past_state(),
                };
                self.paused(state).await;
            }
            Known::RESUME { .. } => {
                self.cause = None;
                self.arrived();
                self.resumed();
                self.arrive().await;
            }
            Known::SUSPEND { .. } => self.asleep(true).await,
            Known::WAKEUP { .. } => self.asleep(false).await,
            Known::RESET { data, .. } => {
                self.env.registry.update(self.vm, |s| s.resets += 1);
                self.env.registry.tell(self.vm, NoticeKind::Reset);
                self.reset(VmReset { by_guest: data.guest, reason: word(&data.reason) });
            }
            Known::SHUTDOWN { data, .. } => {
                let cause = if data.guest { StopCause::GuestShutdown } else { StopCause::HostShutdown };
                if self.life.off {
                    // The proxy's own `quit` after the guest's power-off is not the cause.
                    self.cause.get_or_insert(cause);
                } else {
                    self.cause = Some(cause);
                }
                if self.ends_after_power_off() && !self.life.off {
                    (self.life.off, self.life.to_end) = (true, true);
                }
                self.set_run_state("shutdown");
            }
            Known::GUEST_PANICKED { data, .. } => {
                let info = data.info.map(|info| format!(", {}", word(&info))).unwrap_or_default();
                let action = word(&data.action);
                // As QEMU does when it does not stand still at its end.
                let ends = action == "pause" && self.ends_after_panic();
                self.crash(CrashCause::GuestPanic, format!("{}{info}", if ends { "poweroff" } else { &action }));
                if ends {
                    self.cause = Some(StopCause::GuestShutdown);
                    (self.life.off, self.life.to_end) = (true, true);
                }
            }
            Known::GUEST_CRASHLOADED { data, .. } => {
                self.crash(
                    CrashCause::GuestPanic,
                    format!("{}: the guest's crash kernel takes over", word(&data.action)),
                );
            }
            Known::WATCHDOG { data, .. } => self.crash(CrashCause::Watchdog, word(&data.action)),
            Known::MEMORY_FAILURE { data, .. } => {
                let detail = format!("{} in the memory of the {}", word(&data.action), word(&data.recipient));
                self.crash(CrashCause::MemoryFailure, detail);
            }
            Known::MIGRATION { data, .. } => self.migration(&word(&data.status)).await,
            Known::JOB_STATUS_CHANGE { data, .. } => self.job(data.id, &word(&data.status)).await,
            _ => {}
        }
    }

    /// The processors stand still.
    async fn paused(&mut self, run_state: String) {
        // States that QEMU takes only to put the VM back to a snapshot, and after its state went elsewhere.
        self.life.loaded |= run_state == "restore-vm";
        let gone = run_state == "postmigrate" && self.life.out != Out::Done;
        let failed = run_state == "internal-error";
        // Which of the two QEMU tells is a matter of microseconds; should the migration fail after all, it resumes.
        let run_state = if run_state == FINISHING { "postmigrate".to_owned() } else { run_state };
        self.set_run_state(&run_state);
        self.life.run_state = Some(run_state.clone());
        self.log(VmPause { run_state });
        if failed {
            self.crash(CrashCause::InternalError, "pause".to_owned());
        }
        if gone {
            self.migrated().await;
        }
    }

    /// The guest suspended itself, or was woken up.
    async fn asleep(&mut self, asleep: bool) {
        let runs = self.life.run_state.as_deref() == Some("running");
        if asleep == runs && self.tame("suspend") {
            if asleep {
                self.paused("suspended".to_owned()).await;
            } else {
                self.resumed();
            }
        }
    }

    fn resumed(&mut self) {
        self.life.held = false;
        if self.life.out == Out::Done {
            self.life.out = Out::No;
        }
        self.set_run_state("running");
        self.life.run_state = Some("running".to_owned());
        self.log(VmResume { run_state: "running".to_owned() });
    }

    /// The run state of a pause that was over before QEMU could be asked. Whatever QEMU told until it ran again has come
    /// before its answer. A VM that can be put back to a snapshot may have been: the human monitor's `loadvm` raises the
    /// events of any other short pause. That it was not is certain if the images that hold the snapshots were not
    /// written, since going back writes them (QEMU `block/qcow2-snapshot.c`, `qcow2_snapshot_goto`). Otherwise the log has
    /// a `snapshot-load` behind a pause that does not say so: a rollback that is not told would be worse than one that was
    /// none.
    fn past_state(&mut self) -> String {
        let resumes = |event: &qmp::Event| matches!(event, qmp::Event::Known(e) if matches!(**e, Known::RESUME { .. }));
        let saves =
            |event: &qmp::Event| matches!(event, qmp::Event::Known(e) if matches!(**e, Known::MIGRATION { .. }));
        while !self.life.ahead.iter().any(resumes)
            && let Some(event) = self.events.waiting()
        {
            self.life.ahead.push_back(event);
        }
        let state = if self.life.ahead.iter().take_while(|e| !resumes(e)).any(saves) {
            "save-vm"
        } else if self.life.loading() {
            "restore-vm"
        } else {
            self.life.loaded |= !self.facts.states_saved().is_empty() && !self.rests_since_look();
            "paused"
        };
        state.to_owned()
    }

    /// Whether every image that holds a VM's state is a file that nobody has written since the last look, and since well
    /// before that: a second change within one tick of the clock leaves no trace.
    fn rests_since_look(&self) -> bool {
        self.life.resting.as_ref().is_some_and(|before| self.holders_of_states().as_ref() == Some(before))
    }

    /// Takes down how the images that hold a VM's state are. None if one of them is no file that tells when it was written,
    /// or was written just now.
    pub(super) fn note_resting(&mut self) {
        self.life.resting = self.holders_of_states().filter(|stamps| {
            let settled = |stamp: &Stamp| {
                let changed = u64::try_from(stamp.ctime.0.max(stamp.mtime.0)).unwrap_or(u64::MAX);
                let changed = SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(changed));
                let age = changed.and_then(|changed| SystemTime::now().duration_since(changed).ok());
                age.is_some_and(|age| age > SETTLED)
            };
            stamps.iter().all(settled)
        });
    }

    fn holders_of_states(&self) -> Option<Vec<Stamp>> {
        let contents = self.facts.contents.iter();
        let slots = contents.filter(|(_, content)| content.snapshots.iter().any(|s| s.vm_state > 0));
        let stamp = |slot: &str| {
            let metadata = self.kept.iter().find(|kept| kept.image.slot == slot)?.file.metadata().ok()?;
            metadata.is_file().then(|| Stamp::from(&metadata))
        };
        slots.map(|(slot, _)| stamp(slot)).collect()
    }

    /// Drops what QEMU told of migrations so far.
    pub(super) fn forget_migration_events(&mut self) {
        let mut kept = VecDeque::new();
        while let Some(event) = self.waiting_event() {
            if !matches!(&event, qmp::Event::Known(known) if matches!(**known, Known::MIGRATION { .. })) {
                kept.push_back(event);
            }
        }
        self.life.ahead = kept;
    }

    /// Tells the log when a look finds another run state than it has: events were missed or held back.
    pub(super) async fn compare_run_state(&mut self, seen: &str) {
        let Some(logged) = self.life.run_state.clone().filter(|logged| logged != seen) else { return };
        let Ok(now) = run_state(&self.qmp).await else { return };
        // What QEMU told before its answer has come before it. If there is something, it is newer than what was seen.
        if let Some(event) = self.waiting_event() {
            self.life.ahead.push_front(event);
            self.recheck = true;
        } else if now == "running" && logged != now {
            self.resumed();
        } else if logged != now && now != FINISHING && (now != "prelaunch" || logged == "running") {
            // A reset puts a VM that stands still back into `prelaunch`; that it was reset is in the log.
            self.paused(now).await;
        }
    }

    /// Logs that the guest did not end by itself.
    fn crash(&mut self, cause: CrashCause, detail: String) {
        if self.tame(cause.word()) {
            let detail = match std::mem::take(&mut self.life.untold) {
                0 => detail,
                n => format!("{detail}, and {n} events of this guest before that were not logged one by one"),
            };
            self.log(VmCrash { cause, detail: super::change::bounded(detail) });
        }
    }

    /// Whether one more of what a guest can cause at will is logged.
    fn tame(&mut self, what: &str) -> bool {
        let passes = self.life.tame.take(Instant::now());
        if !passes {
            self.life.untold += 1;
            tracing::debug!(vm = %self.name, "not logged, there were too many: {what}");
        }
        passes
    }

    /// Follows jobs that load snapshots.
    async fn job(&mut self, id: String, status: &str) {
        if status == "null" {
            self.life.jobs.remove(&id);
            return;
        }
        if status == "created" || !self.life.jobs.contains_key(&id) {
            let loads = self.loading_jobs().await.is_some_and(|ids| ids.contains(&id));
            if self.life.jobs.len() < MAX_JOBS || self.life.jobs.contains_key(&id) {
                self.life.jobs.insert(id.clone(), if loads { Job::Loads } else { Job::Other });
            }
        }
        if let Some(job) = self.life.jobs.get_mut(&id)
            && *job == Job::Loads
            && matches!(status, "concluded" | "aborting")
        {
            *job = Job::HasLoaded;
            self.life.loaded = true;
        }
    }

    async fn loading_jobs(&self) -> Option<Vec<String>> {
        #[derive(Deserialize)]
        struct JobInfo {
            id: String,
            #[serde(rename = "type")]
            kind: String,
        }
        let jobs = self.qmp.call::<Vec<JobInfo>>("query-jobs", json!({})).await.ok()?;
        Some(jobs.into_iter().filter(|job| job.kind == "snapshot-load").map(|job| job.id).collect())
    }

    /// Logs a reset, or counts it when there were too many: it is then logged with the next one that is, at the latest
    /// when the configuration is compared.
    pub(super) fn reset(&mut self, reset: VmReset) {
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
}

/// QEMU's own word for a value.
fn word(value: &impl Serialize) -> String {
    match serde_json::to_value(value) {
        Ok(serde_json::Value::String(word)) => word,
        Ok(other) => other.to_string(),
        Err(_) => String::new(),
    }
}

fn is_chatter(event: &Known) -> bool {
    matches!(
        event,
        Known::RTC_CHANGE { .. }
            | Known::BALLOON_CHANGE { .. }
            | Known::NIC_RX_FILTER_CHANGED { .. }
            | Known::VSERPORT_CHANGE { .. }
            | Known::BLOCK_IO_ERROR { .. }
            | Known::MIGRATION_PASS { .. }
            | Known::POWERDOWN { .. }
    )
}
