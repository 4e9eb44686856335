//! Looking at a VM again: what is other than it was when it was measured, where QEMU raises no event for it.
//!
//! One look is one round trip to QEMU ([`Facts::again`]) and one pass over `/proc/PID/fd`. Only what changed is measured.
//! An image that goes is measured a last time, through the descriptor that was kept since it was measured first, so that
//! how the VM left it is known.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Instant,
};

use onequote_evidence::event::{EventBody, Image, MediumChange, SnapshotLoad, SnapshotSave};

use super::{
    change::{self, CHAIN, IMAGE, LeafChanges, SNAPSHOT, UNMEASURED},
    facts::{Drive, Facts, run_state},
    session::{MAX_PENDING, Session},
};
use crate::measure::{Kept, Leaf, MeasureError, VmMeter, drive_of};

/// How often a VM that changes all the time is looked at before what was seen last is taken.
const MAX_LOOKS: u32 = 3;

impl Session {
    /// Looks at the VM, if it is time to: when something happened, unless that was too often, or when the timer says so.
    pub(super) async fn look(&mut self) {
        let now = Instant::now();
        let due = now >= self.look_at;
        if due {
            self.look_at = self.env.pace.next(now);
        }
        if due || (self.recheck && self.life.looks.take(now)) {
            self.recheck = false;
            if self.life.incoming.is_some() {
                self.look_for_arrival().await;
            } else {
                self.compare().await;
            }
        }
    }

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
                    self.log(change::change(UNMEASURED, String::new(), e.to_string(), Vec::new()));
                }
                self.fail(error);
            }
        }
        self.flush().await;
    }

    /// Whether the process is about to end: it closes its files before, and answers nothing then.
    pub(super) async fn ends(&self) -> bool {
        tokio::select! {
            () = self.process.ended() => true,
            state = run_state(&self.qmp) => state.is_err(),
        }
    }

    async fn differences(&mut self) -> Result<Vec<EventBody>, MeasureError> {
        let (facts, leaves) = self.settled_look().await?;
        // Events that QEMU raised before it answered tell their part first.
        while self.outbox.len() < MAX_PENDING
            && let Some(event) = self.waiting_event()
        {
            self.take_event(event).await;
        }
        self.compare_run_state(&facts.run_state).await;
        let different = LeafChanges::between(&self.leaves, &leaves);
        let mut changes: Vec<EventBody> = Vec::new();
        changes.extend(change::outline(&self.facts, &facts).into_iter().map(EventBody::from));

        let mut exchange = Exchange { before: &self.leaves, now: &leaves, ..Exchange::default() };
        let mut drives = different.drives();
        for (before, now) in trays(&self.facts.drives, &facts.drives) {
            let slots = [before, now].map(|drive| drive.map(|d| d.slot.as_str()).unwrap_or_default());
            let turned = before.zip(now).is_some_and(|(before, now)| before.tray_open != now.tray_open);
            if turned || slots.iter().any(|slot| drives.contains(slot)) {
                changes.extend(self.medium_change(&mut exchange, before, now).await?);
            }
            for slot in slots {
                drives.remove(slot);
            }
        }
        for drive in drives {
            self.drive_change(&mut exchange, drive, &mut changes).await?;
        }
        let Exchange { images, kept, .. } = exchange;
        let slots = different.slots();
        changes.extend(change::sizes(&self.facts, &facts, &slots).into_iter().map(EventBody::from));
        changes.extend(self.snapshot_changes(&facts, &leaves, &slots).await?);

        self.images.retain(|i| !slots.contains(i.slot.as_str()));
        self.images.extend(images);
        self.kept.retain(|k| !slots.contains(k.image.slot.as_str()));
        self.kept.extend(kept);
        self.kept.sort_by(|a, b| a.image.slot.cmp(&b.image.slot));
        self.writers.retain(|slot, _| !slots.contains(slot.as_str()));
        self.note_writers();
        (self.facts, self.leaves) = (facts, leaves);
        self.note_resting();
        Ok(changes)
    }

    /// Looks once; and where something is other than it was, until two looks say the same: between the answers that make
    /// a look somebody may have given a command.
    async fn settled_look(&self) -> Result<(Facts, Vec<Leaf>), MeasureError> {
        let mut last = self.one_look().await?;
        for _ in 0..MAX_LOOKS {
            if last.0 == self.facts && last.1 == self.leaves {
                break;
            }
            let next = self.one_look().await?;
            let settled = next == last;
            last = next;
            if settled {
                break;
            }
        }
        Ok(last)
    }

    async fn one_look(&self) -> Result<(Facts, Vec<Leaf>), MeasureError> {
        let (facts, graph) = self.facts.again(&self.qmp).await.map_err(|e| MeasureError::of("monitor", e))?;
        let leaves = self.meter(true).leaves_of(&graph, &self.leaves).await?;
        Ok((facts, leaves))
    }

    /// What changed behind a drive whose medium cannot be changed.
    async fn drive_change(
        &self,
        exchange: &mut Exchange<'_>,
        drive: &str,
        changes: &mut Vec<EventBody>,
    ) -> Result<(), MeasureError> {
        let (before, now) = (of_drive(exchange.before, drive), of_drive(exchange.now, drive));
        let error = self.measure_new(exchange, &now).await?;
        let (stay, go): (Vec<_>, Vec<_>) =
            before.iter().cloned().partition(|old| now.iter().any(|n| n.slot == old.slot));
        let (before, _) = self.as_left(exchange, &stay).await;
        if !go.is_empty() {
            let (gone, images) = self.as_left(exchange, &go).await;
            changes.push(change::change(IMAGE, gone, String::new(), images).into());
        }
        if stay.len() == now.len() && stay.iter().all(|leaf| now.contains(leaf)) {
            return Ok(());
        }
        let mut after = self.in_words(exchange, &now);
        if before == after {
            after += ", another file of that name";
        }
        let what = match (error, stay.is_empty()) {
            // A disk that cannot be measured is a disk nevertheless.
            (Some(error), _) => {
                after += &format!(": {error}");
                UNMEASURED
            }
            (None, true) => IMAGE,
            (None, false) => CHAIN,
        };
        let images = exchange.new_of(drive);
        changes.push(change::change(what, before, after, images).into());
        Ok(())
    }

    /// What changed in a drive whose medium can be changed.
    async fn medium_change(
        &self,
        exchange: &mut Exchange<'_>,
        before: Option<&Drive>,
        now: Option<&Drive>,
    ) -> Result<Option<EventBody>, MeasureError> {
        let slot_of = |drive: Option<&Drive>| drive.map(|d| d.slot.clone()).unwrap_or_default();
        let (old, new) = (of_drive(exchange.before, &slot_of(before)), of_drive(exchange.now, &slot_of(now)));
        let error = self.measure_new(exchange, &new).await?;
        let (mut old, _) = self.as_left(exchange, &old).await;
        let mut new = self.in_words(exchange, &new);
        for (words, drive) in [(&mut old, before), (&mut new, now)] {
            if drive.is_some_and(|drive| drive.tray_open) {
                words.push_str(if words.is_empty() { "tray open" } else { ", tray open" });
            }
        }
        let images = exchange.new_of(&slot_of(now));
        if let Some(error) = error {
            return Ok(Some(change::change(UNMEASURED, old, format!("{new}: {error}"), images).into()));
        }
        let (slot, before, after) = (slot_of(now.or(before)), change::bounded(old), change::bounded(new));
        Ok((before != after).then(|| MediumChange { slot, before, after, images }.into()))
    }

    /// Measures those of a drive's leaves that are new. Errors of the files themselves are told as text.
    async fn measure_new(&self, exchange: &mut Exchange<'_>, now: &[Leaf]) -> Result<Option<String>, MeasureError> {
        let mut error = None;
        for leaf in now.iter().filter(|leaf| !exchange.before.contains(leaf)) {
            match self.meter(true).measure_leaves(std::slice::from_ref(leaf)).await {
                Ok((images, kept)) => {
                    exchange.by_file.extend(leaf.file.zip(images.first().cloned()));
                    exchange.images.extend(images);
                    exchange.kept.extend(kept);
                }
                Err(e) if e.is_monitor() || self.ends().await => return Err(e),
                Err(e) => error = error.or(Some(e.to_string())),
            }
        }
        Ok(error)
    }

    /// Leaves as they were when they went or stopped being written, in words, and those of them that are known.
    async fn as_left(&self, exchange: &Exchange<'_>, leaves: &[Leaf]) -> (String, Vec<Image>) {
        let (mut words, mut images) = (Vec::new(), Vec::new());
        for leaf in leaves {
            let known = self.images.iter().find(|image| image.slot == leaf.slot).cloned();
            let kept = self.kept.iter().find(|kept| kept.image.slot == leaf.slot);
            let elsewhere = leaf.file.and_then(|file| exchange.by_file.get(&file));
            let left = match (known, elsewhere, kept) {
                (Some(known), ..) if leaf.read_only || exchange.now.contains(leaf) => Ok(known),
                (Some(known), Some(now), _) => Ok(Image { size: now.size, digest: now.digest, ..known }),
                (_, _, Some(kept)) => kept.measure_again(&self.env.digester).await.map_err(|e| e.to_string()),
                _ => Err("not measured".to_owned()),
            };
            let mut word = change::in_words(leaf);
            match left {
                Ok(image) => {
                    word += &format!(" {}", image.digest);
                    images.push(image);
                }
                Err(e) => word += &format!(" ({e})"),
            }
            words.push(word);
        }
        (words.join(" <- "), images)
    }

    /// Leaves as they are now, in words.
    fn in_words(&self, exchange: &Exchange<'_>, leaves: &[Leaf]) -> String {
        let word = |leaf: &Leaf| {
            let image = exchange.images.iter().chain(&self.images).find(|image| image.slot == leaf.slot);
            let digest = image.map(|image| format!(" {}", image.digest)).unwrap_or_default();
            format!("{}{digest}", change::in_words(leaf))
        };
        leaves.iter().map(word).collect::<Vec<_>>().join(" <- ")
    }

    /// Snapshots inside images that came and went, and whether the VM was put back to one.
    async fn snapshot_changes(
        &mut self,
        facts: &Facts,
        leaves: &[Leaf],
        exchanged: &BTreeSet<&str>,
    ) -> Result<Vec<EventBody>, MeasureError> {
        let mut changes: Vec<EventBody> = Vec::new();
        let found = change::snapshots(&self.facts, facts, exchanged);
        let words = |tag: &str, slots: &[&str]| format!("{}: {tag}", slots.join(", "));
        for (tag, slots) in &found.gone {
            changes.push(change::change(SNAPSHOT, words(tag, slots), String::new(), Vec::new()).into());
        }
        for (tag, slots) in &found.disks {
            changes.push(change::change(SNAPSHOT, String::new(), words(tag, slots), Vec::new()).into());
        }
        for (tag, slots) in &found.saved {
            let holds = |leaf: &&Leaf| slots.contains(&leaf.slot.as_str());
            let images = self.measure_some(leaves.iter().filter(holds), &mut changes).await?;
            changes.push(SnapshotSave { tag: (*tag).to_owned(), images }.into());
        }
        if std::mem::take(&mut self.life.saved) && found.saved.is_empty() {
            // It was saved, and the snapshot is gone again.
            changes.push(SnapshotSave { tag: String::new(), images: Vec::new() }.into());
        }
        if self.life.loaded && !self.life.loading() {
            self.life.loaded = false;
            // QEMU does not tell which; with one there is no doubt.
            let tag = match facts.states_saved()[..] {
                [tag] => tag.to_owned(),
                _ => String::new(),
            };
            let images = self.measure_some(leaves.iter().filter(|leaf| !leaf.read_only), &mut changes).await?;
            changes.push(SnapshotLoad { tag, images }.into());
        }
        Ok(changes)
    }

    /// Images that are what they were but for their content. Those that cannot be measured are changes of their own.
    async fn measure_some(
        &self,
        leaves: impl Iterator<Item = &Leaf>,
        changes: &mut Vec<EventBody>,
    ) -> Result<Vec<Image>, MeasureError> {
        let mut images = Vec::new();
        for leaf in leaves {
            match self.meter(true).measure_leaves(std::slice::from_ref(leaf)).await {
                Ok((new, _)) => images.extend(new),
                Err(e) if e.is_monitor() || self.ends().await => return Err(e),
                Err(e) => {
                    changes.push(change::change(UNMEASURED, change::in_words(leaf), e.to_string(), Vec::new()).into());
                }
            }
        }
        Ok(images)
    }

    pub(super) fn meter(&self, hot: bool) -> VmMeter<'_> {
        let trees = self.tracker.as_ref().and(self.env.config.trees.as_deref());
        VmMeter { qmp: &self.qmp, process: &self.process, digester: &self.env.digester, hot, trees }
    }
}

/// Images on their way from one look to the next.
#[derive(Default)]
struct Exchange<'a> {
    before: &'a [Leaf],
    now: &'a [Leaf],
    /// What was measured of the new ones.
    images: Vec<Image>,
    kept: Vec<Kept>,
    by_file: BTreeMap<(u64, u64), Image>,
}

impl Exchange<'_> {
    fn new_of(&self, drive: &str) -> Vec<Image> {
        self.images.iter().filter(|image| drive_of(&image.slot) == drive).cloned().collect()
    }
}

fn of_drive(leaves: &[Leaf], drive: &str) -> Vec<Leaf> {
    leaves.iter().filter(|leaf| drive_of(&leaf.slot) == drive).cloned().collect()
}

/// Every drive whose medium can be changed, as it was and as it is.
fn trays<'a>(
    before: &'a BTreeMap<String, Drive>,
    now: &'a BTreeMap<String, Drive>,
) -> impl Iterator<Item = (Option<&'a Drive>, Option<&'a Drive>)> {
    let backends: BTreeSet<&String> = before.keys().chain(now.keys()).collect();
    backends.into_iter().map(|backend| (before.get(backend), now.get(backend)))
}
