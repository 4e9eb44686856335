//! What the shim says, on the kernel log (or standard error where that can't be opened), not too often.

use std::fs::File;
use std::io::Write as _;
use std::time::{Duration, Instant};

const PREFIX: &str = "onequote-shim: ";

/// This many lines at once, then one every [`REFILL`].
const BURST: u32 = 8;
const REFILL: Duration = Duration::from_secs(10);

/// Where lines go.
pub(crate) struct Log {
    kernel: Option<File>,
    limit: Limit,
}

impl Log {
    /// The kernel log.
    pub(crate) fn open() -> Self {
        let kernel = File::options().write(true).open("/dev/kmsg").ok();
        Self { kernel, limit: Limit::new(Instant::now()) }
    }

    /// Says one line, unless there were too many; how many were left out is said with the next.
    pub(crate) fn say(&mut self, line: &str) {
        let Some(left_out) = self.limit.ask(Instant::now()) else { return };
        let note = match left_out {
            0 => String::new(),
            count => format!(" ({count} lines left out)"),
        };
        let text = format!("<6>{PREFIX}{line}{note}\n");
        // Nowhere is left to complain about a failure.
        let _ = match &mut self.kernel {
            // One write is one record of the kernel log.
            Some(file) => file.write_all(text.as_bytes()),
            None => std::io::stderr().write_all(&text.as_bytes()[3..]),
        };
    }
}

/// A bucket of lines.
struct Limit {
    tokens: u32,
    filled: Instant,
    left_out: u32,
}

impl Limit {
    fn new(now: Instant) -> Self {
        Self { tokens: BURST, filled: now, left_out: 0 }
    }

    /// Some with the count of lines left out before, if a line may be said now.
    fn ask(&mut self, now: Instant) -> Option<u32> {
        while self.tokens < BURST && now.duration_since(self.filled) >= REFILL {
            self.tokens += 1;
            self.filled += REFILL;
        }
        if self.tokens == BURST {
            self.filled = now;
        }
        if self.tokens == 0 {
            self.left_out = self.left_out.saturating_add(1);
            return None;
        }
        self.tokens -= 1;
        Some(std::mem::take(&mut self.left_out))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;

    #[test]
    fn lines_beyond_the_burst_are_counted_and_told() {
        let start = Instant::now();
        let mut limit = Limit::new(start);
        for _ in 0..BURST {
            assert_eq!(limit.ask(start), Some(0));
        }
        assert_eq!(limit.ask(start), None);
        assert_eq!(limit.ask(start + REFILL / 2), None);
        assert_eq!(limit.ask(start + REFILL), Some(2));
        assert_eq!(limit.ask(start + REFILL), None);
        assert_eq!(limit.ask(start + REFILL * 100), Some(1));
    }
}
