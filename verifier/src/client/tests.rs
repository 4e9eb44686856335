//! Against a small server that is a proxy as far as the wire goes, and whole rounds with it.

use std::{net::SocketAddr, path::Path, sync::Mutex};

use rustls::{
    ServerConfig,
    pki_types::{PrivateKeyDer, pem::PemObject as _},
    server::WebPkiClientVerifier,
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpListener,
};
use tokio_rustls::TlsAcceptor;

use onequote_evidence::{id::TimeMs, stream};

use super::*;
use crate::{
    appraise::testing::{World, ima_entry, nonce},
    enrol::self_signed,
    intake::Intake,
    result::State,
    round::{Times, Verifier},
    source::Source,
    store::{Database, Enrolment, Store as _},
};

/// What the server does with a request: from nonce and exporter value to status and body.
type Answerer = dyn Fn(Nonce, &[u8]) -> (u16, Vec<u8>) + Send + Sync;

struct Server {
    address: SocketAddr,
    certificate: Vec<u8>,
}

impl Server {
    /// A proxy of `host` that knows the verifier with this certificate.
    async fn start(host: &str, known: &CertificateDer<'static>, answer: Box<Answerer>) -> Self {
        let (certificate, key) = self_signed(host).unwrap();
        let certificate = CertificateDer::from_pem_slice(certificate.as_bytes()).unwrap();
        let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).unwrap();
        let mut roots = RootCertStore::empty();
        roots.add(known.clone()).unwrap();
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let clients = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider));
        let config = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&TLS13])
            .unwrap()
            .with_client_cert_verifier(clients.build().unwrap())
            .with_single_cert(vec![certificate.clone()], key)
            .unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let acceptor = TlsAcceptor::from(Arc::new(config));
        tokio::spawn(async move {
            while let Ok((tcp, _)) = listener.accept().await {
                let Ok(mut stream) = acceptor.accept(tcp).await else { continue };
                let binding = stream.get_ref().1.export_keying_material([0; 32], EXPORTER_LABEL, None).unwrap();
                let Some(nonce) = request(&mut stream).await else { continue };
                let (status, body) = answer(nonce, &binding);
                let head = format!("HTTP/1.1 {status} X\r\ncontent-length: {}\r\n\r\n", body.len());
                let _ = stream.write_all(&[head.as_bytes(), &body].concat()).await;
                let _ = stream.shutdown().await;
            }
        });
        Self { address, certificate: certificate.to_vec() }
    }

    fn url(&self) -> String {
        format!("https://{}", self.address)
    }
}

async fn request(stream: &mut (impl tokio::io::AsyncRead + Unpin)) -> Option<Nonce> {
    let mut bytes = Vec::new();
    loop {
        if stream.read_buf(&mut bytes).await.ok()? == 0 {
            return None;
        }
        let text = String::from_utf8_lossy(&bytes).into_owned();
        if let Some((head, body)) = text.split_once("\r\n\r\n") {
            assert!(head.starts_with("POST /v1/evidence HTTP/1.1"), "{head}");
            if body.ends_with('}') {
                let value: serde_json::Value = serde_json::from_str(body).unwrap();
                return Some(value["nonce"].as_str()?.parse().unwrap());
            }
        }
    }
}

fn identity(dir: &Path) -> Identity {
    Identity::create(dir).unwrap();
    Identity::load(dir).unwrap()
}

async fn ask_once(server: &Server, host: &str, identity: &Identity) -> Result<Answer, AskError> {
    let host = host.parse().unwrap();
    let url = server.url();
    let target = Target { host: &host, url: &url, certificate: &server.certificate };
    ask(target, identity, &nonce(3), &Have::default(), Duration::from_secs(10)).await
}

#[tokio::test]
async fn both_ends_have_the_same_binding() {
    let dir = tempfile::tempdir().unwrap();
    let identity = identity(dir.path());
    let echo = Box::new(|nonce: Nonce, binding: &[u8]| (200, [nonce.as_bytes(), binding].concat()));
    let server = Server::start("host-1", &identity.certificate, echo).await;
    let answer = ask_once(&server, "host-1", &identity).await.unwrap();
    assert_eq!(answer.evidence, [nonce(3).as_bytes(), &answer.binding].concat());
    let other = ask_once(&server, "host-1", &identity).await.unwrap();
    assert_ne!(answer.binding, other.binding);
}

#[tokio::test]
async fn failures_are_told_apart() {
    let dir = tempfile::tempdir().unwrap();
    let own = identity(&dir.path().join("own"));
    let stranger = identity(&dir.path().join("stranger"));
    let busy = Box::new(|_: Nonce, _: &[u8]| (503, b"the TPM does not answer".to_vec()));
    let mut server = Server::start("host-1", &own.certificate, busy).await;
    let code = |e: &AskError| e.finding("url").code;

    let e = ask_once(&server, "host-1", &own).await.unwrap_err();
    assert!(matches!(&e, AskError::Refused { status, text } if status.as_u16() == 503 && text.contains("TPM")));
    assert_eq!(code(&e), Code::ProxyError);
    let e = ask_once(&server, "host-1", &stranger).await.unwrap_err();
    assert_eq!(code(&e), Code::TlsRefused, "the proxy does not know this verifier: {e}");
    let e = ask_once(&server, "host-2", &own).await.unwrap_err();
    assert_eq!(code(&e), Code::TlsRefused, "the certificate has another name: {e}");
    server.certificate = own.certificate.to_vec();
    let e = ask_once(&server, "host-1", &own).await.unwrap_err();
    assert_eq!(code(&e), Code::TlsRefused, "the certificate is not the pinned one: {e}");

    let free = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    server.address = free;
    let e = ask_once(&server, "host-1", &own).await.unwrap_err();
    assert_eq!(code(&e), Code::Unreachable, "{e}");
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (host, url) = ("host-1".parse().unwrap(), format!("https://{}", silent.local_addr().unwrap()));
    let target = Target { host: &host, url: &url, certificate: &own.certificate };
    let e = ask(target, &own, &nonce(1), &Have::default(), Duration::from_millis(50)).await.unwrap_err();
    assert!(matches!(e, AskError::Timeout(_)));
}

