//! Keys by choice, authorisations, credentials, and a TPM that has no time.

use std::{
    io::{Read as _, Write as _},
    os::unix::net::{UnixListener, UnixStream},
    process::{Command, Output},
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
};

use onequote_evidence::tpm::{KeyParameters, StorageKey, StorageParameters};

use super::*;

const HANDLE: u32 = 0x8101_0010;

fn options(swtpm: &Swtpm) -> TpmOptions {
    TpmOptions::new(&swtpm.tcti())
}

fn tool(swtpm: &Swtpm, name: &str, arguments: &[&str]) -> Output {
    let mut command = Command::new(name);
    command.args(arguments).env("TPM2TOOLS_TCTI", swtpm.tcti());
    command.output().expect("tpm2-tools must be installed")
}

fn done(swtpm: &Swtpm, name: &str, arguments: &[&str]) {
    let output = tool(swtpm, name, arguments);
    assert!(output.status.success(), "{name}: {}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn an_ak_that_stays_is_the_one_that_is_made_anew() {
    let mut swtpm = Swtpm::start();
    let made = EsapiTpm::open(&swtpm.tcti()).unwrap().ak_public().to_vec();
    let kept = TpmOptions { ak_handle: Some(HANDLE), ..options(&swtpm) };
    assert_eq!(EsapiTpm::open_with(&kept).unwrap().ak_public(), made);
    swtpm.restart();
    let mut tpm = EsapiTpm::open_with(&kept).unwrap();
    assert_eq!(tpm.ak_public(), made);
    let quote = tpm.quote(&[3; 32], &all(&[HashAlg::Sha256], &[12])).unwrap();
    let attest = Attest::parse(&quote.attest).unwrap();
    assert_eq!(attest.clock.reset_count, tpm.clock().unwrap().reset_count, "not masked");
    drop(tpm);
    let mut esys = esys::Esys::connect(&std::ffi::CString::new(swtpm.tcti()).unwrap()).unwrap();
    assert!(esys.tpm_handles(0x8000_0000).unwrap().is_empty());
    drop(esys);
    let other = TpmOptions { ak: AkKind::Rsa2048, ..kept };
    let error = EsapiTpm::open_with(&other).map(drop).unwrap_err();
    assert!(matches!(error.kind, TpmErrorKind::Taken { handle: HANDLE, .. }), "{error}");
}

#[test]
fn another_key_at_the_handle_is_refused() {
    let swtpm = Swtpm::start();
    let dir = tempfile::tempdir().unwrap();
    let context = dir.path().join("key").display().to_string();
    // A restricted signing key, but of the owner's hierarchy.
    let attributes = "fixedtpm|fixedparent|sensitivedataorigin|userwithauth|noda|restricted|sign";
    let make = ["-C", "o", "-G", "ecc256:ecdsa-sha256:null", "-a", attributes, "-c", &context];
    done(&swtpm, "tpm2_createprimary", &make);
    done(&swtpm, "tpm2_evictcontrol", &["-C", "o", "-c", &context, "0x81010010"]);
    let kept = TpmOptions { ak_handle: Some(HANDLE), ..options(&swtpm) };
    let error = EsapiTpm::open_with(&kept).map(drop).unwrap_err();
    assert!(error.to_string().contains("no primary key of the endorsement hierarchy"), "{error}");
}

#[test]
fn an_rsa_key_quotes() {
    let swtpm = Swtpm::start();
    let mut tpm = EsapiTpm::open_with(&TpmOptions { ak: AkKind::Rsa2048, ..options(&swtpm) }).unwrap();
    let public = Public::parse(tpm.ak_public()).unwrap();
    assert!(matches!(public.key, KeyParameters::Rsa(_)));
    assert_eq!(public.attributes.ak_defect(), None);
    let quote = tpm.quote(&[0xA5; 32], &all(&[HashAlg::Sha256], &QUOTED_PCRS)).unwrap();
    assert!(matches!(Signature::parse(&quote.signature).unwrap(), Signature::RsaSsa { hash: HashAlg::Sha256, .. }));
    let dir = tempfile::tempdir().unwrap();
    for (name, bytes) in [("ak", tpm.ak_public()), ("attest", &quote.attest), ("signature", &quote.signature)] {
        std::fs::write(dir.path().join(name), bytes).unwrap();
    }
    let path = |name: &str| dir.path().join(name).display().to_string();
    let (ak, attest, signature) = (path("ak"), path("attest"), path("signature"));
    let arguments = ["-u", &ak, "-m", &attest, "-s", &signature, "-g", "sha256", "-q", &"a5".repeat(32)];
    done(&swtpm, "tpm2_checkquote", &arguments);
}

#[test]
fn authorisations_come_from_the_operator() {
    let swtpm = Swtpm::start();
    let made = EsapiTpm::open(&swtpm.tcti()).unwrap().ak_public().to_vec();
    done(&swtpm, "tpm2_changeauth", &["-c", "endorsement", "e-secret"]);
    done(&swtpm, "tpm2_changeauth", &["-c", "owner", "o-secret"]);
    let error = EsapiTpm::open(&swtpm.tcti()).map(drop).unwrap_err();
    assert!(matches!(error.kind, TpmErrorKind::WrongAuthorisation { .. }), "{error}");
    assert!(error.to_string().contains("tpm.auth"), "{error}");
    let auth = Authorisations { endorsement: b"e-secret".to_vec(), ..Authorisations::default() };
    let with = TpmOptions { auth, ..options(&swtpm) };
    let mut tpm = EsapiTpm::open_with(&with).unwrap();
    assert_eq!(tpm.ak_public(), made);
    let ek = tpm.endorsement(Some(EkKind::EccP256), None).unwrap();
    assert_eq!(activated(&mut tpm, &ek, b"sixteen bytes...", None).unwrap(), b"sixteen bytes...");
    drop(tpm);
    let kept = TpmOptions { ak_handle: Some(HANDLE), ..with.clone() };
    let error = EsapiTpm::open_with(&kept).map(drop).unwrap_err();
    assert!(matches!(error.kind, TpmErrorKind::WrongAuthorisation { .. }), "{error}");
    let auth = Authorisations { owner: b"o-secret".to_vec(), ..with.auth };
    assert_eq!(EsapiTpm::open_with(&TpmOptions { auth, ..kept }).unwrap().ak_public(), made);
}

/// Makes a credential by tpm2_makecredential for the name of this TPM's AK, or another name, and opens it.
fn activated(tpm: &mut EsapiTpm, ek: &Endorsement, secret: &[u8], name: Option<&[u8]>) -> Result<Vec<u8>, TpmError> {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).display().to_string();
    std::fs::write(path("ek"), &ek.public).unwrap();
    std::fs::write(path("secret"), secret).unwrap();
    let own = Public::parse(tpm.ak_public()).unwrap().name();
    let name = hex::encode(name.unwrap_or(&own));
    let output = Command::new("tpm2_makecredential")
        .args(["-T", "none", "-u", &path("ek"), "-s", &path("secret"), "-n", &name, "-o", &path("credential")])
        .output()
        .expect("tpm2-tools must be installed");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    // Magic and version, 4 bytes each, then the two structures.
    let file = std::fs::read(path("credential")).unwrap();
    let (blob, encrypted) = file[8..].split_at(2 + usize::from(u16::from_be_bytes([file[8], file[9]])));
    tpm.activate(ek, blob, encrypted)
}

