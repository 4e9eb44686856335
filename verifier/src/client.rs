//! Asks a proxy for evidence over mutually authenticated TLS 1.3.
//!
//! The only trust anchor is the proxy's pinned certificate, or our own authority for a host that has joined; the name must
//! be the host's id. The anchor's name is sent along, so that a proxy of several verifiers knows which one asks. The connection's exporter
//! value (RFC 9266) is taken before anything is sent and goes into the appraisal: evidence made for another
//! connection does not fit. One request a connection: `POST /v1/evidence` with `{"nonce": hex, "have": …}`; the answer is an
//! evidence stream of bounded size, without what the verifier has. Every failure says whether the host was not reached, not trusted, or refused.

use std::{sync::Arc, time::Duration};

use http_body_util::{BodyExt as _, Full, Limited};
use hyper::{Request, StatusCode, body::Bytes, header};
use hyper_util::rt::TokioIo;
use rustls::{
    ClientConfig, DigitallySignedStruct, DistinguishedName, RootCertStore, SignatureScheme,
    client::{
        WebPkiServerVerifier,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    pki_types::{CertificateDer, DnsName, ServerName, UnixTime},
    version::TLS13,
};
use tokio::net::TcpStream;
use tokio_rustls::{TlsConnector, client::TlsStream};

use onequote_evidence::{
    id::{HostId, Nonce},
    stream::{Have, MEDIA_TYPE},
};

use crate::{
    enrol::Identity,
    finding::{Code, Finding},
};

/// The label of the exporter value that binds evidence to its connection; 32 bytes, no context.
pub const EXPORTER_LABEL: &[u8] = b"EXPORTER-Channel-Binding";

/// The longest answer in bytes.
pub const MAX_ANSWER: usize = 64 * 1024 * 1024;

/// The longest refusal that is read, in bytes.
const MAX_REFUSAL: usize = 4096;

/// An answer.
#[derive(Debug, Clone)]
pub struct Answer {
    /// The evidence stream as sent.
    pub evidence: Vec<u8>,
    /// The connection's exporter value.
    pub binding: Vec<u8>,
    /// The certificate that the proxy showed, DER.
    pub certificate: Vec<u8>,
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    /// The URL is not one.
    #[error("{0:?} is not a URL of the form https://ADDRESS:PORT")]
    Url(String),
    /// Nothing listens there, or the network is down.
    #[error("cannot reach {address}: {source}")]
    Unreachable {
        /// Where.
        address: String,
        /// Why.
        source: std::io::Error,
    },
    /// Certificates do not fit.
    #[error("no trusted connection with {address}: {source}")]
    Tls {
        /// Where.
        address: String,
        /// Why.
        source: std::io::Error,
    },
    /// Our own certificate or key is unusable.
    #[error("the verifier's own identity is unusable: {0}")]
    Identity(rustls::Error),
    /// The proxy refused.
    #[error("the proxy answered {status}: {text}")]
    Refused {
        /// The HTTP status.
        status: StatusCode,
        /// What it said.
        text: String,
    },
    /// The answer ended early, was too large or not HTTP.
    #[error("the proxy's answer cannot be read: {0}")]
    Broken(String),
    /// It took too long.
    #[error("no answer within {0:?}")]
    Timeout(Duration),
}

impl AskError {
    /// The finding for it.
    #[must_use]
    pub fn finding(&self, url: &str) -> Finding {
        let code = match self {
            Self::Url(_) | Self::Unreachable { .. } | Self::Timeout(_) => Code::Unreachable,
            Self::Tls { .. } => Code::TlsRefused,
            Self::Refused { .. } | Self::Broken(_) => Code::ProxyError,
            Self::Identity(_) => Code::VerifierFault,
        };
        Finding::new(code, url).actual(self)
    }
}

/// Whom to ask.
#[derive(Debug, Clone, Copy)]
pub struct Target<'a> {
    /// The host: also the name in its certificate.
    pub host: &'a HostId,
    /// Where its proxy listens.
    pub url: &'a str,
    /// Its proxy's certificate, or the authority that issued it, DER.
    pub certificate: &'a [u8],
}

/// Asks for evidence.
///
/// # Errors
/// [`AskError`].
pub async fn ask(
    target: Target<'_>,
    identity: &Identity,
    nonce: &Nonce,
    have: &Have,
    timeout: Duration,
) -> Result<Answer, AskError> {
    let asked = async {
        let stream = connect(target, identity).await?;
        let binding = stream.get_ref().1.export_keying_material([0; 32], EXPORTER_LABEL, None);
        let binding = binding.map_err(|e| tls(target.url, std::io::Error::other(e)))?.to_vec();
        let shown = stream.get_ref().1.peer_certificates().and_then(|chain| chain.first());
        let certificate = shown.map(|der| der.to_vec()).unwrap_or_default();
        let evidence = exchange(stream, target, nonce, have).await?;
        Ok(Answer { evidence, binding, certificate })
    };
    tokio::time::timeout(timeout, asked).await.map_err(|_| AskError::Timeout(timeout))?
}

