//! The recorder's thread, its queue, and the handle that everybody else has.

use std::{
    collections::VecDeque,
    sync::Arc,
    thread::{self, JoinHandle},
    time::Instant,
};

use onequote_evidence::{
    cbor,
    digest::HashAlg,
    event::Event,
    id::Epoch,
    record::{MAX_CONTENT, MAX_EVENTS},
};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot, watch};

use super::{
    LogHead, LogPlace, LogRead, LogStore, PcrRole, QualifyingData, Quoted, RecordStream, RecorderConfig, RecorderError,
    TpmFactory,
    journal::{Journal, Position, State},
};
use crate::tpm::{Tpm, TpmError};

/// Requests that may wait.
const MAX_REQUESTS: usize = 4096;

/// Bytes of encoded events that may wait; whoever brings more waits until there is room.
const MAX_QUEUED_BYTES: usize = 16 * 1024 * 1024;

/// Bytes that the array around a record's events can need.
const ARRAY_HEAD: usize = 9;

/// Where an append's events are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Appended {
    /// The epoch.
    pub epoch: Epoch,
    /// The record that carries them, with those of others.
    pub recnum: u64,
}

/// The TPM behind the log.
#[derive(Debug, Clone)]
pub struct TpmInfo {
    /// The public area of the attestation key, `TPM2B_PUBLIC`.
    pub ak_public: Arc<[u8]>,
    /// Whether it says that it is a program.
    pub software: bool,
    /// Manufacturer and model, for people.
    pub model: Arc<str>,
    /// The active banks.
    pub banks: Arc<[HashAlg]>,
}

/// A part of a log: whole records, as they are on disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chunk {
    /// Number of the first record.
    pub first: u64,
    /// Number of the record after the last.
    pub next: u64,
    /// The records' bytes, one after the other.
    pub bytes: Vec<u8>,
}

/// The recorder's thread. It ends when every [`LogHandle`] is gone and what was asked for is done.
pub struct Recorder {
    thread: JoinHandle<()>,
}

impl Recorder {
    /// Recovers the log, records `proxy-start` and starts the thread. Blocks as long as the TPM takes for that.
    ///
    /// # Errors
    /// [`RecorderError`]; nothing is running then, and the next start goes on from whatever was reached.
    pub fn start(
        config: RecorderConfig,
        store: Box<dyn LogStore>,
        open_tpm: TpmFactory,
    ) -> Result<(Self, LogHandle), RecorderError> {
        let (worker, handle) = Worker::start(config, store, open_tpm)?;
        let thread = thread::Builder::new()
            .name("recorder".to_owned())
            .spawn(move || worker.run())
            .map_err(|error| super::StoreError::new("recorder", "start its thread", error))?;
        Ok((Self { thread }, handle))
    }

    /// The same without a thread: whoever polls the future does the work. For TPMs and logs in memory, which make
    /// nobody wait, such as those of simulated hosts. The future ends when every [`LogHandle`] is gone.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub fn start_in_memory(
        config: RecorderConfig,
        store: Box<dyn LogStore>,
        open_tpm: TpmFactory,
    ) -> Result<(impl Future<Output = ()> + Send + 'static, LogHandle), RecorderError> {
        let (worker, handle) = Worker::start(config, store, open_tpm)?;
        Ok((worker.run_in_memory(), handle))
    }

    /// Waits until the thread has ended: the TPM is closed then.
    pub fn join(self) {
        // A panic there was reported by the thread itself, and whoever waited for it got `Ended`.
        let _ = self.thread.join();
    }
}

/// The way to the recorder. Clones are the same recorder.
#[derive(Clone)]
pub struct LogHandle {
    requests: mpsc::Sender<Request>,
    room: Arc<Semaphore>,
    state: watch::Receiver<Option<State>>,
    reader: Arc<dyn LogRead>,
}

