//! Step 4, second half: what became of the host between the log last accepted and this one.
//!
//! A log of ours covers one life of its registers under the kernels that ran meanwhile. Whoever can reset the TPM
//! under a running host, or replace the kernel by kexec, begins or goes on with a log in which that does not show by
//! itself, so boot ids and counters are compared. And a new log must not make forgotten what older logs of the same
//! boot said: their gaps stand until the host is truly rebooted.
//!
//! | kernel | registers | it was |
//! | --- | --- | --- |
//! | other | began anew, with a reset or restart counted | a reboot: nothing stands any more |
//! | same | the same | the log was replaced: gaps stand |
//! | same | began anew | a TPM reset under a running kernel |
//! | other | go on | a kexec |

use minicbor::{Decode, Encode};
use serde::{Deserialize, Serialize};

use onequote_evidence::{
    digest::HashAlg,
    event::{GapReason, ProxyStart},
    id::{BootId, Epoch},
    pcr::RegisterValue,
};

use super::{log::VerifiedLog, state::Accepted};

/// The most gaps of earlier logs that are kept; any one of them keeps the host from being trusted.
pub const MAX_PAST: usize = 64;

/// A gap that an earlier log of the same boot told of, or that nobody told of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Encode, Decode)]
pub struct PastGap {
    /// The number of the log's epoch.
    #[n(0)]
    pub epoch: u64,
    /// Its record.
    #[n(1)]
    pub record: u64,
    /// Why.
    #[n(2)]
    pub reason: GapReason,
    /// For people.
    #[n(3)]
    pub detail: String,
}

/// The kernel that ran at the log's last start of a proxy.
#[must_use]
pub fn last_boot(log: &VerifiedLog) -> BootId {
    log.starts().last().map_or(log.start().boot_id, |(_, start)| start.boot_id)
}

/// What stands of this boot although this log does not tell it. The caller must trust `accepted` to be what it stored
/// itself.
#[must_use]
pub fn check(log: &VerifiedLog, epoch: Epoch, accepted: Option<&Accepted>) -> Vec<PastGap> {
    let Some((accepted, before)) = accepted.and_then(|a| Some((a, a.boot_id?))) else { return Vec::new() };
    if accepted.epoch == epoch {
        return accepted.past_gaps.clone();
    }
    let start = log.start();
    let change = Change::between(accepted, before, start);
    if change == Change::Reboot {
        return Vec::new();
    }
    let mut gaps: Vec<PastGap> = accepted.past_gaps.iter().chain(&accepted.gaps).cloned().collect();
    let (old, new) = (accepted.clock, (start.reset_count, start.restart_count));
    let unsaid = match change {
        Change::TpmReset => Some((
            GapReason::TpmReset,
            format!(
                "resets {} to {}, restarts {} to {}, in boot {before}",
                old.reset_count, new.0, old.restart_count, new.1
            ),
        )),
        Change::Kexec => Some((GapReason::Kexec, format!("boot {before} was followed by boot {}", start.boot_id))),
        Change::SameKernel | Change::Reboot => None,
    };
    let own = log.gaps();
    if let Some((reason, detail)) = unsaid
        && !own.iter().any(|gap| gap.reason == reason)
    {
        gaps.push(PastGap { epoch: epoch.number, record: 0, reason, detail });
    }
    // The newest are about the present log.
    let surplus = gaps.len().saturating_sub(MAX_PAST);
    gaps.drain(..surplus);
    gaps
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Change {
    Reboot,
    SameKernel,
    TpmReset,
    Kexec,
}

impl Change {
    fn between(accepted: &Accepted, before: BootId, start: &ProxyStart) -> Self {
        let reset = accepted.clock.reset_count != start.reset_count;
        let restarted = accepted.clock.restart_count != start.restart_count;
        let goes_on = sha256(&start.history).eq(sha256(&accepted.registers));
        let empty = sha256(&start.history).all(|item| item.value.0.iter().all(|&byte| byte == 0));
        match (before == start.boot_id, reset, restarted) {
            (true, true, _) => Self::TpmReset,
            // A resume leaves the registers as they are; what else they hold then is for the log's history to explain.
            (true, false, true) if empty => Self::TpmReset,
            (true, false, _) => Self::SameKernel,
            (false, true, _) => Self::Reboot,
            (false, false, true) if !goes_on => Self::Reboot,
            (false, false, _) => Self::Kexec,
        }
    }
}

fn sha256(values: &[RegisterValue]) -> impl Iterator<Item = &RegisterValue> {
    values.iter().filter(|item| item.bank == HashAlg::Sha256)
}
