//! Which hosts hold a connection to this verifier, and the way to ask over it.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use onequote_evidence::id::{HostId, TimeMs};
use tokio::sync::{Notify, oneshot};

use crate::result::Verdict;

/// Connections of one host: the one that counts, and one that is ending.
const OF_ONE_HOST: usize = 2;

/// Who may wait for one host's next report at a time.
const WAITING: usize = 64;

/// Why there is no verdict by a held connection.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NotReported {
    /// The host holds none here.
    #[error("the host holds no connection")]
    NoConnection,
    /// It ended meanwhile.
    #[error("the host's connection ended")]
    Ended,
    /// Too many wait for the same.
    #[error("too many wait for this host's report")]
    Busy,
    /// The host says that it cannot.
    #[error("the host cannot report: {0}")]
    Unable(String),
}

/// Who waits for a report.
pub(super) type Waiter = oneshot::Sender<Result<Verdict, NotReported>>;

/// All held connections.
#[derive(Debug, Default)]
pub struct Held {
    hosts: Mutex<HashMap<HostId, Vec<Arc<Line>>>>,
}

/// One held connection, as those see it who want something of it.
#[derive(Debug)]
pub(super) struct Line {
    /// Something is wanted: `waiting` or `ended` changed.
    pub(super) wake: Notify,
    waiting: Mutex<Vec<Waiter>>,
    ended: AtomicBool,
    contact: AtomicU64,
}

impl Line {
    /// Whether a newer connection took its place.
    pub(super) fn is_replaced(&self) -> bool {
        self.ended.load(Ordering::Relaxed)
    }

    /// Those who wait, to be answered by the next report.
    pub(super) fn take_waiting(&self) -> Vec<Waiter> {
        std::mem::take(&mut *lock(&self.waiting))
    }

    /// A frame of the host came.
    pub(super) fn touch(&self, now: TimeMs) {
        self.contact.store(now.0, Ordering::Relaxed);
    }

    fn end(&self) {
        self.ended.store(true, Ordering::Relaxed);
        self.wake.notify_one();
    }
}

/// A connection's place. Gives itself back.
#[derive(Debug)]
pub(super) struct Place {
    held: Arc<Held>,
    host: HostId,
    pub(super) line: Arc<Line>,
}

impl Drop for Place {
    fn drop(&mut self) {
        // Who still waits is told by its own end of the channel.
        drop(self.line.take_waiting());
        let mut hosts = lock(&self.held.hosts);
        if let Some(lines) = hosts.get_mut(&self.host) {
            lines.retain(|line| !Arc::ptr_eq(line, &self.line));
            if lines.is_empty() {
                hosts.remove(&self.host);
            }
        }
    }
}

impl Held {
    /// Puts a new connection in the place of the host's earlier one, which ends. None when that did not end yet of the
    /// one before.
    pub(super) fn hold(self: &Arc<Self>, host: &HostId, now: TimeMs) -> Option<Place> {
        let mut hosts = lock(&self.hosts);
        let lines = hosts.entry(host.clone()).or_default();
        lines.iter().for_each(|line| line.end());
        if lines.len() >= OF_ONE_HOST {
            return None;
        }
        let line = Arc::new(Line {
            wake: Notify::new(),
            waiting: Mutex::default(),
            ended: AtomicBool::new(false),
            contact: AtomicU64::new(now.0),
        });
        lines.push(Arc::clone(&line));
        Some(Place { held: Arc::clone(self), host: host.clone(), line })
    }

    /// Asks a host over the connection that it holds.
    ///
    /// # Errors
    /// [`NotReported`].
    pub async fn ask(&self, host: &HostId) -> Result<Verdict, NotReported> {
        let (answer, verdict) = oneshot::channel();
        {
            let hosts = lock(&self.hosts);
            let line = hosts.get(host).and_then(|lines| lines.iter().find(|line| !line.is_replaced()));
            let line = line.ok_or(NotReported::NoConnection)?;
            let mut waiting = lock(&line.waiting);
            waiting.retain(|waiter| !waiter.is_closed());
            if waiting.len() >= WAITING {
                return Err(NotReported::Busy);
            }
            waiting.push(answer);
            line.wake.notify_one();
        }
        verdict.await.map_err(|_| NotReported::Ended)?
    }

    /// When a host that holds a connection was heard last; none when it holds none.
    #[must_use]
    pub fn contact(&self, host: &HostId) -> Option<TimeMs> {
        let hosts = lock(&self.hosts);
        let times = hosts.get(host)?.iter().map(|line| line.contact.load(Ordering::Relaxed));
        times.max().map(TimeMs)
    }

    /// Hosts that hold a connection.
    #[must_use]
    pub fn count(&self) -> usize {
        lock(&self.hosts).len()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing in here can panic between two changes that belong together.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_newer_connection_takes_the_place() {
        let held = Arc::new(Held::default());
        let host: HostId = "h1".parse().unwrap();
        assert_eq!(held.ask(&host).await, Err(NotReported::NoConnection));
        let first = held.hold(&host, TimeMs(1)).unwrap();
        let second = held.hold(&host, TimeMs(2)).unwrap();
        assert!(first.line.is_replaced() && !second.line.is_replaced());
        // The first has not gone yet.
        assert!(held.hold(&host, TimeMs(3)).is_none());
        assert!(second.line.is_replaced());
        assert_eq!((held.count(), held.contact(&host)), (1, Some(TimeMs(2))));
        drop((first, second));
        assert_eq!((held.count(), held.contact(&host)), (0, None));
        let third = held.hold(&host, TimeMs(4)).unwrap();
        third.line.touch(TimeMs(9));
        assert_eq!(held.contact(&host), Some(TimeMs(9)));
    }

    #[tokio::test]
    async fn who_asks_is_answered_or_told_that_the_connection_ended() {
        let held = Arc::new(Held::default());
        let host: HostId = "h1".parse().unwrap();
        let place = held.hold(&host, TimeMs(1)).unwrap();
        let asked = || {
            let (held, host) = (Arc::clone(&held), host.clone());
            tokio::spawn(async move { held.ask(&host).await })
        };
        let first = asked();
        place.line.wake.notified().await;
        for waiter in place.line.take_waiting() {
            waiter.send(Err(NotReported::Unable("x".to_owned()))).unwrap();
        }
        assert_eq!(first.await.unwrap(), Err(NotReported::Unable("x".to_owned())));
        let second = asked();
        place.line.wake.notified().await;
        drop(place);
        assert_eq!(second.await.unwrap(), Err(NotReported::Ended));
    }
}
