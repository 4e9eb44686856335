//! One client's connection.

use std::{collections::VecDeque, io, os::fd::OwnedFd, sync::Arc, time::Duration};

use serde_json::{Map, Value, json};
use tokio::{net::UnixStream, sync::mpsc, time::timeout};

use super::{
    door::Hub,
    frame::{Frame, Framer},
    outbound::{End, Outbound},
    pass,
    request::{GENERIC, NOT_FOUND, Refusal, Request},
};
use crate::{
    qmp::descriptors,
    rate::{Kind, limited},
};

/// Commands of a client that wait for their turn, as in QEMU (`monitor/qmp.c`, `QMP_REQ_QUEUE_LEN_MAX`).
const WAITING: usize = 8;

/// Bytes read at a time.
const BUFFER: usize = 16 * 1024;

/// Why a client is ended.
const UNREAD: &str = "it does not read its events";

/// Who gives commands.
#[derive(Debug)]
pub(super) struct Client {
    /// `NUMBER: process PID (PROGRAM)`, for log and event.
    pub(super) who: String,
}

/// A command on its way.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) request: Request,
    /// The descriptor that it takes.
    pub(super) fd: Option<OwnedFd>,
}

/// Why a connection ended.
enum Ended {
    /// The client has said all, or QEMU has.
    Done,
    /// The client does not take what is for it.
    Slow(&'static str),
    /// The connection broke.
    Broken(io::Error),
}

/// Serves a client to its end. Commands that are on their way then are finished.
pub(super) async fn serve(hub: Arc<Hub>, stream: UnixStream, number: u64, outbound: Arc<Outbound>) {
    let _leave = Leave { hub: Arc::clone(&hub), number };
    let client = Arc::new(Client { who: who(&stream, number) });
    // Asked for before the greeting: later QEMU may be busy with something that an out-of-band command is to end.
    if let Err(e) = hub.schema().await {
        limited!(Kind::MonitorClient, warn, vm = %hub.vm.name, client = client.who, "QEMU does not tell its commands: {e}");
        return;
    }
    limited!(Kind::MonitorClient, info, vm = %hub.vm.name, client = client.who, "a client of the monitor");
    outbound.answer(greeting(&hub)).await;
    let (jobs, rest) = mpsc::channel(WAITING);
    let (urgent_jobs, urgent) = mpsc::channel(WAITING);
    // Tasks of their own: a command that is in the log goes to QEMU, whatever becomes of who gave it.
    let workers = [rest, urgent]
        .map(|jobs| tokio::spawn(work(Arc::clone(&hub), Arc::clone(&client), Arc::clone(&outbound), jobs)));

    let stream = Arc::new(stream);
    let mut writing = Box::pin(write(&stream, &outbound, hub.settings.limits.stall));
    let mut reading = Box::pin(Reader::new(&hub, &outbound, [jobs, urgent_jobs]).read(&stream));
    let said_all = tokio::select! {
        ended = &mut writing => Err(ended),
        ended = &mut reading => ended.map_err(Ended::Broken),
        () = hub.fanout.ended() => Ok(()),
    };
    drop(reading);
    let ended = match said_all {
        Err(ended) => ended,
        Ok(()) => {
            let finish = async {
                for worker in workers {
                    // One that failed has nothing to say any more.
                    let _ = worker.await;
                }
                outbound.finish();
                std::future::pending::<()>().await;
            };
            tokio::select! { ended = &mut writing => ended, () = finish => Ended::Done }
        }
    };
    match ended {
        Ended::Done => {
            limited!(Kind::MonitorClient, info, vm = %hub.vm.name, client = client.who, "a client of the monitor left");
        }
        Ended::Slow(why) => {
            limited!(Kind::MonitorClient, warn, vm = %hub.vm.name, client = client.who, "a client of the monitor is ended: {why}");
        }
        Ended::Broken(e) => {
            limited!(Kind::MonitorClient, info, vm = %hub.vm.name, client = client.who, "a client of the monitor is lost: {e}");
        }
    }
}

/// Takes a client off the list.
struct Leave {
    hub: Arc<Hub>,
    number: u64,
}

impl Drop for Leave {
    fn drop(&mut self) {
        self.hub.fanout.leave(self.number);
        self.hub.tell(|_| {});
    }
}

fn who(stream: &UnixStream, number: u64) -> String {
    let Some(pid) = stream.peer_cred().ok().and_then(|peer| peer.pid()) else { return number.to_string() };
    match std::fs::read_link(format!("/proc/{pid}/exe")) {
        Ok(program) => format!("{number}: process {pid} ({})", program.display()),
        Err(_) => format!("{number}: process {pid}"),
    }
}

/// QEMU's own greeting. Of its capabilities those that we know how to pass on.
fn greeting(hub: &Hub) -> Vec<u8> {
    let capabilities: &[&str] = if hub.vm.qmp.has_oob() { &["oob"] } else { &[] };
    let mut line =
        json!({"QMP": {"version": hub.vm.qmp.full_version(), "capabilities": capabilities}}).to_string().into_bytes();
    line.extend_from_slice(b"\r\n");
    line
}

/// Runs commands one after the other.
async fn work(hub: Arc<Hub>, client: Arc<Client>, outbound: Arc<Outbound>, mut jobs: mpsc::Receiver<Job>) {
    while let Some(job) = jobs.recv().await {
        if !outbound.is_open() {
            return;
        }
        // Without an answer the connection to QEMU is at its end, and this one with it.
        if let Some(line) = pass::run(&hub, &client, job).await {
            outbound.answer(line).await;
        }
    }
}

async fn write(stream: &UnixStream, outbound: &Outbound, stall: Duration) -> Ended {
    loop {
        let line = match outbound.next().await {
            Ok(line) => line,
            Err(End::Finished) => return Ended::Done,
            Err(End::Overflown) => return Ended::Slow(UNREAD),
        };
        let mut rest = line.as_ref();
        while !rest.is_empty() {
            let writable = tokio::select! {
                () = outbound.overflown() => return Ended::Slow(UNREAD),
                writable = timeout(stall, stream.writable()) => writable,
            };
            match writable {
                Err(_) => return Ended::Slow("it does not read"),
                Ok(Err(e)) => return Ended::Broken(e),
                Ok(Ok(())) => {}
            }
            match stream.try_write(rest) {
                Ok(n) => rest = &rest[n..],
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                Err(e) => return Ended::Broken(e),
            }
        }
    }
}

/// Reads what a client says.
struct Reader<'a> {
    hub: &'a Hub,
    outbound: &'a Outbound,
    jobs: [mpsc::Sender<Job>; 2],
    framer: Framer,
    negotiated: bool,
    oob: bool,
    /// Descriptors that came and were not taken yet; the next ones replace them, as in QEMU.
    fds: VecDeque<OwnedFd>,
}

