//! Every dependency has a licence that lets us publish under Apache-2.0 OR MIT: permissive ones only.

use std::process::Command;

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;

/// SPDX identifiers of permissive licences.
const PERMISSIVE: &[&str] = &[
    "0BSD",
    "Apache-2.0",
    "Apache-2.0 WITH LLVM-exception",
    "BSD-1-Clause",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "BSL-1.0",
    "BlueOak-1.0.0",
    "CC0-1.0",
    "CDLA-Permissive-2.0",
    "ISC",
    "MIT",
    "MIT-0",
    "OpenSSL",
    "Unicode-3.0",
    "Unicode-DFS-2016",
    "Unlicense",
    "Zlib",
];

/// Asks cargo for all packages of the lock file and checks each licence.
pub(crate) fn check(metadata: &mut Command) -> Result<String> {
    let output = metadata
        .args(["--format-version", "1", "--locked", "--filter-platform", "x86_64-unknown-linux-gnu"])
        .output()
        .context("cannot run cargo metadata")?;
    ensure!(output.status.success(), "cargo metadata: {}", String::from_utf8_lossy(&output.stderr));
    let metadata: Value = serde_json::from_slice(&output.stdout)?;
    let packages = metadata["packages"].as_array().context("cargo metadata lists no packages")?;
    let bad: Vec<String> = packages
        .iter()
        .filter(|p| !p["license"].as_str().is_some_and(permissive))
        .map(|p| format!("{} ({})", p["name"].as_str().unwrap_or("?"), p["license"]))
        .collect();
    match bad.as_slice() {
        [] => Ok(format!("{} packages", packages.len())),
        bad => bail!("not permissive, or without a licence: {}", bad.join(", ")),
    }
}

/// Whether an SPDX expression can be met by permissive licences alone.
fn permissive(expression: &str) -> bool {
    let mut words = Words { rest: expression.replace('/', " OR ").replace('(', " ( ").replace(')', " ) ") };
    let met = words.any();
    met && words.next().is_empty()
}

/// `any = all ("OR" all)*`, `all = one ("AND" one)*`, `one = "(" any ")" | licence ["WITH" exception]`.
struct Words {
    rest: String,
}

impl Words {
    fn peek(&self) -> &str {
        self.rest.split_whitespace().next().unwrap_or("")
    }

    fn next(&mut self) -> String {
        let word = self.peek().to_owned();
        let at = self.rest.find(&word).unwrap_or(0) + word.len();
        self.rest = self.rest.split_off(at);
        word
    }

    fn any(&mut self) -> bool {
        let mut met = self.all();
        while self.peek() == "OR" {
            self.next();
            met |= self.all();
        }
        met
    }

    fn all(&mut self) -> bool {
        let mut met = self.one();
        while self.peek() == "AND" {
            self.next();
            met &= self.one();
        }
        met
    }

    fn one(&mut self) -> bool {
        let mut licence = self.next();
        if licence == "(" {
            let met = self.any();
            return self.next() == ")" && met;
        }
        if self.peek() == "WITH" {
            self.next();
            licence = format!("{licence} WITH {}", self.next());
        }
        PERMISSIVE.contains(&licence.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::permissive;

    #[test]
    fn expressions() {
        for good in [
            "MIT",
            "MIT OR GPL-3.0",
            "MIT/Apache-2.0",
            "(MIT OR Apache-2.0) AND Unicode-3.0",
            "GPL-2.0 OR (ISC AND MIT)",
        ] {
            assert!(permissive(good), "{good}");
        }
        for bad in ["", "GPL-3.0", "MIT AND GPL-3.0", "(MIT", "MIT)", "MIT OR", "Apache-2.0 WITH other"] {
            assert_eq!(permissive(bad), bad == "MIT OR", "{bad}");
        }
    }
}
