//! Where rooms put their events: one door to the measurement log.

use std::{future::Future, pin::Pin, sync::Arc};

use onequote_evidence::event::Event;

/// A future that may move between threads.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// Takes events into the measurement log.
pub trait EventSink: Send + Sync + 'static {
    /// Resolves when the record that carries the events is on disk and in the TPM.
    ///
    /// # Errors
    /// [`SinkError`] when it is not; the caller must then act as if the events had not been measured.
    fn append(&self, events: Vec<Event>) -> BoxFuture<'_, Result<(), SinkError>>;

    /// Resolves when the log takes events: at once in good times; after a failure, when log and TPM have been brought
    /// together again. What an append that failed has left in the log is then in the inventory, so a caller that
    /// computes its events from the inventory after this logs nothing twice.
    ///
    /// # Errors
    /// [`SinkError`] while it does not.
    fn ready(&self) -> BoxFuture<'_, Result<(), SinkError>>;
}

/// Events could not be logged and extended.
#[derive(Debug, Clone, thiserror::Error)]
#[error("the measurement log did not take the event: {0}")]
pub struct SinkError(pub Arc<dyn std::error::Error + Send + Sync>);
