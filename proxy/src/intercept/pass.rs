//! What becomes of a command: refused, passed, or measured, logged and then passed.

use std::{
    os::fd::OwnedFd,
    time::{Duration, Instant},
};

use onequote_evidence::{
    digest::sha256,
    event::{CommandOutcome, Component, Event, MonitorCommand},
};
use serde_json::{Map, Value};
use tokio::{sync::oneshot, time::timeout};

use super::{
    client::{Client, Job},
    commands,
    door::{Gate, Hub},
    files, measured,
    request::{GENERIC, NOT_FOUND, Refusal, Request, returned},
};
use crate::{
    qmp::{Answer, Passed},
    rate::{Kind, limited},
};

/// The most bytes of a command's arguments in the log.
const MAX_ARGUMENTS: usize = 4096;

/// The most bytes of why a command was not passed.
const MAX_DETAIL: usize = 1024;

/// Why nothing is passed any more.
const GONE: &str = "the VM has ended, or its monitor is lost";

/// How long `quit` waits for what is to be done before it. The session may be measuring a disk for longer.
const BEFORE_QUIT: Duration = Duration::from_secs(12);

/// How long to wait for a turn when a client floods.
const TURN: Duration = Duration::from_millis(20);

/// Runs a command; gives the line that answers it. None when the connection to QEMU has ended.
pub(super) async fn run(hub: &Hub, client: &Client, job: Job) -> Option<Vec<u8>> {
    let id = job.request.id.clone();
    match allowed(hub, client, &job.request).await {
        Ok(changes) => {
            if changes {
                prepare(hub, &job.request).await;
            }
            let answer = forward(hub, job).await;
            if changes {
                hub.ran.notify_one();
            }
            match answer? {
                Answer::Return(value) => Some(returned(id.as_ref(), &value)),
                Answer::Error(e) => Some(Refusal::new(id, &e.class, e.desc).line()),
            }
        }
        Err(No { class, desc }) => Some(Refusal::new(id, class, desc).line()),
    }
}

/// What comes between the log and QEMU.
async fn prepare(hub: &Hub, request: &Request) {
    let nothing = Map::new();
    hub.note(commands::hands(&request.command, request.arguments.as_ref().unwrap_or(&nothing)));
    if request.command == "quit" {
        let (done, is_done) = oneshot::channel();
        let asked = async {
            // A session that is not there has nothing to do.
            if hub.vm.before_quit.send(done).await.is_ok() {
                let _ = is_done.await;
            }
        };
        if timeout(BEFORE_QUIT, asked).await.is_err() {
            tracing::info!(vm = %hub.vm.name, "it ends before QEMU was asked what changed");
        }
    }
}

/// Why a command is not passed.
struct No {
    class: &'static str,
    desc: String,
}

fn no(desc: impl Into<String>) -> No {
    No { class: GENERIC, desc: desc.into() }
}

/// Whether QEMU may see the command; if so, whether it may change something.
async fn allowed(hub: &Hub, client: &Client, request: &Request) -> Result<bool, No> {
    let command = request.command.as_str();
    let schema = hub.schema().await.map_err(|e| no(e.to_string()))?;
    let Some(known) = schema.command(command) else {
        return Err(No { class: NOT_FOUND, desc: format!("The command {command} has not been found") });
    };
    if request.oob && !known.oob {
        return Err(no(format!("The command {command} does not support OOB")));
    }
    let nothing = Map::new();
    let arguments = request.arguments.as_ref().unwrap_or(&nothing);
    let mut refusing = Refusing { hub, client, command, arguments };
    let parts = commands::parts(command, arguments);
    if let Some((part, _)) = parts.iter().find(|(part, _)| hub.settings.refuses(part)) {
        let why = format!("the proxy's configuration refuses {part}");
        return Err(refusing.with(CommandOutcome::Refused, why).await);
    }
    if commands::is_read_only(command) {
        return Ok(false);
    }
    at_the_gate(&mut refusing).await?;
    let named = files::named(command, arguments, |member| known.unknown_files.contains(member));
    let files = match measured::measure(hub, named).await {
        Ok(files) => files,
        Err(why) => {
            let why = format!("{command} is not passed to QEMU: it names what cannot be measured: {why}");
            return Err(refusing.with(CommandOutcome::Unmeasurable, why).await);
        }
    };
    // Not one by one: the log is to hold each of these.
    while !hub.flood().commands.take(Instant::now()) {
        tokio::time::sleep(TURN).await;
    }
    let event = event(client, command, arguments, CommandOutcome::Forwarded, String::new(), files);
    log(hub, event).await.map_err(|why| {
        hub.tell(|status| status.refused += 1);
        no(format!("{command} is not passed to QEMU: {why}"))
    })?;
    hub.tell(|status| status.commands += 1);
    Ok(true)
}

