//! Measuring one VM.

use std::{
    collections::HashMap,
    ffi::OsString,
    fs::File,
    io,
    os::unix::{ffi::OsStrExt, fs::MetadataExt},
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};

use onequote_evidence::{
    digest::{FileDigest, FileDigestAlg, sha256},
    event::{Component, Image, Role},
};
use tokio::io::AsyncReadExt;

use super::{
    Arguments, BlockGraph, Digester, Held, Leaf, Lookup, MeasureError, MeasureErrorKind, MeasuredFile, Process,
    Program, Told,
    args::{absolute, in_data_dirs},
    file::{Saved, measure_and_save, measure_open, measure_path, newest_link, open},
    loaded, roms,
    slots::Placed,
};
use crate::qmp::Qmp;

/// The longest text that is logged with a component. A longer one is logged by its digest alone.
const MAX_TEXT: usize = 64 * 1024;

/// How exactly a process' start is known.
pub(super) const START_SLACK: Duration = Duration::from_millis(50);

/// The longest configuration file that is searched for the names of further files.
const MAX_CONFIG: u64 = 1024 * 1024;

/// Everything that a VM starts from.
#[derive(Debug, Clone)]
pub struct Measurement {
    /// Parts that are not disk images.
    pub components: Vec<Component>,
    /// Every file of every block chain, in ascending order of slots.
    pub images: Vec<Image>,
    /// The writable ones among them, kept open.
    pub kept: Vec<Kept>,
    /// The block graph's leaves that the images are the files of.
    pub leaves: Vec<Leaf>,
}

/// An image that stays open, so that its inode can be measured again when QEMU is gone.
#[derive(Debug, Clone)]
pub struct Kept {
    /// As it was measured.
    pub image: Image,
    /// The file, open for reading.
    pub file: Arc<File>,
    /// The tree of its digest, where it was kept.
    pub saved: Option<Saved>,
}

impl Kept {
    /// Measures it again.
    ///
    /// # Errors
    /// When it cannot be read or changes meanwhile.
    pub async fn measure_again(&self, digester: &Digester) -> Result<Image, MeasureError> {
        let fail = |kind: MeasureErrorKind| MeasureError::new(&self.image.slot, Path::new(&self.image.path), kind);
        let file = self.file.try_clone().map_err(|e| fail(e.into()))?;
        let now = measure_open(digester, file, FileDigestAlg::FsVerity, false, None).await.map_err(fail)?;
        Ok(Image { size: now.size, digest: now.digest, ..self.image.clone() })
    }
}

/// A measured part, still open.
#[derive(Debug, Clone)]
pub(super) struct Part {
    pub(super) component: Component,
    pub(super) file: Arc<File>,
}

/// Measures one VM's parts.
pub struct VmMeter<'a> {
    /// The VM's monitor.
    pub qmp: &'a Qmp,
    /// Its process.
    pub process: &'a Process,
    /// What computes the digests.
    pub digester: &'a Digester,
    /// Whether the guest may be running, so that writable images may change while they are read.
    pub hot: bool,
    /// The folder of the trees of writable images, if they are to be kept; they have no names there.
    pub trees: Option<&'a Path>,
}

