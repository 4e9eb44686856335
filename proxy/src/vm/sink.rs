//! Where events go, and what time it is.

use std::{pin::Pin, sync::Arc, time::SystemTime};

use onequote_evidence::{event::Event, id::TimeMs};

/// The measurement log as the life cycle of VMs sees it.
pub trait EventSink: Send + Sync {
    /// Puts these events in one record. Done when the record is on disk and in the TPM.
    fn append(&self, events: Vec<Event>) -> Appended<'_>;
}

/// What [`EventSink::append`] gives.
pub type Appended<'a> = Pin<Box<dyn Future<Output = Result<(), SinkError>> + Send + 'a>>;

/// Why events could not be logged, for people.
#[derive(Debug, Clone, thiserror::Error)]
#[error("the measurement log does not take it: {0}")]
pub struct SinkError(pub String);

/// Tells the time.
pub type Clock = Arc<dyn Fn() -> TimeMs + Send + Sync>;

/// The host's clock.
#[must_use]
pub fn system_clock() -> Clock {
    Arc::new(|| {
        let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        TimeMs(u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
    })
}
