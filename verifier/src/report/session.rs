//! One connection of a host, from its first frame to its end.

use std::{io::Cursor, time::Duration};

use onequote_evidence::{
    id::{Blob, HostId, Nonce},
    report::{Ask, EAGER, ProxyFrame, VERSION, VerifierFrame, short},
    stream::Have,
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    time::{Instant, sleep_until},
};

use super::{
    Appraiser, Members, Room,
    connection::{Broken, Connection},
    held::{self, NotReported, Waiter},
};
use crate::{
    challenge::Challenge,
    enrol::registrar::{Caller, Refusal},
    intake::{Answer, Expected, Outcome, Taken},
    round::Fault,
};

/// What a host that could not be served is told to wait, in milliseconds.
const AFTER_FAULT: u64 = 5_000;

/// Why a session ended.
#[derive(Debug, thiserror::Error)]
enum End {
    #[error(transparent)]
    Broken(#[from] Broken),
    #[error("a newer connection of this host took its place")]
    Replaced,
    #[error("nothing came for too long")]
    Silent,
    #[error("{0}")]
    Protocol(&'static str),
    #[error("{0}")]
    Refused(#[from] Refusal),
    #[error("the verifier cannot serve the host: {0}")]
    Fault(#[from] Fault),
}

impl End {
    /// The word for it, where the host is told.
    fn code(&self) -> Option<&'static str> {
        match self {
            Self::Broken(Broken::Closed | Broken::Io(_)) => None,
            Self::Broken(Broken::Slow) | Self::Silent => Some("too-slow"),
            Self::Broken(Broken::Malformed(_)) | Self::Protocol(_) => Some("protocol"),
            Self::Replaced => Some("replaced"),
            Self::Refused(refusal) => Some(refusal.code()),
            Self::Fault(_) => Some("verifier-fault"),
        }
    }
}

/// Serves a connection until it ends. `place` is that among connections of unknown hosts.
pub(super) async fn serve<M, A, S>(room: &Room<M, A>, stream: S, caller: Caller, place: impl Send)
where
    M: Members,
    A: Appraiser,
    S: AsyncRead + AsyncWrite + Unpin + Send,
{
    let mut connection = Connection::new(stream, room.settings.patience);
    let address = caller.address;
    let ended = match begin(room, &mut connection, &caller, place).await {
        Ok((host, place)) => {
            let end = Session {
                room,
                connection: &mut connection,
                caller: &caller,
                line: &place.line,
                host,
                current: None,
                previous: None,
                asked: Vec::new(),
            }
            .run()
            .await;
            drop(place);
            end
        }
        Err(end) => end,
    };
    tracing::debug!(%address, "a host's connection ended: {ended}");
    match &ended {
        End::Refused(refusal) => room.members.refused(&caller, refusal).await,
        End::Fault(fault) => tracing::error!(error = fault as &dyn std::error::Error, "cannot serve a host"),
        _ => {}
    }
    if let Some(code) = ended.code() {
        let frame = VerifierFrame::Refused { code: code.to_owned(), error: short(&ended.to_string()) };
        let _ = connection.send(&frame).await;
    }
    connection.close().await;
}

/// Who it is, and its place among hosts.
async fn begin<M, A, S>(
    room: &Room<M, A>,
    connection: &mut Connection<S>,
    caller: &Caller,
    unknown: impl Send,
) -> Result<(HostId, held::Place), End>
where
    M: Members,
    A: Appraiser,
    S: AsyncRead + AsyncWrite + Unpin + Send,
{
    let member = room.members.member(caller).await?;
    let due = Instant::now() + room.settings.patience;
    let ProxyFrame::Hello { version, host } = connection.next_by(due).await? else {
        return Err(End::Protocol("the first frame is not hello"));
    };
    if version != VERSION {
        return Err(End::Protocol("the proxy speaks another version"));
    }
    if host != member.host {
        return Err(Refusal::Certificate("the certificate is another host's").into());
    }
    drop(unknown);
    let place = room.reporting.held.hold(&host, room.now()).ok_or(End::Replaced)?;
    Ok((host, place))
}

struct Session<'a, M, A, S> {
    room: &'a Room<M, A>,
    connection: &'a mut Connection<S>,
    caller: &'a Caller,
    line: &'a held::Line,
    host: HostId,
    /// What the next report must answer; none after a fault.
    current: Option<Challenge>,
    /// What was asked before that; an answer to it may be on its way.
    previous: Option<Nonce>,
    /// Those who wait for the answer to `current`.
    asked: Vec<Waiter>,
}

/// What happens next.
enum Event {
    Frame(ProxyFrame),
    Woken,
    Silent,
}

impl<M, A, S> Session<'_, M, A, S>
where
    M: Members,
    A: Appraiser,
    S: AsyncRead + AsyncWrite + Unpin + Send,
{
    async fn run(mut self) -> End {
        match self.converse().await {
            Err(end) => end,
            Ok(never) => match never {},
        }
    }

    async fn converse(&mut self) -> Result<std::convert::Infallible, End> {
        // Futures of what happens seldom are in a box: thousands of connections wait in the loop below.
        Box::pin(async {
            let expected = self.room.appraiser.expect(&self.host, false, self.room.lifetime()).await?;
            // A host of which there is nothing is wanted at once.
            let now = expected.have == Have::default();
            self.ask_for(expected, now).await
        })
        .await?;
        let mut silent = self.room.silent();
        loop {
            let event = tokio::select! {
                frame = self.connection.next() => Event::Frame(frame?),
                () = self.line.wake.notified() => Event::Woken,
                () = sleep_until(silent) => Event::Silent,
            };
            match event {
                Event::Frame(frame) => {
                    self.line.touch(self.room.now());
                    silent = self.room.silent();
                    Box::pin(self.handle(frame)).await?;
                }
                Event::Woken if self.line.is_replaced() => return Err(End::Replaced),
                Event::Woken => Box::pin(self.wanted()).await?,
                Event::Silent => return Err(End::Silent),
            }
        }
    }

    async fn handle(&mut self, frame: ProxyFrame) -> Result<(), End> {
        match frame {
            ProxyFrame::NeedHave => {
                let have = self.room.appraiser.details(&self.host).await?;
                Ok(self.connection.send(&VerifierFrame::Details(have)).await?)
            }
            ProxyFrame::Begin { nonce, size, .. } => {
                let nonce = Nonce::new(nonce.0).ok_or(End::Protocol("a nonce of no nonce's size"))?;
                self.report(nonce, size).await
            }
            ProxyFrame::Unable { why } => {
                tracing::info!(host = %self.host, "the host cannot report: {why:?}");
                for waiter in self.asked.drain(..) {
                    let _ = waiter.send(Err(NotReported::Unable(why.clone())));
                }
                Ok(())
            }
            ProxyFrame::Hello { .. } => Err(End::Protocol("a second hello")),
            ProxyFrame::Chunk { .. } => Err(End::Protocol("a chunk without a report")),
        }
    }

    /// Somebody wants a report.
    async fn wanted(&mut self) -> Result<(), End> {
        let waiting = self.line.take_waiting();
        if waiting.is_empty() {
            return Ok(());
        }
        self.asked.retain(|waiter| !waiter.is_closed());
        self.asked.extend(waiting);
        self.ask(true).await
    }

    /// Asks for the next report; `now` if somebody waits for it.
    async fn ask(&mut self, now: bool) -> Result<(), End> {
        let expected = self.room.appraiser.expect(&self.host, now, self.room.lifetime()).await?;
        self.ask_for(expected, now).await
    }

    async fn ask_for(&mut self, expected: Expected, now: bool) -> Result<(), End> {
        let ask = self.question(expected, now).await?;
        Ok(self.connection.send(&VerifierFrame::Ask(ask)).await?)
    }

    /// What is asked from now on.
    async fn question(&mut self, Expected { challenge, have }: Expected, now: bool) -> Result<Ask, End> {
        let statement = have.statement;
        if statement.is_none() && have != Have::default() {
            // The proxy could not ask for what it is not told of.
            self.connection.send(&VerifierFrame::Details(have)).await?;
        }
        let settings = &self.room.settings;
        let ask = Ask {
            nonce: Blob(challenge.nonce.as_bytes().to_vec()),
            statement,
            expires_ms: challenge.expires.0.saturating_sub(self.room.now().0),
            period_ms: millis(settings.period),
            gap_ms: millis(settings.gap),
            now,
        };
        let before = self.current.replace(challenge).map(|challenge| challenge.nonce);
        if before.as_ref() != self.current.as_ref().map(|challenge| &challenge.nonce) {
            self.previous = before;
        }
        Ok(ask)
    }

    /// A report begins.
    async fn report(&mut self, nonce: Nonce, size: u64) -> Result<(), End> {
        match &self.current {
            Some(current) if current.nonce == nonce => {}
            // Begun before the last question came.
            Some(_) if self.previous.as_ref() == Some(&nonce) => return self.later(size, 0).await,
            _ => return Err(End::Protocol("the report answers another nonce than the last one")),
        }
        let member = self.room.members.member(self.caller).await?;
        if member.expires <= self.room.now() {
            return Err(Refusal::Certificate("the certificate has expired").into());
        }
        let _admitted = match self.room.reporting.load.admit(size, std::time::Instant::now()) {
            Ok(admitted) => admitted,
            Err(after) => return self.later(size, millis(after)).await,
        };
        if size > EAGER {
            self.connection.send(&VerifierFrame::Go).await?;
        }
        let evidence = self.body(size, true).await?;
        let turn = self.room.reporting.load.turn().await;
        let Some(challenge) = self.current.take() else { return Ok(()) };
        let (binding, certificate) = (self.caller.binding.clone(), self.caller.certificate.clone());
        let answer = Answer { challenge, binding, certificate, evidence: Cursor::new(evidence) };
        let taken = self.room.appraiser.take(&self.host, answer, self.room.lifetime()).await;
        drop(turn);
        self.room.reporting.load.done(std::time::Instant::now());
        match taken {
            Ok(Outcome::Taken(taken)) => {
                let Taken { verdict, accepted, next, .. } = *taken;
                let state = verdict.host.state;
                tracing::info!(host = %self.host, %state, vms = verdict.vms.len(), "reported");
                for waiter in self.asked.drain(..) {
                    let _ = waiter.send(Ok(verdict.clone()));
                }
                let next = match next {
                    Some(next) => next,
                    None => self.room.appraiser.expect(&self.host, false, self.room.lifetime()).await?,
                };
                let next = self.question(next, false).await?;
                Ok(self.connection.send(&VerifierFrame::Taken { accepted, state: state.to_string(), next }).await?)
            }
            // Somebody else was faster, or what the host left out is not here any more.
            Ok(Outcome::Again(next)) => {
                self.ask_for(*next, true).await?;
                Ok(self.connection.send(&VerifierFrame::Later { after_ms: 0 }).await?)
            }
            Err(fault) => {
                tracing::error!(host = %self.host, error = &fault as &dyn std::error::Error, "cannot take a report");
                self.connection.send(&VerifierFrame::Later { after_ms: AFTER_FAULT }).await?;
                // The challenge may be used up. Without another one the connection ends.
                self.ask(!self.asked.is_empty()).await
            }
        }
    }

    /// Sends a report away. What follows it unasked is read and dropped.
    async fn later(&mut self, size: u64, after_ms: u64) -> Result<(), End> {
        if size <= EAGER {
            self.body(size, false).await?;
        }
        Ok(self.connection.send(&VerifierFrame::Later { after_ms }).await?)
    }

    /// The chunks of a report.
    async fn body(&mut self, size: u64, keep: bool) -> Result<Vec<u8>, End> {
        let patience = self.room.settings.patience;
        let share = u32::try_from(size / (1024 * 1024)).unwrap_or(u32::MAX);
        let due = Instant::now() + patience.saturating_add(patience.saturating_mul(share));
        let (mut evidence, mut left) = (Vec::new(), size);
        while left > 0 {
            let ProxyFrame::Chunk { bytes } = self.connection.next_by(due).await? else {
                return Err(End::Protocol("a report is not at its end"));
            };
            left = left.checked_sub(bytes.0.len() as u64).ok_or(End::Protocol("a report is longer than announced"))?;
            if keep {
                evidence.extend(bytes.0);
            }
        }
        Ok(evidence)
    }
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}
