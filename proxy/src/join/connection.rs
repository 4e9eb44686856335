//! One TLS connection with a verifier, for a few JSON messages.
//!
//! A verifier is known by its authority: by the authority's certificate, once the host has joined; before that by the pin in
//! the token, the hash of the authority's key. The name in the verifier's certificate is the same everywhere: which
//! verifier it is says the authority, and where it is says nothing.

use std::{sync::Arc, time::Duration};

use http_body_util::{BodyExt as _, Full, Limited};
use hyper::{Request, StatusCode, body::Bytes, client::conn::http1, header};
use hyper_util::rt::TokioIo;
use onequote_evidence::{
    digest::sha256,
    id::Sha256,
    join::{EXPORTER_LABEL, MAX_MESSAGE, Refused, VERIFIER_NAME},
};
use rustls::{
    AlertDescription, ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme,
    client::{
        WebPkiServerVerifier,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::CryptoProvider,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime},
    server::ParsedCertificate,
    version::TLS13,
};
use serde::{Serialize, de::DeserializeOwned};
use tokio::net::TcpStream;
use tokio_rustls::{TlsConnector, client::TlsStream};

use super::JoinError;

/// Time for reaching a verifier, handshake included, and for one answer.
const REACH: Duration = Duration::from_secs(20);
const ANSWER: Duration = Duration::from_secs(60);

/// By what a verifier is known.
pub(super) enum Known<'a> {
    /// The hash of its authority's key.
    Pin(Sha256),
    /// Its authority's certificate, and our own certificate and key.
    Authority { authority: &'a CertificateDer<'static>, own: (CertificateDer<'static>, PrivateKeyDer<'static>) },
}

/// A connection.
pub(super) struct Connection {
    sender: http1::SendRequest<Full<Bytes>>,
    driver: tokio::task::JoinHandle<()>,
    /// Its exporter value.
    pub(super) binding: Vec<u8>,
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.driver.abort();
    }
}

/// `ADDRESS:PORT` of a verifier's URL.
pub(super) fn address(url: &str) -> Option<String> {
    let uri: hyper::Uri = url.parse().ok()?;
    let fits = uri.scheme_str() == Some("https") && matches!(uri.path(), "" | "/") && uri.query().is_none();
    fits.then(|| Some(format!("{}:{}", uri.host()?, uri.port_u16()?)))?
}

/// A TLS connection with a verifier.
pub(crate) struct Dialled {
    /// It.
    pub(crate) stream: TlsStream<TcpStream>,
    /// Its exporter value.
    pub(crate) binding: Vec<u8>,
}

/// Connects with the verifier at `url`, for a protocol other than HTTP if one is named.
pub(super) async fn dial(url: &str, known: Known<'_>, protocol: Option<&[u8]>) -> Result<Dialled, JoinError> {
    let address = address(url).ok_or_else(|| JoinError::Url(url.to_owned()))?;
    let mut config = config(known).map_err(|e| JoinError::Tls { address: address.clone(), why: e.to_string() })?;
    config.alpn_protocols.extend(protocol.map(<[u8]>::to_vec));
    let connect = async {
        let unreachable = |source| JoinError::Unreachable { address: address.clone(), source };
        let tcp = TcpStream::connect(&address).await.map_err(unreachable)?;
        tcp.set_nodelay(true).map_err(unreachable)?;
        let name = ServerName::try_from(VERIFIER_NAME)
            .map_err(|e| JoinError::Tls { address: address.clone(), why: e.to_string() })?;
        let connector = TlsConnector::from(Arc::new(config));
        let stream = connector.connect(name, tcp).await;
        stream.map_err(|e| match e.get_ref().and_then(|e| e.downcast_ref::<rustls::Error>()) {
            Some(rustls::Error::AlertReceived(AlertDescription::NoApplicationProtocol)) => JoinError::Protocol,
            _ => JoinError::Tls { address: address.clone(), why: e.to_string() },
        })
    };
    let timed_out = |_| JoinError::Unreachable {
        address: address.clone(),
        source: std::io::Error::new(std::io::ErrorKind::TimedOut, "no answer"),
    };
    let stream = tokio::time::timeout(REACH, connect).await.map_err(timed_out)??;
    let binding = stream.get_ref().1.export_keying_material([0; 32], EXPORTER_LABEL, None);
    let binding = binding.map_err(|e| JoinError::Tls { address: address.clone(), why: e.to_string() })?;
    Ok(Dialled { stream, binding: binding.to_vec() })
}

