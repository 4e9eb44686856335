//! How much is taken at a time, and when those who were sent away come again.
//!
//! Reports are admitted by their announced size, before they are read: so many bytes may be under way, those of small
//! and of large reports counted apart, so that first reports of new hosts do not keep steady ones out. As many are
//! appraised at a time as there are cores; so many may wait for that. Whoever is not admitted is told when to come: so
//! much later as all who were sent away before it take at the pace of the last seconds.

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use onequote_evidence::report::EAGER;
use serde::Serialize;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// One permit of bytes under way is worth so many.
const UNIT: u64 = 1024;

/// Bytes of reports of at most [`EAGER`] bytes, and of larger ones, that may be under way.
const SMALL: u64 = 64 * 1024 * 1024;
const LARGE: u64 = 256 * 1024 * 1024;

/// Whole reports that may wait to be appraised, for each that is appraised at a time.
const WAITING: usize = 64;

/// The shortest and the longest time for which somebody is sent away.
const SOON: Duration = Duration::from_millis(500);
const LATE: Duration = Duration::from_secs(60);

/// Over how long the pace is measured.
const MEASURED: Duration = Duration::from_secs(5);

/// What there is to do.
#[derive(Debug)]
pub struct Load {
    small: Arc<Semaphore>,
    large: Arc<Semaphore>,
    /// Reports that are appraised.
    turns: Arc<Semaphore>,
    at_once: usize,
    waiting: AtomicUsize,
    pace: Mutex<Pace>,
}

/// A report's share of the bytes under way.
#[derive(Debug)]
pub(super) struct Admitted {
    _bytes: OwnedSemaphorePermit,
}

/// The right to appraise.
#[derive(Debug)]
pub(super) struct Turn {
    _turn: OwnedSemaphorePermit,
}

/// Counts, for people and metrics.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Counts {
    /// Reports that were appraised.
    pub taken: u64,
    /// Reports that were sent away.
    pub later: u64,
    /// Reports that wait for their turn.
    pub waiting: usize,
}

#[derive(Debug)]
struct Pace {
    counts: Counts,
    /// Since when `done` is counted, and how many a second there were before.
    since: Instant,
    done: u32,
    per_second: f64,
    /// Until when those who were sent away fill the time.
    filled: Instant,
}

impl Load {
    pub(super) fn new(at_once: usize, now: Instant) -> Self {
        let permits = |bytes: u64| Arc::new(Semaphore::new((bytes / UNIT) as usize));
        Self {
            small: permits(SMALL),
            large: permits(LARGE),
            turns: Arc::new(Semaphore::new(at_once)),
            at_once,
            waiting: AtomicUsize::new(0),
            pace: Mutex::new(Pace { counts: Counts::default(), since: now, done: 0, per_second: 0.0, filled: now }),
        }
    }

    /// Room for a report of `size` bytes; or when to come again.
    pub(super) fn admit(&self, size: u64, now: Instant) -> Result<Admitted, Duration> {
        let bytes = if size <= EAGER { &self.small } else { &self.large };
        let units = u32::try_from(size.div_ceil(UNIT)).unwrap_or(u32::MAX);
        let crowded = self.waiting.load(Ordering::Relaxed) >= self.at_once * WAITING;
        match Arc::clone(bytes).try_acquire_many_owned(units) {
            Ok(bytes) if !crowded => Ok(Admitted { _bytes: bytes }),
            _ => Err(self.lock().defer(now)),
        }
    }

    /// Waits for the turn of a report that is there.
    pub(super) async fn turn(&self) -> Turn {
        let _waiting = Waiting::begin(&self.waiting);
        match Arc::clone(&self.turns).acquire_owned().await {
            Ok(turn) => Turn { _turn: turn },
            // It is never closed.
            Err(_) => std::future::pending().await,
        }
    }

    /// A report was appraised.
    pub(super) fn done(&self, now: Instant) {
        let mut pace = self.lock();
        pace.counts.taken += 1;
        pace.done += 1;
        pace.measure(now);
    }

    /// What was done.
    #[must_use]
    pub fn counts(&self) -> Counts {
        Counts { waiting: self.waiting.load(Ordering::Relaxed), ..self.lock().counts }
    }

    fn lock(&self) -> MutexGuard<'_, Pace> {
        // Nothing in here can panic between two changes that belong together.
        self.pace.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Counts one that waits, also if its future is dropped.
struct Waiting<'a>(&'a AtomicUsize);

impl<'a> Waiting<'a> {
    fn begin(count: &'a AtomicUsize) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Self(count)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Pace {
    fn measure(&mut self, now: Instant) {
        let passed = now.saturating_duration_since(self.since);
        if passed >= MEASURED {
            self.per_second = f64::from(self.done) / passed.as_secs_f64();
            (self.since, self.done) = (now, 0);
        }
    }

    /// For how long one more is sent away: each takes a place behind the last one.
    fn defer(&mut self, now: Instant) -> Duration {
        self.counts.later += 1;
        self.measure(now);
        let each = Duration::from_secs_f64(1.0 / self.per_second.max(10.0));
        self.filled = (self.filled.max(now) + each).min(now + LATE);
        (self.filled - now).max(SOON)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_bounded_and_given_back() {
        let now = Instant::now();
        let load = Load::new(2, now);
        let held: Vec<_> = (0..SMALL / EAGER).map(|_| load.admit(EAGER, now).unwrap()).collect();
        assert!(load.admit(1, now).is_err());
        // Large ones have their own.
        let large: Vec<_> = (0..4).map(|_| load.admit(LARGE / 4, now).unwrap()).collect();
        assert!(load.admit(EAGER + 1, now).is_err());
        drop(large);
        assert!(load.admit(EAGER + 1, now).is_ok() && load.admit(1, now).is_err());
        drop(held);
        assert!(load.admit(1, now).is_ok());
        assert_eq!(load.counts().later, 3);
    }

    #[test]
    fn who_is_sent_away_comes_one_after_the_other() {
        let start = Instant::now();
        let load = Load::new(1, start);
        for _ in 0..500 {
            load.done(start);
        }
        load.done(start + MEASURED);
        // About a hundred a second: a thousand need ten seconds.
        let now = start + MEASURED;
        let times: Vec<_> = (0..1000).map(|_| load.lock().defer(now)).collect();
        assert_eq!(times[0], SOON);
        assert!(times.is_sorted());
        assert!((9.5..10.5).contains(&times[999].as_secs_f64()), "{:?}", times[999]);
        // They come back; whoever is sent away then need not wait for those who are gone.
        assert_eq!(load.lock().defer(now + Duration::from_secs(11)), SOON);
        // However many there are, nobody waits longer than for a while.
        let most = (0..100_000).map(|_| load.lock().defer(now)).max().unwrap();
        assert_eq!(most, LATE);
    }

    #[tokio::test]
    async fn a_long_queue_admits_nobody() {
        let now = Instant::now();
        let load = Arc::new(Load::new(1, now));
        let turn = load.turn().await;
        let waiters: Vec<_> = (0..WAITING)
            .map(|_| {
                let load = Arc::clone(&load);
                tokio::spawn(async move { drop(load.turn().await) })
            })
            .collect();
        while load.counts().waiting < WAITING {
            tokio::task::yield_now().await;
        }
        assert!(load.admit(1, now).is_err());
        drop(turn);
        for waiter in waiters {
            waiter.await.unwrap();
        }
        assert!(load.admit(1, now).is_ok());
        assert_eq!(load.counts().waiting, 0);
    }
}
