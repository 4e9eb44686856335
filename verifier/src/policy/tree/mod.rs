//! Makes an allow list from file trees: a folder, a tar archive, an initramfs.
//!
//! IMA lists a file by its path from the root of the running system with every symbolic link followed
//! (Linux `security/integrity/ima/ima_api.c`, `ima_d_path`): on a system with a merged `/usr` the shell is `/usr/bin/sh`
//! and never `/bin/sh`. So a folder is walked without following links, and what an archive stores beneath a link is
//! listed beneath the link's target. Only regular files are measured, and only those are listed, all of them: the
//! policy `tcb` measures whatever root reads, not programs alone.
//!
//! ```text
//! folder  ─ walk ──────────────► files ─┐
//! tar     ─ members ─ links ───► files ─┼─ skip, mount points ─► Listing ─► TOML for ima_file
//! initrd  ─ cpio segments ─ ″ ─► files ─┘
//! ```
//!
//! An image of a file system is for the operator to mount: reading ext4 is the kernel's business.

mod archive;
mod cpio;
mod folder;
mod members;
#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests;

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    io::{self, Read},
    path::{Path, PathBuf},
};

use aws_lc_rs::digest;

use onequote_evidence::digest::HashAlg;

use super::{
    FileHash, Pattern,
    text::{comment, quote},
};

/// Folders of a tree that are mount points of file systems without files of their own: what an image has there is
/// hidden in the running system, and what is there then is not measured (`ima_policy.c`, `dont_measure_rules`).
const MOUNT_POINTS: [&str; 4] = ["proc", "sys", "dev", "run"];

/// Files that a running distribution makes or changes by itself and that root reads, so that the policy `tcb`
/// measures them: patterns for `ima_ignore`, each with what is found there.
pub const RUN_TIME_FILES: &[(&str, &str)] = &[
    ("/var/log/*", "logs"),
    ("/var/cache/*", "caches"),
    ("/var/lib/systemd/*", "what systemd keeps: random seed, timers, catalogue"),
    ("/var/lib/apt/*", "lists of packages"),
    ("/var/lib/dhcp/*", "leases"),
    ("/etc/machine-id", "made at the first boot"),
    ("/etc/resolv.conf", "written by whatever configures the network"),
    ("/etc/adjtime", "written when the clock is set"),
    ("/etc/ssh/ssh_host_*", "keys made at the first boot"),
];

/// How a tree becomes a list.
#[derive(Debug, Clone)]
pub struct Options {
    /// Where the tree is mounted in the running system, each absolute.
    pub at: Vec<String>,
    /// Patterns of paths, as in the running system, that are left out.
    pub skip: Vec<Pattern>,
    /// The algorithms of the digests.
    pub algorithms: Vec<HashAlg>,
}

impl Default for Options {
    fn default() -> Self {
        Self { at: vec!["/".to_owned()], skip: Vec::new(), algorithms: vec![HashAlg::Sha256] }
    }
}

/// A tree that cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum TreeError {
    /// A file or folder in it.
    #[error("cannot read {path}")]
    Read {
        /// It.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// An archive that is damaged, or does not have the form of one.
    #[error("{path}: {why}")]
    Archive {
        /// It.
        path: PathBuf,
        /// What is wrong, and what to do about it.
        why: String,
    },
    /// A mount point that is none.
    #[error("{0:?} is not an absolute path")]
    At(String),
}

/// Files by their path from the tree's root, without the leading slash, each with a digest in every algorithm asked
/// for.
type Files = BTreeMap<Vec<u8>, Vec<FileHash>>;

/// The files of one or more trees, as an IMA list names them.
#[derive(Debug, Clone, Default)]
pub struct Listing {
    files: BTreeMap<String, BTreeSet<String>>,
    unsayable: BTreeSet<String>,
}

