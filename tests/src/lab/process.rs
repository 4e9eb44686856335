//! Child processes that do not outlive the lab.

use std::fs::File;
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

use super::wait;

/// A running program, in a process group of its own, with a log file.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    log: PathBuf,
    detached: bool,
}

impl Process {
    /// Starts `command`. Its output is appended to `log`. It is killed when this value goes, and by the kernel
    /// when the thread that starts it ends, unless it is `detached`.
    ///
    /// # Errors
    /// The program cannot be started.
    pub fn spawn(name: &str, command: &Command, log: &Path, detached: bool) -> Result<Self> {
        let file = File::options()
            .create(true)
            .append(true)
            .open(log)
            .with_context(|| format!("cannot write the log {}", log.display()))?;
        // `setpriv` (util-linux, on every Debian) sets the parent-death signal and becomes the program: no unsafe here.
        let mut wrapped = Command::new("setpriv");
        if !detached {
            wrapped.args(["--pdeathsig", "KILL"]);
        }
        wrapped.arg("--").arg(command.get_program()).args(command.get_args());
        if let Some(folder) = command.get_current_dir() {
            wrapped.current_dir(folder);
        }
        for (key, value) in command.get_envs() {
            match value {
                Some(value) => wrapped.env(key, value),
                None => wrapped.env_remove(key),
            };
        }
        let child = wrapped
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file)
            .spawn()
            .with_context(|| format!("cannot start {name}"))?;
        Ok(Self { name: name.to_owned(), child, log: log.to_owned(), detached })
    }

    /// The process id, also that of its group.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Where its output goes.
    #[must_use]
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// How it ended, if it has.
    ///
    /// # Errors
    /// It cannot be asked.
    pub fn exited(&mut self) -> Result<Option<ExitStatus>> {
        Ok(self.child.try_wait()?)
    }

    /// Fails if it has ended, with what it said last.
    ///
    /// # Errors
    /// It has ended.
    pub fn check_alive(&mut self) -> Result<()> {
        let Some(status) = self.exited()? else { return Ok(()) };
        let how = match status.signal() {
            Some(signal) => format!("was ended by signal {signal}"),
            None => format!("ended with {}", status.code().unwrap_or(-1)),
        };
        bail!("{} {how}; its log ends:\n{}", self.name, tail(&self.log, 15));
    }

    /// Sends `signal` to its whole group.
    ///
    /// # Errors
    /// The group is gone.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        killpg(Pid::from_raw(self.child.id().try_into()?), signal)
            .with_context(|| format!("cannot send {signal} to {}", self.name))
    }

    /// Waits until it has ended.
    ///
    /// # Errors
    /// It has not, after `limit`.
    pub fn wait(&mut self, limit: Duration) -> Result<ExitStatus> {
        let what = format!("{} to end", self.name);
        wait::until(&what, limit, || self.exited())
    }

    /// Kills it (SIGKILL) and waits for it.
    ///
    /// # Errors
    /// It does not go.
    pub fn kill(&mut self) -> Result<()> {
        if self.exited()?.is_none() {
            self.signal(Signal::SIGKILL)?;
        }
        self.wait(Duration::from_secs(10))?;
        Ok(())
    }

    /// Asks it to end (SIGTERM) and waits for it; kills it if it does not.
    ///
    /// # Errors
    /// It does not go.
    pub fn terminate(&mut self) -> Result<ExitStatus> {
        if self.exited()?.is_none() {
            self.signal(Signal::SIGTERM)?;
        }
        match self.wait(Duration::from_secs(10)) {
            Ok(status) => Ok(status),
            Err(_) => {
                self.signal(Signal::SIGKILL)?;
                self.wait(Duration::from_secs(10))
            }
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if !self.detached {
            // Nobody is left to hear of a failure here; the parent-death signal is the second net.
            let _ = self.kill();
        }
    }
}

/// The last `lines` lines of a file, or why they cannot be had.
pub(crate) fn tail(file: &Path, lines: usize) -> String {
    match std::fs::read(file) {
        Ok(bytes) => last_lines(&String::from_utf8_lossy(&bytes), lines),
        Err(error) => format!("({}: {error})", file.display()),
    }
}

pub(crate) fn last_lines(text: &str, lines: usize) -> String {
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;

    #[test]
    fn a_process_goes_with_its_value_and_its_group_with_it() {
        let folder = tempfile::tempdir().unwrap();
        let mut command = Command::new("sh");
        command.args(["-c", "sleep 1000 & echo $! ; wait"]);
        let log = folder.path().join("log");
        let process = Process::spawn("sh", &command, &log, false).unwrap();
        let child: u32 =
            wait::until("its child", Duration::from_secs(5), || Ok(std::fs::read_to_string(&log)?.trim().parse().ok()))
                .unwrap();
        drop(process);
        wait::for_true("the child to go", Duration::from_secs(5), || {
            let stat = std::fs::read_to_string(format!("/proc/{child}/stat"));
            Ok(stat.is_err() || stat.unwrap().contains(") Z "))
        })
        .unwrap();
    }

    #[test]
    fn an_early_end_is_reported_with_the_log() {
        let folder = tempfile::tempdir().unwrap();
        let mut command = Command::new("sh");
        command.args(["-c", "echo no such thing >&2; exit 3"]);
        let log = folder.path().join("log");
        let mut process = Process::spawn("thing", &command, &log, false).unwrap();
        process.wait(Duration::from_secs(5)).unwrap();
        let error = process.check_alive().unwrap_err().to_string();
        assert!(error.contains("thing ended with 3") && error.contains("no such thing"), "{error}");
    }
}
