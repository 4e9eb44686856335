//! A verdict as the verifier's command line prints it.

use std::fmt;

use anyhow::{Result, ensure};
use serde_json::Value;

use super::verifier::Run;

/// A verdict with the exit code of the command that printed it.
#[derive(Debug, Clone)]
pub struct Verdict {
    /// The command's exit code.
    pub code: i32,
    json: Value,
}

/// What a verdict says of the host or of one VM.
#[derive(Debug, Clone, Copy)]
pub struct Judged<'a>(&'a Value);

impl Verdict {
    /// Reads what a command printed.
    ///
    /// # Errors
    /// It is no JSON.
    pub fn of(run: &Run) -> Result<Self> {
        Ok(Self { code: run.code, json: run.json()? })
    }

    /// A verdict as `serve` shows it.
    #[must_use]
    pub(crate) fn of_json(code: i32, json: Value) -> Self {
        Self { code, json }
    }

    /// A field of the whole.
    #[must_use]
    pub fn field(&self, name: &str) -> &Value {
        &self.json[name]
    }

    /// The verdict on the host.
    #[must_use]
    pub fn host(&self) -> Judged<'_> {
        Judged(&self.json["host"])
    }

    /// Its notes, one a line.
    #[must_use]
    pub fn notes(&self) -> String {
        let notes = self.json["notes"].as_array().map(Vec::as_slice).unwrap_or_default();
        notes.iter().filter_map(Value::as_str).collect::<Vec<_>>().join("\n")
    }

    /// The verdict on the VM called `name`; of a VM that it does not speak of, the state is `none`.
    #[must_use]
    pub fn vm(&self, name: &str) -> Judged<'_> {
        let vms = self.json["vms"].as_array().map(Vec::as_slice).unwrap_or_default();
        Judged(vms.iter().find(|vm| vm["name"] == name).unwrap_or(&Value::Null))
    }
}

impl Judged<'_> {
    /// The state's word, or `none`.
    #[must_use]
    pub fn state(&self) -> &str {
        self.0["state"].as_str().unwrap_or("none")
    }

    /// A field of the verdict.
    #[must_use]
    pub fn field(&self, name: &str) -> &Value {
        &self.0[name]
    }

    /// Findings as `code item`.
    #[must_use]
    pub fn findings(&self) -> Vec<String> {
        let text = |v: &Value| v.as_str().unwrap_or_default().to_owned();
        let list = self.0["findings"].as_array().map(Vec::as_slice).unwrap_or_default();
        list.iter().map(|f| format!("{} {}", text(&f["code"]), text(&f["item"]))).collect()
    }

    /// Whether there is a finding with this code whose item contains `item`.
    #[must_use]
    pub fn has(&self, code: &str, item: &str) -> bool {
        self.findings().iter().any(|f| f.split_once(' ').is_some_and(|(c, i)| c == code && i.contains(item)))
    }

    /// Passes if there is a finding with this code.
    ///
    /// # Errors
    /// There is none; the text has the findings.
    pub fn shows(&self, code: &str) -> Result<()> {
        ensure!(self.has(code, ""), "no {code}, {}: {:?}", self.state(), self.findings());
        Ok(())
    }

    /// Passes if the state is this one.
    ///
    /// # Errors
    /// It is another; the text has the findings.
    pub fn is(&self, state: &str) -> Result<()> {
        ensure!(self.state() == state, "{} instead of {state}: {:?}", self.state(), self.findings());
        Ok(())
    }

    /// Passes if it is untrusted for this finding.
    ///
    /// # Errors
    /// It is not; the text has the findings.
    pub fn is_untrusted_for(&self, code: &str, item: &str) -> Result<()> {
        self.is("untrusted")?;
        ensure!(self.has(code, item), "no {code} {item}: {:?}", self.findings());
        Ok(())
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "exit code {}: {:#}", self.code, self.json)
    }
}
