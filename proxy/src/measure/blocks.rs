//! QEMU's block graph, and the files at its leaves.
//!
//! A device's *backend* has a root node; format nodes have children (`file`, `backing`, `data-file`), and the nodes
//! without children are protocols: a local file, a block device, or something over a network. Each leaf that is
//! reached from a root is one [`Leaf`], under a slot that is the same at each start: the backend's name for the top,
//! `/1`, `/2`, … for backing files, `+data` for external data files.

use std::collections::{BTreeMap, BTreeSet};

use serde::Deserialize;
use serde_json::json;

use super::{MeasureError, MeasureErrorKind};
use crate::qmp::{Qmp, QmpError};

/// The deepest graph that is followed.
const MAX_DEPTH: usize = 256;

/// The most leaves over all roots: a graph in which many nodes share children must not blow up.
const MAX_LEAVES: usize = 4096;

/// Drivers that QEMU puts above a chain while a job works on it, and takes away again. What they stand on is their
/// `backing` child (QEMU `block/mirror.c`, `block/commit.c`).
const JOB_FILTERS: [&str; 2] = ["mirror_top", "commit_top"];

/// The block graph as QEMU tells it.
#[derive(Debug, Clone)]
pub struct BlockGraph {
    graph: Graph,
    named: BTreeMap<String, Node>,
}

/// One node without children, as seen from one root.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Leaf {
    /// The slot.
    pub slot: String,
    /// The protocol's driver: `file`, `host_device`, `nbd`, …
    pub protocol: String,
    /// What the node names; a path for local files.
    pub name: String,
    /// The format's driver: `raw`, `qcow2`; several, from the top, where they are stacked: `copy-on-read+qcow2`.
    pub format: String,
    /// Whether QEMU may not write it.
    pub read_only: bool,
    /// Device and inode of the file that QEMU holds there, once it was looked for: the same name can come to name
    /// another file.
    pub file: Option<(u64, u64)>,
}

impl BlockGraph {
    /// Asks QEMU for it.
    ///
    /// # Errors
    /// When QEMU does not answer, or with what is not understood.
    pub async fn ask(qmp: &Qmp) -> Result<Self, QmpError> {
        // The only command of QEMU 7.2 that tells who is whose child. `qapi`'s types for both commands hold much that
        // changes from one version of QEMU to the next and is not needed here.
        let graph = qmp.call("x-debug-query-block-graph", json!({}));
        let named = qmp.call::<Vec<Node>>("query-named-block-nodes", json!({"flat": true}));
        let (graph, named) = tokio::try_join!(graph, named)?;
        Ok(Self { graph, named: named.into_iter().map(|n| (n.name.clone(), n)).collect() })
    }

    /// Every leaf from every root, in ascending order of slots.
    ///
    /// # Errors
    /// When the graph is not understood, or goes over the limits.
    pub fn leaves(&self) -> Result<Vec<Leaf>, MeasureError> {
        Ok(self.walk()?.leaves.into_values().collect())
    }

    /// The names of the leaves' nodes, by slot.
    ///
    /// # Errors
    /// As [`Self::leaves`].
    pub fn leaf_nodes(&self) -> Result<BTreeMap<String, String>, MeasureError> {
        Ok(self.walk()?.nodes)
    }

    /// Nodes that have a dirty bitmap of this name.
    #[must_use]
    pub fn with_bitmap(&self, name: &str) -> Vec<String> {
        let has = |node: &&Node| node.dirty_bitmaps.iter().any(|bitmap| bitmap.name.as_deref() == Some(name));
        self.named.values().filter(has).map(|node| node.name.clone()).collect()
    }

    /// What the topmost node in each slot says of its content.
    ///
    /// # Errors
    /// As [`Self::leaves`].
    pub fn contents(&self) -> Result<BTreeMap<String, Content>, MeasureError> {
        Ok(self.walk()?.contents)
    }

