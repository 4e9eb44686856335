//! Reading at a VM's end only what its run changed.
//!
//! QEMU is asked for it where the proxy alone commands it: VMs that `launch` started and VMs that are intercepted, and no
//! others.
//!
//! # From start to end
//! 1. Before the images are measured, each that is written gets a dirty bitmap on the node that is its *file*, so that its
//!    offsets are those of what is digested, and a format's own tables count ([`Session::track`]). What is measured then has
//!    its tree kept. QEMU is told to stand still at power-off (`set-action`), as with `-no-shutdown`.
//! 2. When the guest has powered off, or before a tool's `quit` goes to QEMU, the VM stands still, what QEMU has in its own
//!    caches is written, and QEMU is asked what changed ([`Session::conclude`]). After power-off the proxy then gives the
//!    `quit`.
//! 3. When QEMU is gone, the digests are made ([`Kept::measure_changed`]), and the log says how.
//!
//! Wherever anything is missing or other than it was, the image is read whole and the log says why.
//!
//! # How QEMU tells
//! Its bitmaps can be read over NBD only. A node below a format that writes cannot be exported, and its content is nobody's
//! business: so each bitmap is merged into one on a node without content, and that one is exported. The NBD server listens
//! at a socket that the proxy has made and handed over, in a folder for the proxy alone.
//!
//! # What would go unseen, and is kept out
//! A bitmap does not tell of a file that became shorter and then longer again. No guest can do that; commands can. So of
//! commands to an intercepted monitor only those in a reviewed table leave the bitmaps of use
//! ([`crate::intercept`]). What another process writes is in no bitmap of this QEMU: where the proxy knows of
//! another VM that has the same file, both are read whole ([`Writers`]).

