//! A TLS listener for axum whose connections know who is at the other end.

use std::{
    collections::HashMap,
    hash::Hash,
    io,
    net::{IpAddr, Ipv6Addr, SocketAddr},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use axum::{
    extract::connect_info::Connected,
    serve::{IncomingStream, Listener},
};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{Semaphore, mpsc},
    time::timeout,
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};

use super::patience::Patience;
use crate::{
    identity::{Access, Trust},
    rate::{Kind, limited},
};

/// Time for a handshake.
const HANDSHAKE: Duration = Duration::from_secs(10);

/// Handshakes at a time. More clients wait in the kernel's queue.
const HANDSHAKES: usize = 512;

/// Handshakes at a time from one address, our own host's apart. More are closed: a client that begins handshakes and
/// leaves them must not keep the others out.
const HANDSHAKES_OF_ONE: usize = 32;

/// Connections of one verifier. More are closed.
const CONNECTIONS: usize = 1024;

/// A connection on which nothing moves for so long is closed. Longer than any quote takes.
const IDLE: Duration = Duration::from_secs(120);

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

/// A verifier's connection, and its place among those of the same verifier.
type Connection = Patience<TlsStream<TcpStream>, Place<Arc<str>>>;

/// How many there are by key.
#[derive(Debug)]
struct Places<K> {
    taken: Mutex<HashMap<K, usize>>,
    limit: usize,
}

/// One of them. Gives itself back.
#[derive(Debug)]
pub struct Place<K: Eq + Hash> {
    places: Arc<Places<K>>,
    key: K,
}

impl<K: Eq + Hash + Clone> Places<K> {
    fn new(limit: usize) -> Arc<Self> {
        Arc::new(Self { taken: Mutex::default(), limit })
    }

    fn take(self: &Arc<Self>, key: K) -> Option<Place<K>> {
        let mut taken = self.lock();
        let count = taken.entry(key.clone()).or_default();
        if *count >= self.limit {
            return None;
        }
        *count += 1;
        Some(Place { places: Arc::clone(self), key })
    }
}

impl<K> Places<K> {
    fn lock(&self) -> MutexGuard<'_, HashMap<K, usize>> {
        // Nothing in here can panic between two changes that belong together.
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<K: Eq + Hash> Drop for Place<K> {
    fn drop(&mut self) {
        let mut taken = self.places.lock();
        if let Some(count) = taken.get_mut(&self.key) {
            *count -= 1;
            if *count == 0 {
                taken.remove(&self.key);
            }
        }
    }
}

/// Who counts as one client before it has said who it is: an IPv4 address, or the /64 of an IPv6 address. None on
/// this host.
fn origin(address: IpAddr) -> Option<IpAddr> {
    let address = address.to_canonical();
    match address {
        _ if address.is_loopback() => None,
        IpAddr::V4(_) => Some(address),
        IpAddr::V6(v6) => {
            let s = v6.segments();
            Some(Ipv6Addr::new(s[0], s[1], s[2], s[3], 0, 0, 0, 0).into())
        }
    }
}

/// Accepts TCP connections and gives those whose handshake succeeded. Handshakes run side by side, so that a slow
/// client holds up nobody.
pub struct TlsListener {
    ready: mpsc::Receiver<(Connection, Peer)>,
    address: SocketAddr,
}

impl TlsListener {
    /// Listens for the verifiers that `access` lets in at the time of their connection.
    ///
    /// # Errors
    /// When the address cannot be bound; the message names it.
    pub async fn bind(address: SocketAddr, access: Arc<Access>) -> io::Result<Self> {
        let listener = TcpListener::bind(address)
            .await
            .map_err(|e| io::Error::new(e.kind(), format!("cannot listen on {address}: {e}")))?;
        let address = listener.local_addr()?;
        let (done, ready) = mpsc::channel(16);
        tokio::spawn(accept(listener, access, done));
        Ok(Self { ready, address })
    }