impl LogHandle {
    /// Records events, all in one record, and returns when it is on disk and in the register. They belong to the epoch in
    /// force when this is called.
    ///
    /// Waits while too much is queued. When the future is dropped, the events are recorded nevertheless, unless it
    /// was still waiting for room.
    ///
    /// # Errors
    /// See [`RecorderError`]. After [`RecorderError::Tpm`] the events may still turn up in the log; after
    /// [`RecorderError::NewEpoch`] they never will.
    pub async fn append(&self, role: PcrRole, events: Vec<Event>) -> Result<Appended, RecorderError> {
        if events.is_empty() {
            return Err(RecorderError::Empty);
        }
        let bytes = events.iter().map(|event| cbor::encode(event).len()).sum();
        if bytes + ARRAY_HEAD > MAX_CONTENT || events.len() > MAX_EVENTS {
            return Err(RecorderError::TooLarge { events: events.len(), bytes });
        }
        let epoch = self.look(|state| state.head.epoch)?;
        let permits = u32::try_from(bytes).unwrap_or(u32::MAX);
        let room = Arc::clone(&self.room).acquire_many_owned(permits).await.map_err(|_| RecorderError::Ended)?;
        let (reply, answer) = oneshot::channel();
        let append = Append { epoch, role, events, bytes, reply, _room: room };
        self.requests.send(Request::Append(append)).await.map_err(|_| RecorderError::Ended)?;
        let Position { epoch, recnum } = answer.await.map_err(|_| RecorderError::Ended)??;
        Ok(Appended { epoch, recnum })
    }

    /// Drops segments whose records are all before `place`: every verifier has accepted them.
    ///
    /// # Errors
    /// See [`RecorderError`].
    pub async fn drop_before(&self, place: LogPlace) -> Result<(), RecorderError> {
        // Most acknowledgements reach no further segment: the recorder need not be asked.
        if !self.look(|state| state.index.segments().iter().skip(1).any(|start| start.bytes <= place.bytes))? {
            return Ok(());
        }
        let (reply, answer) = oneshot::channel();
        self.requests.send(Request::Drop { place, reply }).await.map_err(|_| RecorderError::Ended)?;
        answer.await.map_err(|_| RecorderError::Ended)?
    }

    /// Where the segments that are there begin, oldest first.
    #[must_use]
    pub fn segments(&self) -> Vec<LogPlace> {
        self.look(|state| state.index.segments().to_vec()).unwrap_or_default()
    }

    /// Records all that was appended before, then quotes.
    ///
    /// `prepare` gets the log's head, whose registers the quote will show, and says what to sign with it. It runs on
    /// the recorder's thread: it must be quick and must not wait for the recorder. One call is one `TPM2_Quote`; more
    /// only when somebody else extends a register in between.
    ///
    /// # Errors
    /// See [`RecorderError`].
    pub async fn quote(
        &self,
        prepare: impl FnOnce(&LogHead) -> QualifyingData + Send + 'static,
    ) -> Result<Quoted, RecorderError> {
        let (reply, answer) = oneshot::channel();
        let request = Request::Quote { prepare: Box::new(prepare), reply };
        self.requests.send(request).await.map_err(|_| RecorderError::Ended)?;
        answer.await.map_err(|_| RecorderError::Ended)?
    }

    /// Returns when log and TPM agree: at once in good times, after a failure when the recorder has recovered. Events
    /// of an append that failed with [`RecorderError::Tpm`] are then in the inventory, or will never be in the log.
    ///
    /// # Errors
    /// While it cannot recover.
    pub async fn ready(&self) -> Result<(), RecorderError> {
        let (reply, answer) = oneshot::channel();
        self.requests.send(Request::Ready { reply }).await.map_err(|_| RecorderError::Ended)?;
        answer.await.map_err(|_| RecorderError::Ended)?
    }

