//! `list`, `stop`, `kill`, `retry`, `delete`: VMs, as people handle them.

use std::{
    io::{self, Write},
    path::Path,
    time::{Duration, Instant, SystemTime},
};

use hyper::StatusCode;
use onequote_evidence::event::Depth;
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::Value;

use super::printable::printable;
use crate::serve::{AskError, ask_json, tell};

/// How often waiting says that it still waits.
const PROGRESS: Duration = Duration::from_secs(5);

/// Why a command about a VM failed. Scripts tell by the exit code.
#[derive(Debug, thiserror::Error)]
pub enum VmCommandError {
    /// No proxy answers.
    #[error("{0}")]
    NoProxy(AskError),
    /// There is no such VM.
    #[error("{0}")]
    NoVm(String),
    /// The VM cannot do that now.
    #[error("{0}")]
    NotNow(String),
    /// The time is over.
    #[error("{0}")]
    Timeout(String),
    /// The proxy or a monitor failed.
    #[error("{0}")]
    Failed(String),
    /// Nothing can be written.
    #[error(transparent)]
    Io(#[from] io::Error),
}

impl VmCommandError {
    /// The exit code that the manual promises.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Failed(_) | Self::Io(_) => 1,
            Self::NoVm(_) => 3,
            Self::NoProxy(_) => 4,
            Self::NotNow(_) => 5,
            Self::Timeout(_) => 6,
        }
    }
}

impl From<AskError> for VmCommandError {
    fn from(e: AskError) -> Self {
        match e {
            AskError::Refused { status: StatusCode::NOT_FOUND, text } => Self::NoVm(text),
            AskError::Refused { status: StatusCode::CONFLICT, text } => Self::NotNow(text),
            AskError::Refused { text, .. } => Self::Failed(text),
            e => Self::NoProxy(e),
        }
    }
}

/// A VM as the proxy tells of it.
#[derive(Debug, Deserialize)]
struct Vm {
    name: String,
    session: String,
    stage: String,
    run_state: String,
    depth: Depth,
}

/// What was logged of a deletion.
#[derive(Debug, Deserialize)]
struct Deleted {
    name: String,
    images: Vec<DeletedImage>,
    unmeasured: Vec<String>,
}

#[derive(Debug, Deserialize)]
struct DeletedImage {
    slot: String,
    path: String,
}

/// Prints the VMs that the proxy manages.
///
/// # Errors
/// [`VmCommandError`].
pub async fn list_vms(socket: &Path, json: bool, out: &mut dyn Write) -> Result<(), VmCommandError> {
    let status: Value = ask_json(socket, "/v1/status").await?;
    let vms = status["vms"].as_array().map_or(&[][..], Vec::as_slice);
    if json {
        return Ok(writeln!(out, "{:#}", Value::from(vms))?);
    }
    let text = |v: &Value| match v {
        Value::Null => "–".to_owned(),
        Value::String(s) => printable(s).into_owned(),
        other => other.to_string(),
    };
    let since = |v: &Value| {
        let time = v.as_u64().and_then(|ms| SystemTime::UNIX_EPOCH.checked_add(Duration::from_millis(ms)));
        time.map_or_else(|| "–".to_owned(), |time| humantime::format_rfc3339_seconds(time).to_string())
    };
    let width =
        |key: &str, least: usize| vms.iter().map(|vm| text(&vm[key]).chars().count()).max().unwrap_or(0).max(least);
    let (name, state, stage) = (width("name", 4), width("run_state", 9), width("stage", 7));
    writeln!(
        out,
        "{:<name$}  {:<36}  {:<stage$}  {:<state$}  {:<9}  {:>8}  SINCE",
        "NAME", "UUID", "STAGE", "RUN STATE", "DEPTH", "PID"
    )?;
    for vm in vms {
        writeln!(
            out,
            "{:<name$}  {:<36}  {:<stage$}  {:<state$}  {:<9}  {:>8}  {}",
            text(&vm["name"]),
            text(&vm["uuid"]),
            text(&vm["stage"]),
            text(&vm["run_state"]),
            text(&vm["depth"]),
            text(&vm["pid"]),
            since(&vm["since"])
        )?;
        if let Some(error) = vm["error"].as_str() {
            writeln!(out, "    {}", printable(error))?;
        }
    }
    Ok(())
}

/// How a VM is to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// Its guest powers down.
    PowerDown,
    /// QEMU ends at once.
    Quit,
}

