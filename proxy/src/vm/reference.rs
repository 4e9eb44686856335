//! The local reference list: what a VM may start from on this host.
//!
//! ```toml
//! [[vm]]
//! name = "web-*"                       # `*` stands for any characters
//! kernel = ["sha256:…"]
//! initrd = ["sha256:…"]
//! cmdline = ["console=ttyS0 root=/dev/vda"]
//! firmware = ["sha256:…"]
//! qemu = ["sha256:…"]
//! [vm.images]
//! "disk0/1" = ["sha256:…"]
//! ```
//!
//! The first entry whose name fits counts; a VM for which there is none does not start. What an entry lists must be
//! there and be one of the values; what it leaves out is not compared, since a writable disk has no fixed value.

use std::{
    collections::BTreeMap,
    io,
    path::{Path, PathBuf},
};

use onequote_evidence::{
    digest::FileDigest,
    event::{Component, Role},
};
use serde::Deserialize;

use crate::measure::Measurement;

/// A host's reference list.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct References {
    #[serde(default)]
    vm: Vec<Entry>,
}

/// A reference list that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ReferenceError {
    /// The file cannot be read.
    #[error("cannot read the reference list {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It is not a reference list.
    #[error("the reference list {path} is not understood")]
    Parse {
        /// The file.
        path: PathBuf,
        /// Where and why.
        source: Box<toml::de::Error>,
    },
}

/// What does not fit.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{item}: {what}")]
pub struct Mismatch {
    /// A role's word or an image's slot; empty if no entry fits the VM.
    pub item: String,
    /// For people.
    pub what: String,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    name: String,
    kernel: Option<Vec<FileDigest>>,
    initrd: Option<Vec<FileDigest>>,
    cmdline: Option<Vec<String>>,
    firmware: Option<Vec<FileDigest>>,
    qemu: Option<Vec<FileDigest>>,
    #[serde(default)]
    images: BTreeMap<String, Vec<FileDigest>>,
}

impl References {
    /// Reads a file.
    ///
    /// # Errors
    /// [`ReferenceError`].
    pub fn load(path: &Path) -> Result<Self, ReferenceError> {
        let read = |source| ReferenceError::Read { path: path.to_owned(), source };
        let text = std::fs::read_to_string(path).map_err(read)?;
        toml::from_str(&text).map_err(|e| ReferenceError::Parse { path: path.to_owned(), source: Box::new(e) })
    }

    /// Whether a VM may start from this.
    ///
    /// # Errors
    /// The first thing that does not fit.
    pub fn check(&self, name: &str, found: &Measurement) -> Result<(), Mismatch> {
        let entry = self.vm.iter().find(|e| fits(&e.name, name)).ok_or_else(|| Mismatch {
            item: String::new(),
            what: format!("the reference list has no entry for a VM named {name}"),
        })?;
        let roles = [
            (Role::QemuBinary, &entry.qemu),
            (Role::Firmware, &entry.firmware),
            (Role::Kernel, &entry.kernel),
            (Role::Initrd, &entry.initrd),
        ];
        for (role, allowed) in roles {
            let Some(allowed) = allowed else { continue };
            component(found, role)?;
            // Option ROMs are firmware, too.
            for component in found.components.iter().filter(|c| c.role == role) {
                digest_fits(role.word(), &component.path, component.digest, allowed)?;
            }
        }
        if let Some(allowed) = &entry.cmdline {
            let component = component(found, Role::KernelCmdline)?;
            let text = component.text.as_deref().unwrap_or_default();
            if !allowed.iter().any(|a| a == text) {
                let what = format!("{text:?} is not one of the reference list");
                return Err(Mismatch { item: component.role.word().to_owned(), what });
            }
        }
        for (slot, allowed) in &entry.images {
            let image = found.images.iter().find(|i| i.slot == *slot);
            let image =
                image.ok_or_else(|| Mismatch { item: slot.clone(), what: "the VM has no such image".into() })?;
            digest_fits(slot, &image.path, image.digest, allowed)?;
        }
        Ok(())
    }
}

