//! When the next report is due.
//!
//! By the period, with jitter; at once when the verifier asks, or has heard nothing from this proxy yet; after a change,
//! when what belongs together has had a moment to come together, and not sooner after the last report than the
//! verifier's gap. Whoever was told to come later comes later, whatever it is about.

use std::time::Duration;

use onequote_evidence::report::{Ask, Cause};
use tokio::time::Instant;

/// A change waits so long for others.
const GATHER: Duration = Duration::from_millis(20);

/// What a verifier may want.
const PERIOD: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(24 * 3600));
const GAP: (Duration, Duration) = (Duration::from_millis(10), Duration::from_secs(24 * 3600));
const LATER: Duration = Duration::from_secs(600);

/// The first and the longest pause after evidence that could not be made.
const UNABLE: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));

/// Reconnecting is spread over a share of the period, within these bounds.
const SPREAD: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(10));
const SPREAD_SHARE: u32 = 10;

/// When reports are due.
#[derive(Debug)]
pub(super) struct Schedule {
    changes: bool,
    period: Duration,
    gap: Duration,
    /// When the last report was taken, and how many were.
    last: Option<Instant>,
    taken: u64,
    /// What they cover.
    position: u64,
    /// From 0 to 1, drawn anew for each report.
    jitter: f64,
    asked: bool,
    /// Since when there is something to report.
    changed: Option<Instant>,
    not_before: Option<Instant>,
    /// Evidence could not be made so often since it could.
    unable: u32,
}

impl Schedule {
    pub(super) fn new(changes: bool) -> Self {
        Self {
            changes,
            period: PERIOD.1,
            gap: Duration::ZERO,
            last: None,
            taken: 0,
            position: 0,
            jitter: rand::random(),
            asked: false,
            changed: None,
            not_before: None,
            unable: 0,
        }
    }

    /// A connection was made: what the verifier wanted over the last one does not count.
    pub(super) fn connected(&mut self, now: Instant) {
        self.asked = false;
        // Being told to come later was this verifier's word, too, and stays.
        self.not_before = self.not_before.filter(|&at| at > now);
    }

    /// What the verifier wants from now on. A question that stood before is void.
    pub(super) fn ask(&mut self, ask: &Ask) {
        self.period = Duration::from_millis(ask.period_ms).clamp(PERIOD.0, PERIOD.1);
        self.gap = match ask.gap_ms {
            0 => Duration::ZERO,
            gap => Duration::from_millis(gap).clamp(GAP.0, GAP.1),
        };
        self.asked = ask.now;
    }

    /// Whether changes are to be noticed: they are wanted, and none is known yet.
    pub(super) fn watches(&self) -> bool {
        self.changes && !self.gap.is_zero() && self.changed.is_none()
    }

    /// There is something to report.
    pub(super) fn changed(&mut self, now: Instant) {
        self.changed.get_or_insert(now);
    }

    /// A report was taken that goes as far as this.
    pub(super) fn reported(&mut self, now: Instant, position: u64) {
        self.last = Some(now);
        self.taken += 1;
        self.position = position;
        self.jitter = rand::random();
        (self.changed, self.not_before, self.unable) = (None, None, 0);
    }

    /// The verifier wants it later.
    pub(super) fn later(&mut self, now: Instant, after: Duration) {
        // Those who were told the same time don't come in the same moment.
        let after = after.min(LATER).mul_f64(1.0 + self.jitter / 4.0);
        self.jitter = rand::random();
        self.not_before = Some(now + after);
    }

    /// Evidence could not be made.
    pub(super) fn unable(&mut self, now: Instant) {
        let pause = UNABLE.0.saturating_mul(1 << self.unable.min(16)).min(UNABLE.1);
        self.unable = self.unable.saturating_add(1);
        self.asked = false;
        self.not_before = Some(now + pause);
    }

    /// How far the last report that was taken goes.
    pub(super) fn position(&self) -> u64 {
        self.position
    }

    /// Reports that were taken.
    pub(super) fn taken(&self) -> u64 {
        self.taken
    }

    /// Over how long those who lost the verifier at the same time come back.
    pub(super) fn spread(&self) -> Duration {
        (self.period / SPREAD_SHARE).clamp(SPREAD.0, SPREAD.1)
    }

