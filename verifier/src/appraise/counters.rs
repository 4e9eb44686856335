//! Step 4: that the TPM's time does not run backwards.
//!
//! Between two quotes of one TPM the reset counter never falls; with the same reset counter neither restart counter
//! nor clock fall. After a reset the clock may fall when it was not saved in order (`safe` is then not set). Counters
//! can be masked by the key with a constant, so that only their differences count, modulo 2³².

use onequote_evidence::tpm::ClockInfo;

use crate::finding::{Code, Finding};

/// Holds a quote's counters against those last accepted. The caller must trust both.
#[must_use]
pub fn check(now: &ClockInfo, accepted: &ClockInfo) -> Vec<Finding> {
    let finding = |code, item: &str, before: u64, after: u64| {
        vec![Finding::new(code, item).expected(format!("at least {before}")).actual(after)]
    };
    if fell(accepted.reset_count, now.reset_count) {
        let (before, after) = (accepted.reset_count, now.reset_count);
        return finding(Code::ResetCountRegression, "reset counter", before.into(), after.into());
    }
    let same_run = accepted.reset_count == now.reset_count;
    if same_run && fell(accepted.restart_count, now.restart_count) {
        let (before, after) = (accepted.restart_count, now.restart_count);
        return finding(Code::RestartCountRegression, "restart counter", before.into(), after.into());
    }
    if now.clock < accepted.clock && (same_run || now.safe) {
        return finding(Code::ClockRegression, "clock", accepted.clock, now.clock);
    }
    Vec::new()
}

fn fell(before: u32, after: u32) -> bool {
    after.wrapping_sub(before) > u32::MAX / 2
}
