//! Looking at a VM again: what is other than it was when it was measured, where QEMU raises no event for it.

use onequote_evidence::event::ConfigChange;
use tokio::time::timeout;

use super::{
    change::{self, LeafChanges},
    facts::Facts,
    session::{STATE_TIMEOUT, Session},
};
use crate::measure::{MeasureError, VmMeter};

impl Session {
    /// Compares configuration and block graph with what the log has, and logs what is different.
    pub(super) async fn compare(&mut self) {
        if !self.measured {
            return;
        }
        match self.differences().await {
            Ok(changes) => changes.into_iter().for_each(|change| self.log(change)),
            // A monitor that ended says so itself, and a VM that is about to end has no graph any more.
            Err(e) if e.is_monitor() || self.ends().await => {
                tracing::debug!(vm = %self.name, "cannot compare: {e}");
            }
            Err(e) => {
                let error = format!("a change in {} cannot be measured: {e}", self.name);
                // What cannot be measured must not look as if nothing had happened; once is enough.
                if self.error.as_ref() != Some(&error) {
                    let (what, before) = (change::UNMEASURED.to_owned(), String::new());
                    self.log(ConfigChange { what, before, after: e.to_string(), images: Vec::new() });
                }
                self.fail(error);
            }
        }
        self.flush().await;
    }

    /// Whether the process is about to end: it closes its files before.
    pub(super) async fn ends(&self) -> bool {
        timeout(STATE_TIMEOUT, self.process.ended()).await.is_ok()
    }

    async fn differences(&mut self) -> Result<Vec<ConfigChange>, MeasureError> {
        let facts = Facts::ask(&self.qmp).await.map_err(|e| MeasureError::of("monitor", e))?;
        let meter = VmMeter { qmp: &self.qmp, process: &self.process, digester: &self.env.digester, hot: true };
        let leaves = meter.leaves(&self.leaves).await?;
        let mut changes = change::outline(&self.facts, &facts);
        let different = LeafChanges::between(&self.leaves, &leaves);
        if !different.is_empty() {
            let mut kept = Vec::new();
            for leaf in &different.other {
                let before = self.leaves.iter().find(|l| l.slot == leaf.slot).map(change::in_words);
                let (before, mut after) = (before.unwrap_or_default(), change::in_words(leaf));
                if before == after {
                    after += ", another file of that name";
                }
                let (what, images) = match meter.measure_leaves(std::slice::from_ref(leaf)).await {
                    Ok((images, new)) => {
                        kept.extend(new);
                        ("image", images)
                    }
                    Err(e) if e.is_monitor() || self.ends().await => return Err(e),
                    // A disk that cannot be measured is a disk nevertheless.
                    Err(e) => {
                        after += &format!(": {e}");
                        (change::UNMEASURED, Vec::new())
                    }
                };
                changes.push(ConfigChange { what: what.to_owned(), before, after, images });
            }
            for gone in &different.gone {
                let (what, before) = ("image".to_owned(), change::in_words(gone));
                changes.push(ConfigChange { what, before, after: String::new(), images: Vec::new() });
            }
            let changed = |slot: &str| different.other.iter().chain(&different.gone).any(|l| l.slot == slot);
            self.kept.retain(|k| !changed(&k.image.slot));
            self.kept.extend(kept);
            self.kept.sort_by(|a, b| a.image.slot.cmp(&b.image.slot));
        }
        let run_state = facts.run_state.clone();
        (self.facts, self.leaves) = (facts, leaves);
        self.set_run_state(&run_state);
        Ok(changes)
    }
}
