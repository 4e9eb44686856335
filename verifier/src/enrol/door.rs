//! The TLS listener for hosts: connections are bounded in number, in number from one address, and in time.
//!
//! A host that reports says so in the handshake (ALPN) and gets to the room for that, which frees it from these bounds once
//! it knows which host it is: thousands of hosts may be behind one address.

use std::{
    collections::HashMap,
    io,
    net::{IpAddr, SocketAddr},
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll},
    time::Duration,
};

use axum::{
    extract::connect_info::Connected,
    serve::{IncomingStream, Listener},
};
use onequote_evidence::{join::EXPORTER_LABEL, report};
use rustls::{RootCertStore, ServerConfig, server::WebPkiClientVerifier, version::TLS13};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore, mpsc},
    time::{Sleep, sleep, timeout},
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};

use super::{authority::Authority, registrar::Caller};

/// Time for a handshake, and for a whole connection: a TPM may take a minute for a key.
const HANDSHAKE: Duration = Duration::from_secs(10);
const CONNECTION: Duration = Duration::from_secs(180);

/// Connections at a time of which is not known which host it is, and those from one address, our own host's apart.
const CONNECTIONS: usize = 1024;
const OF_ONE: usize = 64;

/// A connection on which nothing came for so long is asked whether the other end is there, so often, so many times.
const KEEP_ALIVE: (Duration, Duration, u32) = (Duration::from_secs(30), Duration::from_secs(10), 3);

/// A future in a box.
pub type BoxFuture = Pin<Box<dyn Future<Output = ()> + Send>>;

/// Who takes the connections of hosts that report.
pub trait Reports: Send + Sync + 'static {
    /// Serves one until it ends. `place` is to be given back as soon as it is known which host it is.
    fn serve(self: Arc<Self>, stream: TlsStream<TcpStream>, caller: Caller, place: Place) -> BoxFuture;
}

/// A listener for hosts.
pub struct Door {
    ready: mpsc::Receiver<(Held, Caller)>,
    address: SocketAddr,
}

/// A connection with its place, which ends when its time is over.
pub struct Held {
    stream: TlsStream<TcpStream>,
    end: Pin<Box<Sleep>>,
    _place: Place,
}

/// How many connections there are from each address.
type Counts = Arc<Mutex<HashMap<IpAddr, usize>>>;

/// A connection's place. Gives itself back.
pub struct Place {
    counts: Counts,
    of: Option<IpAddr>,
    _permit: OwnedSemaphorePermit,
}

impl Place {
    /// A place for a connection from there, unless it has too many.
    fn take(counts: &Counts, from: IpAddr, permit: OwnedSemaphorePermit) -> Option<Self> {
        let of = Some(from.to_canonical()).filter(|from| !from.is_loopback());
        if let Some(from) = of {
            let mut taken = counts.lock().unwrap_or_else(PoisonError::into_inner);
            let count = taken.entry(from).or_default();
            if *count >= OF_ONE {
                return None;
            }
            *count += 1;
        }
        Some(Self { counts: Arc::clone(counts), of, _permit: permit })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let Some(from) = self.of else { return };
        let mut taken = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = taken.get_mut(&from) {
            *count -= 1;
            if *count == 0 {
                taken.remove(&from);
            }
        }
    }
}

impl Door {
    /// Listens. Hosts can report if somebody takes their reports.
    ///
    /// # Errors
    /// The address cannot be bound, or the authority's certificate cannot be used.
    pub async fn bind(
        address: SocketAddr,
        authority: Arc<Authority>,
        reports: Option<Arc<dyn Reports>>,
    ) -> io::Result<Self> {
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
        if reports.is_some() {
            config.alpn_protocols.push(report::ALPN.to_vec());
        }
        // Whoever comes back shows its certificate again.
        config.send_tls13_tickets = 0;
        let listener = TcpListener::bind(address).await?;
        let address = listener.local_addr()?;
        let (done, ready) = mpsc::channel(16);
        tokio::spawn(accept(listener, TlsAcceptor::from(Arc::new(config)), reports, done));
        Ok(Self { ready, address })
    }

