//! Finding what QEMU gives no event for: differences between two looks at a VM.

use onequote_evidence::event::ConfigChange;

use super::facts::Facts;
use crate::measure::Leaf;

/// What changed where it could not be measured.
pub(super) const UNMEASURED: &str = "unmeasured image";

/// What changed in a VM's outline.
pub(super) fn outline(before: &Facts, now: &Facts) -> Vec<ConfigChange> {
    let mut changes = Vec::new();
    let mut add = |what: &str, before: String, after: String| {
        if before != after {
            changes.push(ConfigChange { what: what.to_owned(), before, after, images: Vec::new() });
        }
    };
    add("cpus", before.cpus.to_string(), now.cpus.to_string());
    add("memory", before.memory.to_string(), now.memory.to_string());
    for gone in before.devices.iter().filter(|d| !now.devices.contains(d)) {
        add("device", gone.clone(), String::new());
    }
    for new in now.devices.iter().filter(|d| !before.devices.contains(d)) {
        add("device", String::new(), new.clone());
    }
    changes
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

    pub(super) fn is_empty(&self) -> bool {
        self.other.is_empty() && self.gone.is_empty()
    }
}

/// A leaf in words.
pub(super) fn in_words(leaf: &Leaf) -> String {
    let mode = if leaf.read_only { "read-only" } else { "writable" };
    format!("{}: {} ({}, {mode})", leaf.slot, leaf.name, leaf.format)
}
