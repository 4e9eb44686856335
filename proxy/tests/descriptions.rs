//! The descriptions in `qemu-configs` and in `docs/operations.md`, launched with `--dry-run` by the program itself: what
//! it prints is read by a shell, and names every file as it should.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{
    fs,
    os::unix::net::UnixListener,
    path::{Path, PathBuf},
    process::{Command, Output},
};

const DOC: &str = include_str!("../../docs/operations.md");

/// A folder with a proxy's configuration in it, and whatever descriptions here name.
fn folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let run = folder.path().join("run");
    let config = format!("host_id = \"h\"\nrun_dir = {run:?}\n[tpm]\ntcti = \"device:/dev/tpmrm0\"\n");
    fs::write(folder.path().join("proxy.toml"), config).unwrap();
    for file in [
        "vmlinux",
        "vmlinuz",
        "initrd",
        "initrd.img",
        "disk.img",
        "vars.fd",
        "overlay.qcow2",
        "base.qcow2",
        "boot.img",
        "root.img",
    ] {
        fs::write(folder.path().join(file), "x").unwrap();
    }
    folder
}

fn launch(folder: &Path, arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_onequote-proxy"));
    command.arg("--config").arg(folder.join("proxy.toml")).arg("launch").args(arguments);
    // Elsewhere: its paths are relative to the description.
    command.current_dir("/").output().unwrap()
}

/// What a shell makes of the printed line: the folder, and the words.
fn read_by_shell(line: &str) -> (PathBuf, Vec<String>) {
    let (cd, qemu) = line.split_once(" && ").expect(line);
    let script = format!("{cd} && pwd && for word in {qemu}; do printf '%s\\0' \"$word\"; done");
    let done = Command::new("sh").arg("-c").arg(script).output().unwrap();
    assert!(done.status.success(), "{done:?}");
    let said = String::from_utf8(done.stdout).unwrap();
    let (dir, words) = said.split_once('\n').unwrap();
    (dir.into(), words.split_terminator('\0').map(str::to_owned).collect())
}

fn dry_run(folder: &Path, text: &str) -> Vec<String> {
    let path = folder.join("web1.toml");
    fs::write(&path, text).unwrap();
    let done = launch(folder, &["--dry-run", path.to_str().unwrap()]);
    assert!(done.status.success(), "{done:?}\n{text}");
    let (dir, words) = read_by_shell(String::from_utf8(done.stdout).unwrap().trim_end());
    assert_eq!(dir, folder);
    let accelerator = words.windows(2).find(|w| w[0] == "-machine").unwrap()[1].clone();
    assert!(accelerator.contains("accel=kvm") || accelerator.contains("accel=tcg"), "{accelerator}");
    words
}

#[test]
fn the_ready_descriptions_are_put_into_words() {
    let configs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../qemu-configs");
    let mut seen = 0;
    let entries = [&configs, &configs.join("nested-host")].map(|folder| fs::read_dir(folder).unwrap());
    for entry in entries.into_iter().flatten() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|e| e != "toml") {
            continue;
        }
        let folder = folder();
        let words = dry_run(folder.path(), &fs::read_to_string(&path).unwrap());
        assert!(words.contains(&"-S".to_owned()) && words.ends_with(&["-name".to_owned(), "web1".to_owned()]));
        // It starts from the same files as the configuration beside it.
        let beside = fs::read_to_string(path.with_extension("cfg")).unwrap();
        let named = beside.lines().filter_map(|line| line.trim().split_once(" = "));
        let mut files = 0;
        for (_, file) in named.filter(|(key, _)| matches!(*key, "kernel" | "initrd" | "file" | "firmware")) {
            let full = folder.path().join(file.trim_matches('"')).display().to_string();
            assert!(words.iter().any(|word| word.ends_with(&full) || word.contains(&format!("{full},"))), "{full}");
            files += 1;
        }
        assert!(files >= 3, "{}", path.display());
        seen += 1;
    }
    assert_eq!(seen, 4);
}

#[test]
fn descriptions_of_the_manual_are_read_and_have_every_key() {
    let blocks: Vec<_> = DOC.split("\n```toml vm\n").skip(1).map(|b| b.split_once("\n```").unwrap().0).collect();
    assert!(blocks.len() >= 2, "no descriptions in the manual");
    let folder = folder();
    let _back_end = UnixListener::bind(folder.path().join("vhost.sock")).unwrap();
    let text = blocks.concat();
    for block in &blocks {
        dry_run(folder.path(), block);
    }
    for section in ["", "[firmware]", "[[disk]]", "[[network]]", "[vsock]", "[console]"] {
        let wrong = format!("memory = \"1M\"\n{section}\nnonsense = 1\n");
        let path = folder.path().join("wrong.toml");
        fs::write(&path, wrong).unwrap();
        let done = launch(folder.path(), &["--dry-run", path.to_str().unwrap()]);
        assert!(!done.status.success());
        let error = String::from_utf8(done.stderr).unwrap();
        assert!(error.contains("wrong.toml") && error.contains("nonsense") && error.contains("line 3"), "{error}");
        let (_, known) = error.split_once("expected").expect(&error);
        for key in known.lines().next().unwrap().split('`').skip(1).step_by(2) {
            let sets = |line: &str| {
                let rest = line.trim_start_matches(['#', '[', ' ']).strip_prefix(key);
                rest.is_some_and(|rest| rest.starts_with([' ', ']', '=']))
            };
            assert!(text.lines().any(sets), "{section} {key} is not in docs/operations.md");
        }
    }
}

#[test]
fn a_launch_is_by_description_or_by_arguments() {
    let folder = folder();
    let both = launch(folder.path(), &["--dry-run", "x.toml", "--", "qemu"]);
    assert_eq!(both.status.code(), Some(2), "{both:?}");
    assert_eq!(launch(folder.path(), &["--dry-run"]).status.code(), Some(2));
    let missing = launch(folder.path(), &["--dry-run", "/no/such.toml"]);
    assert!(String::from_utf8_lossy(&missing.stderr).contains("/no/such.toml"), "{missing:?}");
    let arguments = launch(folder.path(), &["--dry-run", "--name", "a", "--", "qemu", "-append", "a b"]);
    let line = String::from_utf8(arguments.stdout).unwrap();
    assert!(line.starts_with("qemu -append 'a b' -S -qmp "), "{line}");
}
