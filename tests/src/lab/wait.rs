//! Waiting for conditions, with a deadline and without fixed sleeps.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};

/// How often a condition is looked at. Short: the wait must not show in measured times.
const STEP: Duration = Duration::from_millis(5);

/// Polls `condition` until it gives a value.
///
/// # Errors
/// What the condition's own error was, or, after `limit`, that `what` did not come.
pub fn until<T>(what: &str, limit: Duration, mut condition: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let start = Instant::now();
    loop {
        if let Some(value) = condition()? {
            return Ok(value);
        }
        if start.elapsed() >= limit {
            bail!("waited {} s in vain for {what}", limit.as_secs_f32());
        }
        std::thread::sleep(STEP);
    }
}

/// Polls `condition` until it holds.
///
/// # Errors
/// As [`until`].
pub fn for_true(what: &str, limit: Duration, mut condition: impl FnMut() -> Result<bool>) -> Result<()> {
    until(what, limit, || Ok(condition()?.then_some(())))
}
