//! Limits on what guests and peers can make the proxy say, and on how often they can make it work.
//!
//! Whoever can cause a log line at will can fill the log and hide other lines in it. Each kind of such a line has a
//! token bucket: a burst passes, then one line a second. What is left out is counted; the next line that passes is
//! preceded by that number, and all counts are in the proxy's status.

use std::{
    collections::BTreeMap,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use serde::Serialize;

/// Lines of one kind that pass at once.
const BURST: u32 = 32;

/// How long it takes until one more passes.
const REFILL: Duration = Duration::from_secs(1);

/// A token bucket.
#[derive(Debug, Clone)]
pub struct Bucket {
    burst: u32,
    refill: Duration,
    tokens: u32,
    /// When the last token came in; as long as the bucket is full, when it was last looked at.
    since: Instant,
}

impl Bucket {
    /// A full bucket that holds `burst` tokens and gets a new one every `refill`.
    #[must_use]
    pub fn new(burst: u32, refill: Duration, now: Instant) -> Self {
        Self { burst, refill, tokens: burst, since: now }
    }

    /// Takes a token, if there is one.
    pub fn take(&mut self, now: Instant) -> bool {
        let periods = now.saturating_duration_since(self.since).as_nanos() / self.refill.as_nanos().max(1);
        let new = u32::try_from(periods).unwrap_or(u32::MAX);
        if new >= self.burst - self.tokens {
            (self.tokens, self.since) = (self.burst, now);
        } else {
            self.tokens += new;
            self.since += self.refill * new;
        }
        let some = self.tokens > 0;
        self.tokens -= u32::from(some);
        some
    }
}

/// Kinds of lines that guests and peers can cause.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// A guest's shim connected, or its connection ended.
    GuestConnection,
    /// A guest claims another past, or went over a limit.
    GuestMisbehaves,
    /// Guests' entries could not be written or logged, and wait.
    GuestsWait,
    /// A connection that belongs to no VM, or is one too many of its VM.
    GuestTurnedAway,
    /// A connection could not be accepted.
    Accept,
    /// A TLS handshake failed, or a verifier has too many connections.
    Handshake,
    /// A verifier's challenge was answered.
    Answered,
    /// A verifier's challenge could not be answered.
    Unanswered,
    /// A client of an intercepted monitor came, left or was refused something.
    MonitorClient,
}

impl Kind {
    const ALL: [Self; 9] = [
        Self::GuestConnection,
        Self::GuestMisbehaves,
        Self::GuestsWait,
        Self::GuestTurnedAway,
        Self::Accept,
        Self::Handshake,
        Self::Answered,
        Self::Unanswered,
        Self::MonitorClient,
    ];

    /// Its name in log and status.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::GuestConnection => "guest-connection",
            Self::GuestMisbehaves => "guest-misbehaves",
            Self::GuestsWait => "guests-wait",
            Self::GuestTurnedAway => "guest-turned-away",
            Self::Accept => "accept",
            Self::Handshake => "handshake",
            Self::Answered => "answered",
            Self::Unanswered => "unanswered",
            Self::MonitorClient => "monitor-client",
        }
    }
}

/// How many lines of a kind there were.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Count {
    /// Lines that passed.
    pub passed: u64,
    /// Lines that were left out.
    pub left_out: u64,
}

/// Decides which lines pass.
#[derive(Debug)]
pub struct Limiter {
    kinds: Mutex<BTreeMap<Kind, State>>,
}

#[derive(Debug)]
struct State {
    bucket: Bucket,
    count: Count,
    /// Left out since the last one that passed.
    silent: u64,
}

/// The limiter of this process' log.
pub static LOG: Limiter = Limiter::new();

impl Limiter {
    const fn new() -> Self {
        Self { kinds: Mutex::new(BTreeMap::new()) }
    }

    /// Whether a line may pass; if so, how many of its kind were left out before it.
    pub fn pass(&self, kind: Kind, now: Instant) -> Option<u64> {
        let mut kinds = self.lock();
        let new = || State { bucket: Bucket::new(BURST, REFILL, now), count: Count::default(), silent: 0 };
        let state = kinds.entry(kind).or_insert_with(new);
        if state.bucket.take(now) {
            state.count.passed += 1;
            Some(std::mem::take(&mut state.silent))
        } else {
            state.count.left_out += 1;
            state.silent += 1;
            None
        }
    }

    /// All counts by kind.
    #[must_use]
    pub fn counts(&self) -> BTreeMap<&'static str, Count> {
        let kinds = self.lock();
        Kind::ALL.into_iter().map(|kind| (kind.word(), kinds.get(&kind).map(|s| s.count).unwrap_or_default())).collect()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<Kind, State>> {
        // Numbers, each of which is right by itself.
        self.kinds.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Writes a line that a guest or peer can cause, unless there are too many of its kind: `limited!(Kind::Accept, warn,
/// "…")`, with the fields and the text of the `tracing` macro.
macro_rules! limited {
    ($kind:expr, $level:ident, $($line:tt)+) => {{
        let kind: $crate::rate::Kind = $kind;
        if let Some(silent) = $crate::rate::LOG.pass(kind, std::time::Instant::now()) {
            if silent > 0 {
                tracing::warn!(kind = kind.word(), "{silent} lines of this kind were left out before the next one");
            }
            tracing::$level!($($line)+);
        }
    }};
}
pub(crate) use limited;

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;

    #[test]
    fn a_bucket_gives_a_burst_and_then_what_comes_in() {
        let start = Instant::now();
        let at = |ms: u64| start + Duration::from_millis(ms);
        let mut bucket = Bucket::new(3, Duration::from_millis(100), start);
        assert_eq!([0, 0, 0, 0, 99].map(|ms| bucket.take(at(ms))), [true, true, true, false, false]);
        assert_eq!([100, 150, 200, 299].map(|ms| bucket.take(at(ms))), [true, false, true, false]);
        // Never more than the burst, and a clock that seems to go back gives nothing.
        assert_eq!([90_000; 4].map(|ms| bucket.take(at(ms))), [true, true, true, false]);
        assert!(!bucket.take(at(5)));
        let mut steady = Bucket::new(1, Duration::from_millis(10), start);
        let passed = (0..1000).filter(|ms| steady.take(at(*ms))).count();
        assert_eq!(passed, 100);
    }

    #[test]
    fn what_is_left_out_is_counted_and_told() {
        let limiter = Limiter::new();
        let start = Instant::now();
        let passed = (0..100).filter(|_| limiter.pass(Kind::Handshake, start).is_some()).count();
        assert_eq!(passed, BURST as usize);
        assert_eq!(limiter.pass(Kind::Accept, start), Some(0), "kinds do not hide each other");
        let later = start + REFILL;
        assert_eq!(limiter.pass(Kind::Handshake, later), Some(100 - u64::from(BURST)));
        assert_eq!(limiter.pass(Kind::Handshake, later), None);
        let count = limiter.counts()["handshake"];
        assert_eq!(count, Count { passed: u64::from(BURST) + 1, left_out: 101 - u64::from(BURST) });
        assert_eq!(limiter.counts().len(), Kind::ALL.len());
    }
}