/// Ends a VM and waits until that is logged, telling what is going on. With a limit of zero, does not wait.
///
/// # Errors
/// [`VmCommandError`].
pub async fn end_vm(
    socket: &Path,
    name: &str,
    end: End,
    limit: Duration,
    out: &mut dyn Write,
) -> Result<(), VmCommandError> {
    let command = match end {
        End::PowerDown => "power-down",
        End::Quit => "quit",
    };
    let mut vm: Vm = command_vm(socket, name, command).await?;
    let name = vm.name.clone();
    let told = match end {
        End::PowerDown => "asked to power down",
        End::Quit => "told to end",
    };
    if limit.is_zero() {
        return Ok(writeln!(out, "{name}: {told}")?);
    }
    writeln!(out, "{name}: {told}; waiting at most {limit:?}")?;
    let began = Instant::now();
    let (mut shown, mut last) = (String::new(), Instant::now());
    loop {
        let left = limit.saturating_sub(began.elapsed());
        let state = match vm.stage.as_str() {
            "ending" => "QEMU has ended, its images are being measured".to_owned(),
            _ => vm.run_state.clone(),
        };
        if left.is_zero() {
            return Err(VmCommandError::Timeout(too_late(&vm, end, limit)));
        }
        if shown != state || last.elapsed() >= PROGRESS {
            writeln!(out, "{name}: {} ({} s)", printable(&state), began.elapsed().as_secs())?;
            (shown, last) = (state, Instant::now());
        }
        let wait = left.min(Duration::from_secs(1)).as_millis().max(1);
        match ask_json::<Option<Vm>>(socket, &format!("/v1/sessions/{}?wait_ms={wait}", vm.session)).await? {
            Some(now) => vm = now,
            None => break,
        }
    }
    Ok(writeln!(out, "{name}: ended after {:.1} s, and its end is logged", began.elapsed().as_secs_f32())?)
}

fn too_late(vm: &Vm, end: End, limit: Duration) -> String {
    let (name, state) = (&vm.name, &vm.run_state);
    match (vm.stage.as_str(), end) {
        ("ending", _) => {
            format!("{name} has ended; after {limit:?} its images are still being measured, which needs nothing more")
        }
        (_, End::PowerDown) => format!(
            "{name} is still {state} after {limit:?}: its guest does not react to the power button (no ACPI, no acpid or \
             logind, or still booting). Shut it down from inside, try again, or end QEMU with `onequote-proxy kill {name}`"
        ),
        (_, End::Quit) => {
            format!("QEMU of {name} is still there after {limit:?}; `kill -9` ends it, and its end is logged")
        }
    }
}

/// Lets the proxy look again at a VM that it refused.
///
/// # Errors
/// [`VmCommandError`]; what is still wrong is [`VmCommandError::NotNow`].
pub async fn retry_vm(socket: &Path, name: &str, out: &mut dyn Write) -> Result<(), VmCommandError> {
    let vm: Vm = command_vm(socket, name, "retry").await?;
    let done = match vm.depth {
        // Somebody else let it run before.
        Depth::Observe => "measured while it runs, and logged as attached",
        Depth::Gate | Depth::Intercept => "measured, logged and let run",
    };
    Ok(writeln!(out, "{}: {done}", vm.name)?)
}

/// Says that a VM which has ended will not come back.
///
/// # Errors
/// [`VmCommandError`].
pub async fn delete_vm(socket: &Path, name: &str, out: &mut dyn Write) -> Result<(), VmCommandError> {
    let deleted: Deleted = command_vm(socket, name, "delete").await?;
    writeln!(out, "{}: deleted in the log; its files are left where they are", printable(&deleted.name))?;
    for image in deleted.images {
        writeln!(out, "    {} {}", printable(&image.slot), printable(&image.path))?;
    }
    for image in deleted.unmeasured {
        writeln!(out, "    not measured: {}", printable(&image))?;
    }
    Ok(())
}

/// The name is checked here: it becomes part of a path.
async fn command_vm<T: DeserializeOwned>(socket: &Path, name: &str, command: &str) -> Result<T, VmCommandError> {
    if name.is_empty() || !name.bytes().all(|c| c.is_ascii_alphanumeric() || b"-_.".contains(&c)) {
        return Err(VmCommandError::NoVm(format!("{name:?} is no VM's name or UUID")));
    }
    Ok(tell(socket, &format!("/v1/vms/{name}/{command}")).await?)
}