    /// When the next report is due, and why then.
    pub(super) fn next(&self, now: Instant) -> (Instant, Cause) {
        let Some(last) = self.last else { return (self.not_before.unwrap_or(now).max(now), Cause::First) };
        let mut due = (last + self.period.mul_f64(0.95 + self.jitter / 10.0), Cause::Period);
        if let Some(changed) = self.changed.filter(|_| self.changes && !self.gap.is_zero()) {
            due = due.min(((changed + GATHER).max(last + self.gap), Cause::Change));
        }
        if self.asked {
            due = due.min((now, Cause::Asked));
        }
        (due.0.max(self.not_before.unwrap_or(due.0)), due.1)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use onequote_evidence::id::Blob;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn ask(now: bool) -> Ask {
        Ask { nonce: Blob(vec![1; 32]), statement: None, expires_ms: 120_000, period_ms: 60_000, gap_ms: 500, now }
    }

    fn reported(start: Instant) -> Schedule {
        let mut schedule = Schedule::new(true);
        schedule.ask(&ask(false));
        schedule.reported(start, 1);
        schedule
    }

    #[test]
    fn the_first_report_is_made_at_once_and_the_next_by_the_period() {
        let start = Instant::now();
        let mut schedule = Schedule::new(true);
        schedule.ask(&ask(false));
        assert_eq!(schedule.next(start), (start, Cause::First));
        let mut dues = std::collections::BTreeSet::new();
        for _ in 0..20 {
            schedule.reported(start, 1);
            let (due, cause) = schedule.next(start);
            assert!(due >= start + 57 * SECOND && due <= start + 63 * SECOND && cause == Cause::Period);
            dues.insert(due);
        }
        assert!(dues.len() > 10, "no jitter");
        // A connection that was made anew changes nothing.
        let before = schedule.next(start);
        schedule.connected(start + SECOND);
        schedule.ask(&ask(false));
        assert_eq!(schedule.next(start), before);
    }

    #[test]
    fn changes_come_together_and_keep_their_distance() {
        let start = Instant::now();
        let mut schedule = reported(start);
        schedule.changed(start + 10 * SECOND);
        schedule.changed(start + 11 * SECOND);
        assert_eq!(schedule.next(start), (start + 10 * SECOND + GATHER, Cause::Change));
        schedule.reported(start + 12 * SECOND, 2);
        assert_eq!(schedule.next(start).1, Cause::Period);
        schedule.changed(start + 12 * SECOND);
        assert_eq!(schedule.next(start), (start + 12 * SECOND + SECOND / 2, Cause::Change));
        // Not if nobody wants them.
        schedule.ask(&Ask { gap_ms: 0, ..ask(false) });
        assert_eq!(schedule.next(start).1, Cause::Period);
        let mut off = Schedule::new(false);
        off.ask(&ask(false));
        off.reported(start, 1);
        off.changed(start);
        assert!(!off.watches() && off.next(start).1 == Cause::Period);
    }

    #[test]
    fn who_is_asked_reports_and_who_is_sent_away_waits() {
        let start = Instant::now();
        let mut schedule = reported(start);
        schedule.ask(&ask(true));
        assert_eq!(schedule.next(start), (start, Cause::Asked));
        schedule.later(start, 4 * SECOND);
        let (due, cause) = schedule.next(start);
        assert!(due >= start + 4 * SECOND && due <= start + 5 * SECOND && cause == Cause::Asked);
        schedule.changed(start);
        assert!(schedule.next(start).0 >= start + 4 * SECOND);
        // Nobody can be sent away for good.
        schedule.later(start, Duration::MAX);
        assert!(schedule.next(start).0 <= start + 2 * LATER);
        // The answer to it brings the next question.
        schedule.ask(&ask(false));
        schedule.reported(start, 1);
        assert_eq!(schedule.next(start).1, Cause::Period);
        schedule.ask(&ask(true));
        assert_eq!(schedule.next(start), (start, Cause::Asked));
        // A question over a connection that is gone is gone.
        schedule.connected(start);
        assert_eq!(schedule.next(start).1, Cause::Period);
    }

    #[test]
    fn failures_are_tried_again_less_and_less() {
        let start = Instant::now();
        let mut schedule = Schedule::new(true);
        schedule.ask(&ask(false));
        let mut pauses = Vec::new();
        for _ in 0..8 {
            schedule.unable(start);
            pauses.push((schedule.next(start).0 - start).as_secs());
        }
        assert_eq!(pauses, [1, 2, 4, 8, 16, 32, 60, 60]);
        schedule.reported(start, 1);
        schedule.unable(start);
        schedule.changed(start);
        assert_eq!(schedule.next(start), (start + SECOND, Cause::Change));
    }

    #[test]
    fn what_a_verifier_wants_is_bounded() {
        let start = Instant::now();
        let mut schedule = reported(start);
        schedule.ask(&Ask { period_ms: 0, gap_ms: 1, ..ask(false) });
        assert!(schedule.next(start).0 >= start + Duration::from_millis(95));
        schedule.changed(start);
        assert!(schedule.next(start).0 >= start + GAP.0);
        schedule.ask(&Ask { period_ms: u64::MAX, gap_ms: u64::MAX, ..ask(false) });
        assert!(schedule.next(start).0 <= start + 2 * PERIOD.1);
        assert_eq!(schedule.spread(), SPREAD.1);
    }
}
