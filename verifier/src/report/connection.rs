//! Frames on a connection.

use std::{io, time::Duration};

use onequote_evidence::{
    Malformed,
    report::{Incoming, ProxyFrame, VerifierFrame, to_wire},
};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    time::{Instant, timeout, timeout_at},
};

/// Why a connection can carry no more frames.
#[derive(Debug, thiserror::Error)]
pub(super) enum Broken {
    /// The other end closed it.
    #[error("the host closed it")]
    Closed,
    /// Reading or writing failed.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// A frame came too slowly, or none was taken.
    #[error("the host is too slow")]
    Slow,
    /// What came is no frame.
    #[error(transparent)]
    Malformed(#[from] Malformed),
}

/// A connection with a proxy.
pub(super) struct Connection<S> {
    stream: S,
    incoming: Incoming<ProxyFrame>,
    /// When the frame that has begun must be there.
    due: Instant,
    patience: Duration,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Connection<S> {
    pub(super) fn new(stream: S, patience: Duration) -> Self {
        Self { stream, incoming: Incoming::default(), due: Instant::now(), patience }
    }

    /// The next frame, for which it waits as long as none begins. Nothing is lost when this is dropped.
    pub(super) async fn next(&mut self) -> Result<ProxyFrame, Broken> {
        loop {
            let begun = self.incoming.begun();
            let read = self.stream.read(self.incoming.space());
            let read = match begun {
                true => timeout_at(self.due, read).await.map_err(|_| Broken::Slow)??,
                false => read.await?,
            };
            if read == 0 {
                return Err(Broken::Closed);
            }
            if !begun {
                self.due = Instant::now() + self.patience;
            }
            if let Some(frame) = self.incoming.filled(read)? {
                return Ok(frame);
            }
        }
    }

    /// The next frame, which must be there by then.
    pub(super) async fn next_by(&mut self, due: Instant) -> Result<ProxyFrame, Broken> {
        timeout_at(due, self.next()).await.map_err(|_| Broken::Slow)?
    }

    pub(super) async fn send(&mut self, frame: &VerifierFrame) -> Result<(), Broken> {
        let wire = to_wire(frame);
        let sent = async {
            self.stream.write_all(&wire).await?;
            self.stream.flush().await
        };
        Ok(timeout(self.patience, sent).await.map_err(|_| Broken::Slow)??)
    }

    /// Ends it in order, so that what was sent arrives.
    pub(super) async fn close(mut self) {
        let _ = timeout(self.patience, self.stream.shutdown()).await;
    }
}