    /// The address that it has.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

async fn accept(
    listener: TcpListener,
    acceptor: TlsAcceptor,
    reports: Option<Arc<dyn Reports>>,
    done: mpsc::Sender<(Held, Caller)>,
) {
    let (places, counts) = (Arc::new(Semaphore::new(CONNECTIONS)), Counts::default());
    loop {
        let Ok(permit) = Arc::clone(&places).acquire_owned().await else { return };
        let (stream, address) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(e) => {
                tracing::warn!("cannot accept a host's connection: {e}");
                sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let Some(place) = Place::take(&counts, address.ip(), permit) else {
            tracing::debug!(%address, "too many connections from one address; one is closed");
            continue;
        };
        let _ = stream.set_nodelay(true);
        let (acceptor, reports, done) = (acceptor.clone(), reports.clone(), done.clone());
        tokio::spawn(async move {
            let stream = match timeout(HANDSHAKE, acceptor.accept(stream)).await {
                Ok(Ok(stream)) => stream,
                Ok(Err(e)) => return tracing::debug!(%address, "a host's TLS handshake failed: {e}"),
                Err(_) => return tracing::debug!(%address, "a host's TLS handshake took too long"),
            };
            let connection = stream.get_ref().1;
            let Ok(binding) = connection.export_keying_material([0; 32], EXPORTER_LABEL, None) else { return };
            let certificate = connection.peer_certificates().and_then(|chain| chain.first()).map(|der| der.to_vec());
            let caller = Caller { address, binding: binding.to_vec(), certificate };
            if let Some(reports) = reports.filter(|_| connection.alpn_protocol() == Some(report::ALPN)) {
                keep_alive(stream.get_ref().0);
                return reports.serve(stream, caller, place).await;
            }
            let held = Held { stream, end: Box::pin(sleep(CONNECTION)), _place: place };
            // When nobody takes it, the verifier is ending.
            let _ = done.send((held, caller)).await;
        });
    }
}

/// Lets the kernel notice a host that is gone, or a network between that forgot the connection. Where it cannot, the
/// host's silence is noticed later.
fn keep_alive(stream: &TcpStream) {
    use rustix::net::sockopt;
    let (idle, interval, count) = KEEP_ALIVE;
    let lost = (idle + interval * count).as_millis();
    let set = sockopt::set_socket_keepalive(stream, true)
        .and_then(|()| sockopt::set_tcp_keepidle(stream, idle))
        .and_then(|()| sockopt::set_tcp_keepintvl(stream, interval))
        .and_then(|()| sockopt::set_tcp_keepcnt(stream, count))
        .and_then(|()| sockopt::set_tcp_user_timeout(stream, u32::try_from(lost).unwrap_or(u32::MAX)));
    if let Err(e) = set {
        tracing::debug!("the kernel does not watch over a host's connection: {e}");
    }
}

impl Held {
    fn in_time(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        match self.end.as_mut().poll(cx) {
            Poll::Ready(()) => Err(io::ErrorKind::TimedOut.into()),
            Poll::Pending => Ok(()),
        }
    }
}

impl AsyncRead for Held {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if let Err(e) = self.in_time(cx) {
            return Poll::Ready(Err(e));
        }
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Held {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        if let Err(e) = self.in_time(cx) {
            return Poll::Ready(Err(e));
        }
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

impl Listener for Door {
    type Io = Held;
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

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;

    #[test]
    fn one_address_has_so_many_places() {
        let (places, counts) = (Arc::new(Semaphore::new(100)), Counts::default());
        let take = |from: &str| {
            let permit = Arc::clone(&places).try_acquire_owned().unwrap();
            Place::take(&counts, from.parse().unwrap(), permit)
        };
        let taken: Vec<_> = (0..OF_ONE).map(|_| take("192.0.2.1").unwrap()).collect();
        assert!(take("192.0.2.1").is_none() && take("::ffff:192.0.2.1").is_none());
        assert!(take("192.0.2.2").is_some());
        assert!((0..40).all(|_| take("127.0.0.1").is_some()));
        drop(taken);
        assert!(take("192.0.2.1").is_some());
        assert!(counts.lock().unwrap().is_empty());
    }
}