#[test]
fn every_kind_of_endorsement_key_opens_what_tpm2_tools_make() {
    let swtpm = Swtpm::start();
    let mut tpm = EsapiTpm::open(&swtpm.tcti()).unwrap();
    let mut publics = BTreeSet::new();
    for kind in EkKind::ALL {
        let ek = tpm.endorsement(Some(kind), None).unwrap();
        let key = StorageKey::parse(&ek.public).unwrap();
        assert_eq!(key.attributes.ek_defect(), None);
        let rsa = matches!(key.key, StorageParameters::Rsa(_));
        assert_eq!(rsa, matches!(kind, EkKind::Rsa2048 | EkKind::Rsa2048High));
        let secret = b"a secret of thirty-two bytes....";
        assert_eq!(activated(&mut tpm, &ek, secret, None).unwrap(), secret, "{kind:?}");
        let other = [&[0, 0x0b][..], &[7; 32]].concat();
        let error = activated(&mut tpm, &ek, secret, Some(&other)).unwrap_err();
        assert!(matches!(error.kind, TpmErrorKind::OtherCredential { .. }), "{kind:?}: {error}");
        assert_eq!(activated(&mut tpm, &ek, secret, None).unwrap(), secret, "after a refusal, too");
        publics.insert(ek.public);
    }
    assert_eq!(publics.len(), EkKind::ALL.len());
    tpm.quote(&[1; 32], &all(&[HashAlg::Sha256], &[12])).unwrap();
}

#[test]
fn a_credential_for_another_tpm() {
    let (swtpm, other) = (Swtpm::start(), Swtpm::start());
    let mut tpm = EsapiTpm::open(&swtpm.tcti()).unwrap();
    let mut theirs = EsapiTpm::open(&other.tcti()).unwrap();
    for kind in [EkKind::EccP256, EkKind::Rsa2048] {
        let mut ek = tpm.endorsement(Some(kind), None).unwrap();
        ek.public = theirs.endorsement(Some(kind), None).unwrap().public;
        let error = activated(&mut tpm, &ek, b"x", None).unwrap_err();
        assert!(matches!(error.kind, TpmErrorKind::NoEndorsement { .. }), "{error}");
    }
    let own = tpm.endorsement(None, None).unwrap();
    assert_eq!((&own.certificate, own.chain.len()), (&None, 0), "this TPM has no certificate");
    for bad in [&[][..], &[0], &[0, 5, 1], &[0, 0]] {
        assert!(tpm.activate(&own, bad, bad).is_err());
    }
}

