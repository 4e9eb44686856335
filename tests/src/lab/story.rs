//! What the proxy's log says of one VM, in few words, for tests that tell its whole story.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use onequote_evidence::event::{ConfigChange, EventBody, Image, SnapshotLoad, SnapshotSave, VmRef};
use onequote_evidence::id::Sha256;
use serde_json::{Value, json};

use super::{Qmp, World};

/// How long tests wait for an event.
pub const LIMIT: Duration = Duration::from_secs(60);

/// A world whose proxy looks at its VMs ten times a second.
///
/// # Errors
/// The proxy does not start.
pub fn begin(world: &mut World) -> Result<()> {
    world.settings().tables += "[vms]\nlook_ms = 100\n";
    world.start_proxy_alone()
}

/// What the log says of the VM called `name`, the newest process of that name.
///
/// # Errors
/// There is no log.
pub fn story(world: &World, name: &str) -> Result<Vec<EventBody>> {
    let events = world.read_log()?.events()?;
    let is = |body: &EventBody| matches!(body, EventBody::VmCreate(create) if create.name == name);
    let vm: Option<VmRef> = events.iter().rev().find(|event| is(&event.body)).and_then(|event| event.vm);
    Ok(events.into_iter().filter(|event| vm.is_some() && event.vm == vm).map(|event| event.body).collect())
}

/// An event as tests name it: its kind, and the fields that matter.
#[must_use]
pub fn words(body: &EventBody) -> String {
    let what = match body {
        EventBody::VmCreate(e) => e.depth.word().to_owned(),
        EventBody::VmPause(e) => e.run_state.clone(),
        EventBody::VmReset(e) => e.reason.clone(),
        EventBody::VmStop(e) => e.cause.word().to_owned(),
        EventBody::VmCrash(e) => format!("{} {}", e.cause, e.detail),
        EventBody::VmRefuse(e) => e.cause.word().to_owned(),
        EventBody::ConfigChange(e) => e.what.clone(),
        EventBody::MediumChange(e) => e.slot.clone(),
        EventBody::SnapshotSave(SnapshotSave { tag, .. }) | EventBody::SnapshotLoad(SnapshotLoad { tag, .. }) => {
            tag.clone()
        }
        EventBody::MigrateOut(e) => e.status.word().to_owned(),
        EventBody::MigrateIn(e) => e.status.word().to_owned(),
        _ => String::new(),
    };
    format!("{} {what}", body.kind()).trim_end().to_owned()
}

/// Waits until the log says exactly this of a VM, in this order.
///
/// # Errors
/// It says something else, or nothing in time.
pub fn expect(world: &mut World, name: &str, expected: &[&str]) -> Result<Vec<EventBody>> {
    let mut seen = Vec::new();
    let what = format!("{name}: {expected:#?}");
    let found = world.wait_until(&what, LIMIT, |world| {
        let story = story(world, name)?;
        seen = story.iter().map(words).collect();
        // More than was expected does not become right by waiting.
        ensure!(seen.len() <= expected.len(), "{name}: {seen:#?} instead of {expected:#?}");
        Ok((seen == expected).then_some(story))
    });
    found.with_context(|| format!("the log has {seen:#?}"))
}

/// Waits for an event about this VM that `which` accepts, and gives what that made of it.
///
/// # Errors
/// It does not come in time.
pub fn wait_event<T>(world: &mut World, name: &str, what: &str, which: impl Fn(&EventBody) -> Option<T>) -> Result<T> {
    let found = world.wait_until(what, LIMIT, |world| Ok(story(world, name)?.iter().find_map(&which)));
    found.with_context(|| format!("the log has {:#?}", story(world, name).unwrap_or_default()))
}

/// Waits for a change of the configuration in these words. With `after` empty: that something went.
///
/// # Errors
/// It does not come in time.
pub fn wait_change(world: &mut World, name: &str, what: &str, before: &str, after: &str) -> Result<ConfigChange> {
    let fits = |text: &str, part: &str| text.is_empty() == part.is_empty() && text.contains(part);
    wait_event(world, name, &format!("{what}: {before:?} to {after:?}"), |body| match body {
        EventBody::ConfigChange(change)
            if change.what == what && fits(&change.before, before) && fits(&change.after, after) =>
        {
            Some(change.clone())
        }
        _ => None,
    })
}

/// The fs-verity digest of a file, as the log writes it.
///
/// # Errors
/// It cannot be read.
pub fn digest(path: &Path) -> Result<String> {
    let measured = onequote_verity::measure(&fs::File::open(path)?, onequote_verity::Options::default())?;
    Ok(format!("fs-verity:{}", Sha256(measured.digest)))
}

/// Whether an image was logged as what the file holds.
///
/// # Errors
/// It was not.
pub fn check_image(image: &Image, slot: &str, path: &Path) -> Result<()> {
    let now = digest(path)?;
    ensure!(image.slot == slot && Path::new(&image.path) == path, "another image: {image:?}");
    ensure!(image.digest.to_string() == now, "{} holds {now}: {image:?}", path.display());
    Ok(())
}

/// Runs `qemu-img` in a folder.
///
/// # Errors
/// It fails.
pub fn qemu_img(folder: &Path, arguments: &[&str]) -> Result<()> {
    let status = Command::new("qemu-img").args(arguments).arg("-q").current_dir(folder).status()?;
    ensure!(status.success(), "qemu-img failed");
    Ok(())
}

/// Gives commands one after the other.
///
/// # Errors
/// The first that was refused.
pub fn give(monitor: &mut Qmp, commands: &[(&str, Value)]) -> Result<()> {
    commands.iter().try_for_each(|(command, arguments)| monitor.execute(command, arguments).map(drop))
}

/// Gives the human monitor a command that prints nothing.
///
/// # Errors
/// It prints something.
pub fn human(monitor: &mut Qmp, command: &str) -> Result<()> {
    let answer = monitor.execute("human-monitor-command", &json!({"command-line": command}))?;
    ensure!(answer.as_str().is_some_and(str::is_empty), "{command}: {answer}");
    Ok(())
}

/// What the log says of every VM that the gate lets run.
pub const BEGIN: [&str; 3] = ["vm-create gate", "vm-start", "vm-resume"];

/// [`BEGIN`] and what came then.
#[must_use]
pub fn then<'a>(more: &[&'a str]) -> Vec<&'a str> {
    BEGIN.iter().chain(more).copied().collect()
}

/// A command whose answer is what it printed.
///
/// # Errors
/// It was refused.
pub fn human_io(monitor: &mut Qmp, command: &str) -> Result<()> {
    monitor.execute("human-monitor-command", &json!({"command-line": command})).map(drop)
}

impl World {
    /// Ends the proxy. Its log must be whole then, and in the TPM.
    ///
    /// # Errors
    /// It isn't.
    pub fn end_bound(&mut self) -> Result<()> {
        ensure!(self.proxy()?.terminate()?.success(), "the proxy does not end well");
        self.bound_log()?;
        Ok(())
    }
}
