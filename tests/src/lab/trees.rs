//! Policies whose allow lists come from the trees that systems were made of, not from what they said.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};

use super::world::World;

impl World {
    /// Lists the files of trees, archives or initramfs, which the running system has beneath `at`, in the file `NAME.toml` of the
    /// world. Returns that file, and the lines of a rule that `policy from-tree` printed.
    ///
    /// # Errors
    /// The verifier refuses.
    pub fn from_tree(&self, trees: &[&Path], at: &[&str], name: &str) -> Result<(PathBuf, String)> {
        let list = self.folder().join(name).with_extension("toml");
        let trees: Vec<_> = trees.iter().map(|tree| tree.to_string_lossy()).collect();
        let output = list.to_string_lossy().into_owned();
        let mut arguments = vec!["policy", "from-tree", "-o", &output];
        arguments.extend(trees.iter().map(AsRef::as_ref));
        arguments.extend(at.iter().flat_map(|at| ["--at", at]));
        let lines = self.verifier(&arguments)?.success()?.output;
        Ok((list, lines))
    }

    /// Learns a policy from what runs now, lets `change` change it, and puts it in force. Returns its file.
    ///
    /// # Errors
    /// The verifier cannot ask the host, or refuses.
    pub fn set_learnt(&self, change: impl FnOnce(String) -> Result<String>) -> Result<PathBuf> {
        let file = self.folder().join("policy.toml");
        let path = file.to_string_lossy();
        self.verifier(&["policy", "learn", Self::HOST, "-o", &path])?.success()?;
        fs::write(&file, change(fs::read_to_string(&file)?)?)?;
        self.verifier(&["policy", "set", Self::HOST, &path])?.success()?;
        Ok(file)
    }
}

/// A policy without the tables under `heading`.
///
/// # Errors
/// It has none.
pub fn without_table(policy: &str, heading: &str) -> Result<String> {
    let mut found = false;
    let mut inside = false;
    let kept: Vec<&str> = policy
        .lines()
        .filter(|line| {
            if line.starts_with('[') {
                inside = *line == heading;
                found |= inside;
            }
            !inside
        })
        .collect();
    ensure!(found, "a policy without {heading}: {policy}");
    Ok(kept.join("\n") + "\n")
}

/// A policy with `lines` behind the first line that is `heading`.
///
/// # Errors
/// There is none.
pub fn with_lines(policy: &str, heading: &str, lines: &str) -> Result<String> {
    let line = format!("{heading}\n");
    let at = policy.find(&line).with_context(|| format!("a policy without {heading}: {policy}"))? + line.len();
    Ok(format!("{}{lines}{}", &policy[..at], &policy[at..]))
}

/// The lines of a rule with further patterns of paths that are not judged.
///
/// # Errors
/// They have no such patterns.
pub fn ignoring(lines: &str, patterns: &[&str]) -> Result<String> {
    let start = lines.strip_suffix("]\n").context("lines of a rule that do not end with a list")?;
    Ok(patterns.iter().fold(start.to_owned(), |lines, pattern| lines + &format!("    {pattern:?},\n")) + "]\n")
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;

    #[test]
    fn tables_come_and_go() {
        let policy = "[host]\na = 1\n\n[host.ima]\n\"/x\" = [\"y\"]\n\n[[vm]]\nname = \"n\"\n";
        let without = without_table(policy, "[host.ima]").unwrap();
        assert_eq!(without, "[host]\na = 1\n\n[[vm]]\nname = \"n\"\n");
        assert!(without_table(&without, "[host.ima]").is_err());
        assert_eq!(with_lines("[host]\na = 1\n", "[host]", "b = 2\n").unwrap(), "[host]\nb = 2\na = 1\n");
        assert_eq!(ignoring("l = [\n]\n", &["/x/*"]).unwrap(), "l = [\n    \"/x/*\",\n]\n");
    }
}
