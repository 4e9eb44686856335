//! Debian packages, downloaded and unpacked without root.

use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, bail};

use crate::lab::command;

/// A package at the version that apt would install.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Package {
    pub(crate) name: String,
    pub(crate) version: String,
}

impl Package {
    /// Asks apt for the candidate version of `name`.
    pub(crate) fn candidate(name: &str) -> Result<Self> {
        let shown =
            command::text(Command::new("apt-cache").env("LC_ALL", "C").args(["show", "--no-all-versions", name]))
                .with_context(|| format!("apt knows no package {name}: run `apt-get update` as root"))?;
        let version = field(&shown, "Version").with_context(|| format!("apt shows no version of package {name}"))?;
        Ok(Self { name: name.to_owned(), version: version.to_owned() })
    }

    /// The first package that meta-package `name` depends on.
    pub(crate) fn behind(name: &str) -> Result<Self> {
        let shown =
            command::text(Command::new("apt-cache").env("LC_ALL", "C").args(["show", "--no-all-versions", name]))
                .with_context(|| format!("apt knows no package {name}: run `apt-get update` as root"))?;
        let first = field(&shown, "Depends")
            .and_then(|list| list.split([',', ' ', '|']).next())
            .with_context(|| format!("package {name} depends on nothing"))?;
        Self::candidate(first)
    }

    /// Downloads the package (apt checks its digest against the signed index) and unpacks its files into
    /// `target`, with `scratch` for the package itself.
    pub(crate) fn unpack(&self, scratch: &Path, target: &Path) -> Result<()> {
        let folder = scratch.join(&self.name);
        std::fs::create_dir_all(&folder)?;
        // As root apt would download as a user who may not write here; the warning is noise.
        command::output(
            Command::new("apt-get")
                .args(["-qq", "-o", "APT::Sandbox::User=root", "download"])
                .arg(format!("{}={}", self.name, self.version))
                .current_dir(&folder),
        )
        .with_context(|| format!("cannot download package {}", self.name))?;
        for item in std::fs::read_dir(&folder)? {
            let file = item?.path();
            if file.extension().is_some_and(|ending| ending == "deb") {
                command::output(Command::new("dpkg-deb").arg("-x").arg(&file).arg(target))?;
                std::fs::remove_file(&file)?;
                return Ok(());
            }
        }
        bail!("apt-get download left no package {}", self.name)
    }
}

fn field<'a>(shown: &'a str, name: &str) -> Option<&'a str> {
    shown.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": ")).map(str::trim)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_found_by_their_whole_name() {
        let shown = "Package: a\nPre-Depends: x\nDepends: b (= 2), c\nVersion: 1:2-3\n";
        assert_eq!(field(shown, "Depends"), Some("b (= 2), c"));
        assert_eq!(field(shown, "Version"), Some("1:2-3"));
        assert_eq!(field(shown, "Size"), None);
    }
}