impl Listing {
    /// Adds a tree: a folder, or a file that is an archive.
    ///
    /// # Errors
    /// [`TreeError`]; nothing is added then. A file that cannot be read is an error too: left out, it would be a
    /// false alarm in the running system.
    pub fn add(&mut self, tree: &Path, options: &Options) -> Result<(), TreeError> {
        let mut mounts = Vec::new();
        for at in &options.at {
            if !at.starts_with('/') {
                return Err(TreeError::At(at.clone()));
            }
            mounts.push(at.trim_end_matches('/'));
        }
        let fail = |source| TreeError::Read { path: tree.to_owned(), source };
        let files = if std::fs::metadata(tree).map_err(fail)?.is_dir() {
            folder::files(tree, &options.algorithms)?
        } else {
            archive::files(tree, &options.algorithms)?
        };
        for (path, hashes) in files {
            if MOUNT_POINTS.iter().any(|point| path.strip_prefix(point.as_bytes()).is_some_and(|p| p.starts_with(b"/")))
            {
                continue;
            }
            let Ok(path) = std::str::from_utf8(&path) else {
                self.unsayable.insert(String::from_utf8_lossy(&path).into_owned());
                continue;
            };
            for at in &mounts {
                let path = format!("{at}/{path}");
                if options.skip.iter().any(|pattern| pattern.fits(&path)) {
                    continue;
                }
                // As the kernel lists it (`ima_template_lib.c`, `ima_write_template_field_data`).
                let digests = self.files.entry(path.replace(' ', "_")).or_default();
                digests.extend(hashes.iter().map(FileHash::to_string));
            }
        }
        Ok(())
    }

    /// Number of paths.
    #[must_use]
    pub fn len(&self) -> usize {
        self.files.len()
    }

    /// Whether there is no file.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.files.is_empty()
    }

    /// Files whose names are not UTF-8, which a policy cannot name.
    #[must_use]
    pub fn unsayable(&self) -> &BTreeSet<String> {
        &self.unsayable
    }

    /// The text of an allow-list file, as `ima_file` in a policy names it.
    #[must_use]
    pub fn toml(&self, trees: &[PathBuf]) -> String {
        let mut out = String::from("# What a file may hold, for ima_file in a policy; made from\n");
        for tree in trees {
            let _ = writeln!(out, "#   {}", comment(&tree.display().to_string()));
        }
        for path in &self.unsayable {
            let _ = writeln!(out, "# Left out, for its name is not UTF-8: {}", comment(path));
        }
        for (path, digests) in &self.files {
            let digests: Vec<String> = digests.iter().map(|digest| quote(digest)).collect();
            let _ = writeln!(out, "{} = [{}]", quote(path), digests.join(", "));
        }
        out
    }
}

/// The lines of a rule that use an allow-list file, with what a running system changes by itself left unjudged.
#[must_use]
pub fn rule_lines(list: &Path) -> String {
    let mut out = format!("ima_file = {}\n", quote(&list.display().to_string()));
    out +=
        "# Files that the system makes or changes by itself: whoever is root in it can put a program there unseen.\n";
    out += "ima_ignore = [\n";
    let width = RUN_TIME_FILES.iter().map(|(pattern, _)| pattern.len()).max().unwrap_or(0) + 3;
    for (pattern, what) in RUN_TIME_FILES {
        let _ = writeln!(out, "    {:width$} # {what}", quote(pattern) + ",");
    }
    out + "]\n"
}

/// Digests of everything that `reader` still gives, and how many bytes that was.
fn digests(reader: &mut dyn Read, algorithms: &[HashAlg]) -> io::Result<(Vec<FileHash>, u64)> {
    let mut contexts: Vec<_> = algorithms.iter().map(|alg| (alg, digest::Context::new(engine(*alg)))).collect();
    let mut buffer = vec![0; 128 * 1024];
    let mut size = 0;
    loop {
        match reader.read(&mut buffer) {
            Ok(0) => break,
            Ok(n) => {
                contexts.iter_mut().for_each(|(_, context)| context.update(&buffer[..n]));
                size += n as u64;
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    let hash = |(alg, context): (&HashAlg, digest::Context)| FileHash {
        alg: alg.name().into(),
        value: context.finish().as_ref().into(),
    };
    Ok((contexts.into_iter().map(hash).collect(), size))
}

fn engine(alg: HashAlg) -> &'static digest::Algorithm {
    match alg {
        HashAlg::Sha1 => &digest::SHA1_FOR_LEGACY_USE_ONLY,
        HashAlg::Sha256 => &digest::SHA256,
        HashAlg::Sha384 => &digest::SHA384,
        HashAlg::Sha512 => &digest::SHA512,
    }
}
