//! One connection to a monitor.

use std::{
    collections::HashMap,
    os::fd::OwnedFd,
    path::Path,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak,
        atomic::{AtomicU64, Ordering},
    },
};

use qapi::Command;
use serde::Deserialize;
use serde_json::{Map, Value, json, value::RawValue};
use tokio::{
    io::AsyncWriteExt,
    net::{
        UnixStream,
        unix::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::{mpsc, oneshot},
    task::AbortHandle,
    time::timeout,
};

use super::{Event, Events, Limits, QmpError, descriptors, events::Queue, line::LineReader, peer::peer_inode};

/// Commands that wait to be written.
const OUTGOING: usize = 64;

/// The capability of commands that overtake others (QEMU `docs/interop/qmp-spec`, "out-of-band execution").
const OOB: &str = "oob";

/// Told of every event as QEMU wrote it, and of the connection's end. Called by the task that reads: it must not wait.
pub trait Tap: Send + Sync + 'static {
    /// One event, without the line's end.
    fn event(&self, line: &[u8]);

    /// Nothing comes any more.
    fn closed(&self);
}

/// Somebody else's command, to be passed to QEMU as it is but for its id.
#[derive(Debug)]
pub struct Passed {
    /// The command's name.
    pub command: String,
    /// Its arguments; none is not the same as an empty map to every QEMU.
    pub arguments: Option<Map<String, Value>>,
    /// Whether it overtakes other commands (`exec-oob`).
    pub oob: bool,
    /// A descriptor that it takes. Two of them at a time would be mixed up by QEMU, which keeps only the last.
    pub fd: Option<OwnedFd>,
}

/// QEMU's answer to a command.
#[derive(Debug)]
pub enum Answer {
    /// What it returned, as QEMU wrote it.
    Return(Box<RawValue>),
    /// It was refused.
    Error(ErrorBody),
}

/// QEMU's words about an error.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct ErrorBody {
    /// The class, of which nearly all are `GenericError`.
    pub class: String,
    /// What went wrong, for people.
    pub desc: String,
}

/// An open monitor. Clones share the connection.
#[derive(Clone)]
pub struct Qmp {
    shared: Arc<Shared>,
    outgoing: mpsc::Sender<Line>,
    limits: Limits,
    peer: Option<u32>,
    peer_socket: Result<u64, String>,
    greeting: Arc<GreetingBody>,
    _tasks: Arc<Tasks>,
}

/// The way to an open monitor, which does not keep it open.
#[derive(Clone)]
pub struct WeakQmp {
    shared: Arc<Shared>,
    outgoing: mpsc::Sender<Line>,
    limits: Limits,
    peer: Option<u32>,
    peer_socket: Result<u64, String>,
    greeting: Arc<GreetingBody>,
    tasks: Weak<Tasks>,
}

impl WeakQmp {
    /// The monitor, if somebody has it open.
    #[must_use]
    pub fn upgrade(&self) -> Option<Qmp> {
        let Self { shared, outgoing, limits, peer, peer_socket, greeting, tasks } = self.clone();
        Some(Qmp { shared, outgoing, limits, peer, peer_socket, greeting, _tasks: tasks.upgrade()? })
    }
}

impl Qmp {
    /// Connects to the monitor at `path` and negotiates.
    ///
    /// # Errors
    /// [`QmpError`]; [`QmpError::is_not_listening`] holds when nobody listens there (yet).
    pub async fn connect(path: &Path, limits: &Limits) -> Result<(Self, Events), QmpError> {
        Self::negotiate(Self::open(path, limits).await?, limits).await
    }

    /// Connects to the monitor at `path`. QEMU listens long before it greets: who listens is known then.
    ///
    /// # Errors
    /// As [`Self::connect`].
    pub async fn open(path: &Path, limits: &Limits) -> Result<UnixStream, QmpError> {
        let stream = timeout(limits.greeting, UnixStream::connect(path)).await;
        Ok(stream.map_err(|_| QmpError::NoGreeting(limits.greeting))??)
    }

