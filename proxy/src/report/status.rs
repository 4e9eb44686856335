//! What people see of reports: `status` of the proxy.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use onequote_evidence::{id::TimeMs, report::Cause};
use serde::Serialize;

use super::ReportError;

/// How reporting to all verifiers goes.
#[derive(Debug, Default)]
pub struct Reports(Mutex<BTreeMap<String, Arc<Status>>>);

impl Reports {
    /// Reporting to this verifier begins.
    pub(crate) fn add(&self, verifier: &str) -> Arc<Status> {
        let status = Arc::new(Status::new(verifier));
        self.lock().insert(verifier.to_owned(), Arc::clone(&status));
        status
    }

    /// It ended.
    pub(crate) fn remove(&self, verifier: &str) {
        self.lock().remove(verifier);
    }

    /// As it is now, by verifier.
    #[must_use]
    pub fn shown(&self) -> Vec<Shown> {
        self.lock().values().map(|status| status.shown()).collect()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Arc<Status>>> {
        // Every change is one insertion or removal.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How reporting to one verifier goes.
#[derive(Debug)]
pub struct Status(Mutex<Shown>);

/// The same, as it is shown.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Shown {
    /// The verifier's name with us.
    pub verifier: String,
    /// Since when there is a connection; none when there is none.
    pub connected: Option<TimeMs>,
    /// Reports that were taken since the proxy started.
    pub reports: u64,
    /// How often the verifier had no time for one.
    pub later: u64,
    /// The last one that was taken.
    pub last: Option<Last>,
    /// Why there is no connection, or no report; none when the last one succeeded.
    pub failure: Option<String>,
}

/// A report that was taken.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Last {
    /// When.
    pub time: TimeMs,
    /// Why it was made then.
    pub cause: &'static str,
    /// Bytes of evidence.
    pub bytes: u64,
    /// Whether the verifier accepted the evidence.
    pub accepted: bool,
    /// The host's state in its verdict.
    pub state: String,
}

impl Status {
    /// Nothing was reported yet.
    #[must_use]
    pub fn new(verifier: &str) -> Self {
        Self(Mutex::new(Shown {
            verifier: verifier.to_owned(),
            connected: None,
            reports: 0,
            later: 0,
            last: None,
            failure: None,
        }))
    }

    /// As it is now.
    #[must_use]
    pub fn shown(&self) -> Shown {
        self.lock().clone()
    }

    pub(super) fn connected(&self, now: TimeMs) {
        let mut shown = self.lock();
        (shown.connected, shown.failure) = (Some(now), None);
    }

    pub(super) fn lost(&self, why: &ReportError) {
        let mut shown = self.lock();
        (shown.connected, shown.failure) = (None, Some(why.to_string()));
    }

    pub(super) fn unable(&self, why: &str) {
        self.lock().failure = Some(why.to_owned());
    }

    pub(super) fn later(&self) {
        self.lock().later += 1;
    }

    pub(super) fn taken(&self, time: TimeMs, cause: Cause, bytes: u64, accepted: bool, state: &str) {
        let mut shown = self.lock();
        shown.reports += 1;
        shown.last = Some(Last { time, cause: cause.word(), bytes, accepted, state: state.to_owned() });
        shown.failure = None;
    }

    fn lock(&self) -> MutexGuard<'_, Shown> {
        // Nothing in here can panic between two changes that belong together.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
