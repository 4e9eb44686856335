//! A PostgreSQL server of our own: in a temporary folder, at a Unix socket in it, for one test.
//!
//! The server refuses to run as root; as root it runs as `postgres`, or as `nobody` where there is no such user.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use nix::{
    sys::signal::Signal,
    unistd::{User, chown, geteuid},
};

use super::{command, process::Process, wait};

const LIMIT: Duration = Duration::from_secs(60);

/// The role that owns everything.
const ROLE: &str = "onequote";

/// Where Debian puts the server's programs, a folder for each version.
const VERSIONS: &str = "/usr/lib/postgresql";

/// A server with its data. Both go with this value.
#[derive(Debug)]
pub struct Postgres {
    server: Option<Process>,
    folder: tempfile::TempDir,
    programs: PathBuf,
    user: Option<User>,
    settings: Vec<String>,
}

impl Postgres {
    /// A new server without any database of ours.
    ///
    /// # Errors
    /// PostgreSQL is not installed, or does not start.
    pub fn start() -> Result<Self> {
        Self::start_with(&[])
    }

    /// The same with settings, as `name=value`.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub fn start_with(settings: &[&str]) -> Result<Self> {
        let programs = programs().context("PostgreSQL's server is not installed: apt-get install postgresql")?;
        let folder = tempfile::Builder::new().prefix("oq-pg-").tempdir_in("/tmp")?;
        let user = if geteuid().is_root() {
            let user = ["postgres", "nobody"].iter().find_map(|name| User::from_name(name).ok().flatten());
            let user = user.context("there is no user postgres and no user nobody")?;
            chown(folder.path(), Some(user.uid), Some(user.gid))?;
            Some(user)
        } else {
            None
        };
        let settings = settings.iter().map(|&setting| setting.to_owned()).collect();
        let mut postgres = Self { server: None, folder, programs, user, settings };
        let mut init = postgres.as_user("initdb");
        init.args(["--no-sync", "--auth=trust", "--encoding=UTF8", "--locale=C", "--username", ROLE, "-D"]);
        command::output(init.arg(postgres.data()))?;
        postgres.resume()?;
        Ok(postgres)
    }

    /// Starts the server again on its data.
    ///
    /// # Errors
    /// It does not start, or does run.
    pub fn resume(&mut self) -> Result<()> {
        ensure!(self.server.is_none(), "the server runs");
        let mut command = self.as_user("postgres");
        command.arg("-D").arg(self.data()).arg("-k").arg(self.folder.path());
        command.args(["-c", "listen_addresses="]);
        for setting in &self.settings {
            command.arg("-c").arg(setting);
        }
        let mut server = Process::spawn("postgres", &command, &self.log(), false)?;
        let ready = self.programs.join("pg_isready");
        wait::for_true("PostgreSQL to be ready", LIMIT, || {
            server.check_alive()?;
            let mut asked = Command::new(&ready);
            asked.args(["-q", "-d", "postgres", "-U", ROLE, "-h"]).arg(self.folder.path());
            Ok(asked.status()?.success())
        })?;
        self.server = Some(server);
        Ok(())
    }

    /// Ends the server as an operator does who does not wait for its clients; its data stay.
    ///
    /// # Errors
    /// It does not run, or does not end.
    pub fn stop(&mut self) -> Result<()> {
        let mut server = self.server.take().context("the server does not run")?;
        server.signal(Signal::SIGINT)?;
        server.wait(LIMIT).map(|_| ())
    }

    /// Makes an empty database, and gives its URL.
    ///
    /// # Errors
    /// There is one of this name.
    pub fn database(&self, name: &str) -> Result<String> {
        self.tool("createdb", &[name])?;
        Ok(self.url(name))
    }

    /// The URL of a database.
    #[must_use]
    pub fn url(&self, name: &str) -> String {
        format!("postgres://{ROLE}@localhost/{name}?host={}", self.folder.path().display())
    }

    /// Runs one of PostgreSQL's client programs; gives what it printed.
    ///
    /// # Errors
    /// It fails.
    pub fn tool(&self, program: &str, arguments: &[&str]) -> Result<String> {
        let mut command = Command::new(self.programs.join(program));
        command.args(["-U", ROLE, "-h"]).arg(self.folder.path()).args(arguments);
        command::text(&mut command)
    }

    /// The last lines of the server's log.
    #[must_use]
    pub fn said(&self) -> String {
        super::process::tail(&self.log(), 30)
    }

    /// The process id of the server, when it runs.
    #[must_use]
    pub fn id(&self) -> Option<u32> {
        self.server.as_ref().map(Process::id)
    }

    fn data(&self) -> PathBuf {
        self.folder.path().join("data")
    }

    fn log(&self) -> PathBuf {
        self.folder.path().join("log")
    }

    /// One of the server's programs, as the user that it runs as.
    fn as_user(&self, program: &str) -> Command {
        let program = self.programs.join(program);
        let mut command = match &self.user {
            Some(user) => {
                let mut command = Command::new("setpriv");
                command.arg(format!("--reuid={}", user.uid)).arg(format!("--regid={}", user.gid));
                // A change of user takes an earlier parent-death signal away.
                command.args(["--clear-groups", "--pdeathsig", "KILL", "--"]).arg(program);
                command
            }
            None => Command::new(program),
        };
        command.current_dir(self.folder.path());
        command
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        if let Some(server) = &self.server {
            // Its processes have groups of their own; told so, it ends them too. Whoever drops waits for its end.
            let _ = server.signal(Signal::SIGQUIT);
            if let Some(mut server) = self.server.take() {
                let _ = server.wait(LIMIT);
            }
        }
    }
}

/// The folder of the newest server's programs: as Debian and Ubuntu have them, or in `PATH`.
fn programs() -> Option<PathBuf> {
    let version = |folder: &Path| folder.file_name()?.to_str()?.parse::<u32>().ok();
    let versions = fs::read_dir(VERSIONS).ok().into_iter().flatten().flatten().map(|entry| entry.path());
    let newest = versions
        .filter(|folder| folder.join("bin/initdb").exists() && folder.join("bin/postgres").exists())
        .max_by_key(|folder| version(folder).unwrap_or(0))
        .map(|folder| folder.join("bin"));
    newest.or_else(|| Some(command::find("initdb")?.canonicalize().ok()?.parent()?.to_owned()))
}

/// Runs an asynchronous test.
///
/// # Errors
/// Its own.
pub fn block_on<T>(test: impl Future<Output = Result<T>>) -> Result<T> {
    match tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build() {
        Ok(runtime) => runtime.block_on(test),
        Err(e) => bail!("no runtime: {e}"),
    }
}
