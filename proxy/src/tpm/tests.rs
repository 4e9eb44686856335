//! Against swtpm.

use std::collections::BTreeSet;

mod keys;

use super::{swtpm::Swtpm, *};
use onequote_evidence::{
    id::Blob,
    pcr::{self, PCR_COUNT, QUOTED_PCRS},
    tpm::{Attest, Public, Signature},
};

fn all(banks: &[HashAlg], pcrs: &[u8]) -> Vec<Register> {
    banks.iter().flat_map(|&bank| pcrs.iter().map(move |&pcr| Register { bank, pcr })).collect()
}

fn digests(banks: &[HashAlg], data: &[u8]) -> Vec<BankDigest> {
    banks.iter().map(|&alg| BankDigest { alg, value: Blob(alg.hash(data)) }).collect()
}

#[test]
fn reads_more_registers_than_one_command_answers() {
    let swtpm = Swtpm::start();
    let mut tpm = EsapiTpm::open(&swtpm.tcti()).unwrap();
    let banks = tpm.active_banks().unwrap();
    assert_eq!(banks, HashAlg::ALL, "swtpm without set-up has these four");
    let registers = all(&banks, &(0..PCR_COUNT).collect::<Vec<_>>());
    let values = tpm.pcr_read(&registers).unwrap();
    assert_eq!(values.len(), 4 * 24);
    assert!(values.iter().all(|(register, value)| value.len() == register.bank.size()));
    assert_eq!(values[&Register { bank: HashAlg::Sha256, pcr: 12 }], vec![0; 32]);
    assert!(tpm.pcr_read(&[]).unwrap().is_empty());
}

#[test]
fn an_extend_changes_one_register_in_every_bank() {
    let swtpm = Swtpm::start();
    let mut tpm = EsapiTpm::open(&swtpm.tcti()).unwrap();
    let banks = tpm.active_banks().unwrap();
    let registers = all(&banks, &[12, 13]);
    let mut expected = tpm.pcr_read(&registers).unwrap();
    for round in 0..20_u8 {
        let digests = digests(&banks, &[round]);
        tpm.extend(13, &digests).unwrap();
        for digest in digests {
            let value = expected.get_mut(&Register { bank: digest.alg, pcr: 13 }).unwrap();
            pcr::extend(digest.alg, value, &digest.value.0);
        }
        assert_eq!(tpm.pcr_read(&registers).unwrap(), expected);
    }
}

#[test]
fn a_quote_is_over_what_was_asked() {
    let swtpm = Swtpm::start();
    let mut tpm = EsapiTpm::open(&swtpm.tcti()).unwrap();
    let banks = tpm.active_banks().unwrap();
    let registers = all(&banks, &QUOTED_PCRS);
    tpm.extend(12, &digests(&banks, b"x")).unwrap();
    let values = tpm.pcr_read(&registers).unwrap();
    let quote = tpm.quote(&[7; 32], &registers).unwrap();
    let attest = Attest::parse(&quote.attest).unwrap();
    assert!(attest.selection.is_exactly(&registers.iter().copied().collect()));
    assert_eq!(attest.selection.digest_sha256(&values).unwrap().0.as_slice(), attest.pcr_digest);
    assert_eq!(attest.extra_data, [7; 32]);
    assert_eq!(attest.clock.reset_count, tpm.clock().unwrap().reset_count, "not masked");
    assert!(Signature::parse(&quote.signature).is_ok());
    let longest = tpm.quote(&[7; 64], &registers).unwrap();
    assert_eq!(Attest::parse(&longest.attest).unwrap().extra_data, [7; 64]);
    let error = tpm.quote(&[7; 65], &registers).unwrap_err();
    assert!(matches!(error.kind, TpmErrorKind::Argument { .. }));
}

