//! A host that speaks the frames of reports by itself, for what the proxy's room would never send.

use std::{sync::Arc, time::Duration};

use anyhow::{Context as _, Result, bail, ensure};
use onequote_evidence::{
    id::{Blob, Nonce},
    report::{Ask, Cause, Incoming, MAX_CHUNK, ProxyFrame, VERSION, VerifierFrame, to_wire},
    stream::Have,
};
use onequote_proxy::report::{Connect as _, Connected, Dial};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    time::timeout,
};

use super::Member;

/// How long an answer may take.
const ANSWER: Duration = Duration::from_secs(60);

/// A connection with the verifier's door for reports.
pub struct Wire {
    member: Arc<Member>,
    stream: <Dial as onequote_proxy::report::Connect>::Stream,
    incoming: Incoming<VerifierFrame>,
    /// Its exporter value.
    pub binding: Vec<u8>,
    /// What the verifier asked last.
    pub ask: Ask,
}

impl Wire {
    /// Connects as this host, says hello and takes the first question.
    ///
    /// # Errors
    /// The verifier does not take the host.
    pub async fn open(member: &Arc<Member>) -> Result<Self> {
        let Connected { stream, binding } = member.dial()?.connect().await?;
        let nothing =
            Ask { nonce: Blob::default(), statement: None, expires_ms: 0, period_ms: 0, gap_ms: 0, now: false };
        let mut wire =
            Self { member: Arc::clone(member), stream, incoming: Incoming::default(), binding, ask: nothing };
        wire.send(&ProxyFrame::Hello { version: VERSION, host: member.id.clone() }).await?;
        match wire.next().await? {
            VerifierFrame::Ask(_) => Ok(wire),
            other => bail!("the verifier begins with {other:?}"),
        }
    }

    /// Evidence of the host for this nonce: all that it has.
    ///
    /// # Errors
    /// The host gives none.
    pub async fn evidence(&self, nonce: &Blob) -> Result<Vec<u8>> {
        let nonce = Nonce::new(nonce.0.clone()).context("a nonce")?;
        let attest = self.member.host.lock().await.attest()?.clone();
        Ok(attest.challenge(nonce, self.binding.clone(), Have::default()).await?.bytes().await?)
    }

    /// Sends a report and gives what became of it. Questions that come between are kept.
    ///
    /// # Errors
    /// The connection ends.
    pub async fn report(&mut self, nonce: &Blob, stream: &[u8]) -> Result<VerifierFrame> {
        let size = stream.len() as u64;
        self.send(&ProxyFrame::Begin { nonce: nonce.clone(), cause: Cause::Change, size }).await?;
        if size > onequote_evidence::report::EAGER {
            match self.settled().await? {
                VerifierFrame::Go => {}
                other => return Ok(other),
            }
        }
        for chunk in stream.chunks(MAX_CHUNK) {
            self.send(&ProxyFrame::Chunk { bytes: Blob(chunk.to_vec()) }).await?;
        }
        self.settled().await
    }

    /// The next frame that is no question.
    async fn settled(&mut self) -> Result<VerifierFrame> {
        loop {
            match self.next().await? {
                VerifierFrame::Ask(_) => {}
                other => return Ok(other),
            }
        }
    }

    /// The next frame.
    ///
    /// # Errors
    /// The connection ends, or nothing comes.
    pub async fn next(&mut self) -> Result<VerifierFrame> {
        let read = async {
            loop {
                let len = self.stream.read(self.incoming.space()).await?;
                ensure!(len > 0, "the verifier closed the connection");
                if let Some(frame) = self.incoming.filled(len)? {
                    return Ok(frame);
                }
            }
        };
        let frame = timeout(ANSWER, read).await.context("no answer")??;
        match &frame {
            VerifierFrame::Ask(ask) | VerifierFrame::Taken { next: ask, .. } => self.ask = ask.clone(),
            _ => {}
        }
        Ok(frame)
    }

    /// Sends a frame.
    ///
    /// # Errors
    /// The connection ends.
    pub async fn send(&mut self, frame: &ProxyFrame) -> Result<()> {
        self.send_bytes(&to_wire(frame)).await
    }

    /// Sends bytes, whatever they are.
    ///
    /// # Errors
    /// The connection ends.
    pub async fn send_bytes(&mut self, bytes: &[u8]) -> Result<()> {
        let write = async {
            self.stream.write_all(bytes).await?;
            self.stream.flush().await
        };
        timeout(ANSWER, write).await.context("the verifier takes nothing")??;
        Ok(())
    }
}
