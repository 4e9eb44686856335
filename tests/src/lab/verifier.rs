//! The verifier of a world, by its command line.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::TcpStream,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;

use super::{process::Process, verdict::Verdict, wait, world::World};

/// What a command that ran to its end left.
#[derive(Debug, Clone)]
pub struct Run {
    /// The command, for messages.
    pub command: String,
    /// Exit code; -1 when a signal ended it.
    pub code: i32,
    /// Standard output.
    pub output: String,
    /// Standard error.
    pub errors: String,
}

impl Run {
    pub(crate) fn of(command: &mut Command) -> Result<Self> {
        let shown = format!("{command:?}");
        let output = command.output().with_context(|| format!("cannot start {shown}"))?;
        Ok(Self {
            command: shown,
            code: output.status.code().unwrap_or(-1),
            output: String::from_utf8_lossy(&output.stdout).into_owned(),
            errors: String::from_utf8_lossy(&output.stderr).into_owned(),
        })
    }

    /// Passes on a run that ended with 0.
    ///
    /// # Errors
    /// It ended with something else; the text has what it said.
    pub fn success(self) -> Result<Self> {
        match self.code {
            0 => Ok(self),
            code => bail!("{} ended with {code}: {}{}", self.command, self.errors, self.output),
        }
    }

    /// Standard output as JSON, whatever the exit code.
    ///
    /// # Errors
    /// It is none.
    pub fn json(&self) -> Result<Value> {
        serde_json::from_str(&self.output).with_context(|| {
            format!("{} (exit code {}) gave no JSON: {}{}", self.command, self.code, self.errors, self.output)
        })
    }
}

impl World {
    /// The verifier's state folder.
    #[must_use]
    pub fn verifier_state(&self) -> PathBuf {
        self.folder().join("verifier")
    }

    /// Runs a command of the verifier to its end.
    ///
    /// # Errors
    /// It cannot be started. Its exit code is in the result.
    pub fn verifier(&self, arguments: &[&str]) -> Result<Run> {
        let mut command = Command::new(&self.assets().verifier);
        command.arg("--state").arg(self.verifier_state());
        if let Some(url) = &self.database {
            command.args(["--database", url]);
        }
        Run::of(command.args(arguments))
    }

    /// Makes the identities of proxy and verifier, starts the proxy, and enrols the host.
    ///
    /// # Errors
    /// One of these steps fails.
    pub fn start_enrolled(&mut self) -> Result<()> {
        self.verifier(&["init"])?.success()?;
        self.settings.verifier = Some(self.verifier_state().join("certificate.pem"));
        self.write_proxy_config()?;
        self.proxy_command(&["init"])?.success()?;
        self.start_proxy()?;
        self.enrol()
    }

    /// Lets the host, whose proxy runs, join the verifier as the README has it: `serve` is started, a token made, and given to
    /// `onequote-proxy join`. Gives the URL at which it joined.
    ///
    /// # Errors
    /// One of these steps fails, or the verifier refuses: a TPM that is not ours must have a certificate that leads to these roots.
    pub fn join(&mut self, ek_roots: Option<&Path>) -> Result<String> {
        self.verifier(&["init"])?.success()?;
        let roots = ek_roots.map(|folder| folder.to_string_lossy());
        let mut arguments: Vec<&str> = roots.iter().flat_map(|folder| ["--ek-roots", folder]).collect();
        // Its worlds show hosts that are asked.
        arguments.push("--no-reports");
        let url = self.start_door("127.0.0.1:0", &arguments)?;
        let software: &[&str] = if self.tpm.is_some() { &["--software-tpm"] } else { &[] };
        let token = self.token(&[&["--host", Self::HOST], software].concat())?;
        let file = self.folder().join("token");
        fs::write(&file, token)?;
        self.proxy_command(&["join", &url, "--token-file", &file.to_string_lossy()])?.success()?;
        Ok(url)
    }

    /// Enrols the host at the verifier as the proxy is now: with its address, key and certificate.
    ///
    /// # Errors
    /// The verifier refuses.
    pub fn enrol(&mut self) -> Result<()> {
        self.enrol_with(&[])
    }

    /// Tells the verifier of the enrolled host's new address, after the proxy started again.
    ///
    /// # Errors
    /// The verifier refuses.
    pub fn enrol_again(&mut self) -> Result<()> {
        self.enrol_with(&["--replace"])
    }