#[test]
fn the_key_is_the_tpms_and_stays() {
    let mut swtpm = Swtpm::start();
    let (key, clock) = {
        let mut tpm = EsapiTpm::open(&swtpm.tcti()).unwrap();
        assert!(tpm.is_software());
        assert_eq!(tpm.model(), "IBM SW TPM");
        (tpm.ak_public().to_vec(), tpm.clock().unwrap())
    };
    let public = Public::parse(&key).unwrap();
    assert_eq!(public.attributes.ak_defect(), None);
    swtpm.restart();
    let mut tpm = EsapiTpm::open(&swtpm.tcti()).unwrap();
    assert_eq!(tpm.ak_public(), key);
    assert_eq!(tpm.clock().unwrap().reset_count, clock.reset_count + 1);
    let other = Swtpm::start();
    assert_ne!(EsapiTpm::open(&other.tcti()).unwrap().ak_public(), key);
}

#[test]
fn left_overs_of_killed_proxies_are_removed() {
    let swtpm = Swtpm::start();
    let mut keys = BTreeSet::new();
    for _ in 0..20 {
        let mut tpm = EsapiTpm::open(&swtpm.tcti()).unwrap();
        tpm.extend(12, &digests(&HashAlg::ALL, b"x")).unwrap();
        keys.insert(tpm.ak_public().to_vec());
        // As SIGKILL: nothing is flushed.
        std::mem::forget(tpm);
    }
    assert_eq!(keys.len(), 1);
    let mut tpm = EsapiTpm::open(&swtpm.tcti()).unwrap();
    tpm.quote(&[1; 32], &all(&[HashAlg::Sha256], &[12])).unwrap();
}

#[test]
fn a_clean_close_leaves_nothing() {
    let swtpm = Swtpm::start();
    drop(EsapiTpm::open(&swtpm.tcti()).unwrap());
    let mut esys = esys::Esys::connect(&std::ffi::CString::new(swtpm.tcti()).unwrap()).unwrap();
    assert!(esys.tpm_handles(0x8000_0000).unwrap().is_empty());
    assert!(esys.tpm_handles(0x0200_0000).unwrap().is_empty());
}

#[test]
fn a_dead_tpm_is_named() {
    let mut swtpm = Swtpm::start();
    let mut tpm = EsapiTpm::open(&swtpm.tcti()).unwrap();
    swtpm.kill();
    let error = tpm.extend(12, &digests(&HashAlg::ALL, b"x")).unwrap_err();
    assert!(matches!(error.kind, TpmErrorKind::Gone { .. }), "{error}");
    assert!(error.kind.is_fatal());
    assert_eq!(error.tcti, swtpm.tcti());
    assert!(error.to_string().contains("TPM2_PCR_Extend"), "{error}");
    drop(tpm);
    let error = EsapiTpm::open(&swtpm.tcti()).map(drop).unwrap_err();
    assert!(matches!(&error.kind, TpmErrorKind::Gone { hint, .. } if hint.contains("refused")), "{error}");
}

#[test]
fn no_tpm_at_all_is_explained() {
    let open = |tcti: &str| EsapiTpm::open(tcti).map(drop).unwrap_err();
    let error = open("device:/dev/onequote-has-no-such-device");
    assert!(matches!(&error.kind, TpmErrorKind::Gone { hint, .. } if hint.contains("/dev/onequote")), "{error}");
    assert!(matches!(open("swtpm").kind, TpmErrorKind::BadTcti { .. }));
    assert!(matches!(open("swtpm:path=/\0").kind, TpmErrorKind::BadTcti { .. }));
    assert!(matches!(open("no-such-tcti:x").kind, TpmErrorKind::Gone { .. } | TpmErrorKind::Refused { .. }));
}

#[test]
fn a_key_that_somebody_flushed_is_forgotten() {
    let swtpm = Swtpm::start();
    let mut tpm = EsapiTpm::open(&swtpm.tcti()).unwrap();
    // Another opening on a TPM without resource manager takes everything away.
    let _other = EsapiTpm::open(&swtpm.tcti()).unwrap();
    let error = tpm.extend(12, &digests(&HashAlg::ALL, b"x")).unwrap_err();
    assert!(error.kind.is_fatal(), "{error}");
}

