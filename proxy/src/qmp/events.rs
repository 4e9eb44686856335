//! The events of a monitor, in order, with a bound on how many wait.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use serde_json::Value;
use tokio::sync::Notify;

use super::QmpError;

/// One event of a monitor.
#[derive(Debug, Clone)]
pub enum Event {
    /// One that `qapi` knows.
    Known(Box<qapi::qmp::Event>),
    /// Any other.
    Other {
        /// Its name.
        name: String,
        /// Its data; null when it has none.
        data: Value,
    },
    /// So many events were dropped here because too many waited.
    Missed(u64),
}

/// The receiving end of a connection's events.
#[derive(Debug)]
pub struct Events(pub(super) Arc<Queue>);

impl Events {
    /// The next event; the reason when the connection has ended and all events before that were taken. Safe to cancel.
    ///
    /// # Errors
    /// Why the connection ended.
    pub async fn next(&mut self) -> Result<Event, QmpError> {
        loop {
            // Registered before looking, so that a push in between is not missed: there is one receiver.
            let queue = Arc::clone(&self.0);
            let pushed = queue.pushed.notified();
            if let Some(event) = self.waiting() {
                return Ok(event);
            }
            if let Some(why) = &self.0.lock().closed {
                return Err(why.clone());
            }
            pushed.await;
        }
    }

    /// An event that has come already.
    pub fn waiting(&mut self) -> Option<Event> {
        let mut inner = self.0.lock();
        let missed = |inner: &mut Inner| match std::mem::take(&mut inner.missed) {
            0 => None,
            n => Some(Event::Missed(n)),
        };
        inner.waiting.pop_front().or_else(|| missed(&mut inner))
    }
}

/// A bounded queue of events.
#[derive(Debug)]
pub(super) struct Queue {
    inner: Mutex<Inner>,
    pushed: Notify,
    limit: usize,
}

#[derive(Debug, Default)]
struct Inner {
    waiting: VecDeque<Event>,
    missed: u64,
    closed: Option<QmpError>,
}

impl Queue {
    pub(super) fn new(limit: usize) -> Arc<Self> {
        Arc::new(Self { inner: Mutex::default(), pushed: Notify::new(), limit })
    }

    pub(super) fn push(&self, event: Event) {
        let mut inner = self.lock();
        if inner.waiting.len() >= self.limit {
            inner.missed += 1;
        } else {
            if inner.missed > 0 {
                let missed = std::mem::take(&mut inner.missed);
                inner.waiting.push_back(Event::Missed(missed));
            }
            inner.waiting.push_back(event);
        }
        drop(inner);
        self.pushed.notify_one();
    }

    pub(super) fn close(&self, why: QmpError) {
        self.lock().closed.get_or_insert(why);
        self.pushed.notify_one();
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Nothing in here can panic between two changes that belong together.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
