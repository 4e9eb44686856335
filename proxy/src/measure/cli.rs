//! `measure FILE…`: reference values of files.

use std::{
    io::{self, IsTerminal, Write},
    path::PathBuf,
    time::{Duration, Instant},
};

use super::{MeasureError, Stamp, digest::digest_now, file::open};

/// Prints the digest of each file to `out`: as `sha256sum` does, or one JSON array with `path`, `size` and `digest`.
/// Progress goes to standard error when that is a terminal.
///
/// # Errors
/// The first file that cannot be read, or changes while it is.
pub fn measure_files(files: &[PathBuf], json: bool, out: &mut dyn Write) -> Result<(), MeasureError> {
    let mut list = Vec::new();
    for path in files {
        let fail = |kind: super::MeasureErrorKind| MeasureError::new("file", path, kind);
        let written = |e: io::Error| MeasureError::of("output", e);
        let file = open(path).map_err(fail)?;
        let stamp = || file.metadata().map(|m| Stamp::from(&m)).map_err(|e| fail(e.into()));
        let before = stamp()?;
        let mut meter = Meter::new(path.display().to_string(), before.size);
        let measured = digest_now(&file, &mut |done| meter.show(done));
        meter.clear();
        let (size, digest) = measured.map_err(|e| fail(e.into()))?;
        if stamp()? != before {
            return Err(fail(super::MeasureErrorKind::Changed));
        }
        if json {
            list.push(serde_json::json!({"path": path, "size": size, "digest": digest}));
        } else {
            writeln!(out, "{}  {}", digest.value, path.display()).map_err(written)?;
        }
    }
    if json {
        writeln!(out, "{:#}", serde_json::Value::from(list)).map_err(|e| MeasureError::of("output", e))?;
    }
    Ok(())
}

struct Meter {
    name: String,
    total: u64,
    shown: Option<Instant>,
    begun: Instant,
    wanted: bool,
}

impl Meter {
    fn new(name: String, total: u64) -> Self {
        Self { name, total, shown: None, begun: Instant::now(), wanted: io::stderr().is_terminal() }
    }

    fn show(&mut self, done: u64) -> bool {
        let due = self.shown.unwrap_or(self.begun).elapsed() > Duration::from_millis(200);
        if self.wanted && due {
            self.shown = Some(Instant::now());
            let percent =
                done.saturating_mul(100).checked_div(self.total).map_or(String::new(), |p| format!("{p} % of "));
            // Progress is a courtesy.
            let _ = write!(io::stderr(), "\r\x1b[K{}: {percent}{} MiB", self.name, self.total >> 20);
        }
        true
    }

    fn clear(&self) {
        if self.shown.is_some() {
            let _ = write!(io::stderr(), "\r\x1b[K");
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;

    #[test]
    fn prints_as_sha256sum_does_or_json() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("f");
        std::fs::write(&file, "abc").unwrap();
        let print = |files: &[PathBuf], json| {
            let mut out = Vec::new();
            measure_files(files, json, &mut out).map(|()| String::from_utf8(out).unwrap())
        };
        let digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(print(std::slice::from_ref(&file), false).unwrap(), format!("{digest}  {}\n", file.display()));
        let json: serde_json::Value = serde_json::from_str(&print(std::slice::from_ref(&file), true).unwrap()).unwrap();
        assert_eq!(json[0]["digest"], format!("sha256:{digest}"));
        assert_eq!(json[0]["size"], 3);
        let gone = print(&[file, dir.path().join("gone")], false).unwrap_err().to_string();
        assert!(gone.contains("gone") && gone.contains("No such file"), "{gone}");
    }
}
