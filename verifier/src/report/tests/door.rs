//! Through the door, with real TLS: who gets to this room, and what a connection takes that only waits.
#![allow(clippy::print_stdout)]

use std::collections::HashMap;

use onequote_evidence::{join::VERIFIER_NAME, report::ALPN};
use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName},
    version::TLS13,
};
use tokio_rustls::{TlsConnector, client};

use super::*;
use crate::enrol::{authority::Authority, door::Door, serial};

/// Hosts by the serial numbers of their certificates.
struct Known(HashMap<Vec<u8>, HostId>);

impl Members for Known {
    async fn member(&self, caller: &Caller) -> Result<IssuedCertificate, Refusal> {
        let shown = caller.certificate.as_deref().and_then(serial);
        let serial = shown.ok_or(Refusal::Certificate("no certificate was shown"))?;
        let host = self.0.get(&serial).cloned().ok_or(Refusal::Certificate("it is not known here"))?;
        Ok(IssuedCertificate { serial, host, ak: vec![1], expires: TimeMs(u64::MAX), revoked: false })
    }

    async fn refused(&self, _: &Caller, _: &Refusal) {}
}

type Identity = (CertificateDer<'static>, PrivateKeyDer<'static>);

fn identity(authority: &Authority, host: &HostId) -> (Vec<u8>, Identity) {
    let key = rcgen::KeyPair::generate().unwrap();
    let made = authority.certify(host, key.public_key_raw(), &[1], Duration::from_secs(3600)).unwrap();
    let private = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.serialize_der()));
    (made.serial, (CertificateDer::from(made.certificate), private))
}

async fn connect(
    door: std::net::SocketAddr,
    authority: &Authority,
    own: Option<Identity>,
) -> std::io::Result<client::TlsStream<TcpStream>> {
    let mut roots = RootCertStore::empty();
    roots.add(authority.certificate().clone()).unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = ClientConfig::builder_with_provider(provider).with_protocol_versions(&[&TLS13]).unwrap();
    let config = config.with_root_certificates(roots);
    let mut config = match own {
        Some((certificate, key)) => config.with_client_auth_cert(vec![certificate], key).unwrap(),
        None => config.with_no_client_auth(),
    };
    config.alpn_protocols = vec![ALPN.to_vec()];
    let tcp = TcpStream::connect(door).await?;
    let name = ServerName::try_from(VERIFIER_NAME).unwrap();
    TlsConnector::from(Arc::new(config)).connect(name, tcp).await
}

async fn frame(stream: &mut client::TlsStream<TcpStream>) -> VerifierFrame {
    let mut prefix = [0; 4];
    stream.read_exact(&mut prefix).await.unwrap();
    let mut body = vec![0; VerifierFrame::body_len(prefix).unwrap()];
    stream.read_exact(&mut body).await.unwrap();
    VerifierFrame::parse(&body).unwrap()
}

/// Resident memory of this process in KiB.
fn rss() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

#[tokio::test]
async fn hundreds_of_hosts_behind_one_address_hold_connections() {
    const HOSTS: usize = 300;
    let dir = tempfile::tempdir().unwrap();
    let authority = Arc::new(Authority::open(dir.path(), Arc::new(System)).unwrap());
    let hosts: Vec<HostId> = (0..HOSTS).map(|n| format!("h{n}").parse().unwrap()).collect();
    let made: Vec<_> = hosts.iter().map(|host| identity(&authority, host)).collect();
    let known = made.iter().zip(&hosts).map(|((serial, _), host)| (serial.clone(), host.clone())).collect();
    let reporting = Reporting::new(1);
    let settings = Settings::new(Duration::from_secs(60));
    let played = Arc::new(Played::default());
    let room = Room::new(Arc::new(Known(known)), Arc::clone(&played), reporting.clone(), Arc::new(System), settings);
    let reports: Arc<dyn Reports> = room;
    let bound = Door::bind("127.0.0.1:0".parse().unwrap(), Arc::clone(&authority), Some(reports)).await.unwrap();
    let door = bound.address();

    let before = rss();
    let mut held = Vec::new();
    for ((_, own), host) in made.into_iter().zip(&hosts) {
        let mut stream = connect(door, &authority, Some(own)).await.unwrap();
        stream.write_all(&to_wire(&ProxyFrame::Hello { version: VERSION, host: host.clone() })).await.unwrap();
        assert!(matches!(frame(&mut stream).await, VerifierFrame::Ask(_)));
        held.push(stream);
    }
    assert_eq!(reporting.held.count(), HOSTS);
    // The other ends are in this process, too.
    let each = rss().saturating_sub(before) / HOSTS as u64;
    println!("a held connection, both ends: {each} KiB");

    // Evidence is bound to the connection that it comes over.
    let last = held.last_mut().unwrap();
    let binding = last.get_ref().1.export_keying_material([0; 32], b"EXPORTER-Channel-Binding", None).unwrap();
    let nonce = vec![HOSTS as u8; 32];
    last.write_all(&to_wire(&ProxyFrame::Begin { nonce: Blob(nonce), cause: Cause::First, size: 1 })).await.unwrap();
    last.write_all(&to_wire(&ProxyFrame::Chunk { bytes: Blob(vec![1]) })).await.unwrap();
    assert!(matches!(frame(last).await, VerifierFrame::Taken { .. }));
    assert_eq!(played.taken.lock().unwrap()[0].1, binding);

    // Nobody without a certificate, or with one that is not known here, gets further than to be told so.
    let stranger = identity(&authority, &"stranger".parse().unwrap()).1;
    for own in [None, Some(stranger)] {
        let mut stream = connect(door, &authority, own).await.unwrap();
        assert!(
            matches!(frame(&mut stream).await, VerifierFrame::Refused { code, .. } if code == "certificate-refused")
        );
    }
    drop(held);
    let gone = async {
        while reporting.held.count() > 0 {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), gone).await.unwrap();
}

#[tokio::test]
async fn a_door_without_reports_says_so_in_the_handshake() {
    let dir = tempfile::tempdir().unwrap();
    let authority = Arc::new(Authority::open(dir.path(), Arc::new(System)).unwrap());
    let bound = Door::bind("127.0.0.1:0".parse().unwrap(), Arc::clone(&authority), None).await.unwrap();
    let refused = connect(bound.address(), &authority, None).await.unwrap_err();
    let alert = refused.get_ref().and_then(|e| e.downcast_ref::<rustls::Error>());
    assert!(matches!(alert, Some(rustls::Error::AlertReceived(rustls::AlertDescription::NoApplicationProtocol))));
}