impl Connection {
    /// Connects with the verifier at `url`.
    pub(super) async fn open(url: &str, known: Known<'_>) -> Result<Self, JoinError> {
        let Dialled { stream, binding } = dial(url, known, None).await?;
        let (sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(|e| broken(&e))?;
        let driver = tokio::spawn(async move {
            // The request's own error is reported.
            let _ = connection.await;
        });
        Ok(Self { sender, driver, binding })
    }

    /// Sends a message and gives the answer.
    pub(super) async fn send<T: DeserializeOwned>(&mut self, path: &str, body: Vec<u8>) -> Result<T, JoinError> {
        let request = Request::post(path)
            .header(header::HOST, VERIFIER_NAME)
            .header(header::CONTENT_TYPE, "application/json")
            .body(Full::new(Bytes::from(body)))
            .map_err(|e| JoinError::Broken(e.to_string()))?;
        let exchange = async {
            let response = self.sender.send_request(request).await.map_err(|e| broken(&e))?;
            let status = response.status();
            let body = Limited::new(response.into_body(), MAX_MESSAGE).collect().await;
            Ok::<_, JoinError>((status, body.map_err(|e| JoinError::Broken(e.to_string()))?.to_bytes()))
        };
        let answered = tokio::time::timeout(ANSWER, exchange).await;
        let (status, body) = answered.map_err(|_| JoinError::Broken("no answer in time".to_owned()))??;
        if status == StatusCode::OK {
            return serde_json::from_slice(&body).map_err(|e| JoinError::Broken(e.to_string()));
        }
        Err(match serde_json::from_slice::<Refused>(&body) {
            Ok(Refused { code, error }) => JoinError::Refused { code, error },
            Err(_) => JoinError::Broken(format!("it answered {status}; is that a verifier's --enrol-listen?")),
        })
    }
}

/// A message as it is sent.
pub(super) fn message<T: Serialize>(message: &T) -> Result<Vec<u8>, JoinError> {
    serde_json::to_vec(message).map_err(|e| JoinError::Broken(e.to_string()))
}

fn broken(e: &hyper::Error) -> JoinError {
    let mut text = e.to_string();
    let mut cause = std::error::Error::source(e);
    while let Some(e) = cause {
        text = format!("{text}: {e}");
        cause = e.source();
    }
    JoinError::Broken(text)
}

fn config(known: Known<'_>) -> Result<ClientConfig, rustls::Error> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = ClientConfig::builder_with_provider(Arc::clone(&provider)).with_protocol_versions(&[&TLS13])?;
    let mut config = match known {
        Known::Pin(pin) => builder
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(Pinned { pin, provider }))
            .with_no_client_auth(),
        Known::Authority { authority, own: (certificate, key) } => {
            let mut roots = RootCertStore::empty();
            roots.add(authority.clone())?;
            builder.with_root_certificates(roots).with_client_auth_cert(vec![certificate], key)?
        }
    };
    // Proofs are bound to a handshake of their own.
    config.resumption = rustls::client::Resumption::disabled();
    Ok(config)
}

/// Takes a certificate that is issued by an authority with a certain key; the authority's certificate comes with it.
#[derive(Debug)]
struct Pinned {
    pin: Sha256,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for Pinned {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let pinned = |der: &&CertificateDer<'_>| {
            let key = ParsedCertificate::try_from(*der).map(|parsed| parsed.subject_public_key_info());
            key.is_ok_and(|key| sha256(&[&key]) == self.pin)
        };
        let Some(authority) = intermediates.iter().find(pinned) else {
            let why = "this is not the verifier that the token is from: its authority's key is another";
            return Err(rustls::Error::General(why.to_owned()));
        };
        let mut roots = RootCertStore::empty();
        roots.add(authority.clone().into_owned())?;
        let usual = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&self.provider)).build();
        let usual = usual.map_err(|e| rustls::Error::General(e.to_string()))?;
        usual.verify_server_cert(end_entity, &[], server_name, ocsp_response, now)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        rustls::crypto::verify_tls12_signature(message, cert, dss, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, cert, dss, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_of_verifiers() {
        assert_eq!(address("https://192.0.2.1:20307").as_deref(), Some("192.0.2.1:20307"));
        assert_eq!(address("https://v.example:1/").as_deref(), Some("v.example:1"));
        for bad in ["", "http://v:1", "https://v", "https://v:1/x", "https://v:1?x", "v:1"] {
            assert_eq!(address(bad), None, "{bad}");
        }
    }
}
