//! The verifier of a fleet: its own process, with a state folder, asked over HTTP and looked at in `/proc`.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::TcpStream,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use onequote_evidence::id::HostId;
use onequote_verifier::result::Verdict;
use serde_json::Value;

use crate::lab::{self, Process, Run, wait};

const LIMIT: Duration = Duration::from_secs(60);

/// A verifier.
pub struct Verifier {
    program: PathBuf,
    state: PathBuf,
    log: PathBuf,
    arguments: Vec<String>,
    process: Option<Process>,
    /// What processes that ended have used.
    spent: Duration,
    peak: u64,
}

impl Verifier {
    /// A verifier with its state in this folder; it does not run yet. `database` is where replicas meet.
    ///
    /// # Errors
    /// Its program cannot be built, or makes no identity.
    pub fn new(folder: &Path, database: Option<&str>) -> Result<Self> {
        let program = lab::verifier_program()?;
        let state = folder.join("verifier");
        let verifier = Self {
            program,
            log: folder.join("verifier.log"),
            arguments: database.map(|url| vec!["--database".to_owned(), url.to_owned()]).unwrap_or_default(),
            state,
            process: None,
            spent: Duration::ZERO,
            peak: 0,
        };
        verifier.run(&["init"])?.success()?;
        Ok(verifier)
    }

    /// Another process for the same hosts: same identity and authority, same database, a folder of its own.
    ///
    /// # Errors
    /// Of the file system.
    pub fn replica(&self, folder: &Path) -> Result<Self> {
        let state = folder.join("verifier");
        fs::create_dir_all(&state)?;
        for file in fs::read_dir(&self.state)? {
            let file = file?;
            if file.path().extension().is_some_and(|ending| ending == "pem") {
                fs::copy(file.path(), state.join(file.file_name()))?;
            }
        }
        Ok(Self {
            program: self.program.clone(),
            log: folder.join("verifier.log"),
            arguments: self.arguments.clone(),
            state,
            process: None,
            spent: Duration::ZERO,
            peak: 0,
        })
    }

    /// Its state folder.
    #[must_use]
    pub fn state(&self) -> &Path {
        &self.state
    }

    /// Runs a command of it to its end.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn run(&self, arguments: &[&str]) -> Result<Run> {
        let mut command = Command::new(&self.program);
        command.arg("--state").arg(&self.state).args(&self.arguments).args(arguments);
        Run::of(&mut command)
    }

    /// Starts `serve` with a door for hosts at this address (port 0 takes a free one).
    ///
    /// # Errors
    /// It does not start.
    pub fn start(&mut self, door: &str, period: Duration, more: &[&str]) -> Result<()> {
        let mut command = Command::new(&self.program);
        command.env("RUST_LOG", "warn").arg("--state").arg(&self.state).args(&self.arguments);
        command.args(["serve", "--listen", "127.0.0.1:0", "--enrol-listen", door]);
        command.args(["--period", &period.as_secs().max(1).to_string()]).args(more);
        let (api, hosts) = (self.state.join("serve.addr"), self.state.join("enrol.addr"));
        for file in [&api, &hosts] {
            let _ = fs::remove_file(file);
        }
        let mut process = Process::spawn("onequote-verifier serve", &command, &self.log, false)?;
        wait::for_true("the verifier to listen", LIMIT, || {
            process.check_alive()?;
            Ok([&api, &hosts].into_iter().all(|file| fs::metadata(file).is_ok_and(|data| data.len() > 0)))
        })?;
        self.process = Some(process);
        Ok(())
    }

    /// The address of its door for hosts.
    ///
    /// # Errors
    /// It does not run.
    pub fn door(&self) -> Result<String> {
        Ok(fs::read_to_string(self.state.join("enrol.addr"))?.trim().to_owned())
    }

    /// Kills it (SIGKILL): what it was doing is not done.
    ///
    /// # Errors
    /// It does not go.
    pub fn kill(&mut self) -> Result<()> {
        self.spent = self.cpu()?;
        self.peak = self.peak()?;
        self.process.take().context("the verifier does not run")?.kill()
    }

    /// Processor time that it has used.
    ///
    /// # Errors
    /// It does not run.
    pub fn cpu(&self) -> Result<Duration> {
        let id = self.process.as_ref().context("the verifier does not run")?.id();
        Ok(self.spent + cpu_of(&format!("/proc/{id}/stat"))?)
    }

    /// The most memory that it had at a time, in bytes (`VmHWM`).
    ///
    /// # Errors
    /// It does not run.
    pub fn peak(&self) -> Result<u64> {
        let id = self.process.as_ref().context("the verifier does not run")?.id();
        Ok(self.peak.max(status_of(&format!("/proc/{id}/status"), "VmHWM:")?))
    }

    /// Asks it over HTTP.
    ///
    /// # Errors
    /// It does not answer with JSON.
    pub fn get(&self, path: &str) -> Result<Value> {
        let (status, body) = self.request("GET", path)?;
        ensure!(status == 200, "GET {path}: {status}: {body}");
        Ok(serde_json::from_str(&body)?)
    }

    /// The verdict on a host, as it holds now; none before the first.
    ///
    /// # Errors
    /// It does not answer.
    pub fn verdict(&self, host: &HostId) -> Result<Option<Verdict>> {
        let (status, body) = self.request("GET", &format!("/v1/hosts/{host}"))?;
        match status {
            200 => Ok(Some(serde_json::from_str(&body)?)),
            404 => Ok(None),
            _ => anyhow::bail!("GET /v1/hosts/{host}: {status}: {body}"),
        }
    }

    /// Sends a request and gives status and body.
    ///
    /// # Errors
    /// There is no answer.
    pub fn request(&self, method: &str, path: &str) -> Result<(u16, String)> {
        let address = fs::read_to_string(self.state.join("serve.addr"))?;
        let mut stream = TcpStream::connect(address.trim())?;
        stream.set_read_timeout(Some(LIMIT))?;
        write!(stream, "{method} {path} HTTP/1.1\r\nHost: verifier\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        let (head, body) = answer.split_once("\r\n\r\n").context("no HTTP answer")?;
        let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).context("no HTTP status")?;
        Ok((status, body.to_owned()))
    }
}

/// Processor time of this process.
///
/// # Errors
/// `/proc` cannot be read.
pub fn own_cpu() -> Result<Duration> {
    cpu_of("/proc/self/stat")
}

/// The most memory that this process had at a time, in bytes.
///
/// # Errors
/// `/proc` cannot be read.
pub fn own_peak() -> Result<u64> {
    status_of("/proc/self/status", "VmHWM:")
}

/// Fields 14 and 15 of `/proc/PID/stat`, in ticks of 10 ms, which is what `USER_HZ` is on every Linux of ours.
fn cpu_of(path: &str) -> Result<Duration> {
    let text = fs::read_to_string(path)?;
    let (_, rest) = text.rsplit_once(')').context("no process status")?;
    let fields: Vec<u64> = rest.split_ascii_whitespace().skip(11).take(2).filter_map(|f| f.parse().ok()).collect();
    Ok(Duration::from_millis(10 * fields.iter().sum::<u64>()))
}

fn status_of(path: &str, key: &str) -> Result<u64> {
    let text = fs::read_to_string(path)?;
    let line = text.lines().find_map(|line| line.strip_prefix(key)).context("no such line in the status")?;
    let kib: u64 = line.trim().trim_end_matches(" kB").parse()?;
    Ok(kib * 1024)
}