    /// The address that it has.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

async fn accept(listener: TcpListener, access: Arc<Access>, done: mpsc::Sender<(Connection, Peer)>) {
    let slots = Arc::new(Semaphore::new(HANDSHAKES));
    let (origins, verifiers) = (Places::new(HANDSHAKES_OF_ONE), Places::<Arc<str>>::new(CONNECTIONS));
    loop {
        let Ok(slot) = Arc::clone(&slots).acquire_owned().await else { return };
        let (stream, address) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(e) => {
                limited!(Kind::Accept, warn, "cannot accept a connection: {e}");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let Some((config, known)) = access.now() else {
            limited!(Kind::Handshake, info, %address, "a client, but no verifier is known that may ask");
            continue;
        };
        let place = match origin(address.ip()) {
            None => None,
            Some(origin) => match origins.take(origin) {
                Some(place) => Some(place),
                None => {
                    limited!(Kind::Handshake, warn, %address, "too many handshakes from one address; one is closed");
                    continue;
                }
            },
        };
        // Head and body of an answer are two writes: the second must not wait for the first one's acknowledgement, which
        // takes its time. Where that cannot be had answers are late, not lost.
        let _ = stream.set_nodelay(true);
        let (acceptor, done, verifiers) = (TlsAcceptor::from(config), done.clone(), verifiers.clone());
        tokio::spawn(async move {
            let _held = (slot, place);
            let stream = match timeout(HANDSHAKE, acceptor.accept(stream)).await {
                Ok(Ok(stream)) => stream,
                Ok(Err(e)) => return limited!(Kind::Handshake, info, %address, "TLS handshake failed: {e}"),
                Err(_) => return limited!(Kind::Handshake, info, %address, "TLS handshake took too long"),
            };
            let Some(peer) = peer(&stream, address, &known) else {
                return limited!(Kind::Handshake, warn, %address, "a client without a known certificate");
            };
            let Some(place) = verifiers.take(Arc::clone(&peer.verifier)) else {
                let verifier = &peer.verifier;
                return limited!(Kind::Handshake, warn, %address, %verifier, "a verifier has too many connections");
            };
            // When nobody takes it, the proxy is ending.
            let _ = done.send((Patience::new(stream, IDLE, place), peer)).await;
        });
    }
}

fn peer(stream: &TlsStream<TcpStream>, address: SocketAddr, known: &Trust) -> Option<Peer> {
    let (_, connection) = stream.get_ref();
    let certificate = connection.peer_certificates()?.first()?;
    // The handshake has checked that the client's certificate leads to one that we know; here it must be a verifier's.
    let name = known.verifier(certificate)?;
    let binding = connection.export_keying_material([0; 32], EXPORTER_LABEL, None).ok()?;
    Some(Peer { verifier: name.into(), binding: binding.to_vec(), address })
}

impl Listener for TlsListener {
    type Io = Connection;
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

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;

    #[test]
    fn places_are_counted_by_key_and_given_back() {
        let places = Places::new(2);
        let (a, b) = (places.take("x").unwrap(), places.take("x").unwrap());
        assert!(places.take("x").is_none());
        assert!(places.take("y").is_some(), "one key does not keep another out");
        drop(a);
        assert!(places.take("x").is_some());
        drop(b);
        assert!(places.lock().is_empty());
    }

    #[test]
    fn clients_by_address() {
        let of = |text: &str| origin(text.parse().unwrap()).map(|o| o.to_string());
        assert_eq!(of("127.0.0.1"), None);
        assert_eq!(of("::ffff:127.0.0.1"), None);
        assert_eq!(of("192.0.2.7").as_deref(), Some("192.0.2.7"));
        assert_eq!(of("2001:db8:1:2:3:4:5:6"), of("2001:db8:1:2::1"));
        assert_ne!(of("2001:db8:1:2::1"), of("2001:db8:1:3::1"));
    }
}