#[test]
fn certificates_come_from_nv() {
    let swtpm = Swtpm::start();
    let dir = tempfile::tempdir().unwrap();
    let mut tpm = EsapiTpm::open(&swtpm.tcti()).unwrap();
    let ek = tpm.endorsement(Some(EkKind::EccP256High), None).unwrap();
    let StorageParameters::Ecc { x, y, .. } = StorageKey::parse(&ek.public).unwrap().key else { panic!() };
    drop(tpm);
    let write = |index: &str, bytes: &[u8]| {
        let path = dir.path().join(index).display().to_string();
        std::fs::write(&path, bytes).unwrap();
        let (size, attributes) = (bytes.len().to_string(), "ownerwrite|ownerread|authread|no_da");
        done(&swtpm, "tpm2_nvdefine", &[index, "-C", "o", "-s", &size, "-a", attributes]);
        done(&swtpm, "tpm2_nvwrite", &[index, "-C", "o", "-i", &path]);
    };
    let sequence =
        |content: &[u8]| [&[0x30, 0x82, (content.len() >> 8) as u8, content.len() as u8][..], content].concat();
    let certificate = sequence(&[vec![1; 1500], x, y].concat());
    write("0x01c00014", &[certificate.as_slice(), &[0xFF; 40]].concat());
    let issuers = [sequence(&[2; 300]), sequence(&[3; 900])];
    let (first, rest) = (issuers.concat()[..500].to_vec(), issuers.concat()[500..].to_vec());
    write("0x01c00100", &first);
    write("0x01c00101", &rest);
    let mut tpm = EsapiTpm::open(&swtpm.tcti()).unwrap();
    let found = tpm.endorsement(None, None).unwrap();
    assert_eq!(found.public, ek.public);
    assert_eq!(found.certificate, Some(certificate));
    assert_eq!(found.chain, issuers);
    let given = GivenCertificate { certificate: sequence(&[9; 100]), chain: Vec::new() };
    let error = tpm.endorsement(Some(EkKind::EccP256), Some(&given)).unwrap_err();
    assert!(matches!(error.kind, TpmErrorKind::NoEndorsement { .. }), "{error}");
}

#[test]
fn a_lock_out_is_named_and_ended_if_we_may() {
    let swtpm = Swtpm::start();
    let dir = tempfile::tempdir().unwrap();
    let context = dir.path().join("key").display().to_string();
    done(&swtpm, "tpm2_changeauth", &["-c", "lockout", "l-secret"]);
    let lock = || {
        let setup = ["-s", "-n", "1", "-t", "1000", "-l", "1000", "-p", "l-secret"];
        done(&swtpm, "tpm2_dictionarylockout", &setup);
        done(&swtpm, "tpm2_createprimary", &["-C", "n", "-g", "sha256", "-G", "ecc", "-p", "right", "-c", &context]);
        let wrong = ["-C", &context, "-P", "wrong", "-G", "ecc", "-u", "/dev/null", "-r", "/dev/null"];
        assert!(!tool(&swtpm, "tpm2_create", &wrong).status.success());
        done(&swtpm, "tpm2_flushcontext", &["-t"]);
    };
    lock();
    let mut tpm = EsapiTpm::open(&swtpm.tcti()).unwrap();
    tpm.quote(&[1; 32], &all(&[HashAlg::Sha256], &[12])).unwrap();
    // A high-range key is used by its (empty) password, which a lock-out forbids; a low-range one by policy.
    let low = tpm.endorsement(Some(EkKind::EccP256), None).unwrap();
    assert_eq!(activated(&mut tpm, &low, b"x", None).unwrap(), b"x");
    let high = tpm.endorsement(Some(EkKind::EccP256High), None).unwrap();
    let error = activated(&mut tpm, &high, b"x", None).unwrap_err();
    assert_eq!(error.kind, TpmErrorKind::LockedOut);
    assert!(error.to_string().contains("lock-out") && error.to_string().contains("tpm.auth"), "{error}");
    drop(tpm);
    let auth = Authorisations { lockout: Some(b"l-secret".to_vec()), ..Authorisations::default() };
    let mut tpm = EsapiTpm::open_with(&TpmOptions { auth, ..options(&swtpm) }).unwrap();
    assert_eq!(activated(&mut tpm, &high, b"x", None).unwrap(), b"x");
    drop(tpm);
    lock();
    let auth = Authorisations { lockout: Some(b"wrong".to_vec()), ..Authorisations::default() };
    let mut tpm = EsapiTpm::open_with(&TpmOptions { auth, ..options(&swtpm) }).unwrap();
    let error = activated(&mut tpm, &high, b"x", None).unwrap_err();
    assert!(matches!(error.kind, TpmErrorKind::WrongAuthorisation { .. }), "{error}");
    let error = activated(&mut tpm, &high, b"x", None).unwrap_err();
    assert_eq!(error.kind, TpmErrorKind::LockedOut, "a wrong value is tried once");
}

