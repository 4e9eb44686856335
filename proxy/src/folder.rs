//! Folders that nobody else may write to.

use std::{
    fs, io,
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _},
    path::Path,
};

use tracing::warn;

/// Makes a folder for its owner only, if it is not there. One that is there must belong to us or to root and must not
/// be writable by everybody: whoever can write to it can take our sockets' place and lead us to files of their choice.
///
/// # Errors
/// Of the file system, or what is wrong with the folder and how to put it right.
pub(crate) fn private(path: &Path) -> io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(path)?;
    let folder = fs::metadata(path)?;
    let (owner, mode) = (folder.uid(), folder.mode());
    let refuse = |why: String| Err(io::Error::new(io::ErrorKind::PermissionDenied, why));
    if owner != 0 && owner != rustix::process::geteuid().as_raw() {
        return refuse(format!("belongs to user {owner}, who could exchange what is in it; chown it"));
    }
    if mode & 0o002 != 0 {
        return refuse(format!("everybody can write to it (mode {:o}); chmod o-w it", mode & 0o7777));
    }
    if mode & 0o020 != 0 {
        warn!(folder = %path.display(), group = folder.gid(), "the folder's group can write to it, and so is as trusted as the proxy");
    }
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn a_folder_is_for_its_owner() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run/vms");
        private(&path).unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().mode() & 0o777;
        assert_eq!((mode(&path), mode(path.parent().unwrap())), (0o700, 0o700));
        private(&path).unwrap();
        for (mode, fits) in [(0o755, true), (0o770, true), (0o777, false), (0o1777, false), (0o702, false)] {
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            assert_eq!(private(&path).is_ok(), fits, "{mode:o}");
        }
    }
}
