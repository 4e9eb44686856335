//! A session against a host played by the test, over a Unix socket pair.

use std::os::unix::net::UnixStream;
use std::thread;

use onequote_evidence::ima::Aggregate;

use super::*;
use crate::list::tests::{Source, aggregate, entry};

const BOOT: BootId = BootId([7; 16]);

struct Fixed(Vec<u64>);

impl Count for Fixed {
    /// The given lengths in turn, the last one for ever.
    fn count(&mut self) -> io::Result<u64> {
        Ok(if self.0.len() > 1 { self.0.remove(0) } else { self.0[0] })
    }
}

struct Host(UnixStream);

impl Host {
    fn say(&mut self, frame: &HostFrame) {
        self.0.write_all(&to_wire(frame)).unwrap();
    }

    fn hear(&mut self) -> GuestFrame {
        let mut prefix = [0; 4];
        self.0.read_exact(&mut prefix).unwrap();
        let mut body = vec![0; body_len(prefix).unwrap()];
        self.0.read_exact(&mut body).unwrap();
        GuestFrame::parse(&body).unwrap()
    }

    fn have(&mut self, aggregate: &Aggregate) {
        self.say(&HostFrame::Have { count: aggregate.count, aggregate: aggregate.value });
    }
}

/// Runs a session over a list with the first `entries` entries, with `host` at the other end, to its end.
fn session(entries: u32, host: impl FnOnce(Host) + Send + 'static) -> SessionError {
    let source = Source::default();
    source.add(0..entries);
    let (mut guest, other) = UnixStream::pair().unwrap();
    let played = thread::spawn(move || host(Host(other)));
    let mut list = List::new(source, 20);
    let identity = Identity { boot_id: BOOT, hash_size: 20 };
    let outcome = run(&mut guest, &mut list, &mut Fixed(vec![u64::from(entries)]), identity, |_| ());
    // The host may wait for the end.
    drop(guest);
    played.join().unwrap();
    match outcome {
        Ok(never) => match never {},
        Err(error) => error,
    }
}

fn entries(range: std::ops::Range<u32>) -> GuestFrame {
    let bytes = range.clone().flat_map(entry).collect();
    GuestFrame::Entries { first: u64::from(range.start), entries: Blob(bytes) }
}

#[test]
fn a_new_host_gets_the_whole_list_and_collects() {
    let end = session(3, |mut host| {
        let hello = GuestFrame::Hello { version: VERSION, boot_id: BOOT, hash_size: 20, count: 3 };
        assert_eq!(host.hear(), hello);
        host.have(&Aggregate::EMPTY);
        let resume = GuestFrame::Resume { count: 0, aggregate: Aggregate::EMPTY.value };
        assert_eq!(host.hear(), resume);
        assert_eq!(host.hear(), entries(0..3));
        host.say(&HostFrame::Collect { id: 42 });
        assert_eq!(host.hear(), GuestFrame::Collected { id: 42, count: 3 });
    });
    assert!(matches!(end, SessionError::Connection(_)), "{end}");
}

#[test]
fn a_host_that_has_some_gets_the_rest() {
    let end = session(5, |mut host| {
        host.hear();
        host.have(&aggregate(3));
        let own = aggregate(3);
        assert_eq!(host.hear(), GuestFrame::Resume { count: 3, aggregate: own.value });
        assert_eq!(host.hear(), entries(3..5));
    });
    assert!(matches!(end, SessionError::Connection(_)), "{end}");
}

#[test]
fn a_host_with_another_past_is_told_ours_and_nothing_more() {
    let end = session(5, |mut host| {
        host.hear();
        host.say(&HostFrame::Have { count: 3, aggregate: aggregate(2).value });
        assert_eq!(host.hear(), GuestFrame::Resume { count: 3, aggregate: aggregate(3).value });
        assert_eq!(host.0.read(&mut [0; 1]).unwrap(), 0);
    });
    assert!(matches!(end, SessionError::OtherPast { host: 3, own: 3 }), "{end}");

    let end = session(2, |mut host| {
        host.hear();
        host.have(&aggregate(9));
        assert_eq!(host.hear(), GuestFrame::Resume { count: 2, aggregate: aggregate(2).value });
    });
    assert!(matches!(end, SessionError::OtherPast { host: 9, own: 2 }), "{end}");
}

#[test]
fn rubbish_from_the_host_ends_the_session() {
    for rubbish in [&[0, 0, 0, 0][..], &[255, 255, 255, 255], &[1, 0, 0, 0, 0xff], &[2, 1, 0, 0, 0]] {
        let end = session(1, move |mut host| {
            host.hear();
            host.0.write_all(rubbish).unwrap();
        });
        assert!(matches!(end, SessionError::Protocol(_)), "{rubbish:?}: {end}");
    }
    let end = session(1, |mut host| {
        host.hear();
        host.say(&HostFrame::Collect { id: 1 });
    });
    assert!(matches!(end, SessionError::Protocol(_)), "{end}");
}