impl<'a> Reader<'a> {
    fn new(hub: &'a Hub, outbound: &'a Outbound, jobs: [mpsc::Sender<Job>; 2]) -> Self {
        let limits = &hub.settings.limits;
        let framer = Framer::new(limits.command, limits.nesting);
        Self { hub, outbound, jobs, framer, negotiated: false, oob: false, fds: VecDeque::new() }
    }

    /// Until the client has said all.
    async fn read(mut self, stream: &UnixStream) -> io::Result<()> {
        let mut buffer = vec![0; BUFFER];
        loop {
            let (n, fds) = descriptors::receive(stream, &mut buffer).await?;
            if n == 0 {
                return Ok(());
            }
            if !fds.is_empty() {
                self.fds = fds.into();
            }
            let mut input = &buffer[..n];
            while let Some(frame) = self.framer.next(&mut input) {
                let parsed = match frame {
                    Frame::Value(value) => Request::parse(&value, self.oob),
                    Frame::Bad(why) => Err(Refusal::new(None, GENERIC, why)),
                };
                match parsed {
                    Ok(request) => self.take(request).await,
                    Err(refusal) => self.outbound.answer(refusal.line()).await,
                }
            }
        }
    }

    async fn take(&mut self, request: Request) {
        if request.command == "qmp_capabilities" || !self.negotiated {
            let line = match self.negotiate(&request) {
                Ok(()) => super::request::done(request.id.as_ref()),
                Err((class, desc)) => Refusal::new(request.id, class, desc).line(),
            };
            self.outbound.answer(line).await;
            if self.negotiated {
                // Behind the answer: no event comes before a client knows that it has negotiated.
                self.outbound.negotiated();
            }
            return;
        }
        let fd = matches!(request.command.as_str(), "getfd" | "add-fd").then(|| self.fds.drain(..).next()).flatten();
        let [jobs, urgent] = &self.jobs;
        let jobs = if request.oob { urgent } else { jobs };
        // A worker lives as long as we do, but when its client is gone.
        let _ = jobs.send(Job { request, fd }).await;
    }

    /// QEMU `monitor/qmp-cmds-control.c`, `qmp_qmp_capabilities`.
    fn negotiate(&mut self, request: &Request) -> Result<(), (&'static str, String)> {
        if request.command != "qmp_capabilities" {
            return Err((NOT_FOUND, "Expecting capabilities negotiation with 'qmp_capabilities'".to_owned()));
        }
        if self.negotiated {
            return Err((NOT_FOUND, "Capabilities negotiation is already complete, command ignored".to_owned()));
        }
        let nothing = Map::new();
        let arguments = request.arguments.as_ref().unwrap_or(&nothing);
        if let Some(other) = arguments.keys().find(|key| *key != "enable") {
            return Err((GENERIC, format!("Parameter '{other}' is unexpected")));
        }
        let wanted = match arguments.get("enable") {
            None => &[][..],
            Some(Value::Array(wanted)) => wanted,
            Some(_) => return Err((GENERIC, "Invalid parameter type for 'enable', expected: array".to_owned())),
        };
        let mut oob = false;
        for capability in wanted {
            match capability.as_str() {
                Some("oob") if self.hub.vm.qmp.has_oob() => oob = true,
                Some("oob") => return Err((GENERIC, "Capability oob is not available".to_owned())),
                Some(other) => return Err((GENERIC, format!("Parameter 'enable' does not accept value '{other}'"))),
                None => return Err((GENERIC, "Invalid parameter type for 'enable', expected: string".to_owned())),
            }
        }
        (self.negotiated, self.oob) = (true, oob);
        Ok(())
    }
}