fn component(found: &Measurement, role: Role) -> Result<&Component, Mismatch> {
    found.components.iter().find(|c| c.role == role).ok_or_else(|| Mismatch {
        item: role.word().to_owned(),
        what: "the VM has none, the reference list asks for one".into(),
    })
}

fn digest_fits(item: &str, path: &str, digest: FileDigest, allowed: &[FileDigest]) -> Result<(), Mismatch> {
    if allowed.contains(&digest) {
        return Ok(());
    }
    Err(Mismatch { item: item.to_owned(), what: format!("{path} is {digest}, which is not in the reference list") })
}

/// Whether `pattern`, in which `*` stands for any characters, is all of `name`.
pub(crate) fn fits(pattern: &str, name: &str) -> bool {
    let Some((head, rest)) = pattern.split_once('*') else { return pattern == name };
    let Some(mut left) = name.strip_prefix(head) else { return false };
    let (middle, tail) = rest.rsplit_once('*').map_or((None, rest), |(m, t)| (Some(m), t));
    let Some(inner) = left.strip_suffix(tail) else { return false };
    left = inner;
    for piece in middle.into_iter().flat_map(|m| m.split('*')) {
        let Some(at) = left.find(piece) else { return false };
        left = &left[at + piece.len()..];
    }
    true
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use onequote_evidence::{event::Image, id::Sha256};

    use super::*;

    #[test]
    fn patterns() {
        for (pattern, name, want) in [
            ("web", "web", true),
            ("web", "web1", false),
            ("web-*", "web-1", true),
            ("web-*", "we", false),
            ("*", "", true),
            ("a*b*c", "a1b2c", true),
            ("a*b*c", "a1c", false),
            ("a*a", "a", false),
            ("*x*", "axb", true),
        ] {
            assert_eq!(fits(pattern, name), want, "{pattern} {name}");
        }
    }

    #[test]
    fn what_is_listed_must_fit() {
        let digest = |n| FileDigest::sha256(Sha256([n; 32]));
        let kernel =
            Component { role: Role::Kernel, path: "/k".into(), size: 1, digest: digest(1), text: None, memory: None };
        let line = Component { role: Role::KernelCmdline, text: Some("quiet".into()), ..kernel.clone() };
        let image = Image {
            slot: "disk0/1".into(),
            path: "/d".into(),
            format: "raw".into(),
            read_only: true,
            size: 1,
            digest: digest(2),
        };
        let found =
            Measurement { components: vec![kernel, line], images: vec![image], kept: Vec::new(), leaves: Vec::new() };
        let check = |text: &str| toml::from_str::<References>(text).unwrap().check("web-1", &found);
        let item = |text: &str| check(&format!("[[vm]]\nname='web-*'\n{text}")).unwrap_err().item;
        let (one, two) = (digest(1), digest(2));
        let good = format!("kernel=['{one}']\ncmdline=['quiet']\n[vm.images]\n'disk0/1'=['{one}', '{two}']");
        check(&format!("[[vm]]\nname='other'\n[[vm]]\nname='web-*'\n{good}")).unwrap();
        assert_eq!(item(&format!("kernel=['{two}']")), "kernel");
        assert_eq!(item(&format!("initrd=['{two}']")), "initrd");
        assert_eq!(item("cmdline=['quiet debug']"), "kernel-cmdline");
        assert_eq!(item(&format!("[vm.images]\n'disk0/1'=['{one}']")), "disk0/1");
        assert_eq!(item(&format!("[vm.images]\ndisk1=['{one}']")), "disk1");
        assert!(check("[[vm]]\nname='db'").unwrap_err().what.contains("web-1"));
        assert!(toml::from_str::<References>("[[vm]]\nname='x'\nkernl=[]").is_err());
    }
}
