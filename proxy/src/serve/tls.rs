//! A TLS listener for axum whose connections know who is at the other end.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use axum::{
    extract::connect_info::Connected,
    serve::{IncomingStream, Listener},
};
use rustls::ServerConfig;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{Semaphore, mpsc},
    time::timeout,
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use tracing::debug;

/// Time for a handshake.
const HANDSHAKE: Duration = Duration::from_secs(10);

/// Handshakes at a time. More clients wait in the kernel's queue.
const HANDSHAKES: usize = 256;

/// Label of the TLS exporter for channel bindings (RFC 9266 section 4.2).
const EXPORTER_LABEL: &[u8] = b"EXPORTER-Channel-Binding";

/// The other end of a connection.
#[derive(Debug, Clone)]
pub struct Peer {
    /// The verifier's name in our configuration.
    pub verifier: Arc<str>,
    /// The connection's TLS exporter, 32 bytes.
    pub binding: Vec<u8>,
    /// Where it is.
    pub address: SocketAddr,
}

/// Accepts TCP connections and gives those whose handshake succeeded. Handshakes run side by side, so that a slow
/// client holds up nobody.
pub struct TlsListener {
    ready: mpsc::Receiver<(TlsStream<TcpStream>, Peer)>,
    address: SocketAddr,
}

impl TlsListener {
    /// Listens. `known` are the verifiers' names and certificates (DER).
    ///
    /// # Errors
    /// When the address cannot be bound; the message names it.
    pub async fn bind(
        address: SocketAddr,
        config: Arc<ServerConfig>,
        known: Vec<(String, Vec<u8>)>,
    ) -> io::Result<Self> {
        let listener = TcpListener::bind(address)
            .await
            .map_err(|e| io::Error::new(e.kind(), format!("cannot listen on {address}: {e}")))?;
        let address = listener.local_addr()?;
        let (done, ready) = mpsc::channel(16);
        tokio::spawn(accept(listener, TlsAcceptor::from(config), Arc::new(known), done));
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
    known: Arc<Vec<(String, Vec<u8>)>>,
    done: mpsc::Sender<(TlsStream<TcpStream>, Peer)>,
) {
    let slots = Arc::new(Semaphore::new(HANDSHAKES));
    loop {
        let Ok(slot) = Arc::clone(&slots).acquire_owned().await else { return };
        let (stream, address) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(e) => {
                debug!("cannot accept a connection: {e}");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        // Head and body of an answer are two writes: the second must not wait for the first one's acknowledgement, which
        // takes its time. Where that cannot be had answers are late, not lost.
        let _ = stream.set_nodelay(true);
        let (acceptor, known, done) = (acceptor.clone(), Arc::clone(&known), done.clone());
        tokio::spawn(async move {
            let _slot = slot;
            match timeout(HANDSHAKE, acceptor.accept(stream)).await {
                Ok(Ok(stream)) => match peer(&stream, address, &known) {
                    Some(peer) => drop(done.send((stream, peer)).await),
                    None => debug!(%address, "a client without a known certificate"),
                },
                Ok(Err(e)) => debug!(%address, "TLS handshake failed: {e}"),
                Err(_) => debug!(%address, "TLS handshake took too long"),
            }
        });
    }
}

fn peer(stream: &TlsStream<TcpStream>, address: SocketAddr, known: &[(String, Vec<u8>)]) -> Option<Peer> {
    let (_, connection) = stream.get_ref();
    let certificate = connection.peer_certificates()?.first()?;
    // The handshake has checked that the client's certificate leads to a pinned one; here it must be one.
    let (name, _) = known.iter().find(|(_, der)| der.as_slice() == certificate.as_ref())?;
    let binding = connection.export_keying_material([0; 32], EXPORTER_LABEL, None).ok()?;
    Some(Peer { verifier: name.as_str().into(), binding: binding.to_vec(), address })
}

impl Listener for TlsListener {
    type Io = TlsStream<TcpStream>;
    type Addr = Peer;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        match self.ready.recv().await {
            Some(accepted) => accepted,
            // The accepting task never ends before its receiver does.
            None => std::future::pending().await,
        }
    }

    fn local_addr(&self) -> io::Result<Self::Addr> {
        Ok(Peer { verifier: "".into(), binding: Vec::new(), address: self.address })
    }
}

impl Connected<IncomingStream<'_, TlsListener>> for Peer {
    fn connect_info(stream: IncomingStream<'_, TlsListener>) -> Self {
        stream.remote_addr().clone()
    }
}