    fn enrol_with(&mut self, more: &[&str]) -> Result<()> {
        let url = self.proxy_url()?;
        let (key, certificate) = (self.proxy_state().join("ak.pub"), self.proxy_state().join("certificate.pem"));
        let (key, certificate) = (key.to_string_lossy(), certificate.to_string_lossy());
        let mut arguments = vec!["enrol", Self::HOST, "--ak", &key, "--certificate", &certificate];
        arguments.extend(["--url", &url]);
        arguments.extend(more);
        if self.tpm.is_some() {
            arguments.push("--software-tpm");
        }
        self.verifier(&arguments)?.success()?;
        Ok(())
    }

    /// Takes the host's and VMs' state now for good: learns a policy and puts it in force. Returns its file.
    ///
    /// # Errors
    /// The verifier cannot ask the host, or refuses.
    pub fn learn_policy(&self) -> Result<PathBuf> {
        let file = self.folder().join("policy.toml");
        let path = file.to_string_lossy();
        self.verifier(&["policy", "learn", Self::HOST, "-o", &path])?.success()?;
        // A world shares the machine: VMs of others run here, and this host's proxy sees them.
        let learnt = fs::read_to_string(&file)?;
        ensure!(learnt.contains("[host]\n"), "a policy without [host]: {learnt}");
        let learnt = learnt.replacen("[host]\n", "[host]\nunmanaged = \"allowed\"\n", 1);
        // Tests command their VMs past the proxy.
        fs::write(&file, learnt.replace("# To allow that: monitors =", "monitors ="))?;
        self.verifier(&["policy", "set", Self::HOST, &path])?.success()?;
        Ok(file)
    }

    /// Asks the host once: `attest HOST --json`. The exit code says whether all is trusted.
    ///
    /// # Errors
    /// The verifier cannot be started.
    pub fn attest(&self) -> Result<Run> {
        self.verifier(&["attest", Self::HOST, "--json"])
    }

    /// Asks the host once: the verdict whatever it is, and the bytes of evidence that came for it.
    ///
    /// # Errors
    /// The verifier gives none.
    pub fn attest_counted(&self) -> Result<(Verdict, u64)> {
        let run = self.attest()?;
        let bytes = received(&run.errors);
        let bytes = bytes.with_context(|| format!("the verifier does not say what it received: {}", run.errors))?;
        Ok((Verdict::of(&run)?, bytes))
    }

    /// Waits until `serve` has asked the host of its own accord. Gives the bytes of evidence that came for the first time.
    ///
    /// # Errors
    /// It does not in time, or is not running.
    pub fn wait_served(&mut self) -> Result<u64> {
        let log = self.folder().join("log/serve.log");
        let serve = self.serve.as_mut().context("the verifier does not serve")?;
        wait::until("serve to ask a host that has joined", Duration::from_secs(60), || {
            serve.check_alive()?;
            let text = fs::read_to_string(&log)?;
            Ok(received(&text).filter(|_| text.contains(": attested ")))
        })
    }

    /// Asks the host once, for the verdict whatever it is.
    ///
    /// # Errors
    /// The verifier gives none.
    pub fn verdict(&self) -> Result<Verdict> {
        Verdict::of(&self.attest()?)
    }

    /// Starts `serve` with this period in seconds; it ends with the world.
    ///
    /// # Errors
    /// It cannot be started, or does not listen in time.
    pub fn start_serve(&mut self, period: u32) -> Result<()> {
        self.start_serve_with(period, &[])
    }

    /// The same with further arguments.
    ///
    /// # Errors
    /// As [`Self::start_serve`].
    pub fn start_serve_with(&mut self, period: u32, more: &[&str]) -> Result<()> {
        let mut command = Command::new(&self.assets().verifier);
        command.arg("--state").arg(self.verifier_state());
        command.args(["serve", "--listen", "127.0.0.1:0", "--period", &period.to_string()]).args(more);
        let _ = fs::remove_file(self.verifier_state().join("serve.addr"));
        let log = self.folder().join("log/serve.log");
        let mut process = Process::spawn("onequote-verifier serve", &command, &log, self.options.keep)?;
        let address = self.verifier_state().join("serve.addr");
        wait::for_true("the verifier to listen", Duration::from_secs(60), || {
            process.check_alive()?;
            Ok(fs::metadata(&address).is_ok_and(|data| data.len() > 0))
        })?;
        self.serve = Some(process);
        Ok(())
    }

