//! What is shown when a test fails, and what was left out.

use std::fs;
use std::io::Write as _;
use std::path::Path;

use super::process;

const LINES: usize = 120;

/// Prints the end of every log below `folder` to standard error (libtest shows it with the failed test).
pub(crate) fn print_logs(folder: &Path) {
    let mut logs = Vec::new();
    collect(folder, &mut logs);
    logs.sort();
    for log in logs {
        eprintln!("---- {}", log.display());
        eprintln!("{}", process::tail(&log, LINES));
    }
}

/// Notes that `what` was left out because of `why`: printed, and in the summary of `cargo xtask test`.
pub fn skip(what: &str, why: &str) {
    note(&format!("skipped {what}: {why}"));
}

/// Notes what a test found out, such as a time or a size: printed, and in the summary of `cargo xtask test`.
pub fn note(text: &str) {
    eprintln!("{text}");
    if let Some(file) = std::env::var_os("ONEQUOTE_SKIPS") {
        let file = fs::File::options().create(true).append(true).open(file);
        // The summary would lack a line, nothing else.
        let _ = file.and_then(|mut file| file.write_all(format!("{text}\n").as_bytes()));
    }
}

fn collect(folder: &Path, logs: &mut Vec<std::path::PathBuf>) {
    let Ok(items) = fs::read_dir(folder) else { return };
    for item in items.flatten() {
        let path = item.path();
        if item.file_type().is_ok_and(|kind| kind.is_dir()) {
            collect(&path, logs);
        } else if path.extension().is_some_and(|ending| ending == "log")
            // Every byte that the TPM was given: too much to print, and the proxy says what it asked.
            && path.file_name().is_some_and(|name| name != "commands.log")
            && fs::metadata(&path).is_ok_and(|data| data.len() > 0)
        {
            logs.push(path);
        }
    }
}