    /// Negotiates on a connected socket.
    ///
    /// # Errors
    /// [`QmpError`].
    pub async fn negotiate(stream: UnixStream, limits: &Limits) -> Result<(Self, Events), QmpError> {
        let peer = listener(&stream)?;
        let (read, write) = stream.into_split();
        let mut lines = LineReader::new(read, limits.line);
        let greeting = timeout(limits.greeting, lines.next())
            .await
            .map_err(|_| QmpError::NoGreeting(limits.greeting))??
            .ok_or(QmpError::Closed)?;
        let Ok(greeting) = serde_json::from_slice::<Greeting>(&greeting) else {
            return Err(QmpError::NotQmp(QmpError::excerpt(&greeting)));
        };
        let greeting = Arc::new(greeting.qmp);
        // Whoever greeted has accepted the connection.
        let peer_socket = peer_inode(write.as_ref()).map_err(|e| e.to_string());

        let queue = Queue::new(limits.events);
        let shared = Arc::new(Shared { next: AtomicU64::new(1), state: Mutex::default(), tap: OnceLock::new() });
        let (outgoing, queued) = mpsc::channel(OUTGOING);
        let writer = tokio::spawn(write_lines(write, queued, Arc::clone(&shared), Arc::clone(&queue)));
        let reader = tokio::spawn(read_lines(lines, Arc::clone(&shared), Arc::clone(&queue)));
        let tasks = Tasks { handles: [writer.abort_handle(), reader.abort_handle()], queue: Arc::clone(&queue) };
        let qmp =
            Self { shared, outgoing, limits: limits.clone(), peer, peer_socket, greeting, _tasks: Arc::new(tasks) };
        let enable: &[&str] = if qmp.has_oob() { &[OOB] } else { &[] };
        let arguments = if enable.is_empty() { json!({}) } else { json!({"enable": enable}) };
        qmp.call::<serde::de::IgnoredAny>("qmp_capabilities", arguments).await?;
        Ok((qmp, Events(queue)))
    }

    /// A way to it that does not keep it open.
    #[must_use]
    pub fn downgrade(&self) -> WeakQmp {
        let Self { shared, outgoing, limits, peer, peer_socket, greeting, _tasks } = self.clone();
        WeakQmp { shared, outgoing, limits, peer, peer_socket, greeting, tasks: Arc::downgrade(&_tasks) }
    }

    /// The process id of QEMU as the kernel knows it (`SO_PEERCRED`).
    #[must_use]
    pub fn peer_pid(&self) -> Option<u32> {
        self.peer
    }

    /// The inode of the socket at the monitor's end, or why the kernel does not tell it.
    ///
    /// # Errors
    /// The reason.
    pub fn peer_socket(&self) -> Result<u64, &str> {
        self.peer_socket.as_ref().copied().map_err(String::as_str)
    }

    /// How many commands were given so far.
    #[cfg(test)]
    pub(crate) fn commands(&self) -> u64 {
        self.shared.next.load(Ordering::Relaxed) - 1
    }

    /// QEMU's version as it greeted: `major.minor.micro`.
    #[must_use]
    pub fn version(&self) -> String {
        let version = &self.greeting.version.qemu;
        format!("{}.{}.{}", version.major, version.minor, version.micro)
    }

    /// The version as QEMU greeted with it, the packager's name included.
    #[must_use]
    pub fn full_version(&self) -> &qapi::qmp::VersionInfo {
        &self.greeting.version
    }

    /// Whether commands can overtake others here.
    #[must_use]
    pub fn has_oob(&self) -> bool {
        self.limits.oob && self.greeting.capabilities.iter().any(|c| c == OOB)
    }

