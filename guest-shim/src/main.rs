//! The guest's program: streams the kernel's IMA list to the host over vsock.
//!
//! It opens the list and keeps it open, gives up every privilege, connects to the host, and then goes on for ever:
//! say who we are, hear what the host has, prove that this is our own past, send what is new, again and again
//! (`onequote_evidence::guest_frame` has the protocol). A lost connection is made again; a list that cannot be opened
//! yet is tried again. It holds no secret, listens on nothing, and needs no configuration but
//! `onequote.port=` on the kernel's command line. What it does it says on the kernel log.

mod kernel;
mod list;
mod say;
mod session;

use std::time::Duration;

use say::Log;
use session::{Identity, SessionError};

/// Waits between attempts grow from the first to the second.
const BACK_OFF: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(2));

/// After the host was told another past than it has, it takes nothing more: no need to hurry.
const AFTER_REWIND: Duration = Duration::from_secs(30);

fn main() {
    let mut log = Log::open();
    let mut wait = BackOff::new();
    let mut opened = loop {
        match kernel::open() {
            Ok(opened) => break opened,
            Err(error) => log.say(&format!("cannot read the IMA list: {error}")),
        }
        std::thread::sleep(wait.next());
    };
    let identity = Identity { boot_id: opened.boot_id, hash_size: opened.list.hash_size() };
    match kernel::drop_privileges() {
        Ok(()) => {}
        Err(error) => log.say(&format!("kept privileges it doesn't need: {error}")),
    }
    log.say(&format!("version {}, host port {}", env!("CARGO_PKG_VERSION"), opened.port));

    wait = BackOff::new();
    loop {
        let mut reached = false;
        let error = match kernel::connect(opened.port) {
            Ok(mut stream) => {
                let outcome = session::run(&mut stream, &mut opened.list, &mut opened.count, identity, |resumed| {
                    reached = true;
                    log.say(&format!("connected; the host has {resumed} entries"));
                });
                match outcome {
                    Ok(never) => match never {},
                    Err(error) => error,
                }
            }
            Err(error) => SessionError::Connection(error),
        };
        log.say(&error.to_string());
        if reached {
            wait = BackOff::new();
        }
        let rewound = matches!(error, SessionError::OtherPast { .. });
        std::thread::sleep(if rewound { AFTER_REWIND } else { wait.next() });
    }
}

/// Growing waits.
struct BackOff(Duration);

impl BackOff {
    fn new() -> Self {
        Self(BACK_OFF.0)
    }

    fn next(&mut self) -> Duration {
        let now = self.0;
        self.0 = (now * 2).min(BACK_OFF.1);
        now
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;

    #[test]
    fn waits_grow_to_a_limit() {
        let mut wait = BackOff::new();
        assert_eq!(wait.next(), BACK_OFF.0);
        assert_eq!(wait.next(), BACK_OFF.0 * 2);
        for _ in 0..20 {
            wait.next();
        }
        assert_eq!(wait.next(), BACK_OFF.1);
    }
}