    /// Has the TPM do something else, between two requests: everything that waits, waits for it too.
    ///
    /// # Errors
    /// [`RecorderError::Tpm`] with what the TPM says, and while log and TPM do not agree.
    pub async fn with_tpm<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut dyn Tpm) -> Result<T, TpmError> + Send + 'static,
    ) -> Result<T, RecorderError> {
        let (reply, answer) = oneshot::channel();
        let work = Box::new(move |journal: &mut Journal| {
            let _ = reply.send(journal.with_tpm(work));
        });
        self.requests.send(Request::Tpm { work }).await.map_err(|_| RecorderError::Ended)?;
        answer.await.map_err(|_| RecorderError::Ended)?
    }

    /// The log's head as of now.
    ///
    /// # Errors
    /// [`RecorderError::Ended`].
    pub fn head(&self) -> Result<LogHead, RecorderError> {
        self.look(|state| state.head.clone())
    }

    /// Waits until head or failure have changed since the last call on this clone, and gives the new head. When the
    /// epoch is another than before, everything that is still true must be logged again.
    ///
    /// # Errors
    /// [`RecorderError::Ended`].
    pub async fn changed(&mut self) -> Result<LogHead, RecorderError> {
        self.state.changed().await.map_err(|_| RecorderError::Ended)?;
        let state = self.state.borrow_and_update();
        state.as_ref().map(|state| state.head.clone()).ok_or(RecorderError::Ended)
    }

    /// The TPM.
    ///
    /// # Errors
    /// [`RecorderError::Ended`].
    pub fn tpm(&self) -> Result<TpmInfo, RecorderError> {
        self.look(|state| state.tpm.clone())
    }

    /// `TPM2_Quote` commands since the start.
    #[must_use]
    pub fn quotes(&self) -> u64 {
        self.look(|state| state.quotes).unwrap_or_default()
    }

    /// What made the last append or quote fail; none when it succeeded.
    pub fn failure(&self) -> Option<RecorderError> {
        self.look(|state| state.failure.clone()).unwrap_or_else(Some)
    }

    /// Reads records of the current epoch: from number `from` to before number `to`, as many as fit into `max_bytes`,
    /// but at least one if there is any.
    ///
    /// # Errors
    /// [`RecorderError::OtherEpoch`] when `epoch` is over, [`RecorderError::NoSuchRecords`], or the disk's failure.
    pub async fn records(&self, epoch: u64, from: u64, to: u64, max_bytes: usize) -> Result<Chunk, RecorderError> {
        let (current, first, len, (mut at, offset)) = self.look(|state| {
            let index = &state.index;
            (index.epoch.number, index.first().records, index.len(), index.mark(from))
        })?;
        if epoch != current {
            return Err(RecorderError::OtherEpoch { asked: epoch, current });
        }
        if from < first || from > to || to > len {
            return Err(RecorderError::NoSuchRecords { from, to, len });
        }
        let reader = Arc::clone(&self.reader);
        let read = move || {
            let mut stream = RecordStream::new(reader.as_ref(), epoch, at, offset);
            let mut chunk = Chunk { first: from, next: from, bytes: Vec::new() };
            while at < to {
                let Some(record) = stream.next_bytes() else {
                    return Err(RecorderError::NoSuchRecords { from, to, len: at });
                };
                let record = record?;
                if at >= from {
                    if !chunk.bytes.is_empty() && chunk.bytes.len() + record.len() > max_bytes {
                        break;
                    }
                    chunk.bytes.extend_from_slice(record);
                    chunk.next = at + 1;
                }
                at += 1;
            }
            Ok(chunk)
        };
        tokio::task::spawn_blocking(read).await.map_err(|_| RecorderError::Ended)?
    }

    fn look<T>(&self, look: impl FnOnce(&State) -> T) -> Result<T, RecorderError> {
        self.state.borrow().as_ref().map(look).ok_or(RecorderError::Ended)
    }
}

enum Request {
    Append(Append),
    Quote { prepare: Prepare, reply: oneshot::Sender<Result<Quoted, RecorderError>> },
    Ready { reply: oneshot::Sender<Result<(), RecorderError>> },
    Tpm { work: Box<dyn FnOnce(&mut Journal) + Send> },
    Drop { place: LogPlace, reply: oneshot::Sender<Result<(), RecorderError>> },
}

type Prepare = Box<dyn FnOnce(&LogHead) -> QualifyingData + Send>;