impl VmMeter<'_> {
    /// Measures all. `graph` is the block graph, if QEMU has just told it; `program` the digest of its program, if it was
    /// begun.
    ///
    /// # Errors
    /// The first item that could not be measured.
    pub async fn measure(
        &self,
        told: &Told,
        graph: Option<BlockGraph>,
        program: Option<Program>,
    ) -> Result<Measurement, MeasureError> {
        let components = self.components(told, program).await?;
        self.with_images(components, graph).await
    }

    /// Measures all of a VM whose state came from elsewhere: what its guest booted from, and what its memory holds, has
    /// nothing to do with the files that its QEMU was given.
    ///
    /// # Errors
    /// As [`Self::measure`].
    pub async fn measure_arrived(&self, told: &Told, program: Option<Program>) -> Result<Measurement, MeasureError> {
        let components = VmMeter { hot: true, ..*self }.components(told, program).await?;
        self.with_images(components, None).await
    }

    async fn components(&self, told: &Told, program: Option<Program>) -> Result<Vec<Component>, MeasureError> {
        let given = self.given().await?;
        self.must_be_who_it_seems(&given, told)?;
        // QEMU's program is long to read, and its monitor long to answer: neither waits for the other.
        let program = Program::measured(program, self.process, self.digester);
        let roms = async { roms::ask(self.qmp).await.map_err(|e| MeasureError::of("option ROMs", e)) };
        let parts = async {
            let mut parts = self.arguments(&given).await?;
            parts.extend(self.loaded(&given, told).await?);
            Ok(parts)
        };
        let (program, roms, mut parts) = tokio::try_join!(program, roms, parts)?;
        let roms = self.option_roms(&given, &parts, roms).await?;
        parts.extend(roms);
        Ok(std::iter::once(program).chain(parts).collect())
    }

    async fn with_images(
        &self,
        components: Vec<Component>,
        graph: Option<BlockGraph>,
    ) -> Result<Measurement, MeasureError> {
        let leaves = match graph {
            Some(graph) => self.leaves_of(&graph, &[]).await?,
            None => self.leaves(&[]).await?,
        };
        let (images, kept) = self.measure_leaves(&leaves).await?;
        Ok(Measurement { components, images, kept, leaves })
    }

    /// QEMU's arguments, with the configuration files that they name.
    ///
    /// # Errors
    /// When they cannot be read.
    pub async fn given(&self) -> Result<Arguments, MeasureError> {
        let args = self.process.arguments().map_err(|e| MeasureError::of(Role::Arguments.word(), e))?;
        let dir = self.working_dir()?;
        let mut given = Arguments::parse(&args);
        for config in given.configs.clone() {
            given.add_config(&read_config(&absolute(&dir, &config)).await?);
        }
        Ok(given)
    }

    /// QEMU's arguments and the files that they name.
    async fn arguments(&self, given: &Arguments) -> Result<Vec<Component>, MeasureError> {
        let role = Role::Arguments.word();
        let args = self.process.arguments().map_err(|e| MeasureError::of(role, e))?;
        let mut components = vec![arguments_component(&args)];

        let (dir, program) = (self.working_dir()?, self.program()?);
        let mut seen = Vec::new();
        for named in &given.files {
            let role = Role::ArgumentFile;
            let path = match named.lookup {
                Lookup::Path => absolute(&dir, &named.name),
                Lookup::DataDirs => in_data_dirs(&dir, &program, &given.data_dirs, &named.name)
                    .ok_or_else(|| MeasureError::new(role.word(), &named.name, MeasureErrorKind::NotFound))?,
            };
            if !seen.contains(&path) {
                let part = self.by_path(role, &path).await?;
                components.push(self.named(part, named).await?);
                seen.push(path);
            }
        }
        Ok(components)
    }

    /// Option ROMs that are not among the parts yet.
    async fn option_roms(
        &self,
        given: &Arguments,
        parts: &[Component],
        names: Vec<String>,
    ) -> Result<Vec<Component>, MeasureError> {
        let role = Role::Firmware;
        let (dir, program) = (self.working_dir()?, self.program()?);
        let mut components: Vec<Component> = Vec::new();
        for name in names {
            let name = Path::new(&name);
            let path = in_data_dirs(&dir, &program, &given.data_dirs, name)
                .ok_or_else(|| MeasureError::new(role.word(), name, MeasureErrorKind::NotFound))?;
            let shown = path.to_string_lossy();
            if !parts.iter().chain(&components).any(|part| part.path == shown) {
                let part = self.by_path(role, &path).await?;
                components.push(self.compared(part, loaded::Place::Hidden).await?);
            }
        }
        Ok(components)
    }

    /// The block graph's leaves and which files QEMU holds there now. A file in `before` whose name is gone but that
    /// QEMU still holds is the same.
    ///
    /// # Errors
    /// When QEMU does not answer, or its graph is not understood.
    pub async fn leaves(&self, before: &[Leaf]) -> Result<Vec<Leaf>, MeasureError> {
        let graph = BlockGraph::ask(self.qmp).await.map_err(|e| MeasureError::of("block graph", e))?;
        self.leaves_of(&graph, before).await
    }

    /// The same for a graph that QEMU has told already.
    ///
    /// # Errors
    /// As [`Self::leaves`].
    pub async fn leaves_of(&self, graph: &BlockGraph, before: &[Leaf]) -> Result<Vec<Leaf>, MeasureError> {
        let mut leaves = graph.leaves()?;
        let held = self.process.held().map_err(|e| MeasureError::of("open files", e))?;
        let dir = self.working_dir()?;
        for leaf in &mut leaves {
            leaf.file = match self.find(leaf, &dir, &held).await {
                Ok((_, held)) => Some(held.id),
                Err(_) => {
                    let known = before.iter().find(|old| (&old.slot, &old.name) == (&leaf.slot, &leaf.name));
                    known.and_then(|old| old.file).filter(|file| held.iter().any(|h| h.id == *file))
                }
            };
        }
        Ok(leaves)
    }

    /// Measures the files at these leaves of the block graph.
    ///
    /// # Errors
    /// The first slot that could not be measured.
    pub async fn measure_leaves(&self, leaves: &[Leaf]) -> Result<(Vec<Image>, Vec<Kept>), MeasureError> {
        let held = self.process.held().map_err(|e| MeasureError::of("open files", e))?;
        let dir = self.working_dir()?;
        let mut done: HashMap<(u64, u64), MeasuredFile> = HashMap::new();
        let (mut images, mut kept, mut placed) = (Vec::new(), Vec::new(), Vec::new());
        for leaf in leaves {
            let (path, held) = self.find(leaf, &dir, &held).await?;
            let measured = match done.get(&held.id) {
                Some(measured) => measured.clone(),
                None => {
                    let fail = |kind: MeasureErrorKind| MeasureError::new(&leaf.slot, &path, kind);
                    let file = self.process.open_held(held).map_err(|e| fail(e.into()))?;
                    let hot = self.hot && !leaf.read_only;
                    match self.tree_for(leaf) {
                        Some(tree) => measure_and_save(self.digester, file, tree).await.map_err(fail)?,
                        None => {
                            measure_open(self.digester, file, FileDigestAlg::FsVerity, hot, None).await.map_err(fail)?
                        }
                    }
                }
            };
            let image = Image {
                slot: leaf.slot.clone(),
                path: path.to_string_lossy().into_owned(),
                format: leaf.format.clone(),
                read_only: leaf.read_only,
                size: measured.size,
                digest: measured.digest,
            };
            if !leaf.read_only {
                let (file, saved) = (Arc::clone(&measured.file), measured.saved.clone());
                kept.push(Kept { image: image.clone(), file, saved });
            }
            // A file that was handed over as a descriptor has no name that could lead elsewhere.
            if !self.hot && !leaf.name.contains("/dev/fdset/") {
                let (leaf, file, digest) = (leaf.clone(), Arc::clone(&measured.file), measured.digest);
                placed.push(Placed { leaf, path, held, file, digest });
            }
            images.push(image);
            done.insert(held.id, measured);
        }
        self.must_be_in_their_slots(&placed).await?;
        Ok((images, kept))
    }

    /// Where the tree of a leaf's image is to be kept.
    fn tree_for(&self, leaf: &Leaf) -> Option<File> {
        let dir = self.trees.filter(|_| !self.hot && !leaf.read_only)?;
        tempfile::tempfile_in(dir).inspect_err(|e| tracing::warn!("no tree can be kept in {}: {e}", dir.display())).ok()
    }

    /// The path of a leaf's file and the descriptor through which QEMU holds it.
    async fn find(&self, leaf: &Leaf, dir: &Path, held: &[Held]) -> Result<(PathBuf, Held), MeasureError> {
        let unsupported = |what: String| MeasureError::of(&leaf.slot, MeasureErrorKind::Unsupported(what));
        if !matches!(leaf.protocol.as_str(), "file" | "host_device" | "host_cdrom") {
            return Err(unsupported(format!("{} ({}) is not a local file", leaf.name, leaf.protocol)));
        }
        let name = local_name(&leaf.name).ok_or_else(|| unsupported(format!("{} names no file", leaf.name)))?;
        if let Some(set) = name.strip_prefix("/dev/fdset/") {
            return self.in_fd_set(leaf, set, held).await;
        }
        let path = absolute(dir, Path::new(&name));
        let not_held = || MeasureError::new(&leaf.slot, &path, MeasureErrorKind::NotHeld);
        let now = std::fs::metadata(&path).map_err(|_| not_held())?;
        let held = held.iter().find(|h| h.id == (now.dev(), now.ino())).ok_or_else(not_held)?;
        Ok((path, *held))
    }

    /// A file that was handed to QEMU as a descriptor. There is no path that could have been exchanged.
    async fn in_fd_set(&self, leaf: &Leaf, set: &str, held: &[Held]) -> Result<(PathBuf, Held), MeasureError> {
        let sets = self.qmp.execute(qapi::qmp::query_fdsets {}).await;
        let sets = sets.map_err(|e| MeasureError::of(&leaf.slot, e))?;
        let fds = sets.into_iter().find(|s| s.fdset_id.to_string() == set).map(|s| s.fds).unwrap_or_default();
        let ids: Vec<Held> =
            fds.iter().filter_map(|fd| held.iter().find(|h| i64::from(h.fd) == fd.fd).copied()).collect();
        let unsupported = |what: &str| {
            let what = format!("{} {what}", leaf.name);
            MeasureError::of(&leaf.slot, MeasureErrorKind::Unsupported(what))
        };
        let first = *ids.first().ok_or_else(|| unsupported("holds no open file"))?;
        if ids.len() != fds.len() || ids.iter().any(|h| h.id != first.id) {
            return Err(unsupported("holds several files"));
        }
        let shown = std::fs::read_link(format!("/proc/{}/fd/{}", self.process.pid(), first.fd));
        Ok((shown.unwrap_or_else(|_| PathBuf::from(&leaf.name)), first))
    }

    pub(super) async fn by_path(&self, role: Role, path: &Path) -> Result<Part, MeasureError> {
        let measured = measure_path(self.digester, path, FileDigestAlg::Sha256, None).await;
        let fail = |kind: MeasureErrorKind| MeasureError::new(role.word(), path, kind);
        let measured = measured.map_err(fail)?;
        let part = Part { component: file_component(role, path, &measured), file: measured.file };
        if !self.hot {
            self.must_be_older(&part).map_err(fail)?;
        }
        Ok(part)
    }

    /// A file that QEMU read must not have changed since QEMU was started.
    pub(super) fn must_be_older(&self, part: &Part) -> Result<(), MeasureErrorKind> {
        let changed = self.changed_since_start(Path::new(&part.component.path), &part.file)?;
        if changed { Err(MeasureErrorKind::ChangedSinceStart) } else { Ok(()) }
    }

    fn changed_since_start(&self, path: &Path, file: &File) -> io::Result<bool> {
        let m = file.metadata()?;
        let changed = u64::try_from(m.ctime()).unwrap_or(0);
        let nanos = u32::try_from(m.ctime_nsec()).unwrap_or(0);
        let changed = SystemTime::UNIX_EPOCH + Duration::new(changed, nanos);
        let changed = newest_link(path)?.map_or(changed, |link| link.max(changed));
        Ok(changed > self.process.started()? + START_SLACK)
    }

    pub(super) fn program(&self) -> Result<PathBuf, MeasureError> {
        self.process.program().map_err(|e| MeasureError::of(Role::QemuBinary.word(), e))
    }

    pub(super) fn working_dir(&self) -> Result<PathBuf, MeasureError> {
        self.process.working_dir().map_err(|e| MeasureError::of("working directory", e))
    }
}