    fn walk(&self) -> Result<Walk<'_>, MeasureError> {
        let mut walk = Walk {
            graph: self,
            children: BTreeMap::new(),
            leaves: BTreeMap::new(),
            nodes: BTreeMap::new(),
            contents: BTreeMap::new(),
        };
        let mut owned = BTreeSet::new();
        let drivers: BTreeMap<u64, &str> =
            self.graph.nodes.iter().filter(|n| n.kind == "block-driver").map(|n| (n.id, n.name.as_str())).collect();
        let mut roots = BTreeMap::new();
        for edge in &self.graph.edges {
            if drivers.contains_key(&edge.parent) {
                walk.children.entry(edge.parent).or_default().push((&edge.name, edge.child));
                owned.insert(edge.child);
            }
        }
        for node in self.graph.nodes.iter().filter(|n| n.kind == "block-backend") {
            for edge in self.graph.edges.iter().filter(|e| e.parent == node.id) {
                let root = drivers.get(&edge.child).copied().unwrap_or_default();
                roots.insert((slot_name(&node.name, root), edge.child), ());
                owned.insert(edge.child);
            }
        }
        for (&id, &name) in drivers.iter().filter(|(id, _)| !owned.contains(*id)) {
            roots.insert((name.to_owned(), id), ());
        }
        for (slot, id) in roots.into_keys() {
            walk.visit(id, &slot, &slot, 0, &[], false, 0)?;
        }
        Ok(walk)
    }
}

struct Walk<'a> {
    graph: &'a BlockGraph,
    children: BTreeMap<u64, Vec<(&'a str, u64)>>,
    leaves: BTreeMap<String, Leaf>,
    nodes: BTreeMap<String, String>,
    contents: BTreeMap<String, Content>,
}

impl Walk<'_> {
    /// Follows one node. `base` and `depth` make the slot of backing files, `formats` are the drivers above.
    #[expect(clippy::too_many_arguments, reason = "one private recursion")]
    fn visit(
        &mut self,
        id: u64,
        base: &str,
        slot: &str,
        depth: usize,
        formats: &[&str],
        read_only: bool,
        level: usize,
    ) -> Result<(), MeasureError> {
        let strange = |what: &str| MeasureError::of(slot, MeasureErrorKind::Unsupported(what.to_owned()));
        if level > MAX_DEPTH {
            return Err(strange(&format!("its chain of images is deeper than {MAX_DEPTH} nodes, or goes in a circle")));
        }
        if self.leaves.len() > MAX_LEAVES {
            return Err(strange(&format!("the VM has more than {MAX_LEAVES} files in its block graph")));
        }
        let graph = self.graph;
        let name = graph.graph.nodes.iter().find(|n| n.id == id).map(|n| n.name.as_str());
        let node = name.and_then(|n| graph.named.get(n)).ok_or_else(|| strange("the block graph changed meanwhile"))?;
        let read_only = read_only || node.read_only;
        if let Some(content) = &node.image {
            self.contents.entry(slot.to_owned()).or_insert_with(|| content.clone());
        }
        let Some(children) = self.children.get(&id).cloned() else {
            let format = if formats.is_empty() { node.driver.clone() } else { formats.join("+") };
            let leaf = Leaf {
                slot: slot.to_owned(),
                protocol: node.driver.clone(),
                name: node.file.clone(),
                format,
                read_only,
                file: None,
            };
            return self.add(leaf, &node.name);
        };
        if node.driver == "vvfat" {
            return Err(strange("a folder shown as a disk (vvfat) is no file"));
        }
        let mut formats = formats.to_vec();
        let of_job = JOB_FILTERS.contains(&node.driver.as_str());
        if !of_job {
            formats.push(&node.driver);
        }
        for (child, child_id) in children {
            match child {
                "backing" if of_job => self.visit(child_id, base, slot, depth, &formats, read_only, level + 1)?,
                "file" => self.visit(child_id, base, slot, depth, &formats, read_only, level + 1)?,
                "backing" => {
                    let next = format!("{base}/{}", depth + 1);
                    self.visit(child_id, base, &next, depth + 1, &[], false, level + 1)?;
                }
                "data-file" => {
                    self.visit(child_id, base, &format!("{slot}+data"), depth, &["raw"], read_only, level + 1)?;
                }
                other => {
                    let inner = format!("{slot}.{other}");
                    self.visit(child_id, &inner, &inner, 0, &formats, read_only, level + 1)?;
                }
            }
        }
        Ok(())
    }

    /// Adds a leaf; a second one in the same slot gets a number unless it is the same.
    fn add(&mut self, mut leaf: Leaf, node: &str) -> Result<(), MeasureError> {
        let slot = leaf.slot.clone();
        for n in 2.. {
            match self.leaves.get(&leaf.slot) {
                None => break,
                Some(other) if *other == leaf => return Ok(()),
                Some(_) => leaf.slot = format!("{slot}#{n}"),
            }
        }
        self.nodes.insert(leaf.slot.clone(), node.to_owned());
        self.leaves.insert(leaf.slot.clone(), leaf);
        Ok(())
    }
}

