//! What is shown when a test fails.

use std::fs;
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
