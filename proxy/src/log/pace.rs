//! How fast extends follow each other.
//!
//! An extend takes a discrete TPM 7 to 20 ms, and in that time it can do nothing else. When events come one after the other, each
//! with work before it, one extend an event would keep the TPM busy without end, and a quote would have to queue. So after an
//! extend the TPM rests for a multiple of the time that the extend took: what comes meanwhile shares the next one. The first
//! event after a quiet time waits for nothing, and a quote that waits ends the rest.

use std::time::{Duration, Instant};

/// The rest is so many times as long as the extend before it: the TPM is left free for four fifths of the time.
const REST: u32 = 4;

/// The longest rest: an event is never held back for longer.
const LONGEST: Duration = Duration::from_millis(50);

/// Of the rest, how long nobody looks whether a quote came.
const STEP: Duration = Duration::from_millis(2);

/// Keeps the rest between extends.
#[derive(Debug, Default)]
pub(super) struct Pace {
    free: Option<Instant>,
}

impl Pace {
    /// An extend began and ended.
    pub(super) fn extended(&mut self, began: Instant, ended: Instant) {
        let took = ended.saturating_duration_since(began);
        self.free = Some(ended + took.saturating_mul(REST).min(LONGEST));
    }

    /// How long to wait now, if the rest is not over; then it is to be asked again.
    pub(super) fn step(&self, now: Instant) -> Option<Duration> {
        let left = self.free?.saturating_duration_since(now);
        (!left.is_zero()).then(|| left.min(STEP))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn an_extend_is_followed_by_a_rest_that_is_bounded() {
        let (mut pace, start) = (Pace::default(), Instant::now());
        assert_eq!(pace.step(start), None, "the first waits for nothing");
        pace.extended(start, start + 10 * MS);
        assert_eq!(pace.step(start + 10 * MS), Some(STEP));
        assert_eq!(pace.step(start + 49 * MS), Some(MS));
        assert_eq!(pace.step(start + 50 * MS), None, "nor does one after a quiet time");
        pace.extended(start, start + 1000 * MS);
        assert_eq!(pace.step(start + 1050 * MS), None);
    }
}
