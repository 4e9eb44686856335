//! What waits to be written to one client, and to which clients events go.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use tokio::sync::{Notify, watch};

use crate::qmp::Tap;

/// Events that may wait for one client, and their bytes.
const MAX_EVENTS: usize = 4096;
const MAX_EVENT_BYTES: usize = 4 * 1024 * 1024;

/// With this many bytes of answers waiting, a client's next command waits. One answer more may be waiting, as long as
/// a line of QEMU may be.
const MAX_ANSWER_BYTES: usize = 256 * 1024;

/// A client's queue. Answers wait for room in it, which holds up only the client's own commands; an event for which
/// there is no room ends the client: leaving it out would mislead the client, and waiting would hold up all others.
#[derive(Debug, Default)]
pub(super) struct Outbound {
    queue: Mutex<Queue>,
    pushed: Notify,
    taken: Notify,
    /// Events are for clients that have negotiated.
    negotiated: AtomicBool,
}

#[derive(Debug, Default)]
struct Queue {
    lines: VecDeque<Line>,
    events: usize,
    event_bytes: usize,
    answer_bytes: usize,
    state: State,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum State {
    #[default]
    Open,
    /// Nothing more comes; what waits is still written.
    Finished,
    /// The client reads too slowly.
    Overflown,
    /// Nobody is there to write it any more.
    Gone,
}

#[derive(Debug)]
enum Line {
    Event(Arc<[u8]>),
    Answer(Vec<u8>),
}

/// Why no line comes any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum End {
    /// Everything is written.
    Finished,
    /// More events waited than may wait.
    Overflown,
}

impl Outbound {
    /// Adds an answer, once there is room for it.
    pub(super) async fn answer(&self, line: Vec<u8>) {
        loop {
            // Registered before looking, so that no taking in between is missed.
            let mut taken = std::pin::pin!(self.taken.notified());
            taken.as_mut().enable();
            {
                let mut queue = self.lock();
                if queue.state != State::Open {
                    return;
                }
                if queue.answer_bytes < MAX_ANSWER_BYTES {
                    queue.answer_bytes += line.len();
                    queue.lines.push_back(Line::Answer(line));
                    break;
                }
            }
            taken.await;
        }
        self.pushed.notify_one();
    }

    fn event(&self, line: &Arc<[u8]>) {
        if !self.negotiated.load(Ordering::SeqCst) {
            return;
        }
        let mut queue = self.lock();
        if queue.state != State::Open {
            return;
        }
        if queue.events >= MAX_EVENTS || queue.event_bytes + line.len() > MAX_EVENT_BYTES {
            queue.end(State::Overflown);
        } else {
            queue.events += 1;
            queue.event_bytes += line.len();
            queue.lines.push_back(Line::Event(Arc::clone(line)));
        }
        drop(queue);
        self.pushed.notify_one();
        self.taken.notify_waiters();
    }

    /// The next line to write. Safe to cancel. There is one taker.
    pub(super) async fn next(&self) -> Result<impl AsRef<[u8]> + use<>, End> {
        loop {
            let pushed = self.pushed.notified();
            {
                let mut queue = self.lock();
                if let Some(line) = queue.take() {
                    drop(queue);
                    self.taken.notify_waiters();
                    return Ok(line);
                }
                match queue.state {
                    State::Open => {}
                    State::Finished | State::Gone => return Err(End::Finished),
                    State::Overflown => return Err(End::Overflown),
                }
            }
            pushed.await;
        }
    }

    /// Waits until more events waited than may wait. Safe to cancel.
    pub(super) async fn overflown(&self) {
        loop {
            let mut changed = std::pin::pin!(self.taken.notified());
            changed.as_mut().enable();
            if self.lock().state == State::Overflown {
                return;
            }
            changed.await;
        }
    }

    /// Says that the client has negotiated.
    pub(super) fn negotiated(&self) {
        self.negotiated.store(true, Ordering::SeqCst);
    }

    /// Says that nothing more comes.
    pub(super) fn finish(&self) {
        self.end(State::Finished);
    }

