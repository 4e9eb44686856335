//! One connection with a verifier.

use std::{convert::Infallible, time::Duration};

use onequote_evidence::{
    id::{Blob, Nonce, Sha256},
    report::{Ask, Cause, EAGER, Incoming, MAX_CHUNK, ProxyFrame, VERSION, VerifierFrame, short, to_wire},
    stream::Have,
};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    time::{Instant, sleep_until, timeout},
};

use super::{Attest, Connect, Connected, ReportError, Reporter, schedule::Schedule};
use crate::attest::Stream;

/// How long the verifier may take for an answer, and for taking what it is sent.
const ANSWER: Duration = Duration::from_secs(120);

/// What the next report must answer.
struct Asked {
    nonce: Nonce,
    statement: Option<Sha256>,
    /// What the verifier has, where it said so by itself.
    details: Option<Have>,
    expires: Instant,
    /// Whether the verifier waits for it.
    now: bool,
}

/// What became of a report.
enum Outcome {
    Taken { accepted: bool, state: String },
    Later,
}

pub(super) struct Session<'a, A, C: Connect> {
    reporter: &'a Reporter<A, C>,
    schedule: &'a mut Schedule,
    stream: C::Stream,
    binding: Vec<u8>,
    certificate: u64,
    incoming: Incoming<VerifierFrame>,
    asked: Option<Asked>,
    /// Details that came before their question.
    details: Option<Have>,
}

impl<'a, A: Attest, C: Connect> Session<'a, A, C> {
    pub(super) fn new(
        reporter: &'a Reporter<A, C>,
        schedule: &'a mut Schedule,
        Connected { stream, binding }: Connected<C::Stream>,
        certificate: u64,
    ) -> Self {
        let (incoming, asked, details) = (Incoming::default(), None, None);
        Self { reporter, schedule, stream, binding, certificate, incoming, asked, details }
    }

    pub(super) async fn run(mut self) -> Result<Infallible, ReportError> {
        self.send(&ProxyFrame::Hello { version: VERSION, host: self.reporter.host.clone() }).await?;
        // The first question tells whether the verifier wants us.
        while self.asked.is_none() {
            match self.answer().await? {
                VerifierFrame::Later { .. } => return Err(ReportError::Protocol("it does not begin with a question")),
                frame => self.take(frame)?,
            }
        }
        self.reporter.status.connected((self.reporter.now)());
        loop {
            let (due, cause) = self.schedule.next(Instant::now());
            let (watches, position) = (self.schedule.watches(), self.schedule.position());
            let attest = &self.reporter.attest;
            tokio::select! {
                frame = next(&mut self.stream, &mut self.incoming) => {
                    let frame = frame?;
                    self.take(frame)?;
                }
                () = attest.changed(position), if watches => self.schedule.changed(Instant::now()),
                // In a box: most of its life a session waits here.
                () = sleep_until(due) => Box::pin(self.report(cause)).await?,
            }
        }
    }

    /// A frame that may come at any time.
    fn take(&mut self, frame: VerifierFrame) -> Result<(), ReportError> {
        match frame {
            VerifierFrame::Ask(ask) => self.asks(ask),
            VerifierFrame::Details(have) => {
                self.details = Some(have);
                Ok(())
            }
            VerifierFrame::Refused { code, error } => Err(ReportError::Refused { code, error }),
            // To a report of which the verifier thinks that it waits.
            VerifierFrame::Later { after_ms } => {
                self.schedule.later(Instant::now(), Duration::from_millis(after_ms));
                Ok(())
            }
            _ => Err(ReportError::Protocol("an answer to nothing")),
        }
    }

    fn asks(&mut self, ask: Ask) -> Result<(), ReportError> {
        self.schedule.ask(&ask);
        let nonce = Nonce::new(ask.nonce.0).ok_or(ReportError::Protocol("a nonce of no nonce's size"))?;
        // A little early: a nonce that is too old when it arrives is a bad answer.
        let lifetime = Duration::from_millis(ask.expires_ms.min(1 << 40)).mul_f64(0.9);
        let expires = Instant::now() + lifetime;
        let details = self.details.take();
        self.asked = Some(Asked { nonce, statement: ask.statement, details, expires, now: ask.now });
        Ok(())
    }