/// A way to an swtpm that answers commands of one kind with a code, as long as there are any left to answer.
struct Busy {
    dir: tempfile::TempDir,
    left: Arc<AtomicU32>,
}

impl Busy {
    fn start(swtpm: &Swtpm, command: u32, code: u32) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let upstream = swtpm.tcti().trim_start_matches("swtpm:path=").to_owned();
        std::os::unix::fs::symlink(format!("{upstream}.ctrl"), dir.path().join("tpm.ctrl")).unwrap();
        let listener = UnixListener::bind(dir.path().join("tpm")).unwrap();
        let left = Arc::new(AtomicU32::new(0));
        let own = Arc::clone(&left);
        std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let (own, upstream) = (Arc::clone(&own), UnixStream::connect(&upstream).unwrap());
                std::thread::spawn(move || relay(client, upstream, command, code, &own));
            }
        });
        Self { dir, left }
    }

    fn tcti(&self) -> String {
        format!("swtpm:path={}", self.dir.path().join("tpm").display())
    }
}

fn relay(mut client: UnixStream, mut tpm: UnixStream, command: u32, code: u32, left: &AtomicU32) -> Option<()> {
    loop {
        let message = message(&mut client)?;
        let asked = u32::from_be_bytes(message[6..10].try_into().unwrap());
        let take = |left: u32| left.checked_sub(1);
        if asked == command && left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, take).is_ok() {
            let answer = [&[0x80, 1, 0, 0, 0, 10][..], &code.to_be_bytes()].concat();
            client.write_all(&answer).ok()?;
            continue;
        }
        tpm.write_all(&message).ok()?;
        let answer = self::message(&mut tpm)?;
        client.write_all(&answer).ok()?;
    }
}

fn message(stream: &mut UnixStream) -> Option<Vec<u8>> {
    let mut message = vec![0; 10];
    stream.read_exact(&mut message).ok()?;
    let size = u32::from_be_bytes(message[2..6].try_into().unwrap()) as usize;
    message.resize(size, 0);
    stream.read_exact(&mut message[10..]).ok()?;
    Some(message)
}

#[test]
fn a_busy_tpm_is_asked_again_but_not_for_ever() {
    const QUOTE: u32 = 0x158;
    const START_SESSION: u32 = 0x176;
    let swtpm = Swtpm::start();
    let registers = all(&[HashAlg::Sha256], &[12]);
    // TPM_RC_RETRY, _YIELDED, _TESTING.
    for code in [0x922, 0x908, 0x90A] {
        let busy = Busy::start(&swtpm, QUOTE, code);
        let mut tpm = EsapiTpm::open(&busy.tcti()).unwrap();
        busy.left.store(4, Ordering::SeqCst);
        tpm.quote(&[1; 32], &registers).unwrap();
        assert_eq!(busy.left.load(Ordering::SeqCst), 0);
        busy.left.store(1000, Ordering::SeqCst);
        let error = tpm.quote(&[1; 32], &registers).unwrap_err();
        assert!(matches!(error.kind, TpmErrorKind::Busy { attempts: 2.., .. }), "{error}");
        assert!(!error.kind.is_fatal());
        busy.left.store(0, Ordering::SeqCst);
        tpm.quote(&[1; 32], &registers).unwrap();
    }
    // A resource manager that has no session left to give: TPM_RC_SESSION_MEMORY.
    let busy = Busy::start(&swtpm, START_SESSION, 0x903);
    busy.left.store(3, Ordering::SeqCst);
    drop(EsapiTpm::open(&busy.tcti()).unwrap());
    busy.left.store(1000, Ordering::SeqCst);
    let error = EsapiTpm::open(&busy.tcti()).map(drop).unwrap_err();
    assert!(matches!(error.kind, TpmErrorKind::Full { attempts: 2.., .. }), "{error}");
}

#[test]
fn a_tpm_that_vanishes_while_a_credential_is_opened() {
    let mut swtpm = Swtpm::start();
    let mut tpm = EsapiTpm::open(&swtpm.tcti()).unwrap();
    let ek = tpm.endorsement(Some(EkKind::EccP256), None).unwrap();
    swtpm.kill();
    let error = activated(&mut tpm, &ek, b"x", None).unwrap_err();
    assert!(matches!(error.kind, TpmErrorKind::Gone { .. }) && error.kind.is_fatal(), "{error}");
}