    /// Has every event from now on told to `tap`, beside [`Events`]. Only the first one counts.
    pub fn tap(&self, tap: &Arc<dyn Tap>) {
        // A second one is never asked for: one session has one door.
        let _ = self.shared.tap.set(Arc::clone(tap));
        // Looked at after that, so that an end in between is not missed. Being told twice does no harm.
        if self.shared.lock().closed.is_some() {
            tap.closed();
        }
    }

    /// Runs a command. Safe to cancel: its answer is then dropped.
    ///
    /// # Errors
    /// [`QmpError`].
    pub async fn execute<C: Command>(&self, command: C) -> Result<C::Ok, QmpError> {
        let arguments = serde_json::to_value(&command)
            .map_err(|e| QmpError::Answer { command: C::NAME.to_owned(), what: e.to_string() })?;
        self.call(C::NAME, arguments).await
    }

    /// Runs a command for which `qapi` has no type, or one that QEMU's answers do not fit.
    ///
    /// # Errors
    /// [`QmpError`].
    pub async fn call<T: serde::de::DeserializeOwned>(&self, command: &str, arguments: Value) -> Result<T, QmpError> {
        let exchange = self.exchange(json!({"execute": command, "arguments": arguments}), None);
        let command = || command.to_owned();
        let answer = timeout(self.limits.reply, exchange)
            .await
            .map_err(|_| QmpError::Timeout { command: command(), after: self.limits.reply })??;
        match answer {
            Answer::Return(value) => serde_json::from_str(value.get())
                .map_err(|e| QmpError::Answer { command: command(), what: e.to_string() }),
            Answer::Error(e) => Err(QmpError::Refused { command: command(), class: e.class, desc: e.desc }),
        }
    }

    /// Passes somebody else's command. It may take as long as it takes. Safe to cancel: its answer is then dropped.
    ///
    /// # Errors
    /// When the connection ends.
    pub async fn pass(&self, passed: Passed) -> Result<Answer, QmpError> {
        let Passed { command, arguments, oob, fd } = passed;
        let mut message = json!({(if oob { "exec-oob" } else { "execute" }): command});
        if let Some(arguments) = arguments {
            message["arguments"] = Value::Object(arguments);
        }
        self.exchange(message, fd).await
    }

    /// Sends a command under an id of its own and waits for its answer.
    async fn exchange(&self, mut message: Value, fd: Option<OwnedFd>) -> Result<Answer, QmpError> {
        let id = self.shared.next.fetch_add(1, Ordering::Relaxed);
        message["id"] = id.into();
        let mut bytes = message.to_string().into_bytes();
        bytes.push(b'\n');
        let (answer, answered) = oneshot::channel();
        self.shared.expect(id, answer)?;
        let _forget = Forget { shared: &self.shared, id };
        // Both ends report a closed connection by dropping, and the shared state says why.
        if self.outgoing.send(Line { bytes, fd }).await.is_err() {
            return Err(self.shared.why_closed());
        }
        answered.await.map_err(|_| self.shared.why_closed())
    }
}

/// The process id of who listens at the other end, as the kernel knows it (`SO_PEERCRED`).
pub(crate) fn listener(stream: &UnixStream) -> Result<Option<u32>, QmpError> {
    Ok(stream.peer_cred()?.pid().and_then(|pid| u32::try_from(pid).ok()))
}

/// A whole command line on its way to QEMU.
struct Line {
    bytes: Vec<u8>,
    fd: Option<OwnedFd>,
}

/// Ends the connection with its last user.
struct Tasks {
    handles: [AbortHandle; 2],
    queue: Arc<Queue>,
}

impl Drop for Tasks {
    fn drop(&mut self) {
        self.handles.iter().for_each(AbortHandle::abort);
        self.queue.close(QmpError::Closed);
    }
}

/// Takes a caller that went away off the list.
struct Forget<'a> {
    shared: &'a Shared,
    id: u64,
}

impl Drop for Forget<'_> {
    fn drop(&mut self) {
        self.shared.lock().waiting.remove(&self.id);
    }
}

struct Shared {
    next: AtomicU64,
    state: Mutex<State>,
    tap: OnceLock<Arc<dyn Tap>>,
}

