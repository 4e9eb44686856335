//! `measure FILE…`: reference values of files.

use std::{
    io::{self, IsTerminal, Write},
    path::{Path, PathBuf},
    sync::Mutex,
    time::{Duration, Instant},
};

use onequote_evidence::digest::{FileDigest, FileDigestAlg};
use onequote_verity::Options;

use super::{
    MeasureError, MeasureErrorKind, Stamp,
    digest::{cores, digest_now},
    file::open,
};

/// Which digests are wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Algorithms {
    /// Both.
    All,
    /// As `sha256sum` prints it: for kernels, initial RAM disks, firmware and files that arguments name.
    Sha256,
    /// As `fsverity digest` prints it: for disk images.
    FsVerity,
}

impl Algorithms {
    fn list(self) -> &'static [FileDigestAlg] {
        match self {
            Self::All => &[FileDigestAlg::Sha256, FileDigestAlg::FsVerity],
            Self::Sha256 => &[FileDigestAlg::Sha256],
            Self::FsVerity => &[FileDigestAlg::FsVerity],
        }
    }
}

/// Prints the digests of each file to `out`, one a line: digest as in policies and logs, two spaces, path; or one JSON
/// array of objects with `path`, `size` and each digest under its algorithm's name. Progress goes to standard error
/// when that is a terminal.
///
/// # Errors
/// The first file that cannot be measured, or changes while it is.
pub fn measure_files(
    files: &[PathBuf],
    algorithms: Algorithms,
    json: bool,
    out: &mut dyn Write,
) -> Result<(), MeasureError> {
    let written = |e: io::Error| MeasureError::of("output", e);
    let mut list = Vec::new();
    for path in files {
        let mut object = serde_json::Map::new();
        object.insert("path".to_owned(), path.to_string_lossy().into());
        for &alg in algorithms.list() {
            let (size, digest) = measure(path, alg).map_err(|kind| MeasureError::new("file", path, kind))?;
            if json {
                object.insert("size".to_owned(), size.into());
                object.insert(alg.name().to_owned(), digest.to_string().into());
            } else {
                writeln!(out, "{digest}  {}", path.display()).map_err(written)?;
            }
        }
        list.push(serde_json::Value::Object(object));
    }
    if json {
        writeln!(out, "{:#}", serde_json::Value::from(list)).map_err(written)?;
    }
    Ok(())
}

fn measure(path: &Path, alg: FileDigestAlg) -> Result<(u64, FileDigest), MeasureErrorKind> {
    let file = open(path)?;
    let stamp = || file.metadata().map(|m| Stamp::from(&m));
    let before = stamp()?;
    let meter = Meter::new(format!("{}, {}", path.display(), alg.name()), onequote_verity::size_of(&file)?);
    let show = |done| meter.show(done);
    let options = Options { threads: cores(), progress: &show, ..Options::default() };
    let measured = digest_now(&file, alg, options);
    meter.clear();
    let measured = measured?;
    if stamp()? == before { Ok(measured) } else { Err(MeasureErrorKind::Changed) }
}

struct Meter {
    name: String,
    /// Bytes.
    total: u64,
    begun: Instant,
    wanted: bool,
    shown: Mutex<Option<Instant>>,
}

impl Meter {
    fn new(name: String, total: u64) -> Self {
        let wanted = io::stderr().is_terminal();
        Self { name, total, begun: Instant::now(), wanted, shown: Mutex::new(None) }
    }

    fn show(&self, done: u64) -> bool {
        // Whoever finds it locked leaves the showing to the other.
        if self.wanted
            && let Ok(mut shown) = self.shown.try_lock()
            && shown.unwrap_or(self.begun).elapsed() > Duration::from_millis(200)
        {
            *shown = Some(Instant::now());
            let percent = u128::from(done) * 100 / u128::from(self.total.max(1));
            // Progress is a courtesy.
            let _ = write!(io::stderr(), "\r\x1b[K{}: {percent} % of {} MiB", self.name, self.total >> 20);
        }
        true
    }

    fn clear(&self) {
        if self.shown.lock().is_ok_and(|shown| shown.is_some()) {
            let _ = write!(io::stderr(), "\r\x1b[K");
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;

    const SHA256: &str = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";

    /// `printf abc > f && fsverity digest f`
    const VERITY: &str = "700b6bd8510f0b4f9bac8b9cf0459151a1c4a99f467892bb4bd289a67df8e19c";

    fn print(files: &[PathBuf], algorithms: Algorithms, json: bool) -> Result<String, MeasureError> {
        let mut out = Vec::new();
        measure_files(files, algorithms, json, &mut out).map(|()| String::from_utf8(out).unwrap())
    }

    #[test]
    fn prints_lines_or_json() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("f");
        std::fs::write(&file, "abc").unwrap();
        let files = std::slice::from_ref(&file);
        let (sha256, verity) = (format!("sha256:{SHA256}"), format!("fs-verity:{VERITY}"));
        let path = file.display();
        assert_eq!(print(files, Algorithms::Sha256, false).unwrap(), format!("{sha256}  {path}\n"));
        assert_eq!(print(files, Algorithms::FsVerity, false).unwrap(), format!("{verity}  {path}\n"));
        assert_eq!(print(files, Algorithms::All, false).unwrap(), format!("{sha256}  {path}\n{verity}  {path}\n"));
        let json: serde_json::Value = serde_json::from_str(&print(files, Algorithms::All, true).unwrap()).unwrap();
        let want = serde_json::json!([{"path": file, "size": 3, "sha256": sha256, "fs-verity": verity}]);
        assert_eq!(json, want);
        let gone = print(&[file, dir.path().join("gone")], Algorithms::All, false).unwrap_err().to_string();
        assert!(gone.contains("gone") && gone.contains("No such file"), "{gone}");
    }
}
