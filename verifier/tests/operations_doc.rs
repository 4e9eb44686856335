//! `docs/operations.md` against the code: the table of findings is what `codes` prints, and its policies are read by what
//! reads them and name every key there is.
//!
//! An example is a code block with the info string `toml policy`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{fs, process::Command};

use onequote_verifier::policy::Policy;

const DOC: &str = include_str!("../../docs/operations.md");

/// A key to be named in a policy.
const VENDOR: &str = "-----BEGIN PUBLIC KEY-----\n\
    MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEBfEksDzoKrKmCMroazrQrn8TstSD\n\
    dRRXL7cHeLQJTbg9AnLB1sa4389GxNYCEWuEZKKJMf7Jq8QimTLF5Jl+HQ==\n\
    -----END PUBLIC KEY-----\n";

fn policies() -> Vec<&'static str> {
    let blocks: Vec<_> = (DOC.split("\n```toml policy\n").skip(1))
        .map(|rest| rest.split_once("\n```").expect("a block ends").0)
        .collect();
    assert!(!blocks.is_empty());
    blocks
}

#[test]
fn the_table_of_findings_is_what_codes_prints() {
    let output = Command::new(env!("CARGO_BIN_EXE_onequote-verifier")).arg("codes").output().unwrap();
    assert!(output.status.success());
    let printed = String::from_utf8(output.stdout).unwrap();
    assert!(printed.lines().count() > 50, "{printed}");
    let (_, chapter) = DOC.split_once("\n# Every finding\n").expect("the chapter");
    let told: String = chapter.lines().filter(|line| line.starts_with('|')).map(|line| format!("{line}\n")).collect();
    assert_eq!(told, printed, "put what `onequote-verifier codes` prints at the end of docs/operations.md");
}

#[test]
fn policies_are_read() {
    for text in policies() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("policy.toml");
        fs::write(&path, text).unwrap();
        let files = format!("\"/usr/local/sbin/onequote-proxy\" = [\"sha256:{}\"]\n", "0".repeat(64));
        fs::write(dir.path().join("host-files.toml"), files).unwrap();
        fs::write(dir.path().join("vendor.pem"), VENDOR).unwrap();
        let (policy, _) = Policy::load(&path).unwrap_or_else(|e| panic!("{e}\n{text}"));
        assert_eq!(policy.host.ima.allow.as_ref().map(onequote_verifier::policy::AllowList::len), Some(1));
        assert_eq!(policy.vms.len(), 1);
    }
}

#[test]
fn every_key_of_a_policy_is_there() {
    let image = format!("images.d = {{ digests = [\"sha256:{}\"], nonsense = 1 }}\n", "0".repeat(64));
    for text in [
        "nonsense = 1\n".to_owned(),
        "[host]\nnonsense = 1\n".to_owned(),
        "[host.firmware]\nnonsense = 1\n".to_owned(),
        "[host.firmware]\ndb = { nonsense = 1 }\n".to_owned(),
        "[[vm]]\nnonsense = 1\n".to_owned(),
        format!("[[vm]]\nname = \"*\"\n{image}"),
        "[host]\naccept_gaps = [\"nonsense\"]\n".to_owned(),
        "[host]\nunmanaged = \"nonsense\"\n".to_owned(),
        "[[vm]]\nname = \"*\"\nruntime = \"nonsense\"\n".to_owned(),
    ] {
        let error = Policy::parse(&text, "p.toml").expect_err(&text).to_string();
        let (_, list) = error.rsplit_once("expected").unwrap_or_else(|| panic!("{error}"));
        let known: Vec<_> = list.lines().next().unwrap().split('`').skip(1).step_by(2).collect();
        assert!(known.len() > 1, "{error}");
        for key in known {
            let there = policies().iter().any(|policy| policy.contains(key));
            assert!(there, "{key} is not in a policy of docs/operations.md; known: {error}");
        }
    }
}