#[derive(Default)]
struct State {
    waiting: HashMap<u64, oneshot::Sender<Answer>>,
    closed: Option<QmpError>,
}

impl Shared {
    fn expect(&self, id: u64, answer: oneshot::Sender<Answer>) -> Result<(), QmpError> {
        let mut state = self.lock();
        match &state.closed {
            Some(why) => Err(why.clone()),
            None => {
                state.waiting.insert(id, answer);
                Ok(())
            }
        }
    }

    fn close(&self, why: QmpError) {
        let mut state = self.lock();
        state.closed.get_or_insert(why);
        state.waiting.clear();
        drop(state);
        if let Some(tap) = self.tap.get() {
            tap.closed();
        }
    }

    fn why_closed(&self) -> QmpError {
        self.lock().closed.clone().unwrap_or(QmpError::Closed)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing in here can panic between two changes that belong together.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn write_lines(
    mut write: OwnedWriteHalf,
    mut queued: mpsc::Receiver<Line>,
    shared: Arc<Shared>,
    queue: Arc<Queue>,
) {
    while let Some(line) = queued.recv().await {
        if let Err(e) = write_line(&mut write, line).await {
            let why = QmpError::from(e);
            shared.close(why.clone());
            queue.close(why);
            return;
        }
    }
}

async fn write_line(write: &mut OwnedWriteHalf, line: Line) -> std::io::Result<()> {
    let sent = match &line.fd {
        Some(fd) => descriptors::send_with(write.as_ref(), &line.bytes, fd).await?,
        None => 0,
    };
    write.write_all(&line.bytes[sent..]).await
}

async fn read_lines(mut lines: LineReader<OwnedReadHalf>, shared: Arc<Shared>, queue: Arc<Queue>) {
    let why = loop {
        match lines.next().await {
            Ok(Some(line)) => {
                if let Err(e) = route(&line, &shared, &queue) {
                    break e;
                }
            }
            Ok(None) => break QmpError::Closed,
            Err(e) => break e,
        }
    };
    shared.close(why.clone());
    queue.close(why);
}

fn route(line: &[u8], shared: &Shared, queue: &Queue) -> Result<(), QmpError> {
    let rubbish = || QmpError::Rubbish(QmpError::excerpt(line));
    let message: Message = serde_json::from_slice(line).map_err(|_| rubbish())?;
    let reply = match message {
        Message { event: Some(name), data, reply: None, error: None, .. } => {
            if let Some(tap) = shared.tap.get() {
                tap.event(line);
            }
            queue.push(match serde_json::from_slice(line) {
                Ok(event) => Event::Known(Box::new(event)),
                Err(_) => Event::Other { name, data },
            });
            return Ok(());
        }
        Message { event: None, reply: Some(value), error: None, .. } => Answer::Return(value),
        Message { event: None, reply: None, error: Some(e), .. } => Answer::Error(e),
        _ => return Err(rubbish()),
    };
    // Without an id it answers a line that QEMU could not read; all of ours have one.
    let id = message.id.and_then(|id| id.as_u64()).ok_or_else(rubbish)?;
    if let Some(answer) = shared.lock().waiting.remove(&id) {
        // A caller that went away in this moment does not want it.
        let _ = answer.send(reply);
    }
    Ok(())
}

#[derive(Deserialize)]
struct Greeting {
    #[serde(rename = "QMP")]
    qmp: GreetingBody,
}

#[derive(Deserialize)]
struct GreetingBody {
    version: qapi::qmp::VersionInfo,
    /// Those that a client may enable; they may be of any kind.
    #[serde(default)]
    capabilities: Vec<Value>,
}

#[derive(Deserialize)]
struct Message {
    event: Option<String>,
    #[serde(default)]
    data: Value,
    #[serde(rename = "return")]
    reply: Option<Box<RawValue>>,
    error: Option<ErrorBody>,
    id: Option<Value>,
}