struct Append {
    epoch: Epoch,
    role: PcrRole,
    events: Vec<Event>,
    bytes: usize,
    reply: oneshot::Sender<Result<Position, RecorderError>>,
    /// Its share of the queue, given back when it was answered.
    _room: OwnedSemaphorePermit,
}

struct Worker {
    journal: Journal,
    queue: mpsc::Receiver<Request>,
    /// In the order in which they came.
    pending: VecDeque<Request>,
}

impl Worker {
    fn start(
        config: RecorderConfig,
        store: Box<dyn LogStore>,
        open_tpm: TpmFactory,
    ) -> Result<(Self, LogHandle), RecorderError> {
        let journal = Journal::start(config, store, open_tpm)?;
        let (requests, queue) = mpsc::channel(MAX_REQUESTS);
        let handle = LogHandle {
            requests,
            room: Arc::new(Semaphore::new(MAX_QUEUED_BYTES)),
            state: journal.subscribe(),
            reader: journal.reader(),
        };
        Ok((Self { journal, queue, pending: VecDeque::new() }, handle))
    }

    fn run(mut self) {
        loop {
            if self.pending.is_empty() {
                let Some(request) = self.queue.blocking_recv() else { return };
                self.pending.push_back(request);
            }
            self.gather();
            if !self.rests() {
                self.step();
            }
        }
    }

    /// A TPM in memory needs no rest.
    async fn run_in_memory(mut self) {
        loop {
            if self.pending.is_empty() {
                let Some(request) = self.queue.recv().await else { return };
                self.pending.push_back(request);
            }
            self.gather();
            self.step();
        }
    }

    fn gather(&mut self) {
        while self.pending.len() < MAX_REQUESTS
            && let Ok(request) = self.queue.try_recv()
        {
            self.pending.push_back(request);
        }
    }

    fn step(&mut self) {
        match self.pending.pop_front() {
            Some(Request::Append(first)) => self.append(first),
            Some(Request::Quote { prepare, reply }) => {
                let _ = reply.send(self.journal.quote(prepare));
            }
            Some(Request::Ready { reply }) => {
                let _ = reply.send(self.journal.ready());
            }
            Some(Request::Tpm { work }) => work(&mut self.journal),
            Some(Request::Drop { place, reply }) => {
                let _ = reply.send(self.journal.drop_acknowledged(place));
            }
            None => {}
        }
    }

    /// Lets the TPM rest for a moment, unless there is something that cannot wait. Whether it did.
    fn rests(&self) -> bool {
        // A full queue gathers nothing more.
        if self.pending.len() >= MAX_REQUESTS || !self.pending.iter().all(|r| matches!(r, Request::Append(_))) {
            return false;
        }
        let step = self.journal.pace().step(Instant::now());
        step.inspect(|step| thread::sleep(*step)).is_some()
    }

    /// One record for the first append and all others of its register that came before the next quote and fit in.
    fn append(&mut self, first: Append) {
        let (epoch, role) = (first.epoch, first.role);
        let (mut bytes, mut events) = (first.bytes, first.events);
        let mut waiting = vec![(first.reply, first._room)];
        let mut left = VecDeque::with_capacity(self.pending.len());
        let mut open = true;
        for request in self.pending.drain(..) {
            match request {
                Request::Append(mut next) if open && next.role == role && next.epoch == epoch => {
                    open = bytes + next.bytes + ARRAY_HEAD <= MAX_CONTENT
                        && events.len() + next.events.len() <= MAX_EVENTS;
                    if open {
                        bytes += next.bytes;
                        events.append(&mut next.events);
                        waiting.push((next.reply, next._room));
                    } else {
                        left.push_back(Request::Append(next));
                    }
                }
                other => {
                    open &= matches!(other, Request::Append(_));
                    left.push_back(other);
                }
            }
        }
        self.pending = left;
        let outcome = self.journal.append(epoch, role, &events);
        for (reply, _room) in waiting {
            let _ = reply.send(outcome.clone());
        }
    }
}