use std::{
    collections::{BTreeMap, HashMap},
    io,
    os::{
        fd::OwnedFd,
        unix::net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError, Weak,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use onequote_evidence::event::{HowRead, Image, ImageRead};
use onequote_verity::Changed;
use serde::de::IgnoredAny;
use serde_json::{Value, json};
use tokio::time::timeout;

use super::{intercepted::Hands, session::Session};
use crate::{
    intercept::Gate,
    measure::{self, BlockGraph, Dirty, Kept, Leaf, Stamp},
    nbd,
    qmp::{Answer, Passed, Qmp, QmpError},
};

/// What our bitmaps are called, and what the names of our nodes and exports begin with.
const NAME: &str = "onequote";

/// Bytes that one bit stands for: as much as a cluster of a qcow2 image, QEMU's own choice for most.
const GRANULARITY: u64 = 65_536;

/// How long asking QEMU may take at all. A VM's end is not held up for longer.
const LIMIT: Duration = Duration::from_secs(10);

/// How long QEMU's NBD server may be silent.
const SILENCE: Duration = Duration::from_secs(2);

/// What QEMU said when it did not.
const NOT_ASKED: &str = "QEMU ended before it was asked what changed";

/// What is tracked of a session.
pub(super) struct Tracker {
    /// QEMU was told to stand still at power-off.
    pub(super) holds: bool,
    bitmaps: Vec<Bitmap>,
    /// What QEMU said changed, by slot, once it was asked.
    told: Option<BTreeMap<String, Result<Dirty, String>>>,
}

/// One image's bitmap.
struct Bitmap {
    leaf: Leaf,
    node: String,
}

/// The files that QEMU's of this host write, as far as sessions know them.
#[derive(Debug, Default)]
pub(super) struct Writers {
    files: Mutex<HashMap<(u64, u64), Weak<Writer>>>,
}

/// One file that is written.
#[derive(Debug, Default)]
pub(super) struct Writer {
    several: AtomicBool,
}

impl Writers {
    /// Notes that a file is written from one place more.
    fn add(&self, file: (u64, u64)) -> Arc<Writer> {
        let mut files = self.files.lock().unwrap_or_else(PoisonError::into_inner);
        files.retain(|_, writer| writer.strong_count() > 0);
        if let Some(writer) = files.get(&file).and_then(Weak::upgrade) {
            writer.several.store(true, Ordering::SeqCst);
            return writer;
        }
        let writer = Arc::new(Writer::default());
        files.insert(file, Arc::downgrade(&writer));
        writer
    }
}

impl Tracker {
    /// Whether QEMU was asked what changed.
    pub(super) fn was_asked(&self) -> bool {
        self.told.is_some()
    }
}

impl Session {
    /// Has QEMU note what it writes, from before the images are measured. Where that fails, all is read at the end.
    pub(super) async fn track(&mut self, given: &measure::Arguments) {
        let before = self.tracker.take();
        if self.env.config.trees.is_none() || !self.monitors.is_empty() {
            return;
        }
        if self.door.is_none() && !self.process.was_launched() {
            return;
        }
        // What whoever started it says about its end stays.
        let own = ["action", "no-shutdown"].iter().any(|option| given.names.contains(*option));
        match self.try_to_track(own, before).await {
            Ok(tracker) => self.tracker = tracker,
            Err(e) => tracing::info!(vm = %self.name, "what it changes is not tracked: {e}"),
        }
    }

    async fn try_to_track(&self, own: bool, before: Option<Tracker>) -> Result<Option<Tracker>, String> {
        let words = |e: QmpError| e.to_string();
        let graph = BlockGraph::ask(&self.qmp).await.map_err(words)?;
        // Of a proxy before this one, or of an attempt before: they began earlier.
        for node in graph.with_bitmap(NAME) {
            let _: IgnoredAny = self.qmp.call("block-dirty-bitmap-remove", bitmap(&node)).await.map_err(words)?;
        }
        let leaves = self.meter(false).leaves_of(&graph, &[]).await.map_err(|e| e.to_string())?;
        let nodes = graph.leaf_nodes().map_err(|e| e.to_string())?;
        let mut bitmaps = Vec::new();
        for leaf in leaves.into_iter().filter(is_tracked) {
            let Some(node) = nodes.get(&leaf.slot).cloned() else { continue };
            bitmaps.push(Bitmap { leaf, node });
        }
        if bitmaps.is_empty() {
            return Ok(before.filter(|before| before.holds));
        }
        let add = |b: &Bitmap| {
            let data = json!({"node": b.node, "name": NAME, "granularity": GRANULARITY});
            json!({"type": "block-dirty-bitmap-add", "data": data})
        };
        let actions: Vec<Value> = bitmaps.iter().map(add).collect();
        let _: IgnoredAny = self.qmp.call("transaction", json!({ "actions": actions })).await.map_err(words)?;
        if !own {
            let _: IgnoredAny = self.qmp.call("set-action", json!({"shutdown": "pause"})).await.map_err(words)?;
        }
        if let Some(door) = &self.door {
            door.hold_end(!own);
        }
        Ok(Some(Tracker { holds: !own, bitmaps, told: None }))
    }

    /// A VM is met again: whatever was noted before is not whole, or nobody knows whether it is. QEMU ends by itself again;
    /// one that stands still for us already is ended.
    pub(super) async fn lose_track(&mut self, given: &measure::Arguments) {
        let held = self.tracker.take().is_some_and(|tracker| tracker.holds);
        let own = ["action", "no-shutdown"].iter().any(|option| given.names.contains(*option));
        let Ok(graph) = BlockGraph::ask(&self.qmp).await else { return };
        let nodes = graph.with_bitmap(NAME);
        if own || self.end_is_tools() || (nodes.is_empty() && !held) {
            return;
        }
        let back = self.qmp.call::<IgnoredAny>("set-action", json!({"shutdown": "poweroff"})).await;
        if let Err(e) = back {
            tracing::warn!(vm = %self.name, "it will stand still at power-off: {e}");
        }
        for node in nodes {
            // One that stays is of no use to anybody.
            let _ = self.qmp.call::<IgnoredAny>("block-dirty-bitmap-remove", bitmap(&node)).await;
        }
        if self.facts.run_state == "shutdown" {
            self.tracker = Some(Tracker { holds: true, bitmaps: Vec::new(), told: Some(BTreeMap::new()) });
            (self.life.off, self.life.to_end) = (true, true);
        }
    }

    /// Whether it is the proxy's to end QEMU when it stands still at power-off.
    pub(super) fn ends_after_power_off(&self) -> bool {
        self.tracker.as_ref().is_some_and(|tracker| tracker.holds) && !self.end_is_tools()
    }

    /// Whether a panicked guest that stands still does so only since it stands still at power-off, too (QEMU
    /// `softmmu/runstate.c`, `qemu_system_guest_panicked`).
    pub(super) fn ends_after_panic(&self) -> bool {
        let tools = self.door.as_ref().is_some_and(|door| door.hands().contains(&Hands::Panic));
        self.ends_after_power_off() && !tools
    }

    fn end_is_tools(&self) -> bool {
        self.door.as_ref().is_some_and(|door| door.hands().contains(&Hands::Shutdown))
    }

    /// Asks QEMU what changed, once, before it ends. Bounded.
    pub(super) async fn conclude(&mut self) {
        let Some(tracker) = self.tracker.as_ref().filter(|tracker| !tracker.was_asked()) else { return };
        tracing::info!(vm = %self.name, images = tracker.bitmaps.len(), "asking QEMU what changed before it ends");
        self.life.off = true;
        if let Some(door) = &self.door {
            door.end_begins();
        }
        let mut told = match timeout(LIMIT, self.ask(tracker)).await {
            Ok(Ok(told)) => told,
            Ok(Err(why)) => self.for_all(&why),
            Err(_) => self.for_all(&format!("QEMU did not say within {LIMIT:?} what changed")),
        };
        for (slot, told) in &mut told {
            let writer = self.writers.get(slot);
            if writer.is_none_or(|writer| writer.several.load(Ordering::SeqCst)) {
                *told = Err("another VM or another drive has the same file".to_owned());
            }
        }
        if let Some(tracker) = &mut self.tracker {
            tracker.told = Some(told);
        }
    }

    /// The VM has powered off and stands still: QEMU is ended.
    pub(super) async fn end_after_power_off(&mut self) {
        self.set_gate(Gate::Gone);
        self.conclude().await;
        match self.qmp.execute(qapi::qmp::quit {}).await {
            Ok(_) | Err(QmpError::Closed) => {}
            Err(e) => self.fail(format!("{} has powered off, but its QEMU does not end: {e}", self.name)),
        }
    }

    fn for_all(&self, why: &str) -> BTreeMap<String, Result<Dirty, String>> {
        self.kept.iter().map(|kept| (kept.image.slot.clone(), Err(why.to_owned()))).collect()
    }

    async fn ask(&self, tracker: &Tracker) -> Result<BTreeMap<String, Result<Dirty, String>>, String> {
        if let Some(door) = &self.door
            && let Some(Hands::Images(command)) = door.hands().iter().find(|hands| matches!(hands, Hands::Images(_)))
        {
            return Err(format!("{command} was given, which may do more to images than QEMU notes"));
        }
        let words = |e: QmpError| e.to_string();
        // Also of one that stands still: QEMU writes what it has in its caches.
        self.qmp.execute(qapi::qmp::stop {}).await.map_err(words)?;
        let graph = BlockGraph::ask(&self.qmp).await.map_err(words)?;
        let leaves = self.meter(false).leaves_of(&graph, &self.leaves).await.map_err(|e| e.to_string())?;
        let (nodes, noted) = (graph.leaf_nodes().map_err(|e| e.to_string())?, graph.with_bitmap(NAME));
        let (mut told, mut asked) = (BTreeMap::new(), Vec::new());
        for kept in &self.kept {
            let slot = &kept.image.slot;
            let quiet = match tracked(&tracker.bitmaps, slot, &leaves, &nodes, &noted) {
                Err(why) => Err(why.to_owned()),
                Ok(_) if kept.saved.is_none() => Err("its tree was not kept".to_owned()),
                Ok(b) => quiet(kept).await.map(|quiet| (quiet, b.node.clone())),
            };
            match quiet {
                Ok((quiet, node)) => asked.push((slot.clone(), node, quiet)),
                Err(why) => drop(told.insert(slot.clone(), Err(why))),
            }
        }
        if !asked.is_empty() {
            let server = Server::start(&self.qmp, &self.env.config.dir, &self.name).await?;
            for (n, (slot, node, quiet)) in asked.into_iter().enumerate() {
                let changed = server.changed(&self.qmp, n, &node, quiet.size()).await;
                told.insert(slot, changed.map(|changed| Dirty { changed, quiet }));
            }
        }
        Ok(told)
    }

    /// Every image that QEMU could write as it left it, how that was found out, and what cannot be measured.
    pub(super) async fn measure_left(&mut self) -> (Vec<Image>, Vec<ImageRead>, Vec<String>) {
        let Some(tracker) = self.tracker.take() else {
            let (images, unmeasured) = self.measure_kept().await;
            return (images, Vec::new(), unmeasured);
        };
        let mut told = tracker.told.unwrap_or_else(|| self.for_all(NOT_ASKED));
        let (mut images, mut read, mut unmeasured) = (Vec::new(), Vec::new(), Vec::new());
        for kept in &self.kept {
            let slot = kept.image.slot.clone();
            let said = told.remove(&slot).unwrap_or_else(|| Err("QEMU was not asked about it".to_owned()));
            match kept.measure_changed(&self.env.digester, said).await {
                Ok((image, how)) => {
                    let (how, bytes, why) = match how.read {
                        Ok(bytes) => (HowRead::Changed, bytes, String::new()),
                        Err(why) => (HowRead::Full, image.size, super::change::bounded(why)),
                    };
                    tracing::info!(vm = %self.name, slot, %how, bytes, why, "measured at its end");
                    read.push(ImageRead { slot, how, bytes, why });
                    images.push(image);
                }
                Err(e) => unmeasured.push(e.to_string()),
            }
        }
        (images, read, unmeasured)
    }

    /// Notes which files this QEMU writes.
    pub(super) fn note_writers(&mut self) {
        let file = |kept: &Kept| kept.file.metadata().ok().map(|m| Stamp::from(&m).file);
        self.writers.retain(|slot, _| self.kept.iter().any(|kept| &kept.image.slot == slot));
        for kept in &self.kept {
            if !self.writers.contains_key(&kept.image.slot)
                && let Some(file) = file(kept)
            {
                self.writers.insert(kept.image.slot.clone(), self.env.writers.add(file));
            }
        }
    }
}

/// The bitmap of an image, if QEMU still has it where it was made: what goes by a mirror or a commit to another node, or
/// loses its bitmap, was not noted.
fn tracked<'b>(
    bitmaps: &'b [Bitmap],
    slot: &str,
    leaves: &[Leaf],
    nodes: &BTreeMap<String, String>,
    noted: &[String],
) -> Result<&'b Bitmap, &'static str> {
    let bitmap = bitmaps.iter().find(|b| b.leaf.slot == slot).ok_or("it is not tracked")?;
    if !leaves.contains(&bitmap.leaf) || nodes.get(slot) != Some(&bitmap.node) {
        return Err("it is at another place of the block graph");
    }
    if !noted.contains(&bitmap.node) {
        return Err("its bitmap is gone");
    }
    Ok(bitmap)
}

/// Whether what is written to a leaf can be noted: a file with a format that never makes it shorter by itself.
fn is_tracked(leaf: &Leaf) -> bool {
    !leaf.read_only && leaf.protocol == "file" && matches!(leaf.format.as_str(), "raw" | "qcow2")
}

fn bitmap(node: &str) -> Value {
    json!({"node": node, "name": NAME})
}

async fn quiet(kept: &Kept) -> Result<measure::Quiet, String> {
    let file = Arc::clone(&kept.file);
    let quiet = tokio::task::spawn_blocking(move || measure::quiet(&file)).await;
    quiet.map_err(|e| e.to_string()).and_then(|quiet| quiet)
}

/// QEMU's NBD server. It ends with QEMU.
struct Server {
    path: PathBuf,
}

impl Drop for Server {
    fn drop(&mut self) {
        // Left behind, the next one of the VM takes its place.
        let _ = std::fs::remove_file(&self.path);
    }
}

impl Server {
    /// Has QEMU serve at a socket of ours.
    async fn start(qmp: &Qmp, dir: &Path, name: &str) -> Result<Self, String> {
        let path = dir.join(format!("{name}.nbd"));
        match std::fs::remove_file(&path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(format!("{}: {e}", path.display())),
            _ => {}
        }
        let socket = UnixListener::bind(&path).map_err(|e| format!("{}: {e}", path.display()))?;
        let server = Self { path };
        let named = json!({ "fdname": NAME });
        let Value::Object(arguments) = named else { return Err("no arguments".to_owned()) };
        let getfd = Passed {
            command: "getfd".to_owned(),
            arguments: Some(arguments),
            oob: false,
            fd: Some(OwnedFd::from(socket)),
        };
        match qmp.pass(getfd).await.map_err(|e| e.to_string())? {
            Answer::Return(_) => {}
            Answer::Error(e) => return Err(format!("QEMU does not take a socket: {}", e.desc)),
        }
        let start = json!({"addr": {"type": "fd", "data": {"str": NAME}}});
        qmp.call::<IgnoredAny>("nbd-server-start", start).await.map_err(|e| e.to_string())?;
        Ok(server)
    }

    /// What a node's bitmap says. `n` is a number of its own, `size` the file's in bytes.
    async fn changed(&self, qmp: &Qmp, n: usize, node: &str, size: u64) -> Result<Changed, String> {
        let own = format!("{NAME}-{n}");
        let steps = [
            ("blockdev-add", json!({"driver": "null-co", "node-name": own, "size": size, "read-zeroes": true})),
            (
                "block-dirty-bitmap-add",
                json!({"node": own, "name": NAME, "granularity": GRANULARITY, "disabled": true}),
            ),
            ("block-dirty-bitmap-merge", json!({"node": own, "target": NAME, "bitmaps": [bitmap(node)]})),
            ("block-export-add", json!({"type": "nbd", "id": own, "node-name": own, "name": own, "bitmaps": [NAME]})),
        ];
        for (command, arguments) in steps {
            qmp.call::<IgnoredAny>(command, arguments).await.map_err(|e| e.to_string())?;
        }
        let path = self.path.clone();
        let read = tokio::task::spawn_blocking(move || read_bitmap(&path, &own)).await.map_err(|e| e.to_string())?;
        let (seen, changed) = read.map_err(|e| format!("the bitmap cannot be read: {e}"))?;
        // QEMU counts in sectors.
        if seen == size.next_multiple_of(512) { Ok(changed) } else { Err("its size is not what QEMU says".to_owned()) }
    }
}

/// The size of an export, and what its bitmap says.
fn read_bitmap(path: &Path, export: &str) -> Result<(u64, Changed), nbd::NbdError> {
    let mut stream = UnixStream::connect(path)?;
    stream.set_read_timeout(Some(SILENCE))?;
    stream.set_write_timeout(Some(SILENCE))?;
    let mut changed = Changed::default();
    let context = format!("qemu:dirty-bitmap:{NAME}");
    let size = nbd::dirty_ranges(&mut stream, export, &context, |range| changed.add(range))?;
    nbd::disconnect(&mut stream);
    Ok((size, changed))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;

    #[test]
    fn a_bitmap_counts_only_where_it_was_made() {
        let leaf = |slot: &str, name: &str| Leaf {
            slot: slot.to_owned(),
            protocol: "file".to_owned(),
            name: name.to_owned(),
            format: "raw".to_owned(),
            read_only: false,
            file: Some((1, 2)),
        };
        let bitmaps = [Bitmap { leaf: leaf("disk", "/a"), node: "#1".to_owned() }];
        let at = |node: &str| BTreeMap::from([("disk".to_owned(), node.to_owned())]);
        let noted = ["#1".to_owned(), "#2".to_owned()];
        let leaves = [leaf("disk", "/a"), leaf("other", "/b")];
        let why = |slot: &str, leaves: &[Leaf], nodes, noted: &[String]| {
            tracked(&bitmaps, slot, leaves, &nodes, noted).map(|bitmap| bitmap.node.clone())
        };
        assert_eq!(why("disk", &leaves, at("#1"), &noted).unwrap(), "#1");
        assert_eq!(why("other", &leaves, at("#1"), &noted).unwrap_err(), "it is not tracked");
        // After a mirror to another file; after a snapshot or commit, to another node; another file by the same name.
        let elsewhere = "it is at another place of the block graph";
        assert_eq!(why("disk", &[leaf("disk", "/copy")], at("#1"), &noted).unwrap_err(), elsewhere);
        assert_eq!(why("disk", &leaves, at("#2"), &noted).unwrap_err(), elsewhere);
        assert_eq!(why("disk", &leaves, BTreeMap::new(), &noted).unwrap_err(), elsewhere);
        let replaced = [Leaf { file: Some((1, 3)), ..leaf("disk", "/a") }];
        assert_eq!(why("disk", &replaced, at("#1"), &noted).unwrap_err(), elsewhere);
        assert_eq!(why("disk", &leaves, at("#1"), &noted[1..]).unwrap_err(), "its bitmap is gone");
    }

    #[test]
    fn a_file_that_two_write_is_known_as_such_to_both() {
        let writers = Writers::default();
        let several = |writer: &Arc<Writer>| writer.several.load(Ordering::SeqCst);
        let (first, other) = (writers.add((1, 1)), writers.add((1, 2)));
        assert!(!several(&first) && !several(&other));
        let second = writers.add((1, 1));
        assert!(several(&first) && several(&second) && !several(&other));
        // It stays so after one of them is gone, and is forgotten with both.
        drop(second);
        assert!(several(&first));
        drop(first);
        assert!(!several(&writers.add((1, 1))));
    }
}
