//! What is counted of a fleet's reports: at each host what it sent and what it was told, over all how long that took.

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

/// Of all hosts together.
#[derive(Debug, Default)]
pub struct Totals {
    /// Reports that were begun.
    pub begun: AtomicU64,
    /// Of these: appraised, and accepted as evidence.
    pub taken: AtomicU64,
    /// See above.
    pub accepted: AtomicU64,
    /// Sent away to come later.
    pub later: AtomicU64,
    /// Cut off by the simulator itself: a host was rebooted, or its proxy started again, in the middle of one.
    pub cut: AtomicU64,
    /// Lost with the connection.
    pub lost: AtomicU64,
    /// Connections that were made.
    pub connections: AtomicU64,
    /// Bytes of evidence in reports with all that the host has, and in those with what is new; and their numbers.
    pub first: (AtomicU64, AtomicU64),
    /// See above.
    pub steady: (AtomicU64, AtomicU64),
    /// From a report that is ready to be sent to the word that it was appraised, in microseconds.
    latencies: Mutex<Vec<u32>>,
}

/// Of one host.
#[derive(Debug)]
pub struct Meter {
    totals: Arc<Totals>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// A report is under way: since when, and how far it goes.
    begun: Option<(Instant, u64)>,
    last: Option<Told>,
    taken: u64,
    connected: bool,
    refused: Option<String>,
}

/// What a host was told of its last report.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Told {
    /// How far the report went: records of the host's log.
    pub position: u64,
    /// Whether the verifier accepted the evidence.
    pub accepted: bool,
    /// The host's state in the verdict.
    pub state: String,
}

/// Shares of the times that reports took.
#[derive(Debug, Clone, Copy, Default, serde::Serialize)]
pub struct Times {
    /// How many.
    pub count: usize,
    /// Milliseconds that half of them took at most.
    pub median: f64,
    /// Milliseconds that 99 of 100 took at most.
    pub p99: f64,
    /// Milliseconds of the longest.
    pub longest: f64,
}

impl Totals {
    /// The times of all reports since the last call.
    pub fn take_times(&self) -> Times {
        let mut all = std::mem::take(&mut *lock(&self.latencies));
        all.sort_unstable();
        let at = |share: f64| {
            all.get(((all.len().max(1) - 1) as f64 * share) as usize).map_or(0.0, |&us| f64::from(us) / 1000.0)
        };
        Times { count: all.len(), median: at(0.5), p99: at(0.99), longest: at(1.0) }
    }
}

impl Meter {
    /// Nothing was sent yet.
    #[must_use]
    pub fn new(totals: Arc<Totals>) -> Self {
        Self { totals, state: Mutex::default() }
    }

    /// What the host was told last.
    #[must_use]
    pub fn last(&self) -> Option<Told> {
        self.lock().last.clone()
    }

    /// How many reports were appraised.
    #[must_use]
    pub fn taken(&self) -> u64 {
        self.lock().taken
    }

    /// Whether it holds a connection.
    #[must_use]
    pub fn is_connected(&self) -> bool {
        self.lock().connected
    }

    /// Why the verifier ended a connection, if it said so.
    #[must_use]
    pub fn refused(&self) -> Option<String> {
        self.lock().refused.clone()
    }

    /// What it was told belongs to a log that is no more: the host was booted.
    pub(super) fn forget(&self) {
        self.lock().last = None;
    }

    pub(super) fn connected(&self) {
        self.totals.connections.fetch_add(1, Ordering::Relaxed);
        let mut state = self.lock();
        state.connected = true;
        state.refused = None;
    }

    pub(super) fn begin(&self, bytes: u64, first: bool, position: u64) {
        let totals = &self.totals;
        totals.begun.fetch_add(1, Ordering::Relaxed);
        let (count, sum) = if first { &totals.first } else { &totals.steady };
        count.fetch_add(1, Ordering::Relaxed);
        sum.fetch_add(bytes, Ordering::Relaxed);
        self.lock().begun = Some((Instant::now(), position));
    }

    pub(super) fn told(&self, accepted: bool, word: &str) {
        let mut state = self.lock();
        let Some((began, position)) = state.begun.take() else { return };
        state.last = Some(Told { position, accepted, state: word.to_owned() });
        state.taken += 1;
        drop(state);
        self.totals.taken.fetch_add(1, Ordering::Relaxed);
        self.totals.accepted.fetch_add(u64::from(accepted), Ordering::Relaxed);
        lock(&self.totals.latencies).push(micros(began.elapsed()));
    }

    pub(super) fn later(&self) {
        if self.lock().begun.take().is_some() {
            self.totals.later.fetch_add(1, Ordering::Relaxed);
        }
    }

    pub(super) fn refuse(&self, code: &str) {
        self.lock().refused = Some(code.to_owned());
    }

    /// The connection is gone, `cut` by the simulator or lost.
    pub(super) fn disconnected(&self, cut: bool) {
        let mut state = self.lock();
        state.connected = false;
        if state.begun.take().is_some() {
            let count = if cut { &self.totals.cut } else { &self.totals.lost };
            count.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }
}

fn micros(time: Duration) -> u32 {
    u32::try_from(time.as_micros()).unwrap_or(u32::MAX)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