/// QEMU shows `json:{…}` where a node has options that a plain name cannot hold.
fn local_name(name: &str) -> Option<String> {
    let Some(json) = name.strip_prefix("json:") else {
        return Some(name.strip_prefix("file:").unwrap_or(name).to_owned());
    };
    let value: serde_json::Value = serde_json::from_str(json).ok()?;
    value.get("filename")?.as_str().map(str::to_owned)
}

async fn read_config(path: &Path) -> Result<Vec<u8>, MeasureError> {
    let fail = |kind: MeasureErrorKind| MeasureError::new(Role::ArgumentFile.word(), path, kind);
    let mut text = Vec::new();
    let file = tokio::fs::File::from_std(open(path).map_err(fail)?);
    file.take(MAX_CONFIG + 1).read_to_end(&mut text).await.map_err(|e| fail(e.into()))?;
    if text.len() as u64 > MAX_CONFIG {
        return Err(fail(MeasureErrorKind::Unsupported(format!("a configuration of more than {MAX_CONFIG} bytes"))));
    }
    Ok(text)
}

pub(super) fn file_component(role: Role, path: &Path, measured: &MeasuredFile) -> Component {
    let path = path.to_string_lossy().into_owned();
    Component { role, path, size: measured.size, digest: measured.digest, text: None, memory: None }
}

pub(super) fn text_component(role: Role, bytes: &[u8], text: &str) -> Component {
    Component {
        role,
        path: String::new(),
        size: bytes.len() as u64,
        digest: FileDigest::sha256(sha256(&[bytes])),
        text: (text.len() <= MAX_TEXT).then(|| text.to_owned()),
        memory: None,
    }
}

/// The digest is over the arguments, each ended by NUL; the text is one that a shell would read the same.
fn arguments_component(args: &[OsString]) -> Component {
    let mut bytes = Vec::new();
    let mut words = Vec::new();
    for arg in args {
        bytes.extend_from_slice(arg.as_bytes());
        bytes.push(0);
        words.push(quoted(&arg.to_string_lossy()));
    }
    text_component(Role::Arguments, &bytes, &words.join(" "))
}

/// One word as a shell reads it.
pub(crate) fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_=./,:+@%^#".contains(c);
    if !word.is_empty() && word.chars().all(plain) && !word.starts_with('#') {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}
