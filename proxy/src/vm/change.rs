//! Differences between two looks at a VM, in the words of the log. Pure: what is measured of them is up to
//! [`super::compare`].
//!
//! The words of [`ConfigChange::what`] are part of policies: they are listed in `docs/operations.md`.

use std::collections::{BTreeMap, BTreeSet};

use onequote_evidence::event::{ConfigChange, Image};

use super::{commanders::is_commander, facts::Facts};
use crate::measure::{Content, Leaf, Snapshot, drive_of};

/// What changed where it could not be measured.
pub(super) const UNMEASURED: &str = "unmeasured image";

/// The images behind a drive came, went, or moved to another drive.
pub(super) const IMAGE: &str = "image";

/// The chain of images behind a drive is another one.
pub(super) const CHAIN: &str = "chain";

/// A snapshot inside an image, of the disk alone, was made; or any snapshot was deleted.
pub(super) const SNAPSHOT: &str = "snapshot";

/// Another way to command QEMU came or went.
const MONITOR: &str = "monitor";

/// The longest text about one change.
const MAX_WORDS: usize = 4096;

/// What changed in a VM's outline.
pub(super) fn outline(before: &Facts, now: &Facts) -> Vec<ConfigChange> {
    let mut changes = Vec::new();
    let mut add = |what: &str, before: &str, after: &str| {
        if before != after {
            changes.push(change(what, before.to_owned(), after.to_owned(), Vec::new()));
        }
    };
    add("cpus", &before.cpus.to_string(), &now.cpus.to_string());
    add("memory", &before.memory.to_string(), &now.memory.to_string());
    for (what, before, now) in [
        ("object", &before.objects, &now.objects),
        ("chardev", &before.chardevs, &now.chardevs),
        ("netdev", &before.netdevs, &now.netdevs),
        ("device", &before.devices, &now.devices),
        ("block-export", &before.exports, &now.exports),
    ] {
        // A debugger that is opened while the VM runs is a character device first.
        let word = |d: &str| if what == "chardev" && is_commander(d) { MONITOR } else { what };
        before.iter().filter(|d| !now.contains(d)).for_each(|gone| add(word(gone), gone, ""));
        now.iter().filter(|d| !before.contains(d)).for_each(|new| add(word(new), "", new));
    }
    for ((what, before), (_, now)) in before.loaded().into_iter().zip(now.loaded()) {
        add(what, before, now);
    }
    changes
}

/// Slots whose content has another size now, except those in `exchanged`, which hold another file.
pub(super) fn sizes(before: &Facts, now: &Facts, exchanged: &BTreeSet<&str>) -> Vec<ConfigChange> {
    let in_both = both(&before.contents, &now.contents, exchanged);
    let resized = in_both.filter(|(_, before, now)| before.size != now.size);
    let words = |slot: &str, size: u64| format!("{slot}: {size}");
    resized.map(|(slot, b, n)| change("image-size", words(slot, b.size), words(slot, n.size), Vec::new())).collect()
}

/// Snapshots that came and went: in which slots, by tag.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct SnapshotChanges<'a> {
    /// Snapshots of a VM's state.
    pub(super) saved: BTreeMap<&'a str, Vec<&'a str>>,
    /// Snapshots of disks alone.
    pub(super) disks: BTreeMap<&'a str, Vec<&'a str>>,
    /// Those that are gone.
    pub(super) gone: BTreeMap<&'a str, Vec<&'a str>>,
}

/// Snapshots in slots that hold the same file as before.
pub(super) fn snapshots<'a>(before: &'a Facts, now: &'a Facts, exchanged: &BTreeSet<&str>) -> SnapshotChanges<'a> {
    let mut changes = SnapshotChanges::default();
    for (slot, before, now) in both(&before.contents, &now.contents, exchanged) {
        fn missing<'a>(from: &'a Content, other: &'a Content) -> impl Iterator<Item = &'a Snapshot> {
            from.snapshots.iter().filter(|s| !other.snapshots.contains(s))
        }
        for new in missing(now, before) {
            let list = if new.vm_state > 0 { &mut changes.saved } else { &mut changes.disks };
            list.entry(&new.name).or_default().push(slot);
        }
        for gone in missing(before, now) {
            changes.gone.entry(&gone.name).or_default().push(slot);
        }
    }
    // A VM's state stands in one image, and with the same tag in all others is what their disks were then.
    for (tag, slots) in &mut changes.saved {
        slots.extend(changes.disks.remove(tag).unwrap_or_default());
    }
    changes
}

