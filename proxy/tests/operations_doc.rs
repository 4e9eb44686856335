//! `docs/operations.md` and the README against the code: their configurations and reference lists are read by what reads
//! them on a host, name every key there is, and say the values that count when a key is left out.
//!
//! An example is a code block with the info string `toml proxy` or `toml references`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{fs, path::PathBuf};

use onequote_proxy::{
    config::{Config, Guest, Intercept, Log},
    vm::References,
};

const DOC: &str = include_str!("../../docs/operations.md");
const README: &str = include_str!("../../README.md");

/// The blocks with that info string.
fn blocks<'a>(page: &'a str, info: &str) -> Vec<&'a str> {
    let opening = format!("\n```{info}\n");
    let blocks: Vec<_> =
        page.split(&opening).skip(1).map(|rest| rest.split_once("\n```").expect("a block ends").0).collect();
    assert!(!blocks.is_empty(), "no block {info}");
    blocks
}

fn file(text: &str) -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("file.toml");
    fs::write(&path, text).unwrap();
    (dir, path)
}

fn config(text: &str) -> Config {
    let (_dir, path) = file(text);
    Config::read(&path).unwrap_or_else(|e| panic!("{e}\n{text}"))
}

/// The keys that a message about the unknown key `nonsense` lists as known.
fn known(message: &str) -> Vec<String> {
    let (_, list) = message.split_once("expected").unwrap_or_else(|| panic!("{message}"));
    list.lines().next().unwrap().split('`').skip(1).step_by(2).map(str::to_owned).collect()
}

/// Whether a line of the block sets the key, if only in a comment.
fn sets(block: &str, key: &str) -> bool {
    let line = |line: &str| {
        let line = line.trim_start_matches(['#', '[', ' ']);
        line.strip_prefix("tpm.").unwrap_or(line).strip_prefix(key).map(str::to_owned)
    };
    block.lines().filter_map(line).any(|rest| rest.starts_with([' ', ']', '.', '=']))
}

#[test]
fn configurations_are_read() {
    for page in [DOC, README] {
        let of_proxy = if page == DOC { blocks(page, "toml proxy") } else { blocks(page, "toml") };
        for text in of_proxy.into_iter().filter(|text| text.contains("host_id")) {
            config(text);
        }
    }
}

#[test]
fn every_key_of_the_configuration_is_there() {
    let text = blocks(DOC, "toml proxy").remove(0);
    for section in [
        "[tpm]",
        "[tpm.auth]",
        "[[verifiers]]",
        "[[monitor]]",
        "[enforce]",
        "[measure]",
        "[vms]",
        "[intercept]",
        "[guest]",
        "[report]",
        "[host]",
        "[log]",
        "",
    ] {
        let lines = text.lines().map(|line| match line.starts_with(section) && !section.is_empty() {
            true => format!("{line}\nnonsense = 1\n"),
            false => format!("{line}\n"),
        });
        let wrong = format!("{}{}", if section.is_empty() { "nonsense = 1\n" } else { "" }, lines.collect::<String>());
        let (_dir, path) = file(&wrong);
        let error = Config::read(&path).expect_err(section).to_string();
        assert!(error.contains("nonsense"), "{section}: {error}");
        for key in known(&error) {
            assert!(sets(text, &key), "{section} {key} is not in docs/operations.md");
        }
    }
}

#[test]
fn values_of_keys_that_are_left_out() {
    let told = config(blocks(DOC, "toml proxy")[0]);
    let least = config("host_id = \"host-7\"\n[tpm]\ntcti = \"device:/dev/tpmrm0\"\n");
    assert_eq!((&told.host_id, &told.state_dir, &told.run_dir), (&least.host_id, &least.state_dir, &least.run_dir));
    assert_eq!((told.listen, told.pcr_vm, told.pcr_guest), (least.listen, least.pcr_vm, least.pcr_guest));
    assert_eq!(told.tpm.ak, least.tpm.ak);
    assert!(least.tpm.ak_handle.is_none() && least.tpm.ek.is_none() && least.tpm.ek_certificate.is_none());
    assert_eq!(told.vms.look_ms, least.vms.look_ms);
    assert_eq!(told.vms.looks_per_second, least.vms.looks_per_second);
    let Log { segment_bytes } = least.log;
    assert_eq!(told.log.segment_bytes, segment_bytes);
    let Guest { port, vsock, unix, collect_ms, max_entries, max_bytes } = least.guest;
    let guest = told.guest;
    assert_eq!((guest.port, guest.vsock, guest.unix, guest.collect_ms), (port, vsock, unix, collect_ms));
    assert_eq!((guest.max_entries, guest.max_bytes), (max_entries, max_bytes));
    assert_eq!(told.measure.limits().idle_io, least.measure.limits().idle_io);
    let Intercept { vms, refuse, clients } = Intercept::default();
    let intercept = told.intercept.unwrap();
    assert_eq!((intercept.vms, intercept.refuse, intercept.clients), (vms, refuse, clients));
    assert!(least.intercept.is_none());
    assert_eq!((told.report.enabled, told.report.changes), (least.report.enabled, least.report.changes));
    // Of these the page says that they are not set.
    assert!(least.measure.parallel.is_none() && told.measure.parallel.is_none());
    assert!(least.host.firmware_log.is_none() && least.host.ima_list.is_none() && least.enforce.is_none());
    assert!(least.monitors.is_empty());
}

#[test]
fn reference_lists_are_read_and_have_every_key() {
    for text in blocks(DOC, "toml references") {
        let (_dir, path) = file(text);
        References::load(&path).unwrap_or_else(|e| panic!("{e}\n{text}"));
        let (_dir, path) = file(&text.replacen("[[vm]]\n", "[[vm]]\nnonsense = 1\n", 1));
        let error = References::load(&path).unwrap_err();
        let source = std::error::Error::source(&error).expect("where and why").to_string();
        for key in known(&source) {
            assert!(sets(text, &key) || text.contains(&format!("[vm.{key}]")), "{key} is not in docs/operations.md");
        }
    }
}
