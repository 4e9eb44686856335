//! Hosts that report: each keeps a connection to the verifier, over which it reports and can be asked.
//!
//! ```text
//! door (TLS, ALPN) ─► Room::serve: who is it? ─► held: its place ─► session: Ask … Begin … Outcome
//!                                                   ▲                  │ admitted by load, then
//!        POST /v1/hosts/{id}/attest ── Held::ask ───┘                  └─► intake: appraise, keep
//! ```
//!
//! A connection has one task. A host has one connection that counts; a newer one takes its place. Whoever shows no
//! certificate of a host, or one that does not count any more, is told so and let go before it can send anything else.
//! What a report says is the intake's business; here it is bounded in bytes, number and time. What is sent is in
//! docs/formats.md.

mod connection;
mod held;
mod load;
mod session;

use std::{io::Cursor, sync::Arc, time::Duration};

use onequote_evidence::{
    id::{HostId, TimeMs},
    stream::Have,
};
use tokio::{net::TcpStream, time::Instant};
use tokio_rustls::server::TlsStream;

pub use held::{Held, NotReported};
pub use load::{Counts, Load};

use crate::{
    enrol::{
        door::{BoxFuture, Place, Reports},
        registrar::{Caller, Refusal},
    },
    intake::{Answer, Expected, Outcome},
    round::Fault,
    source::Source,
    store::enrol::IssuedCertificate,
};

/// Where reports go.
pub trait Appraiser: Send + Sync + 'static {
    /// What the host's next report must answer; `now` if somebody waits for it.
    fn expect(
        &self,
        host: &HostId,
        now: bool,
        lifetime: Duration,
    ) -> impl Future<Output = Result<Expected, Fault>> + Send;

    /// What there is of the host's logs already, in detail.
    fn details(&self, host: &HostId) -> impl Future<Output = Result<Have, Fault>> + Send;

    /// Takes a report, and says what the next one has to answer, for so long.
    fn take(
        &self,
        host: &HostId,
        answer: Answer<Cursor<Vec<u8>>>,
        lifetime: Duration,
    ) -> impl Future<Output = Result<Outcome, Fault>> + Send;
}

/// Who may report.
pub trait Members: Send + Sync + 'static {
    /// Whose certificate the caller showed, if it still counts.
    fn member(&self, caller: &Caller) -> impl Future<Output = Result<IssuedCertificate, Refusal>> + Send;

    /// Writes down that a caller was refused.
    fn refused(&self, caller: &Caller, refusal: &Refusal) -> impl Future<Output = ()> + Send;
}

/// What the operator chooses.
#[derive(Debug, Clone, Copy)]
pub struct Settings {
    /// Time between two reports of a host.
    pub period: Duration,
    /// Least time between two reports of a host because something changed; none are wanted if zero.
    pub gap: Duration,
    /// How long a challenge can be answered beyond two periods.
    pub slack: Duration,
    /// Time for the whole of a small report, and beyond that for each MiB of a larger one; for a frame; for an answer to be
    /// taken by the host.
    pub patience: Duration,
}

impl Settings {
    /// With this period, and everything else as usual.
    #[must_use]
    pub fn new(period: Duration) -> Self {
        let (gap, second) = (Duration::from_millis(500), Duration::from_secs(1));
        Self { period, gap, slack: 60 * second, patience: 20 * second }
    }
}

/// What is known of hosts that report now, for those who ask.
#[derive(Debug, Clone)]
pub struct Reporting {
    /// Who is connected.
    pub held: Arc<Held>,
    /// What there is to do.
    pub load: Arc<Load>,
}

impl Reporting {
    /// Nobody is connected, and so many reports can be appraised at a time.
    #[must_use]
    pub fn new(at_once: usize) -> Self {
        Self { held: Arc::default(), load: Arc::new(Load::new(at_once, std::time::Instant::now())) }
    }
}

/// Takes reports.
pub struct Room<M, A> {
    members: Arc<M>,
    appraiser: Arc<A>,
    reporting: Reporting,
    source: Arc<dyn Source>,
    settings: Settings,
}

impl<M: Members, A: Appraiser> Room<M, A> {
    /// A room.
    pub fn new(
        members: Arc<M>,
        appraiser: Arc<A>,
        reporting: Reporting,
        source: Arc<dyn Source>,
        settings: Settings,
    ) -> Arc<Self> {
        Arc::new(Self { members, appraiser, reporting, source, settings })
    }

    fn now(&self) -> TimeMs {
        self.source.now()
    }

    /// When a connection ends on which nothing comes: a host that lives has reported before.
    fn silent(&self) -> Instant {
        Instant::now() + self.settings.period * 3 + self.settings.slack
    }

    /// How long a challenge can be answered.
    fn lifetime(&self) -> Duration {
        self.settings.period * 2 + self.settings.slack
    }
}

impl<M: Members, A: Appraiser> Reports for Room<M, A> {
    fn serve(self: Arc<Self>, stream: TlsStream<TcpStream>, caller: Caller, place: Place) -> BoxFuture {
        Box::pin(async move { session::serve(&self, stream, caller, place).await })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests;