/// The name of a backend's slot: the drive's id, else the device's id, else the root node's name if it was given, else
/// the device's place.
pub(crate) fn slot_name(backend: &str, root_node: &str) -> String {
    let device = backend.strip_suffix("/virtio-backend").unwrap_or(backend);
    let given = |name: &str| !name.is_empty() && !name.starts_with('#');
    if let Some(id) = device.strip_prefix("/machine/peripheral/") {
        id.to_owned()
    } else if !device.starts_with('/') && given(device) {
        device.to_owned()
    } else if given(root_node) {
        root_node.to_owned()
    } else {
        // A job's target has no name at all.
        let last = device.rsplit('/').next().unwrap_or(device);
        if last.is_empty() { "unnamed" } else { last }.to_owned()
    }
}

/// The drive that a slot belongs to: the slot of its top.
pub(crate) fn drive_of(slot: &str) -> &str {
    slot.split(['/', '+']).next().unwrap_or(slot)
}

#[derive(Debug, Clone, Deserialize)]
struct Graph {
    nodes: Vec<GraphNode>,
    edges: Vec<Edge>,
}

#[derive(Debug, Clone, Deserialize)]
struct GraphNode {
    id: u64,
    #[serde(rename = "type")]
    kind: String,
    name: String,
}

#[derive(Debug, Clone, Deserialize)]
struct Edge {
    parent: u64,
    child: u64,
    name: String,
}

#[derive(Debug, Clone, Deserialize)]
struct Node {
    #[serde(rename = "node-name")]
    name: String,
    #[serde(rename = "drv")]
    driver: String,
    file: String,
    #[serde(rename = "ro")]
    read_only: bool,
    image: Option<Content>,
    #[serde(rename = "dirty-bitmaps", default)]
    dirty_bitmaps: Vec<DirtyBitmap>,
}

/// A dirty bitmap; some have no name.
#[derive(Debug, Clone, Deserialize)]
struct DirtyBitmap {
    name: Option<String>,
}

/// What a format says of an image's content, as the guest sees it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
pub struct Content {
    /// Its size in bytes.
    #[serde(rename = "virtual-size", default)]
    pub size: u64,
    /// Snapshots inside the image.
    #[serde(default)]
    pub snapshots: Vec<Snapshot>,
}

/// A snapshot inside an image (QEMU `qapi/block-core.json`, `SnapshotInfo`).
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
pub struct Snapshot {
    /// QEMU's number for it.
    pub id: String,
    /// Its tag.
    pub name: String,
    /// Bytes of the VM's own state in it; 0 when it is of the disk alone.
    #[serde(rename = "vm-state-size")]
    pub vm_state: u64,
    /// When it was made: a tag can be used again.
    #[serde(rename = "date-sec")]
    pub seconds: i64,
    /// The same, nanoseconds.
    #[serde(rename = "date-nsec")]
    pub nanos: i64,
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;

