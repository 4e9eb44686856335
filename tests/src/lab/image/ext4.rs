//! Reading and changing an ext4 image without mounting it, by debugfs (e2fsprogs).

use std::fmt::Write as _;
use std::path::Path;

use anyhow::{Context as _, Result, bail};

use crate::lab::command;

/// Changes to an image, done together.
#[derive(Default)]
pub(crate) struct Changes {
    script: String,
    folders: Vec<String>,
    /// Holds the content of files until they are written.
    scratch: Option<tempfile::TempDir>,
    count: usize,
}

impl Changes {
    /// A copy of `from` at the absolute path `to`, instead of what is there. Folders that lack are made.
    pub(crate) fn file(&mut self, from: &Path, to: &str, mode: u32) -> &mut Self {
        self.folders_above(to);
        // An error of `rm` is that there is nothing.
        let _ = writeln!(self.script, "rm {to}\nwrite {} {to}", from.display());
        let _ = writeln!(self.script, "set_inode_field {to} mode 0{:o}", 0o100_000 | mode);
        let _ = writeln!(self.script, "set_inode_field {to} uid 0\nset_inode_field {to} gid 0");
        self
    }

    /// A file with this content.
    pub(crate) fn text(&mut self, content: &str, to: &str, mode: u32) -> Result<&mut Self> {
        let scratch = match &self.scratch {
            Some(scratch) => scratch,
            None => self.scratch.insert(tempfile::tempdir()?),
        };
        self.count += 1;
        let from = scratch.path().join(self.count.to_string());
        std::fs::write(&from, content)?;
        Ok(self.file(&from, to, mode))
    }

    /// A symbolic link.
    pub(crate) fn link(&mut self, at: &str, target: &str) -> &mut Self {
        self.folders_above(at);
        let _ = writeln!(self.script, "symlink {at} {target}");
        self
    }

    fn folders_above(&mut self, path: &str) {
        let parts: Vec<usize> = path.match_indices('/').map(|(at, _)| at).skip(1).collect();
        for at in parts {
            let folder = path[..at].to_owned();
            if !self.folders.contains(&folder) {
                let _ = writeln!(self.script, "mkdir {folder}");
                self.folders.push(folder);
            }
        }
    }

    /// Does them to `image`.
    pub(crate) fn apply(&self, image: &Path) -> Result<()> {
        let script = tempfile::NamedTempFile::new()?;
        std::fs::write(script.path(), &self.script)?;
        let output = command::program("debugfs").arg("-w").arg("-f").arg(script.path()).arg(image).output();
        let output = output.context("cannot start debugfs (is the package e2fsprogs installed?)")?;
        // It ends well whatever happened; what counts is said.
        let said = String::from_utf8_lossy(&output.stderr);
        for line in said.lines() {
            let expected = line.contains("File not found by ext2_lookup while trying to resolve filename")
                || line.contains("Ext2 directory already exists")
                || line.starts_with("mkdir: ")
                || line.starts_with("debugfs ");
            if !expected {
                bail!("debugfs on {}: {line}", image.display());
            }
        }
        Ok(())
    }
}

/// Puts the tree of an image into the empty folder `target`; owners get lost where the caller is not root.
pub(crate) fn extract(image: &Path, target: &Path) -> Result<()> {
    let mut rdump = command::program("debugfs");
    rdump.arg("-R").arg(format!("rdump / {}", target.display())).arg(image);
    command::output(&mut rdump)?;
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::PermissionsExt as _;

    #[test]
    fn what_is_put_into_an_image_comes_out_of_it() {
        let folder = tempfile::tempdir().unwrap();
        let (tree, image, out) = (folder.path().join("t"), folder.path().join("i"), folder.path().join("o"));
        fs::create_dir_all(tree.join("etc")).unwrap();
        fs::create_dir(&out).unwrap();
        fs::write(tree.join("etc/old"), "old").unwrap();
        let mut make = command::program("mke2fs");
        command::output(make.args(["-q", "-t", "ext4", "-d"]).arg(&tree).arg(&image).arg("4M")).unwrap();
        let mut changes = Changes::default();
        changes.text("new", "/etc/old", 0o600).unwrap();
        changes.text("#!/bin/sh", "/usr/local/sbin/tool", 0o755).unwrap().link("/etc/x/link", "../old");
        changes.apply(&image).unwrap();
        extract(&image, &out).unwrap();
        assert_eq!(fs::read(out.join("etc/old")).unwrap(), b"new");
        assert_eq!(fs::read(out.join("etc/x/link")).unwrap(), b"new");
        let mode = fs::metadata(out.join("usr/local/sbin/tool")).unwrap().permissions().mode();
        assert_eq!(mode & 0o7777, 0o755);
        changes.file(Path::new("/no/such/file"), "/etc/none", 0o600);
        assert!(changes.apply(&image).is_err());
    }
}
