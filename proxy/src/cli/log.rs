//! `log`: the measurement log for people, and as CEL-JSON.

use std::{
    io::{self, Write},
    path::Path,
    time::{Duration, SystemTime},
};

use onequote_evidence::{
    event::{Component, Event, EventBody, HowRead, Image, SnapshotLoad, SnapshotSave},
    record::Record,
};

use super::printable::printable;
use crate::log::{LogFolder, LogRead, RecordStream, RecorderError};

/// Prints the log of an epoch from its file, whether a proxy runs or not. A damaged log is printed up to the damage.
///
/// # Errors
/// [`RecorderError`] when there is no such log, it cannot be read, or it is damaged.
pub fn print_log(folder: &Path, epoch: Option<u64>, json: bool, out: &mut dyn Write) -> Result<(), RecorderError> {
    let folder = LogFolder::new(folder);
    let epoch = match epoch {
        Some(epoch) => epoch,
        None => folder.epochs()?.last().copied().ok_or(RecorderError::NoLog)?,
    };
    let mut first = true;
    for record in RecordStream::oldest(&folder, epoch)? {
        let record = record?;
        let written = if json { write_json(&record, first, out) } else { write_text(&record, out) };
        first = false;
        if written.is_err() {
            return Ok(());
        }
    }
    if json {
        let _ = writeln!(out, "{}", if first { "[]" } else { "\n]" });
    }
    Ok(())
}

fn write_json(record: &Record, first: bool, out: &mut dyn Write) -> io::Result<()> {
    write!(out, "{}", if first { "[\n" } else { ",\n" })?;
    let json = record.to_json().map_err(io::Error::other)?;
    serde_json::to_writer(&mut *out, &json).map_err(io::Error::from)
}

fn write_text(record: &Record, out: &mut dyn Write) -> io::Result<()> {
    let digest = record.digests.iter().last().map(|(bank, d)| format!("{bank}:{:.16}…", d.to_string()));
    writeln!(out, "{:>6}  PCR {}  {}", record.recnum, record.pcr, digest.unwrap_or_default())?;
    match record.events() {
        Ok(events) => events.iter().try_for_each(|event| write_event(event, out)),
        Err(e) => writeln!(out, "        content is not a list of events: {e}"),
    }
}