/// `ADDRESS:PORT` of a proxy's URL.
#[must_use]
pub fn address(url: &str) -> Option<String> {
    let uri: hyper::Uri = url.parse().ok()?;
    let fits = uri.scheme_str() == Some("https") && matches!(uri.path(), "" | "/") && uri.query().is_none();
    fits.then(|| Some(format!("{}:{}", uri.host()?, uri.port_u16()?)))?
}

async fn connect(target: Target<'_>, identity: &Identity) -> Result<TlsStream<TcpStream>, AskError> {
    let address = address(target.url).ok_or_else(|| AskError::Url(target.url.to_owned()))?;
    let config = config(target.certificate, identity)?;
    let name = DnsName::try_from(target.host.to_string()).map_err(|_| AskError::Url(target.host.to_string()))?;
    let tcp = TcpStream::connect(&address).await;
    let tcp = tcp.map_err(|source| AskError::Unreachable { address: address.clone(), source })?;
    tcp.set_nodelay(true).map_err(|source| AskError::Unreachable { address: address.clone(), source })?;
    let connector = TlsConnector::from(Arc::new(config));
    connector.connect(ServerName::DnsName(name), tcp).await.map_err(|source| AskError::Tls { address, source })
}

fn config(pinned: &[u8], identity: &Identity) -> Result<ClientConfig, AskError> {
    let mut roots = RootCertStore::empty();
    roots
        .add(CertificateDer::from(pinned.to_vec()))
        .map_err(|e| tls("the pinned certificate", std::io::Error::other(e)))?;
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let names = roots.subjects();
    let anchored = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider)).build();
    let anchored = anchored.map_err(|e| tls("the pinned certificate", std::io::Error::other(e)))?;
    let builder = ClientConfig::builder_with_provider(provider).with_protocol_versions(&[&TLS13]);
    let builder = builder.map_err(AskError::Identity)?;
    // Only adds the anchor's name to what the usual verifier says.
    let builder = builder.dangerous().with_custom_certificate_verifier(Arc::new(Named { anchored, names }));
    let chain = vec![identity.certificate.clone()];
    let mut config = builder.with_client_auth_cert(chain, identity.key.clone_key()).map_err(AskError::Identity)?;
    // Each round is a handshake of its own: nothing of an earlier connection is reused.
    config.resumption = rustls::client::Resumption::disabled();
    Ok(config)
}

/// The usual verification, and the anchors' names for the server to choose its certificate by.
#[derive(Debug)]
struct Named {
    anchored: Arc<WebPkiServerVerifier>,
    names: Vec<DistinguishedName>,
}

impl ServerCertVerifier for Named {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        self.anchored.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.anchored.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.anchored.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.anchored.supported_verify_schemes()
    }

    fn root_hint_subjects(&self) -> Option<&[DistinguishedName]> {
        Some(&self.names)
    }
}

async fn exchange(
    stream: TlsStream<TcpStream>,
    target: Target<'_>,
    nonce: &Nonce,
    have: &Have,
) -> Result<Vec<u8>, AskError> {
    let broken = |e: hyper::Error| match tls_error(&e) {
        // A server that does not know our certificate says so only after the handshake.
        Some(why) => tls(target.url, std::io::Error::other(why)),
        None => AskError::Broken(e.to_string()),
    };
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(broken)?;
    let driver = tokio::spawn(connection);
    let body = serde_json::json!({ "nonce": nonce, "have": have }).to_string();
    let request = Request::post("/v1/evidence")
        .header(header::HOST, target.host.as_str())
        .header(header::CONTENT_TYPE, "application/json")
        .header(header::ACCEPT, MEDIA_TYPE)
        .body(Full::new(Bytes::from(body)))
        .map_err(|e| AskError::Broken(e.to_string()))?;
    let response = match sender.send_request(request).await {
        Ok(response) => response,
        Err(e) => {
            // The connection's own error tells more than the request's.
            drop(sender);
            return Err(match driver.await {
                Ok(Err(deeper)) => broken(deeper),
                _ => broken(e),
            });
        }
    };
    let status = response.status();
    let limit = if status == StatusCode::OK { MAX_ANSWER } else { MAX_REFUSAL };
    let body = Limited::new(response.into_body(), limit).collect().await;
    let body = body.map(|body| body.to_bytes().to_vec());
    driver.abort();
    if status == StatusCode::OK {
        return body.map_err(|e| AskError::Broken(e.to_string()));
    }
    let text = String::from_utf8_lossy(&body.unwrap_or_default()).trim().to_owned();
    Err(AskError::Refused { status, text })
}

fn tls(address: &str, source: std::io::Error) -> AskError {
    AskError::Tls { address: address.to_owned(), source }
}

/// The TLS error below an HTTP error, if there is one.
fn tls_error(e: &hyper::Error) -> Option<rustls::Error> {
    let mut cause: Option<&dyn std::error::Error> = std::error::Error::source(e);
    while let Some(e) = cause {
        if let Some(tls) = e.downcast_ref::<rustls::Error>() {
            return Some(tls.clone());
        }
        let inner = e.downcast_ref::<std::io::Error>().and_then(std::io::Error::get_ref);
        if let Some(tls) = inner.and_then(|inner| inner.downcast_ref::<rustls::Error>()) {
            return Some(tls.clone());
        }
        cause = e.source();
    }
    None
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests;
