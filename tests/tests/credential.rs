//! Credentials made in software, and joins by hand, against real TPMs: who opens what, and who is refused.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{fs, net::SocketAddr, path::Path, process::Command, sync::Arc, time::Duration};

use onequote_evidence::{
    id::{Blob, Sha256},
    join::{JoinProof, JoinRequest, JoinToken, SECRET_SIZE, proof},
    tpm::{Public, StorageKey},
};
use onequote_proxy::tpm::{EkKind, Endorsement, EsapiTpm, Tpm as _, TpmErrorKind};
use onequote_tests::lab::{Maker, Tpm};
use onequote_verifier::{
    enrol::{
        authority::Authority,
        credential::{self, Credential},
        ek::Roots,
        registrar::{Caller, Registrar, Settings},
    },
    source::{Source, System},
    store::{
        Database,
        enrol::{EnrolStore as _, Token},
    },
};

fn tool(tpm: &Tpm, dir: &Path, name: &str, arguments: &[&str]) -> bool {
    let mut command = Command::new(name);
    command.args(arguments).env("TPM2TOOLS_TCTI", tpm.tcti()).current_dir(dir);
    let output = command.output().expect("tpm2-tools must be installed");
    if !output.status.success() {
        eprintln!("{name} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    }
    output.status.success()
}

/// A credential as tpm2-tools keep it: magic, version, the two structures.
fn file(credential: &Credential) -> Vec<u8> {
    [&[0xba, 0xdc, 0xc0, 0xde, 0, 0, 0, 1][..], &credential.blob, &credential.encrypted_seed].concat()
}

#[test]
fn tpm2_activatecredential_opens_what_we_make() {
    let dir = tempfile::tempdir().unwrap();
    let tpm = Tpm::start(&dir.path().join("tpm"), false, false).unwrap();
    // P-384 is opened by the proxy, below; its policy is one of SHA-384, for which this tool has no session.
    for kind in ["rsa", "ecc"] {
        let done = |name: &str, arguments: &[&str]| {
            assert!(tool(&tpm, dir.path(), name, arguments), "{name} for {kind}");
            assert!(tool(&tpm, dir.path(), "tpm2_flushcontext", &["-t"]));
        };
        done("tpm2_createek", &["-c", "ek", "-G", kind, "-u", "ek.pub"]);
        let ak = ["-C", "ek", "-c", "ak", "-G", "ecc", "-g", "sha256", "-s", "ecdsa", "-u", "ak.pub", "-n", "ak.name"];
        done("tpm2_createak", &ak);
        let read = |name: &str| fs::read(dir.path().join(name)).unwrap();
        let ek = StorageKey::parse(&read("ek.pub")).unwrap();
        assert_eq!(ek.attributes.ek_defect(), None);
        let name = Public::parse(&read("ak.pub")).unwrap().name();
        assert_eq!(name, read("ak.name"));
        let secret = b"thirty-two bytes that are secret";
        let made = credential::make(&ek, &name, secret, &System).unwrap();
        let open = |credential: &Credential| {
            fs::write(dir.path().join("credential"), file(credential)).unwrap();
            let _ = fs::remove_file(dir.path().join("opened"));
            assert!(tool(&tpm, dir.path(), "tpm2_startauthsession", &["--policy-session", "-S", "session"]));
            assert!(tool(&tpm, dir.path(), "tpm2_policysecret", &["-S", "session", "-c", "e"]));
            let arguments = ["-c", "ak", "-C", "ek", "-i", "credential", "-o", "opened", "-P", "session:session"];
            let opened = tool(&tpm, dir.path(), "tpm2_activatecredential", &arguments);
            assert!(tool(&tpm, dir.path(), "tpm2_flushcontext", &["session"]));
            tool(&tpm, dir.path(), "tpm2_flushcontext", &["-t"]);
            opened.then(|| read("opened"))
        };
        assert_eq!(open(&made).as_deref(), Some(&secret[..]), "{kind}");
        let other = credential::make(&ek, &[&[0, 0x0b][..], &[9; 32]].concat(), secret, &System).unwrap();
        assert_eq!(open(&other), None, "for another name, {kind}");
    }
}

#[test]
fn a_proxy_opens_what_we_make_for_every_kind_of_endorsement_key() {
    let dir = tempfile::tempdir().unwrap();
    let tpm = Tpm::start(&dir.path().join("tpm"), false, false).unwrap();
    let mut proxy = EsapiTpm::open(&tpm.tcti()).unwrap();
    let name = Public::parse(proxy.ak_public()).unwrap().name();
    for kind in EkKind::ALL {
        let ek = proxy.endorsement(Some(kind), None).unwrap();
        let key = StorageKey::parse(&ek.public).unwrap();
        let made = credential::make(&key, &name, &[5; 32], &System).unwrap();
        assert_eq!(proxy.activate(&ek, &made.blob, &made.encrypted_seed).unwrap(), [5; 32], "{kind:?}");
        let other = credential::make(&key, &[&[0, 0x0b][..], &[9; 32]].concat(), &[5; 32], &System).unwrap();
        let error = proxy.activate(&ek, &other.blob, &other.encrypted_seed).unwrap_err();
        assert!(matches!(error.kind, TpmErrorKind::OtherCredential { .. }), "{kind:?}: {error}");
    }
}

/// Whether the proxy opens what is made for this key.
fn opens(proxy: &mut EsapiTpm, ek: &Endorsement) {
    let (key, name) = (StorageKey::parse(&ek.public).unwrap(), Public::parse(proxy.ak_public()).unwrap().name());
    let made = credential::make(&key, &name, &[5; 32], &System).unwrap();
    assert_eq!(proxy.activate(ek, &made.blob, &made.encrypted_seed).unwrap(), [5; 32]);
}

#[test]
fn a_nonce_in_nv_fills_the_usual_template_and_one_in_nv_alike() {
    // Kind, where nonce and template are, and how long the parts of the template's `unique` are.
    let low: [(EkKind, u32, &[usize]); 2] =
        [(EkKind::Rsa2048, 0x01C0_0003, &[256]), (EkKind::EccP256, 0x01C0_000B, &[32, 32])];
    for (kind, at, unique) in low {
        let dir = tempfile::tempdir().unwrap();
        let tpm = Tpm::start(&dir.path().join("tpm"), false, false).unwrap();
        let mut proxy = EsapiTpm::open(&tpm.tcti()).unwrap();
        let usual = proxy.endorsement(Some(kind), None).unwrap();
        // The nonce alone goes with the usual template.
        tpm.put(dir.path(), at, &[0x5A; 20]).unwrap();
        let with_nonce = proxy.endorsement(Some(kind), None).unwrap();
        assert_ne!(with_nonce.public, usual.public, "{kind:?}");
        opens(&mut proxy, &with_nonce);
        // And a template: what is usual, with a `unique` of zeros, which the nonce fills.
        let size = unique.iter().map(|part| part + 2).sum::<usize>();
        let mut template = usual.public[2..usual.public.len() - size].to_vec();
        for part in unique {
            template.extend((*part as u16).to_be_bytes());
            template.extend(vec![0; *part]);
        }
        tpm.put(dir.path(), at + 1, &template).unwrap();
        let with_both = proxy.endorsement(Some(kind), None).unwrap();
        opens(&mut proxy, &with_both);
        assert_eq!(with_both.public, with_nonce.public, "the same template, the same nonce: {kind:?}");
    }
}

#[test]
fn a_template_in_nv_alone_is_taken_as_it_is() {
    for (kind, at) in [(EkKind::Rsa2048, 0x01C0_0004), (EkKind::EccP256, 0x01C0_000C), (EkKind::EccP384, 0x01C0_0017)] {
        let dir = tempfile::tempdir().unwrap();
        let tpm = Tpm::start(&dir.path().join("tpm"), false, false).unwrap();
        let mut proxy = EsapiTpm::open(&tpm.tcti()).unwrap();
        let usual = proxy.endorsement(Some(kind), None).unwrap();
        // Its `unique` is another: another key.
        let mut template = usual.public[2..].to_vec();
        let last = template.len() - 1;
        template[last] ^= 1;
        tpm.put(dir.path(), at, &template).unwrap();
        let other = proxy.endorsement(Some(kind), None).unwrap();
        assert_ne!(other.public, usual.public, "{kind:?}");
        opens(&mut proxy, &other);
        let mut again = EsapiTpm::open(&tpm.tcti()).unwrap();
        assert_eq!(again.endorsement(Some(kind), None).unwrap().public, other.public, "{kind:?}");
    }
    let dir = tempfile::tempdir().unwrap();
    let tpm = Tpm::start(&dir.path().join("tpm"), false, false).unwrap();
    tpm.put(dir.path(), 0x01C0_000C, b"no template").unwrap();
    let refused = EsapiTpm::open(&tpm.tcti()).unwrap().endorsement(Some(EkKind::EccP256), None).unwrap_err();
    assert!(refused.to_string().contains("template"), "{refused}");
}

#[test]
fn certificates_of_the_high_range_are_found_and_believed() {
    for (kind, index) in
        [(EkKind::Rsa2048High, 0x01C0_0012), (EkKind::EccP256High, 0x01C0_0014), (EkKind::EccP384, 0x01C0_0016)]
    {
        let dir = tempfile::tempdir().unwrap();
        let maker = Maker::new(&dir.path().join("maker")).unwrap();
        let tpm = Tpm::start(&dir.path().join("tpm"), false, false).unwrap();
        let mut proxy = EsapiTpm::open(&tpm.tcti()).unwrap();
        let bare = proxy.endorsement(Some(kind), None).unwrap();
        let certificate = maker.certify_der(&bare.public, kind == EkKind::Rsa2048High).unwrap();
        // An index is often longer than what it holds.
        tpm.put(dir.path(), index, &[&certificate[..], &[0xFF; 30]].concat()).unwrap();
        let found = proxy.endorsement(None, None).unwrap();
        assert_eq!((&found.public, found.certificate.as_ref()), (&bare.public, Some(&certificate)), "{kind:?}");
        opens(&mut proxy, &found);
        let roots = Roots::load(&[maker.root()], &[], &[]).unwrap();
        let key = StorageKey::parse(&found.public).unwrap();
        let vouched = roots.check(&key, found.certificate.as_deref(), &found.chain, System.now()).unwrap();
        assert_eq!((vouched.software, vouched.model.model.as_deref()), (false, Some("proof")), "{kind:?}");
    }
}

/// A verifier without a network, and a token for any TPM.
struct Office {
    registrar: Registrar<Database>,
    store: Database,
    caller: Caller,
    token: JoinToken,
}

impl Office {
    async fn open(dir: &Path) -> Self {
        let store = Database::open(&dir.join("v.sqlite")).await.unwrap();
        let source: Arc<dyn Source> = Arc::new(System);
        let authority = Arc::new(Authority::open(dir, Arc::clone(&source)).unwrap());
        let token = JoinToken { id: [1; 8], secret: [2; SECRET_SIZE], pin: authority.pin() };
        let kept = Token {
            id: Blob(token.id.to_vec()).to_string(),
            secret: token.hashed(),
            host: None,
            replace: false,
            software_tpm: true,
            url: None,
            expires: onequote_evidence::id::TimeMs(System.now().0 + 1_000_000),
            uses: 1,
        };
        store.create_token(&kept, System.now()).await.unwrap();
        let settings = Settings { roots: Roots::default(), certificate: Duration::from_secs(60) };
        let registrar = Registrar::new(store.clone(), source, authority, settings);
        let address: SocketAddr = "192.0.2.1:5".parse().unwrap();
        let caller = Caller { address, binding: vec![3; 32], certificate: None };
        Self { registrar, store, caller, token }
    }

    fn request(&self, ek: &Endorsement, ak: &[u8], key: &[u8]) -> Vec<u8> {
        let request = JoinRequest {
            token: Blob(self.token.id.to_vec()),
            secret: Blob(self.token.secret.to_vec()),
            host: "host-1".parse().unwrap(),
            url: None,
            port: 20305,
            ek: Blob(ek.public.clone()),
            ek_certificate: None,
            ek_chain: Vec::new(),
            ak: Blob(ak.to_vec()),
            key: Blob(key.to_vec()),
        };
        serde_json::to_vec(&request).unwrap()
    }

    async fn is_refused(&self, body: &[u8], code: &str) {
        let refusal = self.registrar.join(&self.caller, body).await.unwrap_err();
        assert_eq!(refusal.code(), code, "{refusal}");
        let last = self.store.audit_log(1).await.unwrap().remove(0);
        assert_eq!((last.what.as_str(), last.result.as_str()), ("join", code));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_activation_that_is_relayed_to_another_tpm_fails() {
    let dir = tempfile::tempdir().unwrap();
    let office = Office::open(dir.path()).await;
    let (honest, attacker) = (
        Tpm::start(&dir.path().join("a"), false, false).unwrap(),
        Tpm::start(&dir.path().join("b"), false, false).unwrap(),
    );
    let (mut honest, attacker) =
        (EsapiTpm::open(&honest.tcti()).map(|tpm| (honest, tpm)).unwrap(), EsapiTpm::open(&attacker.tcti()).unwrap());
    let ek = honest.1.endorsement(Some(EkKind::EccP256), None).unwrap();
    let point = [&[4][..], &[7; 64]].concat();
    // The attacker's attestation key, the honest host's endorsement key.
    let body = office.request(&ek, attacker.ak_public(), &point);
    let challenge = office.registrar.join(&office.caller, &body).await.unwrap();
    let relayed = honest.1.activate(&ek, &challenge.credential.0, &challenge.encrypted_seed.0).unwrap_err();
    assert!(matches!(relayed.kind, TpmErrorKind::OtherCredential { .. }), "{relayed}");
    let shown = |session: &Blob, proof: Sha256| {
        let shown = JoinProof { session: session.clone(), proof, key_signature: Blob(vec![0; 70]) };
        serde_json::to_vec(&shown).unwrap()
    };
    let guess = shown(&challenge.session, proof(&[0; SECRET_SIZE], &body, &office.caller.binding));
    let refusal = office.registrar.prove(&office.caller, &guess).await.unwrap_err();
    assert_eq!(refusal.code(), "proof-wrong");
    let refusal = office.registrar.prove(&office.caller, &guess).await.unwrap_err();
    assert_eq!(refusal.code(), "no-attempt", "an attempt has one proof");

    // The honest host itself, its answer carried over another connection, and a TLS key that is not its own.
    let body = office.request(&ek, honest.1.ak_public(), &point);
    for (binding, code) in [(vec![4; 32], "proof-wrong"), (vec![3; 32], "key-proof-wrong")] {
        let challenge = office.registrar.join(&office.caller, &body).await.unwrap();
        let secret = honest.1.activate(&ek, &challenge.credential.0, &challenge.encrypted_seed.0).unwrap();
        let proof = proof(&secret.try_into().unwrap(), &body, &binding);
        let refusal = office.registrar.prove(&office.caller, &shown(&challenge.session, proof)).await.unwrap_err();
        assert_eq!(refusal.code(), code);
    }
    let audit = office.store.audit_log(100).await.unwrap();
    assert!(audit.iter().all(|entry| entry.result != "ok"));
    let hosts = onequote_verifier::store::Store::hosts(&office.store).await.unwrap();
    assert!(hosts.is_empty(), "{hosts:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_that_may_not_attest_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let office = Office::open(dir.path()).await;
    let tpm = Tpm::start(&dir.path().join("tpm"), false, false).unwrap();
    // A signing key of the same TPM that signs whatever it is given.
    let free = "fixedtpm|fixedparent|sensitivedataorigin|userwithauth|noda|sign";
    let make = ["-C", "e", "-G", "ecc256:ecdsa-sha256:null", "-a", free, "-c", "free"];
    assert!(tool(&tpm, dir.path(), "tpm2_createprimary", &make));
    assert!(tool(&tpm, dir.path(), "tpm2_readpublic", &["-c", "free", "-f", "tss", "-o", "free.pub"]));
    assert!(tool(&tpm, dir.path(), "tpm2_flushcontext", &["-t"]));
    let mut proxy = EsapiTpm::open(&tpm.tcti()).unwrap();
    let ek = proxy.endorsement(Some(EkKind::EccP256), None).unwrap();
    let point = [&[4][..], &[7; 64]].concat();
    let body = office.request(&ek, &fs::read(dir.path().join("free.pub")).unwrap(), &point);
    let refusal = office.registrar.join(&office.caller, &body).await.unwrap_err();
    assert!(refusal.to_string().contains("restricted is not set"), "{refusal}");
    office.is_refused(&body, "ak-attributes").await;
    let mut no_ek = ek.clone();
    no_ek.public = proxy.ak_public().to_vec();
    office.is_refused(&office.request(&no_ek, proxy.ak_public(), &point), "ek-malformed").await;
    office.is_refused(&office.request(&ek, proxy.ak_public(), &point[1..]), "request-malformed").await;
    let unknown = String::from_utf8(office.request(&ek, proxy.ak_public(), &point)).unwrap();
    office.is_refused(unknown.replace("\"port\"", "\"prot\"").as_bytes(), "request-malformed").await;
    office.is_refused(unknown.replace("host-1", "onequote-verifier").as_bytes(), "host-reserved").await;
    office.is_refused(unknown.replace(&"02".repeat(32), &"03".repeat(32)).as_bytes(), "token-unknown").await;
}