    fn graph(
        nodes: &[(u64, &str, &str)],
        edges: &[(u64, u64, &str)],
        named: &[(&str, &str, &str, bool)],
    ) -> BlockGraph {
        let node = |&(id, kind, name): &(u64, &str, &str)| GraphNode { id, kind: kind.into(), name: name.into() };
        let edge = |&(parent, child, name): &(u64, u64, &str)| Edge { parent, child, name: name.into() };
        let named = named.iter().map(|&(name, driver, file, read_only)| {
            (
                name.to_owned(),
                Node {
                    name: name.into(),
                    driver: driver.into(),
                    file: file.into(),
                    read_only,
                    image: None,
                    dirty_bitmaps: Vec::new(),
                },
            )
        });
        BlockGraph {
            graph: Graph { nodes: nodes.iter().map(node).collect(), edges: edges.iter().map(edge).collect() },
            named: named.collect(),
        }
    }

    fn slots(graph: &BlockGraph) -> Vec<(String, String, String, bool)> {
        graph.leaves().unwrap().into_iter().map(|l| (l.slot, l.name, l.format, l.read_only)).collect()
    }

    #[test]
    fn a_chain_with_data_file() {
        const D: &str = "block-driver";
        let g = graph(
            &[(1, "block-backend", "disk0"), (2, D, "#q"), (3, D, "#f"), (4, D, "#b"), (5, D, "#bf"), (6, D, "#d")],
            &[(1, 2, "root"), (2, 3, "file"), (2, 4, "backing"), (4, 5, "file"), (2, 6, "data-file")],
            &[
                ("#q", "qcow2", "top", false),
                ("#f", "file", "top", false),
                ("#b", "raw", "base", true),
                ("#bf", "file", "base", true),
                ("#d", "file", "data", false),
            ],
        );
        let leaf = |slot: &str, name: &str, format: &str, ro| (slot.to_owned(), name.to_owned(), format.to_owned(), ro);
        assert_eq!(
            slots(&g),
            [
                leaf("disk0", "top", "qcow2", false),
                leaf("disk0+data", "data", "raw", false),
                leaf("disk0/1", "base", "raw", true),
            ]
        );
    }

    #[test]
    fn a_job_does_not_change_the_chain_that_it_works_on() {
        const D: &str = "block-driver";
        let g = graph(
            &[(1, "block-backend", "disk0"), (2, D, "#m"), (3, D, "#q"), (4, D, "#f")],
            &[(1, 2, "root"), (2, 3, "backing"), (3, 4, "file")],
            &[("#m", "mirror_top", "top", false), ("#q", "qcow2", "top", false), ("#f", "file", "top", false)],
        );
        assert_eq!(slots(&g), [("disk0".to_owned(), "top".to_owned(), "qcow2".to_owned(), false)]);
    }

    #[test]
    fn a_cycle_is_an_error() {
        let g = graph(
            &[(1, "block-backend", "x"), (2, "block-driver", "a"), (3, "block-driver", "b")],
            &[(1, 2, "root"), (2, 3, "file"), (3, 2, "file")],
            &[("a", "raw", "", false), ("b", "raw", "", false)],
        );
        assert!(g.leaves().unwrap_err().to_string().starts_with("x: "));
    }

    #[test]
    fn names_of_slots() {
        for (backend, root, slot) in [
            ("disk0", "#block1", "disk0"),
            ("/machine/peripheral/d1/virtio-backend", "n", "d1"),
            ("/machine/peripheral-anon/device[0]/virtio-backend", "n1", "n1"),
            ("/machine/peripheral-anon/device[0]/virtio-backend", "#block1", "device[0]"),
            ("/machine/system.flash0", "#block1", "system.flash0"),
            ("", "exported", "exported"),
            ("", "#block1", "unnamed"),
        ] {
            assert_eq!(slot_name(backend, root), slot);
        }
    }

    #[test]
    fn drives_of_slots() {
        for (slot, drive) in [("disk", "disk"), ("disk/12", "disk"), ("disk+data", "disk"), ("a.file/1+data", "a.file")]
        {
            assert_eq!(drive_of(slot), drive);
        }
    }
}
