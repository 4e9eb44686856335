//! The true ways: evidence from the proxy's own quotes, connections as a member.

use std::{
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use onequote_evidence::{
    id::{Nonce, Sha256},
    report::ALPN,
    stream::Have,
};
use tokio::net::TcpStream;
use tokio_rustls::client::TlsStream;

use super::{Attest, Connect, Connected, Evidence, ReportError};
use crate::{
    attest::AttestHandle,
    join::{Dialled, JoinError, Membership, Own, dial_member},
    log::LogHandle,
    serve::Releasing,
};

/// A connection on which nothing came for so long is asked whether the other end is there, so often, so many times.
const KEEP_ALIVE: (Duration, Duration, u32) = (Duration::from_secs(30), Duration::from_secs(10), 3);

/// Evidence of this proxy.
#[derive(Clone)]
pub struct Proxy {
    /// Where quotes are made.
    pub attest: AttestHandle,
    /// The log that they are about.
    pub log: LogHandle,
    /// What verifiers have accepted; none for a log that keeps everything.
    pub releasing: Option<Releasing>,
    /// The verifier that it is for.
    pub verifier: String,
}

impl Attest for Proxy {
    fn knows(&self, _: &Sha256) -> bool {
        false
    }

    async fn evidence(&self, nonce: Nonce, binding: Vec<u8>, have: Have) -> Result<Evidence, String> {
        if let Some(releasing) = &self.releasing {
            releasing.asked(&self.verifier, &have).await;
        }
        // What comes between is reported once more: better than not at all.
        let position = self.log.head().map_err(|e| e.to_string())?.log_len;
        let stream = self.attest.challenge(nonce, binding, have).await.map_err(|e| e.to_string())?;
        Ok(Evidence { stream, position })
    }

    async fn changed(&self, position: u64) {
        let mut log = self.log.clone();
        loop {
            match log.head() {
                Ok(head) if head.log_len > position => return,
                Ok(_) => {}
                // The proxy is ending.
                Err(_) => std::future::pending().await,
            }
            if log.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }
}

/// Connects as a member.
pub struct Dial {
    own: Arc<RwLock<Own>>,
}

impl Dial {
    pub(crate) fn new(own: Arc<RwLock<Own>>) -> Self {
        Self { own }
    }

    /// As this member, which is not renewed.
    #[must_use]
    pub fn of(membership: &Membership) -> Self {
        Self::new(Arc::new(RwLock::new(Own::of(membership))))
    }
}

impl Connect for Dial {
    type Stream = TlsStream<TcpStream>;

    async fn connect(&self) -> Result<Connected<Self::Stream>, ReportError> {
        match dial_member(&self.own, ALPN).await {
            Ok(Dialled { stream, binding }) => {
                keep_alive(stream.get_ref().0);
                match stream.get_ref().1.alpn_protocol() {
                    Some(ALPN) => Ok(Connected { stream, binding }),
                    _ => Err(ReportError::NotWanted),
                }
            }
            Err(JoinError::Protocol) => Err(ReportError::NotWanted),
            Err(e) => Err(ReportError::Connect(e.to_string())),
        }
    }

    fn certificate(&self) -> u64 {
        self.own.read().unwrap_or_else(PoisonError::into_inner).received.0
    }
}

/// Lets the kernel notice a verifier that is gone, keep the place in a table of translated addresses, and give up on what is
/// not taken. Where it cannot, an answer that does not come is noticed later.
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
        tracing::debug!("the kernel does not watch over the connection with a verifier: {e}");
    }
}
