//! Signatures made by `evmctl` of ima-evm-utils are good here, and those of altered files are not.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{fs, path::Path, process::Command};

use onequote_evidence::{digest::HashAlg, ima::Entry};
use onequote_verifier::{appraise::ima::Judge, finding::Code, policy::Policy};

/// Whether the tools are there. Without them nothing is tested, and that is said.
fn tools() -> bool {
    let there = |program: &str| Command::new(program).arg("--version").output().is_ok();
    let all = there("evmctl") && there("openssl");
    if !all {
        eprintln!("skipped: evmctl (ima-evm-utils) or openssl is not installed");
    }
    all
}

fn run(folder: &Path, words: &str) {
    let mut words = words.split_whitespace();
    let output = Command::new(words.next().unwrap()).args(words.clone()).current_dir(folder).output().unwrap();
    assert!(output.status.success(), "{words:?}: {}", String::from_utf8_lossy(&output.stderr));
}

fn block(bytes: &[u8]) -> Vec<u8> {
    [&(bytes.len() as u32).to_le_bytes(), bytes].concat()
}

/// An `ima-sig` entry as the kernel lists it.
fn entry(alg: HashAlg, content: &[u8], signature: &[u8]) -> Vec<u8> {
    let digest = [alg.name().as_bytes(), b":\0", &alg.hash(content)].concat();
    let data = [block(&digest), block(b"/usr/bin/program\0"), block(signature)].concat();
    [&10_u32.to_le_bytes(), HashAlg::Sha1.hash(&data).as_slice(), &block(b"ima-sig"), &block(&data)].concat()
}

fn judge(policy: &Policy, raw: &[u8]) -> Option<Code> {
    let entry = Entry::parse(raw, 20).unwrap();
    Judge::new(&policy.host.ima).finding(&entry).map(|finding| finding.code)
}

#[test]
fn signatures_of_evmctl() {
    if !tools() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let content = b"a program that was signed";
    fs::write(at("program"), content).unwrap();
    let keys = [
        ("rsa", "openssl genrsa -out rsa.key 2048"),
        ("p256", "openssl ecparam -name prime256v1 -genkey -noout -out p256.key"),
        ("p384", "openssl ecparam -name secp384r1 -genkey -noout -out p384.key"),
    ];
    for (key, make) in keys {
        run(folder.path(), make);
        run(folder.path(), &format!("openssl pkey -in {key}.key -pubout -out {key}.pem"));
        let certificate = "req -x509 -new -subj /CN=test -days 2 -addext subjectKeyIdentifier=01020304050607080910";
        run(folder.path(), &format!("openssl {certificate} -key {key}.key -out {key}.crt"));
    }
    for (key, _) in keys {
        let policy = |files: &str| {
            fs::write(at("policy.toml"), format!("[host]\nima_keys = [{files}]\n")).unwrap();
            let (policy, text) = Policy::load(&at("policy.toml")).unwrap();
            // As it is stored: the keys are in it.
            assert!(Policy::parse(&text, "stored").unwrap().host.ima.keys == policy.host.ima.keys);
            policy
        };
        for alg in [HashAlg::Sha256, HashAlg::Sha384, HashAlg::Sha512] {
            let sign = |more: &str| {
                let _ = fs::remove_file(at("program.sig"));
                run(folder.path(), &format!("evmctl ima_sign --sigfile -a {alg} --key {key}.key {more} program"));
                fs::read(at("program.sig")).unwrap()
            };
            let signature = sign("");
            for files in [format!("\"{key}.pem\""), format!("\"{key}.crt\"")] {
                let policy = policy(&files);
                assert_eq!(judge(&policy, &entry(alg, content, &signature)), None, "{key} {alg} {files}");
                let altered = entry(alg, b"a program that was altered", &signature);
                assert_eq!(judge(&policy, &altered), Some(Code::ImaSignatureBad), "{key} {alg} {files}");
            }
            let others = policy("\"p256.pem\"");
            if key != "p256" {
                assert_eq!(judge(&others, &entry(alg, content, &signature)), Some(Code::ImaSignatureKey));
            }
            // Named after the certificate's own identifier.
            let named = sign(&format!("--keyid-from-cert {key}.crt"));
            assert_eq!(named[3..7], [7, 8, 9, 0x10]);
            let with = |files: &str| judge(&policy(files), &entry(alg, content, &named));
            assert_eq!(with(&format!("\"{key}.crt\"")), None);
            assert_eq!(with(&format!("{{ key = \"{key}.pem\", id = \"07080910\" }}")), None);
            assert_eq!(with(&format!("\"{key}.pem\"")), Some(Code::ImaSignatureKey));
        }
    }
    for wrong in ["openssl ecparam -name secp256k1 -genkey -noout -out wrong.key", "openssl genrsa -out wrong.key 1024"]
    {
        run(folder.path(), wrong);
        run(folder.path(), "openssl pkey -in wrong.key -pubout -out wrong.pem");
        fs::write(at("policy.toml"), "[host]\nima_keys = [\"wrong.pem\"]\n").unwrap();
        let e = Policy::load(&at("policy.toml")).unwrap_err();
        assert!(e.to_string().contains("wrong.pem"), "{e}");
    }
}