fn write_event(event: &Event, out: &mut dyn Write) -> io::Result<()> {
    let vm = event.vm.map(|vm| format!("  {} session {}", vm.vm, vm.session)).unwrap_or_default();
    writeln!(out, "        {}  {}{vm}", utc(event.time.0), event.body.kind())?;
    let mut line = |text: String| writeln!(out, "            {}", printable(&text));
    match &event.body {
        EventBody::ProxyStart(b) => {
            line(format!("host {} epoch {} version {} TPM resets {}", b.host, b.epoch.number, b.version, b.reset_count))
        }
        EventBody::VmCreate(b) => line(format!(
            "{} pid {} {} {} {} MiB {} CPUs {} QEMU {}",
            b.name,
            b.pid,
            b.depth,
            b.machine,
            b.memory >> 20,
            b.cpus,
            b.accelerator,
            b.qemu
        ))
        .and_then(|()| b.monitors.iter().try_for_each(|m| line(format!("also commanded by {m}")))),
        EventBody::VmStart(b) => parts(&b.components, &b.images, &mut line),
        EventBody::VmAttach(b) => {
            line(if b.again { "measured again" } else { "was running when first seen" }.to_owned())?;
            parts(&b.components, &b.images, &mut line)
        }
        EventBody::VmRefuse(b) => line(format!("{}: {} {}", b.cause, b.item, b.reason)),
        EventBody::VmPause(b) => line(b.run_state.clone()),
        EventBody::VmResume(b) => line(b.run_state.clone()),
        EventBody::VmReset(b) => line(format!("{}{}", b.reason, if b.by_guest { " by the guest" } else { "" })),
        EventBody::VmStop(b) => {
            line(b.cause.to_string())?;
            parts(&[], &b.images, &mut line)?;
            b.read.iter().try_for_each(|r| match r.how {
                HowRead::Changed => line(format!("{}: {} bytes read, which QEMU said had changed", r.slot, r.bytes)),
                HowRead::Full => line(format!("{}: read whole: {}", r.slot, r.why)),
            })?;
            b.unmeasured.iter().try_for_each(|u| line(format!("not measured: {u}")))
        }
        EventBody::VmCrash(b) => line(format!("{}: {}", b.cause, b.detail)),
        EventBody::VmDelete(b) => {
            line(b.name.clone())?;
            parts(&[], &b.images, &mut line)?;
            b.unmeasured.iter().try_for_each(|u| line(format!("not measured: {u}")))
        }
        EventBody::MediumChange(b) => {
            line(format!("{}: {} → {}", b.slot, b.before, b.after))?;
            parts(&[], &b.images, &mut line)
        }
        EventBody::SnapshotSave(SnapshotSave { tag, images })
        | EventBody::SnapshotLoad(SnapshotLoad { tag, images }) => {
            line(tag.clone())?;
            parts(&[], images, &mut line)
        }
        EventBody::MigrateOut(b) => {
            line(format!("{} to {}", b.status, b.target))?;
            parts(&[], &b.images, &mut line)?;
            b.unmeasured.iter().try_for_each(|u| line(format!("not measured: {u}")))
        }
        EventBody::MigrateIn(b) => line(format!("{} from {}", b.status, b.source)),
        EventBody::MonitorCommand(b) => {
            line(format!("{}: {} {} ({}) {}", b.outcome, b.command, b.arguments, b.client, b.detail))?;
            parts(&b.files, &[], &mut line)
        }
        EventBody::ConfigChange(b) => {
            line(format!("{}: {} → {}", b.what, b.before, b.after))?;
            parts(&[], &b.images, &mut line)
        }
        EventBody::UnmanagedVm(b) => line(format!("pid {} {} {}", b.pid, b.program, b.arguments)),
        EventBody::LogGap(b) => line(format!("{}: {}", b.reason, b.detail)),
        EventBody::LogSegment(b) => {
            line(format!("segment {} of epoch {}, snapshot {}", b.number, b.start.epoch.number, b.snapshot))
        }
        EventBody::GuestHello(b) => line(format!("boot {} boot id {} from entry {}", b.boot, b.boot_id, b.count)),
        EventBody::GuestEntries(b) => {
            line(format!("boot {} entries {} to {}  {}", b.boot, b.first, b.first + b.count - 1, b.aggregate))
        }
        EventBody::GuestLost(b) => line(format!("boot {} at entry {}: {}", b.boot, b.count, b.reason)),
        EventBody::GuestRewind(b) => {
            line(format!("boot {} at entry {}: claims {} entries {}", b.boot, b.count, b.claimed_count, b.claimed))
        }
        EventBody::GuestOverflow(b) => line(format!("boot {} at entry {}: over {}", b.boot, b.count, b.limit)),
        EventBody::Unknown { body, .. } => line(format!("body {body}")),
    }
}

fn parts(components: &[Component], images: &[Image], line: &mut dyn FnMut(String) -> io::Result<()>) -> io::Result<()> {
    for c in components {
        let text = c.text.as_deref().map(|t| format!(" {t:?}")).unwrap_or_default();
        let memory = c.memory.map(|m| format!(" (in memory: {m})")).unwrap_or_default();
        line(format!("{:<14} {}  {}{text}{memory}", c.role.word(), c.digest, c.path))?;
    }
    for i in images {
        let access = if i.read_only { "ro" } else { "rw" };
        line(format!("{:<14} {}  {} {} {access} {} bytes", i.slot, i.digest, i.path, i.format, i.size))?;
    }
    Ok(())
}

/// RFC 3339 in UTC with milliseconds. The time is only a claim, so it may be one that the calendar does not have.
fn utc(ms: u64) -> String {
    match SystemTime::UNIX_EPOCH.checked_add(Duration::from_millis(ms)) {
        Some(time) if ms < END_OF_CALENDAR_MS => humantime::format_rfc3339_millis(time).to_string(),
        _ => format!("{ms} ms"),
    }
}

/// The year 10000.
const END_OF_CALENDAR_MS: u64 = 253_402_300_800_000;
