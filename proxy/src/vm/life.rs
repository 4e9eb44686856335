//! What QEMU tells of a VM's life, as it comes to the log.

use std::time::Instant;

use onequote_evidence::event::{GapReason, LogGap, StopCause, VmPause, VmReset, VmResume};
use qapi::qmp::Event as Known;
use tokio::time::timeout;

use super::{
    facts::run_state,
    registry::NoticeKind,
    session::{MAX_PENDING, STATE_TIMEOUT, Session},
};
use crate::qmp;

/// Events that say nothing about configuration, some of them as often as a guest likes.
const CHATTER: [&str; 5] =
    ["RTC_CHANGE", "BALLOON_CHANGE", "NIC_RX_FILTER_CHANGED", "VSERPORT_CHANGE", "BLOCK_IO_ERROR"];

impl Session {
    /// Takes an event and those that came with it, and logs them together.
    pub(super) async fn take_events(&mut self, first: qmp::Event) {
        let mut next = Some(first);
        while let Some(event) = next {
            self.take_event(event).await;
            next = if self.outbox.len() < MAX_PENDING { self.events.waiting() } else { None };
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
        match known {
            Known::STOP { .. } => {
                let state = timeout(STATE_TIMEOUT, run_state(&self.qmp)).await;
                let run_state = state.ok().and_then(Result::ok).unwrap_or_else(|| "paused".to_owned());
                self.set_run_state(&run_state);
                self.log(VmPause { run_state });
            }
            Known::RESUME { .. } => {
                self.cause = None;
                self.set_run_state("running");
                self.log(VmResume { run_state: "running".to_owned() });
            }
            Known::RESET { data, .. } => {
                self.env.registry.update(self.vm, |s| s.resets += 1);
                self.env.registry.tell(self.vm, NoticeKind::Reset);
                let reason = serde_json::to_value(data.reason).ok();
                let reason = reason.and_then(|r| r.as_str().map(str::to_owned)).unwrap_or_default();
                self.reset(VmReset { by_guest: data.guest, reason });
            }
            Known::SHUTDOWN { data, .. } => {
                self.cause = Some(if data.guest { StopCause::GuestShutdown } else { StopCause::HostShutdown });
                self.set_run_state("shutdown");
            }
            Known::RTC_CHANGE { .. }
            | Known::BALLOON_CHANGE { .. }
            | Known::NIC_RX_FILTER_CHANGED { .. }
            | Known::VSERPORT_CHANGE { .. }
            | Known::BLOCK_IO_ERROR { .. } => {}
            _ => self.recheck = true,
        }
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