fn both<'a>(
    before: &'a BTreeMap<String, Content>,
    now: &'a BTreeMap<String, Content>,
    exchanged: &BTreeSet<&str>,
) -> impl Iterator<Item = (&'a str, &'a Content, &'a Content)> {
    let same = now.iter().filter(|(slot, _)| !exchanged.contains(slot.as_str()));
    same.filter_map(|(slot, now)| Some((slot.as_str(), before.get(slot)?, now)))
}

/// A change, its texts cut at their bound.
pub(super) fn change(what: &str, before: String, after: String, images: Vec<Image>) -> ConfigChange {
    ConfigChange { what: what.to_owned(), before: bounded(before), after: bounded(after), images }
}

/// Cuts a text at its bound.
pub(super) fn bounded(mut text: String) -> String {
    if text.len() > MAX_WORDS {
        let end = (0..=MAX_WORDS).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0);
        text.truncate(end);
        text.push('…');
    }
    text
}

/// What changed in a block graph.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct LeafChanges {
    /// Leaves that are new or other than they were.
    pub(super) other: Vec<Leaf>,
    /// Leaves that are gone.
    pub(super) gone: Vec<Leaf>,
}

impl LeafChanges {
    pub(super) fn between(before: &[Leaf], now: &[Leaf]) -> Self {
        let other = now.iter().filter(|leaf| !before.contains(leaf)).cloned().collect();
        let gone = before.iter().filter(|leaf| now.iter().all(|n| n.slot != leaf.slot)).cloned().collect();
        Self { other, gone }
    }

    /// Every slot that is another one now.
    pub(super) fn slots(&self) -> BTreeSet<&str> {
        self.other.iter().chain(&self.gone).map(|leaf| leaf.slot.as_str()).collect()
    }

    /// The drives that these slots belong to.
    pub(super) fn drives(&self) -> BTreeSet<&str> {
        self.slots().into_iter().map(drive_of).collect()
    }
}

/// A leaf in words.
pub(super) fn in_words(leaf: &Leaf) -> String {
    let mode = if leaf.read_only { "read-only" } else { "writable" };
    format!("{}: {} ({}, {mode})", leaf.slot, leaf.name, leaf.format)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;

    /// Tag, bytes of the VM's state, and time.
    type Tags = [(&'static str, u64, i64)];

    fn facts(contents: &[(&str, &Tags)]) -> Facts {
        let snapshot = |&(name, vm_state, seconds): &(&str, u64, i64)| Snapshot {
            id: "1".into(),
            name: name.into(),
            vm_state,
            seconds,
            nanos: 0,
        };
        let content = |&(slot, list): &(&str, &Tags)| {
            (slot.to_owned(), Content { size: 1, snapshots: list.iter().map(snapshot).collect() })
        };
        Facts { contents: contents.iter().map(content).collect(), ..Facts::nothing() }
    }

    #[test]
    fn snapshots_are_told_by_tag_and_time() {
        let before = facts(&[("a", &[("old", 9, 1), ("again", 9, 1)]), ("b", &[("old", 0, 1)]), ("x", &[("x", 9, 1)])]);
        let now =
            facts(&[("a", &[("again", 9, 2), ("new", 9, 2)]), ("b", &[("new", 0, 2), ("disk", 0, 2)]), ("x", &[])]);
        let changes = snapshots(&before, &now, &["x"].into());
        assert_eq!(changes.saved, [("again", vec!["a"]), ("new", vec!["a", "b"])].into());
        assert_eq!(changes.disks, [("disk", vec!["b"])].into());
        assert_eq!(changes.gone, [("again", vec!["a"]), ("old", vec!["a", "b"])].into());
        assert_eq!(before.states_saved(), ["again", "old", "x"]);
    }

    #[test]
    fn texts_are_bounded() {
        assert_eq!(bounded("ä".into()), "ä");
        let long = bounded("ä".repeat(MAX_WORDS));
        assert!(long.len() <= MAX_WORDS + 3 && long.ends_with('…'));
    }
}