    /// Says that nothing is written any more.
    pub(super) fn gone(&self) {
        self.end(State::Gone);
    }

    /// Whether lines are still taken in.
    pub(super) fn is_open(&self) -> bool {
        self.lock().state == State::Open
    }

    fn end(&self, state: State) {
        self.lock().end(state);
        self.pushed.notify_one();
        self.taken.notify_waiters();
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        // Nothing in here can panic between two changes that belong together.
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Queue {
    fn take(&mut self) -> Option<Line> {
        let line = self.lines.pop_front()?;
        match &line {
            Line::Event(line) => {
                self.events -= 1;
                self.event_bytes -= line.len();
            }
            Line::Answer(line) => self.answer_bytes -= line.len(),
        }
        Some(line)
    }

    /// The first end counts, but for one: that nobody is there.
    fn end(&mut self, state: State) {
        if self.state == State::Open || state == State::Gone {
            self.state = state;
        }
        if matches!(self.state, State::Overflown | State::Gone) {
            self.lines.clear();
            (self.events, self.event_bytes, self.answer_bytes) = (0, 0, 0);
        }
    }
}

impl AsRef<[u8]> for Line {
    fn as_ref(&self) -> &[u8] {
        match self {
            Self::Event(line) => line,
            Self::Answer(line) => line,
        }
    }
}

/// The clients of one monitor, who all get its events.
#[derive(Debug)]
pub(super) struct Fanout {
    clients: Mutex<BTreeMap<u64, Arc<Outbound>>>,
    ended: watch::Sender<bool>,
    /// What clients see of QEMU's end.
    ending: Mutex<Ending>,
}

/// What clients see of QEMU's end. Where it stands still at power-off only to be asked what changed, they see what they would
/// see of any QEMU: one SHUTDOWN, and the connection's end.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum Ending {
    /// All that QEMU says.
    #[default]
    Open,
    /// The same, until QEMU tells of a shutdown.
    Held,
    /// It is stopped for its end, of which QEMU has not told.
    Begun,
    /// QEMU has told of it.
    Told,
}

impl Ending {
    /// Whether clients see an event. Changes as it is seen.
    fn shows(&mut self, line: &[u8]) -> bool {
        #[derive(serde::Deserialize)]
        struct Name {
            event: String,
        }
        if *self == Self::Open {
            return true;
        }
        let name = serde_json::from_slice::<Name>(line).map(|name| name.event).unwrap_or_default();
        match (name.as_str(), *self) {
            ("SHUTDOWN", Self::Told) => false,
            ("SHUTDOWN", _) => {
                *self = Self::Told;
                true
            }
            ("STOP" | "BLOCK_EXPORT_DELETED", Self::Begun | Self::Told) => false,
            _ => true,
        }
    }
}

impl Default for Fanout {
    fn default() -> Self {
        Self { clients: Mutex::default(), ended: watch::Sender::new(false), ending: Mutex::default() }
    }
}

impl Fanout {
    /// Takes a client in, unless there are `most` already.
    pub(super) fn enter(&self, number: u64, most: usize) -> Option<Arc<Outbound>> {
        let mut clients = self.lock();
        if clients.len() >= most {
            return None;
        }
        let outbound = Arc::new(Outbound::default());
        clients.insert(number, Arc::clone(&outbound));
        Some(outbound)
    }

    /// Takes a client out.
    pub(super) fn leave(&self, number: u64) {
        let left = self.lock().remove(&number);
        if let Some(outbound) = left {
            outbound.gone();
        }
    }

    /// How many clients there are.
    pub(super) fn len(&self) -> usize {
        self.lock().len()
    }

    /// Waits until QEMU has said its last.
    pub(super) async fn ended(&self) {
        // The sender lives as long as `self`.
        let _ = self.ended.subscribe().wait_for(|ended| *ended).await;
    }

    /// Says whether QEMU stands still at power-off only to be asked something.
    pub(super) fn hold_end(&self, holds: bool) {
        let mut ending = self.ending();
        if matches!(*ending, Ending::Open | Ending::Held) {
            *ending = if holds { Ending::Held } else { Ending::Open };
        }
    }

