//! A host's way to the verifier: the proxy's own report room over its own connection, with somebody listening who counts.

use std::{
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use onequote_evidence::{
    id::{Nonce, Sha256},
    report::{Incoming, VerifierFrame},
    stream::Have,
};
use onequote_proxy::report::{Attest, Connect, Connected, Dial, Evidence, Proxy, ReportError};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::meter::Meter;

/// The proxy's evidence, counted.
pub(super) struct Observed {
    pub(super) proxy: Proxy,
    pub(super) meter: Arc<Meter>,
}

impl Attest for Observed {
    fn knows(&self, statement: &Sha256) -> bool {
        self.proxy.knows(statement)
    }

    async fn evidence(&self, nonce: Nonce, binding: Vec<u8>, have: Have) -> Result<Evidence, String> {
        let first = have == Have::default();
        let evidence = self.proxy.evidence(nonce, binding, have).await?;
        self.meter.begin(evidence.stream.left(), first, evidence.position);
        Ok(evidence)
    }

    async fn changed(&self, position: u64) {
        self.proxy.changed(position).await;
    }
}

/// The proxy's connection, listened to.
pub(super) struct Line {
    pub(super) dial: Dial,
    pub(super) meter: Arc<Meter>,
}

impl Connect for Line {
    type Stream = Tap<<Dial as Connect>::Stream>;

    async fn connect(&self) -> Result<Connected<Self::Stream>, ReportError> {
        let Connected { stream, binding } = self.dial.connect().await?;
        self.meter.connected();
        let tap = Tap { stream, incoming: Incoming::default(), meter: Arc::clone(&self.meter), lost: false };
        Ok(Connected { stream: tap, binding })
    }

    fn certificate(&self) -> u64 {
        self.dial.certificate()
    }
}

/// A stream whose frames from the verifier are read along.
pub(super) struct Tap<S> {
    stream: S,
    incoming: Incoming<VerifierFrame>,
    meter: Arc<Meter>,
    /// Whether the other end closed it, or the network.
    lost: bool,
}

impl<S> Tap<S> {
    fn hear(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let space = self.incoming.space();
            let len = space.len().min(bytes.len());
            space[..len].copy_from_slice(&bytes[..len]);
            bytes = &bytes[len..];
            match self.incoming.filled(len) {
                Ok(Some(VerifierFrame::Taken { accepted, state, .. })) => self.meter.told(accepted, &state),
                Ok(Some(VerifierFrame::Later { .. })) => self.meter.later(),
                Ok(Some(VerifierFrame::Refused { code, .. })) => self.meter.refuse(&code),
                Ok(_) => {}
                // The room itself ends the connection.
                Err(_) => return,
            }
        }
    }
}

impl<S> Drop for Tap<S> {
    fn drop(&mut self) {
        self.meter.disconnected(!self.lost);
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Tap<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = buf.filled().len();
        let read = ready!(Pin::new(&mut this.stream).poll_read(cx, buf));
        let heard = buf.filled()[before..].to_vec();
        this.lost |= read.is_err() || heard.is_empty();
        this.hear(&heard);
        Poll::Ready(read)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Tap<S> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let written = ready!(Pin::new(&mut this.stream).poll_write(cx, bytes));
        this.lost |= written.is_err();
        Poll::Ready(written)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(cx)
    }
}