/// Waits until the VM was measured. What would let it run does not wait, and is refused.
async fn at_the_gate(refusing: &mut Refusing<'_>) -> Result<(), No> {
    let (hub, command) = (refusing.hub, refusing.command);
    let mut gate = hub.gate.subscribe();
    loop {
        let now = gate.borrow_and_update().clone();
        match now {
            Gate::Open => return Ok(()),
            Gate::Measuring if commands::lets_run(command) => {
                hub.tell(|status| status.refused += 1);
                // The log does not know the VM yet: only the proxy's own says so.
                limited!(Kind::MonitorClient, warn, vm = %hub.vm.name, client = refusing.client.who,
                    "{command} was refused: the VM is being measured");
                let name = &hub.vm.name;
                return Err(no(format!(
                    "{command} is refused: {name} is still being measured; the proxy lets it run when that is logged"
                )));
            }
            Gate::Measuring => {
                // We hold the sender.
                let _ = gate.changed().await;
            }
            Gate::Closed(why) if commands::lets_run(command) => {
                let why = format!("{command} is refused: {why}");
                return Err(refusing.with(CommandOutcome::Refused, why).await);
            }
            Gate::Closed(_) => return Ok(()),
            Gate::Gone => return Err(no(GONE)),
        }
    }
}

/// What is needed to refuse a command.
struct Refusing<'a> {
    hub: &'a Hub,
    client: &'a Client,
    command: &'a str,
    arguments: &'a Map<String, Value>,
}

impl Refusing<'_> {
    /// Logs that the command is not passed. If too many are, they are counted, and told with the next that is logged.
    async fn with(&mut self, outcome: CommandOutcome, why: String) -> No {
        let Self { hub, client, command, arguments } = self;
        hub.tell(|status| status.refused += 1);
        limited!(Kind::MonitorClient, warn, vm = %hub.vm.name, client = client.who, "{}", why.escape_debug());
        let silent = {
            let mut flood = hub.flood();
            if flood.refusals.take(Instant::now()) {
                Some(std::mem::take(&mut flood.silent))
            } else {
                flood.silent += 1;
                None
            }
        };
        // Before the gate has decided, the log does not know the VM: its creation comes first.
        let mut gate = hub.gate.subscribe();
        let _ = gate.wait_for(|gate| *gate != Gate::Measuring).await;
        if let Some(silent) = silent {
            let detail = match silent {
                0 => why.clone(),
                n => format!("{why}; and {n} commands before that were refused and not logged one by one"),
            };
            let event = event(client, command, arguments, outcome, detail, Vec::new());
            // That it is refused does not hang on the log: the event stays until it can be logged.
            hub.vm.outbox.offer(of_vm(hub, event));
            if let Err(e) = hub.vm.outbox.flush().await {
                tracing::error!(vm = %hub.vm.name, "{e}");
            }
        }
        no(why)
    }
}

fn event(
    client: &Client,
    command: &str,
    arguments: &Map<String, Value>,
    outcome: CommandOutcome,
    detail: String,
    files: Vec<Component>,
) -> MonitorCommand {
    let arguments = Value::Object(commands::without_secrets(command, arguments)).to_string();
    MonitorCommand {
        client: client.who.clone(),
        command: command.to_owned(),
        digest: sha256(&[arguments.as_bytes()]),
        arguments: cut(arguments, MAX_ARGUMENTS),
        outcome,
        detail: cut(detail, MAX_DETAIL),
        files,
    }
}

/// At most so many bytes, whole characters.
fn cut(mut text: String, most: usize) -> String {
    if text.len() > most {
        let end = (0..=most).rev().find(|&at| text.is_char_boundary(at)).unwrap_or(0);
        text.truncate(end);
    }
    text
}

/// Done when the event is in log and TPM. If it cannot be, it is taken back.
async fn log(hub: &Hub, event: MonitorCommand) -> Result<(), String> {
    let outbox = &hub.vm.outbox;
    let ticket = outbox.offer(of_vm(hub, event)).ok_or(GONE)?;
    outbox.flush().await.map_err(|e| {
        outbox.withdraw(ticket);
        e.to_string()
    })
}

fn of_vm(hub: &Hub, event: MonitorCommand) -> Event {
    Event { time: (hub.vm.clock)(), vm: Some(hub.vm.vm), body: event.into() }
}

async fn forward(hub: &Hub, job: Job) -> Option<Answer> {
    let Job { request, fd } = job;
    let passed = |fd: Option<OwnedFd>| Passed {
        command: request.command.clone(),
        arguments: request.arguments.clone(),
        oob: request.oob,
        fd,
    };
    if request.oob {
        return hub.vm.qmp.pass(passed(fd)).await.ok();
    }
    let _turn = hub.in_flight.acquire().await.ok()?;
    // QEMU keeps only the descriptors that came last.
    let _alone = if fd.is_some() { Some(hub.handing_over.lock().await) } else { None };
    hub.vm.qmp.pass(passed(fd)).await.ok()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::cut;

    #[test]
    fn texts_are_cut_between_characters() {
        assert_eq!(cut("abc".to_owned(), 3), "abc");
        assert_eq!(cut("abc".to_owned(), 2), "ab");
        assert_eq!(cut("aéb".to_owned(), 2), "a");
        assert_eq!(cut("é".to_owned(), 0), "");
    }
}