    /// Says that the VM is stopped because QEMU is about to end.
    pub(super) fn end_begins(&self) {
        let mut ending = self.ending();
        if *ending != Ending::Told {
            *ending = Ending::Begun;
        }
    }

    fn ending(&self) -> MutexGuard<'_, Ending> {
        self.ending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<u64, Arc<Outbound>>> {
        // As above.
        self.clients.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Tap for Fanout {
    fn event(&self, line: &[u8]) {
        if !self.ending().shows(line) {
            return;
        }
        let clients = self.lock();
        if clients.is_empty() {
            return;
        }
        let line: Arc<[u8]> = [line, b"\r\n"].concat().into();
        clients.values().for_each(|client| client.event(&line));
    }

    fn closed(&self) {
        self.ended.send_replace(true);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;

    #[test]
    fn an_end_looks_as_it_does_without_a_question() {
        let seen = |ending: &mut Ending, names: &[&str]| {
            let line = |name: &&str| format!("{{\"timestamp\": {{}}, \"event\": \"{name}\"}}");
            names.iter().filter(|name| ending.shows(line(name).as_bytes())).map(|n| (*n).to_owned()).collect::<Vec<_>>()
        };
        let all = ["STOP", "RESUME", "SHUTDOWN", "STOP", "BLOCK_EXPORT_DELETED", "SHUTDOWN", "RESET"];
        assert_eq!(seen(&mut Ending::Open, &all), all);
        assert_eq!(seen(&mut Ending::Held, &all), ["STOP", "RESUME", "SHUTDOWN", "RESET"]);
        assert_eq!(seen(&mut Ending::Begun, &all), ["RESUME", "SHUTDOWN", "RESET"]);
        assert!(Ending::Held.shows(b"no event at all"));
    }

    #[tokio::test]
    async fn who_does_not_read_is_ended_and_nobody_else() {
        let fanout = Fanout::default();
        let [slow, fast, new] = [1, 2, 3].map(|n| fanout.enter(n, 3).unwrap());
        assert!(fanout.enter(4, 3).is_none());
        slow.negotiated();
        fast.negotiated();
        for n in 0..=MAX_EVENTS {
            fanout.event(format!("{n}").as_bytes());
            assert_eq!(fast.next().await.unwrap().as_ref(), format!("{n}\r\n").as_bytes());
        }
        assert_eq!(slow.next().await.err(), Some(End::Overflown));
        assert!(!slow.is_open() && fast.is_open() && new.is_open());
        slow.answer(b"nobody waits for this".to_vec()).await;
        fanout.leave(1);
        assert_eq!(fanout.len(), 2);
        // Events are for those who have negotiated.
        new.finish();
        assert_eq!(new.next().await.err(), Some(End::Finished));
    }

    #[tokio::test]
    async fn bytes_of_events_are_bounded_too() {
        let fanout = Fanout::default();
        let client = fanout.enter(1, 1).unwrap();
        client.negotiated();
        let long = vec![b'x'; MAX_EVENT_BYTES / 4];
        (0..4).for_each(|_| fanout.event(&long));
        assert_eq!(client.next().await.err(), Some(End::Overflown));
    }

    #[tokio::test]
    async fn answers_wait_for_room() {
        let client = Outbound::default();
        client.answer(vec![1; MAX_ANSWER_BYTES]).await;
        let mut second = std::pin::pin!(client.answer(vec![2]));
        assert!(futures_poll(second.as_mut()).is_pending());
        assert_eq!(client.next().await.unwrap().as_ref().len(), MAX_ANSWER_BYTES);
        second.await;
        client.finish();
        assert_eq!(client.next().await.unwrap().as_ref(), [2]);
        assert_eq!(client.next().await.err(), Some(End::Finished));
    }

    fn futures_poll<F: Future>(future: std::pin::Pin<&mut F>) -> std::task::Poll<F::Output> {
        future.poll(&mut std::task::Context::from_waker(std::task::Waker::noop()))
    }
}