    /// Makes a report and sends it.
    async fn report(&mut self, cause: Cause) -> Result<(), ReportError> {
        if self.reporter.connect.certificate() != self.certificate {
            return Err(ReportError::Renew("the certificate was renewed"));
        }
        let have = self.have().await?;
        let Some(asked) = self.asked.as_ref().filter(|asked| asked.expires > Instant::now()) else {
            return Err(ReportError::Renew("the last question is too old"));
        };
        let (nonce, now) = (asked.nonce.clone(), asked.now);
        let made = self.reporter.attest.evidence(nonce.clone(), self.binding.clone(), have).await;
        let evidence = match made {
            Ok(evidence) => evidence,
            Err(why) => {
                self.schedule.unable(Instant::now());
                self.reporter.status.unable(&why);
                if now {
                    self.send(&ProxyFrame::Unable { why: short(&why) }).await?;
                }
                return Ok(());
            }
        };
        let size = evidence.stream.left();
        match self.deliver(nonce, cause, evidence.stream).await? {
            Outcome::Taken { accepted, state } => {
                self.schedule.reported(Instant::now(), evidence.position);
                self.reporter.status.taken((self.reporter.now)(), cause, size, accepted, &state);
            }
            Outcome::Later => self.reporter.status.later(),
        }
        Ok(())
    }

    /// What the verifier has: its statement, if that is known here; otherwise it is asked for the details.
    async fn have(&mut self) -> Result<Have, ReportError> {
        let Some(asked) = &self.asked else { return Ok(Have::default()) };
        let Some(statement) = asked.statement else { return Ok(asked.details.clone().unwrap_or_default()) };
        if self.reporter.attest.knows(&statement) {
            return Ok(Have { statement: Some(statement), ..Have::default() });
        }
        self.send(&ProxyFrame::NeedHave).await?;
        loop {
            match self.answer().await? {
                VerifierFrame::Details(have) => return Ok(Have { statement: Some(statement), ..have }),
                other => self.take(other)?,
            }
        }
    }

    async fn deliver(&mut self, nonce: Nonce, cause: Cause, mut stream: Stream) -> Result<Outcome, ReportError> {
        let size = stream.left();
        let begin = ProxyFrame::Begin { nonce: Blob(nonce.as_bytes().to_vec()), cause, size };
        if size > EAGER {
            self.send(&begin).await?;
            loop {
                match self.answer().await? {
                    VerifierFrame::Go => break,
                    later @ VerifierFrame::Later { .. } => {
                        self.take(later)?;
                        return Ok(Outcome::Later);
                    }
                    other => self.take(other)?,
                }
            }
            while let Some(part) = stream.next().await? {
                for chunk in part.chunks(MAX_CHUNK) {
                    self.send(&ProxyFrame::Chunk { bytes: Blob(chunk.to_vec()) }).await?;
                }
            }
        } else {
            // In one, so that it is one record and one segment on the wire.
            let mut wire = to_wire(&begin);
            wire.extend(to_wire(&ProxyFrame::Chunk { bytes: Blob(stream.bytes().await?) }));
            self.write(&wire).await?;
        }
        loop {
            match self.answer().await? {
                VerifierFrame::Taken { accepted, state, next } => {
                    self.asks(next)?;
                    return Ok(Outcome::Taken { accepted, state });
                }
                later @ VerifierFrame::Later { .. } => {
                    self.take(later)?;
                    return Ok(Outcome::Later);
                }
                other => self.take(other)?,
            }
        }
    }

    async fn answer(&mut self) -> Result<VerifierFrame, ReportError> {
        let next = next(&mut self.stream, &mut self.incoming);
        timeout(ANSWER, next).await.map_err(|_| ReportError::Silent)?
    }

    async fn send(&mut self, frame: &ProxyFrame) -> Result<(), ReportError> {
        self.write(&to_wire(frame)).await
    }

    async fn write(&mut self, wire: &[u8]) -> Result<(), ReportError> {
        let written = async {
            self.stream.write_all(wire).await?;
            self.stream.flush().await
        };
        Ok(timeout(ANSWER, written).await.map_err(|_| ReportError::Silent)??)
    }
}

/// The next frame. Nothing is lost when this is dropped.
async fn next<S: AsyncRead + AsyncWrite + Unpin>(
    stream: &mut S,
    incoming: &mut Incoming<VerifierFrame>,
) -> Result<VerifierFrame, ReportError> {
    loop {
        let read = stream.read(incoming.space()).await?;
        if read == 0 {
            return Err(ReportError::Closed);
        }
        if let Some(frame) = incoming.filled(read)? {
            return Ok(frame);
        }
    }
}
