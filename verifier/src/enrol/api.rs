//! Where hosts join: TLS 1.3 with the verifier's own certificate, bounded JSON, a limit on requests.
//!
//! `POST /v1/join`, `/v1/join/prove`, `/v1/renew`, `/v1/renew/prove`, `/v1/here`: see docs/formats.md. Whoever connects
//! may show a certificate, which must then be one of the authority's; joining needs none.

use std::{
    io,
    net::SocketAddr,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use axum::{
    Json, Router,
    body::Bytes,
    extract::{ConnectInfo, DefaultBodyLimit, Request, State, connect_info::Connected},
    http::{StatusCode, header},
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing::post,
    serve::{IncomingStream, Listener},
};
use onequote_evidence::join::{EXPORTER_LABEL, MAX_MESSAGE, Refused};
use rustls::{RootCertStore, ServerConfig, server::WebPkiClientVerifier, version::TLS13};
use serde::Serialize;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{Semaphore, mpsc},
    time::timeout,
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};

use super::{
    authority::Authority,
    registrar::{Caller, Refusal, Registrar},
};
use crate::store::enrol::EnrolStore;

/// Time for a handshake, and for a whole connection: a TPM may take a minute for a key.
const HANDSHAKE: Duration = Duration::from_secs(10);
const CONNECTION: Duration = Duration::from_secs(180);

/// Connections at a time.
const CONNECTIONS: usize = 512;

/// Requests that are taken at once, and how many a second after that. A renewal has three, a join two.
const BURST: f64 = 200.0;
const PER_SECOND: f64 = 50.0;

/// A listener for hosts.
pub struct Door {
    ready: mpsc::Receiver<(TlsStream<TcpStream>, Caller)>,
    address: SocketAddr,
}

impl Door {
    /// Listens.
    ///
    /// # Errors
    /// The address cannot be bound, or the authority's certificate cannot be used.
    pub async fn bind(address: SocketAddr, authority: Arc<Authority>) -> io::Result<Self> {
        let mut roots = RootCertStore::empty();
        roots.add(authority.certificate().clone()).map_err(io::Error::other)?;
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let clients = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider))
            .allow_unauthenticated()
            .build()
            .map_err(io::Error::other)?;
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&TLS13])
            .map_err(io::Error::other)?
            .with_client_cert_verifier(clients)
            .with_cert_resolver(authority);
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        // Whoever comes back shows its certificate again.
        config.send_tls13_tickets = 0;
        let listener = TcpListener::bind(address).await?;
        let address = listener.local_addr()?;
        let (done, ready) = mpsc::channel(16);
        tokio::spawn(accept(listener, TlsAcceptor::from(Arc::new(config)), done));
        Ok(Self { ready, address })
    }

    /// The address that it has.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

async fn accept(listener: TcpListener, acceptor: TlsAcceptor, done: mpsc::Sender<(TlsStream<TcpStream>, Caller)>) {
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
        let (stream, address) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(e) => {
                tracing::warn!("cannot accept a host's connection: {e}");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let _ = stream.set_nodelay(true);
        let (acceptor, done) = (acceptor.clone(), done.clone());
        tokio::spawn(async move {
            let _place = place;
            let stream = match timeout(HANDSHAKE, acceptor.accept(stream)).await {
                Ok(Ok(stream)) => stream,
                Ok(Err(e)) => return tracing::debug!(%address, "a host's TLS handshake failed: {e}"),
                Err(_) => return tracing::debug!(%address, "a host's TLS handshake took too long"),
            };
            let connection = stream.get_ref().1;
            let Ok(binding) = connection.export_keying_material([0; 32], EXPORTER_LABEL, None) else { return };
            let certificate = connection.peer_certificates().and_then(|chain| chain.first()).map(|der| der.to_vec());
            let caller = Caller { address, binding: binding.to_vec(), certificate };
            // When nobody takes it, the verifier is ending.
            let _ = done.send((stream, caller)).await;
        });
    }
}

impl Listener for Door {
    type Io = TlsStream<TcpStream>;
    type Addr = Caller;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        match self.ready.recv().await {
            Some(accepted) => accepted,
            // The accepting task never ends before its receiver does.
            None => std::future::pending().await,
        }
    }

    fn local_addr(&self) -> io::Result<Self::Addr> {
        Ok(Caller { address: self.address, binding: Vec::new(), certificate: None })
    }
}

