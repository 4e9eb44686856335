//! Measuring the files that a command names.

use std::{
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use onequote_evidence::{
    digest::FileDigestAlg,
    event::{Component, Role},
};
use serde::Deserialize;
use serde_json::json;

use super::{
    door::Hub,
    files::{MAX_FILES, Named},
};
use crate::measure::{Arguments, MeasureErrorKind, absolute, in_data_dirs, measure_named, process};

/// Measures them, each once. The error names the first that cannot be measured.
pub(super) async fn measure(hub: &Hub, named: Vec<Named>) -> Result<Vec<Component>, String> {
    if named.len() > MAX_FILES {
        return Err(format!("it names {} files, more than {MAX_FILES}", named.len()));
    }
    let mut done: Vec<PathBuf> = Vec::new();
    let mut components = Vec::new();
    for named in named {
        let Some(Found { shown, path, alg }) = find(hub, named).await? else { continue };
        if done.contains(&path) {
            continue;
        }
        let fail = |kind: MeasureErrorKind| format!("{}: {kind}", shown.display());
        // What QEMU has open already the guest may be writing.
        let hot = inode(&path).is_some_and(|id| is_held(hub.vm.pid, id));
        let measured = measure_named(&hub.vm.digester, &path, alg, hot, None).await.map_err(fail)?;
        components.push(Component {
            role: Role::ArgumentFile,
            path: shown.to_string_lossy().into_owned(),
            size: measured.size,
            digest: measured.digest,
            text: None,
            memory: None,
        });
        done.push(path);
    }
    Ok(components)
}

/// A file to measure.
struct Found {
    /// Its path for people.
    shown: PathBuf,
    /// Where it is opened.
    path: PathBuf,
    alg: FileDigestAlg,
}

fn inode(path: &Path) -> Option<(u64, u64)> {
    std::fs::metadata(path).ok().map(|m| (m.dev(), m.ino()))
}

fn is_held(pid: u32, id: (u64, u64)) -> bool {
    let Ok(fds) = std::fs::read_dir(format!("/proc/{pid}/fd")) else { return false };
    fds.flatten().any(|fd| inode(&fd.path()) == Some(id))
}

/// None when there is nothing to measure.
async fn find(hub: &Hub, named: Named) -> Result<Option<Found>, String> {
    let proc = Path::new("/proc").join(hub.vm.pid.to_string());
    let dir = std::fs::read_link(proc.join("cwd")).map_err(|e| format!("QEMU's working directory: {e}"))?;
    let at = |name: &str| absolute(&dir, Path::new(name));
    // As elsewhere: images by their tree, so that they can be compared with what the log has of images.
    let alg = match named {
        Named::Image(_) | Named::Backing { .. } => FileDigestAlg::FsVerity,
        _ => FileDigestAlg::Sha256,
    };
    let path = match named {
        Named::Not(why) => return Err(why),
        Named::Image(name) | Named::Path(name) => match name.strip_prefix("/dev/fdset/") {
            Some(set) => {
                let path = in_fd_set(hub, &proc, set).await?;
                let shown = std::fs::read_link(&path).unwrap_or_else(|_| path.clone());
                return Ok(Some(Found { shown, path, alg }));
            }
            None => at(&name),
        },
        Named::Data(name) => {
            let program = std::fs::read_link(proc.join("exe")).map_err(|e| format!("QEMU's program: {e}"))?;
            let args = process::arguments(hub.vm.pid).map_err(|e| format!("QEMU's arguments: {e}"))?;
            in_data_dirs(&dir, &program, &Arguments::parse(&args).data_dirs, Path::new(&name))
                .ok_or_else(|| format!("{name}: {}", MeasureErrorKind::NotFound))?
        }
        Named::Memory(name) => {
            let path = at(&name);
            match std::fs::metadata(&path) {
                Ok(m) if !m.is_dir() => path,
                // Huge pages, or a file that QEMU makes.
                Ok(_) | Err(_) => return Ok(None),
            }
        }
        Named::Maybe(name) => {
            let path = at(&name);
            if !path.is_file() {
                return Ok(None);
            }
            path
        }
        Named::Backing { file, .. } if Path::new(&file).is_absolute() => PathBuf::from(file),
        Named::Backing { file, node } => image_folder(hub, &node).await?.join(file),
    };
    Ok(Some(Found { shown: path.clone(), path, alg }))
}

/// A file that was handed to QEMU as a descriptor (`add-fd`).
async fn in_fd_set(hub: &Hub, proc: &Path, set: &str) -> Result<PathBuf, String> {
    #[derive(Deserialize)]
    #[serde(rename_all = "kebab-case")]
    struct Set {
        fdset_id: i64,
        fds: Vec<Fd>,
    }
    #[derive(Deserialize)]
    struct Fd {
        fd: i64,
    }
    let sets: Vec<Set> = hub.vm.qmp.call("query-fdsets", json!({})).await.map_err(|e| e.to_string())?;
    let fds = sets.into_iter().find(|s| s.fdset_id.to_string() == set).map(|s| s.fds).unwrap_or_default();
    let paths: Vec<PathBuf> = fds.iter().map(|fd| proc.join("fd").join(fd.fd.to_string())).collect();
    let [first, rest @ ..] = paths.as_slice() else { return Err(format!("/dev/fdset/{set} holds no open file")) };
    // QEMU takes the one whose mode fits.
    if inode(first).is_none() || rest.iter().any(|path| inode(path) != inode(first)) {
        return Err(format!("/dev/fdset/{set} holds several files"));
    }
    Ok(first.clone())
}

/// The folder of a node's image.
async fn image_folder(hub: &Hub, node: &str) -> Result<PathBuf, String> {
    #[derive(Deserialize)]
    #[serde(rename_all = "kebab-case")]
    struct Node {
        node_name: String,
        file: String,
    }
    let nodes: Vec<Node> =
        hub.vm.qmp.call("query-named-block-nodes", json!({"flat": true})).await.map_err(|e| e.to_string())?;
    let node = nodes.into_iter().find(|n| n.node_name == node).ok_or_else(|| format!("there is no node {node:?}"))?;
    let dir = std::fs::read_link(format!("/proc/{}/cwd", hub.vm.pid))
        .map_err(|e| format!("QEMU's working directory: {e}"))?;
    Ok(absolute(&dir, Path::new(&node.file)).parent().map(Path::to_owned).unwrap_or_default())
}
