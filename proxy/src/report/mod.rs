//! Reports to verifiers: one task for each verifier that was joined, which holds a connection and reports over it.
//!
//! ```text
//! connect ──► Hello ──► Ask ──► wait ──────────► quote ──► Begin, Chunk … ──► Taken, next Ask
//!    ▲                           ▲ period, change, asked                         │
//!    └── back-off ◄── lost       └───────────────── Later ◄──────────────────────┘
//! ```
//!
//! The verifier says how often it wants reports and whether a change is worth one; when the next one is due says the
//! [`schedule`], which outlives connections: a verifier that comes back is not reported to by all hosts at once. One report
//! is under way at a time. The evidence answers the verifier's last nonce, and is bound to this connection.
//!
//! The room knows neither TPM nor log nor TLS: evidence comes from an [`Attest`], connections from a [`Connect`].

mod connect;
mod schedule;
mod session;
mod status;

use std::{io, sync::Arc, time::Duration};

use onequote_evidence::{
    Malformed,
    id::{HostId, Nonce, Sha256, TimeMs},
    stream::Have,
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    time::{Instant, sleep},
};
use tracing::{debug, info, warn};

pub use connect::{Dial, Proxy};
pub use status::{Reports, Shown, Status};

use crate::attest::Stream;
use schedule::Schedule;

/// The longest pause between two attempts to connect, and after a verifier that does not want to hear of us.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);
const UNWANTED_PAUSE: Duration = Duration::from_secs(300);

/// Evidence as it is sent.
#[derive(Debug)]
pub struct Evidence {
    /// The stream.
    pub stream: Stream,
    /// How far it goes: what [`Attest::changed`] counts by.
    pub position: u64,
}

/// Where evidence comes from.
pub trait Attest: Send + Sync + 'static {
    /// Whether it is remembered what evidence with this statement (its SHA-256) held.
    fn knows(&self, statement: &Sha256) -> bool;

    /// Evidence for a challenge, without what the verifier has; or why there is none.
    fn evidence(
        &self,
        nonce: Nonce,
        binding: Vec<u8>,
        have: Have,
    ) -> impl Future<Output = Result<Evidence, String>> + Send;

    /// Returns when there is something to report beyond this position.
    fn changed(&self, position: u64) -> impl Future<Output = ()> + Send;
}

/// A connection that was made.
#[derive(Debug)]
pub struct Connected<S> {
    /// It.
    pub stream: S,
    /// Its exporter value.
    pub binding: Vec<u8>,
}

/// How a verifier is reached.
pub trait Connect: Send + Sync + 'static {
    /// A connection.
    type Stream: AsyncRead + AsyncWrite + Unpin + Send;

    /// Connects.
    fn connect(&self) -> impl Future<Output = Result<Connected<Self::Stream>, ReportError>> + Send;

    /// By which certificate it would connect now: a number that changes with it.
    fn certificate(&self) -> u64;
}

/// Why a connection failed or ended.
#[derive(Debug, thiserror::Error)]
pub enum ReportError {
    /// It could not be made.
    #[error("{0}")]
    Connect(String),
    /// The verifier takes no reports.
    #[error("the verifier takes no reports; it asks by itself")]
    NotWanted,
    /// The verifier closed it.
    #[error("the verifier closed the connection")]
    Closed,
    /// Reading or writing failed.
    #[error("the connection failed: {0}")]
    Io(#[from] io::Error),
    /// No answer.
    #[error("the verifier did not answer in time")]
    Silent,
    /// What came is no frame.
    #[error(transparent)]
    Malformed(#[from] Malformed),
    /// A frame that does not belong here.
    #[error("the verifier breaks the protocol: {0}")]
    Protocol(&'static str),
    /// The verifier says no.
    #[error("the verifier refuses ({code}): {error}")]
    Refused {
        /// The stable word.
        code: String,
        /// In words.
        error: String,
    },
    /// The certificate was renewed, or the last nonce is too old: a new connection has another.
    #[error("it is time for a new connection: {0}")]
    Renew(&'static str),
}

impl ReportError {
    /// How long to wait before the next attempt, at most: `failures` came before without a report between.
    fn pause(&self, failures: u32, spread: Duration) -> Duration {
        match self {
            Self::NotWanted => UNWANTED_PAUSE,
            Self::Refused { code, .. } if code == "host-withdrawn" || code == "certificate-refused" => UNWANTED_PAUSE,
            Self::Renew(_) => spread,
            _ => spread.saturating_mul(1 << failures.min(16)).min(LONGEST_PAUSE),
        }
    }
}

/// Reports to one verifier.
pub struct Reporter<A, C> {
    /// The verifier's name with us, for messages.
    pub verifier: String,
    /// The host.
    pub host: HostId,
    /// Where evidence comes from.
    pub attest: Arc<A>,
    /// How the verifier is reached.
    pub connect: C,
    /// Whether a change on the host is reported at once, if the verifier wants that.
    pub changes: bool,
    /// What is shown to people.
    pub status: Arc<Status>,
    /// The host's clock.
    pub now: fn() -> TimeMs,
}

impl<A: Attest, C: Connect> Reporter<A, C> {
    /// Reports until the process ends.
    pub async fn run(self) {
        let mut schedule = Schedule::new(self.changes);
        let mut failures = 0;
        loop {
            let taken = schedule.taken();
            // In a box: while it waits to connect again there is no session.
            let ended = Box::pin(self.connected(&mut schedule)).await;
            self.status.lost(&ended);
            if schedule.taken() != taken {
                failures = 0;
            }
            let pause = ended.pause(failures, schedule.spread());
            failures = failures.saturating_add(1);
            match &ended {
                ReportError::Renew(why) => debug!(verifier = %self.verifier, "connecting anew: {why}"),
                ReportError::NotWanted => info!(verifier = %self.verifier, "{ended}"),
                _ => warn!(verifier = %self.verifier, "not connected for reports; trying again: {ended}"),
            }
            sleep(pause.mul_f64(rand::random())).await;
        }
    }

    /// One connection.
    async fn connected(&self, schedule: &mut Schedule) -> ReportError {
        let certificate = self.connect.certificate();
        let connected = match self.connect.connect().await {
            Ok(connected) => connected,
            Err(e) => return e,
        };
        schedule.connected(Instant::now());
        match session::Session::new(self, schedule, connected, certificate).run().await {
            Err(e) => e,
            Ok(never) => match never {},
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests;
