//! The service files as systemd reads them.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{fs, path::Path, process::Command};

#[test]
fn reading_with_idle_priority_is_allowed() {
    let unit = Path::new(env!("CARGO_MANIFEST_DIR")).join("systemd/onequote-proxy.service");
    let text = fs::read_to_string(unit).unwrap();
    // Later lines count: what is taken away with @resources must be given back after that.
    let filters: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix("SystemCallFilter=")).collect();
    let last = |part: &str| filters.iter().rposition(|filter| filter.contains(part));
    assert!(last("@resources") < last("ioprio_set"), "{filters:?}");
}

#[test]
fn systemd_finds_nothing_wrong_with_the_units() {
    let dir = tempfile::tempdir().unwrap();
    let units = Path::new(env!("CARGO_MANIFEST_DIR")).join("systemd");
    let mut names = Vec::new();
    for entry in fs::read_dir(units).unwrap() {
        let path = entry.unwrap().path();
        // A template is looked at as one of its instances.
        let name = path.file_name().unwrap().to_str().unwrap().replace("@.", "@web1.");
        // systemd looks whether the program is there.
        let text = fs::read_to_string(&path).unwrap();
        let installed = "/usr/local/sbin/onequote-proxy";
        assert!(text.contains(installed), "{name}");
        fs::write(dir.path().join(&name), text.replace(installed, env!("CARGO_BIN_EXE_onequote-proxy"))).unwrap();
        names.push(name);
    }
    assert_eq!(names.len(), 2, "{names:?}");
    let done = Command::new("systemd-analyze").args(["verify", "--man=no"]).args(&names).current_dir(&dir).output();
    match done {
        Ok(done) => assert!(done.status.success() && done.stderr.is_empty(), "{done:?}"),
        Err(e) => eprintln!("skipped: systemd-analyze: {e}"),
    }
}