impl Connected<IncomingStream<'_, Door>> for Caller {
    fn connect_info(stream: IncomingStream<'_, Door>) -> Self {
        stream.remote_addr().clone()
    }
}

/// A bucket of requests.
#[derive(Debug)]
struct Bucket(Mutex<(f64, Instant)>);

impl Bucket {
    fn full(now: Instant) -> Self {
        Self(Mutex::new((BURST, now)))
    }

    fn take(&self, now: Instant) -> bool {
        let mut bucket = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let passed = now.saturating_duration_since(bucket.1).as_secs_f64();
        let left = (bucket.0 + passed * PER_SECOND).min(BURST);
        *bucket = if left >= 1.0 { (left - 1.0, now) } else { (left, now) };
        left >= 1.0
    }
}

type Shared<S> = State<Arc<Registrar<S>>>;
type Of = ConnectInfo<Caller>;

/// Serves hosts until `stop` is done.
///
/// # Errors
/// When the listener fails.
pub async fn serve<S: EnrolStore>(
    door: Door,
    registrar: Arc<Registrar<S>>,
    stop: impl Future<Output = ()> + Send + 'static,
) -> io::Result<()> {
    let bucket = Arc::new(Bucket::full(Instant::now()));
    let limit = move |request: Request, next: Next| {
        let allowed = bucket.take(Instant::now());
        async move {
            match allowed {
                // Nothing takes longer: a client that sends its request drop by drop is let go.
                true => timeout(CONNECTION, next.run(request)).await.unwrap_or_else(|_| refused(&Refusal::Busy)),
                false => refused(&Refusal::Busy),
            }
        }
    };
    let app = Router::new()
        .route("/v1/join", post(join::<S>))
        .route("/v1/join/prove", post(prove::<S>))
        .route("/v1/renew", post(renew::<S>))
        .route("/v1/renew/prove", post(prove_renewal::<S>))
        .route("/v1/here", post(here::<S>))
        .layer(DefaultBodyLimit::max(MAX_MESSAGE))
        .layer(middleware::from_fn(limit))
        .with_state(registrar);
    axum::serve(door, app.into_make_service_with_connect_info::<Caller>()).with_graceful_shutdown(stop).await
}

async fn join<S: EnrolStore>(State(r): Shared<S>, ConnectInfo(caller): Of, body: Bytes) -> Response {
    answer(r.join(&caller, &body).await)
}

async fn prove<S: EnrolStore>(State(r): Shared<S>, ConnectInfo(caller): Of, body: Bytes) -> Response {
    answer(r.prove(&caller, &body).await)
}

async fn renew<S: EnrolStore>(State(r): Shared<S>, ConnectInfo(caller): Of, body: Bytes) -> Response {
    answer(r.renew(&caller, &body).await)
}

async fn prove_renewal<S: EnrolStore>(State(r): Shared<S>, ConnectInfo(caller): Of, body: Bytes) -> Response {
    answer(r.prove_renewal(&caller, &body).await)
}

async fn here<S: EnrolStore>(State(r): Shared<S>, ConnectInfo(caller): Of, body: Bytes) -> Response {
    answer(r.here(&caller, &body).await)
}

fn answer<T: Serialize>(outcome: Result<T, Refusal>) -> Response {
    match outcome {
        Ok(message) => Json(message).into_response(),
        Err(refusal) => refused(&refusal),
    }
}

fn refused(refusal: &Refusal) -> Response {
    let status = match refusal {
        Refusal::Malformed(_) => StatusCode::BAD_REQUEST,
        Refusal::Busy => StatusCode::TOO_MANY_REQUESTS,
        Refusal::Store(_) | Refusal::Certify(_) => {
            tracing::error!(error = refusal as &dyn std::error::Error, "cannot serve a host");
            StatusCode::INTERNAL_SERVER_ERROR
        }
        _ => StatusCode::FORBIDDEN,
    };
    let body = Json(Refused { code: refusal.code().to_owned(), error: refusal.to_string() });
    (status, [(header::RETRY_AFTER, "5")], body).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_come_in_bursts_and_then_at_a_rate() {
        let start = Instant::now();
        let bucket = Bucket::full(start);
        let taken = (0..1000).filter(|_| bucket.take(start)).count();
        assert_eq!(taken, 200);
        let taken = (0..1000).filter(|_| bucket.take(start + Duration::from_secs(1))).count();
        assert_eq!(taken, 50);
    }
}