    /// Ends `serve`.
    ///
    /// # Errors
    /// It does not go.
    pub fn stop_serve(&mut self) -> Result<()> {
        let mut serve = self.serve.take().context("the verifier does not serve")?;
        serve.terminate()?;
        Ok(())
    }

    /// Starts `serve` with a door at which hosts join, at this address (port 0 takes a free one). Gives its URL.
    ///
    /// # Errors
    /// As [`Self::start_serve`].
    pub fn start_door(&mut self, address: &str, more: &[&str]) -> Result<String> {
        self.start_door_with(3600, address, more)
    }

    /// The same with a period in seconds.
    ///
    /// # Errors
    /// As [`Self::start_serve`].
    pub fn start_door_with(&mut self, period: u32, address: &str, more: &[&str]) -> Result<String> {
        let file = self.verifier_state().join("enrol.addr");
        let _ = fs::remove_file(&file);
        let mut arguments = vec!["--enrol-listen", address];
        arguments.extend(more);
        self.start_serve_with(period, &arguments)?;
        let serve = self.serve.as_mut().context("the verifier does not serve")?;
        wait::for_true("the door for hosts", Duration::from_secs(60), || {
            serve.check_alive()?;
            Ok(fs::metadata(&file).is_ok_and(|data| data.len() > 0))
        })?;
        Ok(format!("https://{}", fs::read_to_string(&file)?.trim()))
    }

    /// Makes a token: `token create` with these arguments.
    ///
    /// # Errors
    /// The verifier refuses.
    pub fn token(&self, arguments: &[&str]) -> Result<String> {
        let mut command = vec!["token", "create"];
        command.extend(arguments);
        Ok(self.verifier(&command)?.success()?.output.trim().to_owned())
    }

    /// The audit log.
    ///
    /// # Errors
    /// The verifier does not show it.
    pub fn audit(&self) -> Result<Vec<Value>> {
        let log = self.verifier(&["audit", "--json"])?.success()?.json()?;
        Ok(log.as_array().cloned().unwrap_or_default())
    }

    /// Whether the audit log says that `what` was asked and ended with `result`.
    ///
    /// # Errors
    /// As [`Self::audit`].
    pub fn audited(&self, what: &str, result: &str) -> Result<bool> {
        Ok(self.audit()?.iter().any(|entry| entry["what"] == what && entry["result"] == result))
    }

    /// The last verdict on the host, as `serve` shows it.
    ///
    /// # Errors
    /// It does not answer with one.
    pub fn served_verdict(&self) -> Result<Verdict> {
        let (status, body) = self.api("GET", &format!("/v1/hosts/{}", Self::HOST))?;
        Ok(Verdict::of_json(if status == 200 { 0 } else { 1 }, body))
    }

    /// Has `serve` ask the host now, for the verdict.
    ///
    /// # Errors
    /// It does not answer with one.
    pub fn ask_served(&self) -> Result<Verdict> {
        let (status, body) = self.api("POST", &format!("/v1/hosts/{}/attest", Self::HOST))?;
        Ok(Verdict::of_json(if status == 200 { 0 } else { 1 }, body))
    }

    /// What `serve` lists of the host.
    ///
    /// # Errors
    /// It does not answer with a list.
    pub fn served_line(&self) -> Result<Value> {
        let (_, body) = self.api("GET", "/v1/hosts")?;
        let lines = body.as_array().context("a list")?;
        Ok(lines.iter().find(|line| line["id"] == Self::HOST).cloned().unwrap_or_default())
    }

    /// A request to `serve`: status and body.
    ///
    /// # Errors
    /// It does not answer with JSON.
    pub fn api(&self, method: &str, path: &str) -> Result<(u16, Value)> {
        let address = fs::read_to_string(self.verifier_state().join("serve.addr"))?;
        let mut stream = TcpStream::connect(address.trim())?;
        stream.set_read_timeout(Some(Duration::from_secs(90)))?;
        write!(stream, "{method} {path} HTTP/1.1\r\nHost: verifier\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        let (head, body) = answer.split_once("\r\n\r\n").context("no HTTP answer")?;
        let status = head.split(' ').nth(1).and_then(|word| word.parse().ok()).context("no HTTP status")?;
        let body = serde_json::from_str(body).with_context(|| format!("{method} {path}: {head}\n{body}"))?;
        Ok((status, body))
    }
}

/// The bytes that the first evidence of a log had.
fn received(log: &str) -> Option<u64> {
    let said = log.split("evidence received bytes=").nth(1)?;
    said.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
}