#[test]
fn urls() {
    assert_eq!(address("https://127.0.0.1:4433").unwrap(), "127.0.0.1:4433");
    assert_eq!(address("https://[::1]:4433/").unwrap(), "[::1]:4433");
    for bad in ["http://a:1", "https://a", "https://a:1/x", "https://a:1?x", "a:1", ""] {
        assert_eq!(address(bad), None, "{bad}");
    }
}

/// A clock that stands still and randomness that counts.
#[derive(Default)]
struct Still(Mutex<u8>);

impl Source for Still {
    fn now(&self) -> TimeMs {
        TimeMs(5000)
    }

    fn fill(&self, bytes: &mut [u8]) {
        let mut n = self.0.lock().unwrap();
        *n += 1;
        bytes.fill(*n);
    }
}

async fn verifier(dir: &Path, world: &World, url: String, certificate: Vec<u8>) -> Verifier<Database> {
    let store = Database::open(&dir.join("v.sqlite")).await.unwrap();
    let id: HostId = "host-1".parse().unwrap();
    let ak = world.ak.public();
    store.enrol(&Enrolment { id: id.clone(), url, ak, certificate, software_tpm: true }, true).await.unwrap();
    store.set_policy(&id, world.policy.as_ref().unwrap(), TimeMs(1)).await.unwrap();
    Verifier {
        store,
        identity: Identity::load(dir).unwrap(),
        authority: None,
        source: Arc::new(Still::default()),
        times: Times::default(),
        intake: Intake::default(),
    }
}

#[tokio::test]
async fn whole_rounds() {
    let dir = tempfile::tempdir().unwrap();
    let own = identity(dir.path());
    let world = Arc::new(Mutex::new(World::with_two_vms()));
    let replay: Arc<Mutex<Option<Vec<u8>>>> = Arc::default();
    let (shared, old) = (Arc::clone(&world), Arc::clone(&replay));
    let answer = move |nonce: Nonce, binding: &[u8]| {
        if let Some(old) = old.lock().unwrap().clone() {
            return (200, old);
        }
        let mut world = shared.lock().unwrap();
        world.clock.clock += 1;
        (200, stream::compress(&world.quote_for(&nonce, binding, |_, _| {}).stream()).unwrap())
    };
    let server = Server::start("host-1", &own.certificate, Box::new(answer)).await;
    let id: HostId = "host-1".parse().unwrap();
    let verifier = {
        let world = World { policy: world.lock().unwrap().policy.clone(), ..World::new() };
        verifier(dir.path(), &world, server.url(), server.certificate.clone()).await
    };
    // Another world's key was enrolled: what answers is not this host.
    let round = verifier.attest(&id).await.unwrap();
    assert_eq!(round.verdict.host.findings[0].code, Code::SignatureInvalid);
    let ak = world.lock().unwrap().ak.public();
    let enrolment = verifier.store.host(&id).await.unwrap().enrolment;
    verifier.store.enrol(&Enrolment { ak, ..enrolment.clone() }, true).await.unwrap();

    let round = verifier.attest(&id).await.unwrap();
    assert!(round.verdict.all_trusted(), "{:#?}", round.verdict);
    world.lock().unwrap().entries(1, 1, &[ima_entry("/tmp/evil", 9)]);
    let round = verifier.attest_for_evidence(&id).await.unwrap();
    assert_eq!(round.verdict.vms[0].findings[0].code, Code::ImaUnknownFile);
    assert_eq!(round.verdict.vms[1].state, State::Trusted);
    let host = verifier.store.host(&id).await.unwrap();
    assert_eq!(host.verdict.as_ref(), Some(&round.verdict));
    assert_eq!(host.state.accepted.unwrap().records, 12);

    // What was answered once is played again.
    *replay.lock().unwrap() = round.evidence;
    let round = verifier.attest(&id).await.unwrap();
    assert_eq!(round.verdict.host.findings[0].code, Code::NonceReused);
    assert!(round.verdict.vms.iter().all(|vm| vm.state == State::Untrusted) && round.verdict.vms.len() == 2);
    *replay.lock().unwrap() = Some(b"rubbish".to_vec());
    let round = verifier.attest(&id).await.unwrap();
    assert_eq!(round.verdict.host.findings[0].code, Code::EvidenceMalformed);
    *replay.lock().unwrap() = None;

    let gone = Enrolment { url: "https://127.0.0.1:1".into(), ak: world.lock().unwrap().ak.public(), ..enrolment };
    verifier.store.enrol(&gone, true).await.unwrap();
    let round = verifier.attest(&id).await.unwrap();
    assert_eq!(round.verdict.host.state, State::Unreachable);
    assert_eq!(round.verdict.vms.len(), 2);
}