#[test]
fn wrong_arguments_reach_no_tpm() {
    let swtpm = Swtpm::start();
    let mut tpm = EsapiTpm::open(&swtpm.tcti()).unwrap();
    let mut short = digests(&[HashAlg::Sha256], b"x");
    short[0].value.0.pop();
    for error in [
        tpm.extend(24, &digests(&HashAlg::ALL, b"x")).unwrap_err(),
        tpm.extend(12, &short).unwrap_err(),
        tpm.extend(12, &[]).unwrap_err(),
        tpm.pcr_read(&[Register { bank: HashAlg::Sha256, pcr: 24 }]).unwrap_err(),
    ] {
        assert!(matches!(error.kind, TpmErrorKind::Argument { .. }), "{error}");
        assert!(!error.kind.is_fatal());
    }
}

#[test]
fn tpm2_checkquote_accepts_a_quote() {
    let swtpm = Swtpm::start();
    let mut tpm = EsapiTpm::open(&swtpm.tcti()).unwrap();
    let quote = tpm.quote(&[0xA5; 32], &all(&HashAlg::ALL, &QUOTED_PCRS)).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str, bytes: &[u8]| {
        let path = dir.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        path
    };
    let check = |qualifying_data: &str| {
        let output = std::process::Command::new("tpm2_checkquote")
            .arg("-u")
            .arg(file("ak.pub", tpm.ak_public()))
            .arg("-m")
            .arg(file("attest", &quote.attest))
            .arg("-s")
            .arg(file("signature", &quote.signature))
            .args(["-g", "sha256", "-q", qualifying_data])
            .output()
            .expect("tpm2-tools must be installed");
        (output.status.success(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let (accepted, why) = check(&"a5".repeat(32));
    assert!(accepted, "{why}");
    assert!(!check(&"a6".repeat(32)).0);
}

#[test]
fn registers_are_read_as_of_one_moment() {
    const EXTENDS: usize = 25;
    let swtpm = Swtpm::start();
    let mut tpm = EsapiTpm::open(&swtpm.tcti()).unwrap();
    let registers = all(&HashAlg::ALL, &(0..PCR_COUNT).collect::<Vec<_>>());
    // What PCR 10 holds after each extend, in all banks.
    let mut states = vec![HashAlg::ALL.map(pcr::zeros)];
    for _ in 0..EXTENDS {
        let mut next = states.last().unwrap().clone();
        for (bank, value) in HashAlg::ALL.into_iter().zip(&mut next) {
            pcr::extend(bank, value, &bank.hash(b"somebody else"));
        }
        states.push(next);
    }
    let argument = HashAlg::ALL.map(|bank| format!("{bank}={}", Blob(bank.hash(b"somebody else")))).join(",");
    let mut seen = BTreeSet::new();
    for _ in 0..EXTENDS {
        let mut other = std::process::Command::new("tpm2_pcrextend")
            .arg(format!("10:{argument}"))
            .env("TPM2TOOLS_TCTI", swtpm.tcti())
            .spawn()
            .expect("tpm2-tools must be installed");
        // Not without end: swtpm would never get round to the other.
        for _ in 0..6 {
            let values = tpm.pcr_read(&registers).unwrap();
            let now = HashAlg::ALL.map(|bank| values[&Register { bank, pcr: 10 }].clone());
            let state = states.iter().position(|state| *state == now);
            seen.insert(state.expect("the banks are of the same moment"));
        }
        assert!(other.wait().unwrap().success());
    }
    assert!(seen.len() > 2, "{seen:?}");
}

#[test]
fn the_environment_is_left_alone_beside_other_threads() {
    let (stop, wait) = std::sync::mpsc::channel::<()>();
    let other = std::thread::spawn(move || wait.recv());
    assert_eq!(silence_tss_log(), std::env::var_os("TSS2_LOG").is_some());
    drop(stop);
    let _ = other.join();
}
