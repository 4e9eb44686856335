//! A software TPM (swtpm), and the count of the commands that it was given.

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use super::{process::Process, wait};

/// A TPM command code (TPM 2.0 Library Part 2, `TPM_CC`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct TpmCommand(pub u32);

impl TpmCommand {
    /// `TPM2_Quote`.
    pub const QUOTE: Self = Self(0x158);
    /// `TPM2_PCR_Extend`.
    pub const PCR_EXTEND: Self = Self(0x182);
}

/// One software TPM with its state folder.
#[derive(Debug)]
pub struct Tpm {
    folder: PathBuf,
    process: Process,
    detached: bool,
    count: bool,
    /// Socket at which a machine's QEMU finds it, instead of the socket of the TCTI.
    machine: Option<PathBuf>,
}

impl Tpm {
    /// Starts a TPM with state, sockets and log in `folder`. With `count` it logs every command.
    ///
    /// # Errors
    /// swtpm is missing or does not start.
    pub fn start(folder: &Path, detached: bool, count: bool) -> Result<Self> {
        fs::create_dir_all(folder.join("state"))?;
        let process = spawn(folder, detached, count, "startup-clear")?;
        Ok(Self { folder: folder.to_owned(), process, detached, count, machine: None })
    }

    /// Starts the TPM of a machine: QEMU gives it commands, by `socket`, and turns it on when the machine is turned on. It has
    /// certificates as that of [`Self::start_certified`].
    ///
    /// # Errors
    /// As [`Self::start_certified`].
    pub fn for_machine(folder: &Path, socket: &Path, authority: &Path, detached: bool) -> Result<Self> {
        manufacture(folder, authority)?;
        let process = spawn_for_machine(folder, socket, detached)?;
        let machine = Some(socket.to_owned());
        Ok(Self { folder: folder.to_owned(), process, detached, count: true, machine })
    }

    /// As [`Self::start`], of a TPM that was manufactured by `swtpm_setup`: it has certificates for its endorsement keys
    /// (RSA 2048 and P-384) from the local authority in `folder`'s sibling `authority`, see [`Self::authority`].
    ///
    /// # Errors
    /// As [`Self::start`], and the package swtpm-tools is missing.
    pub fn start_certified(folder: &Path, authority: &Path, detached: bool, count: bool) -> Result<Self> {
        manufacture(folder, authority)?;
        Self::start(folder, detached, count)
    }

    /// The TCTI by which the proxy and tpm2-tools reach it.
    #[must_use]
    pub fn tcti(&self) -> String {
        format!("swtpm:path={}", self.folder.join("tpm").display())
    }

    /// Puts bytes at an index of its NV storage, to be read by whoever reads the index itself. tpm2-tools do it, with
    /// files in `folder`.
    ///
    /// # Errors
    /// The tools are missing, or the TPM refuses.
    pub fn put(&self, folder: &Path, index: u32, bytes: &[u8]) -> Result<()> {
        let (file, index, size) = (folder.join("nv"), format!("{index:#x}"), bytes.len().to_string());
        fs::write(&file, bytes)?;
        let attributes = "ownerwrite|authread|ownerread|no_da";
        self.tool("tpm2_nvdefine", &["-C", "o", "-s", &size, "-a", attributes, &index])?;
        self.tool("tpm2_nvwrite", &["-C", "o", "-i", &file.display().to_string(), &index])
    }

    fn tool(&self, name: &str, arguments: &[&str]) -> Result<()> {
        let mut command = Command::new(name);
        command.args(arguments).env("TPM2TOOLS_TCTI", self.tcti());
        super::command::output(&mut command).map(|_| ())
    }

    /// How often `command` was given since the TPM was first started.
    ///
    /// # Errors
    /// The TPM's log cannot be read.
    pub fn commands(&self, command: TpmCommand) -> Result<u64> {
        Ok(self.all_commands()?.get(&command).copied().unwrap_or(0))
    }

    /// How many quotes it made.
    ///
    /// # Errors
    /// As [`Self::commands`].
    pub fn quotes(&self) -> Result<u64> {
        self.commands(TpmCommand::QUOTE)
    }

    /// Every command with its count.
    ///
    /// # Errors
    /// The TPM's log cannot be read.
    pub fn all_commands(&self) -> Result<BTreeMap<TpmCommand, u64>> {
        let log = fs::read(self.folder.join("commands.log")).context("the TPM's log is gone")?;
        Ok(count(&String::from_utf8_lossy(&log)))
    }

    /// Kills the TPM, as when it dies in the middle.
    ///
    /// # Errors
    /// It does not go.
    pub fn kill(&mut self) -> Result<()> {
        self.process.kill()
    }

    /// Stops the TPM and starts it again with the same state, as when its power is lost: its PCRs start anew and its
    /// reset count rises.
    ///
    /// # Errors
    /// It does not go or come.
    pub fn reset(&mut self) -> Result<()> {
        self.process.kill()?;
        self.process = match &self.machine {
            None => spawn(&self.folder, self.detached, self.count, "startup-clear")?,
            Some(socket) => spawn_for_machine(&self.folder, socket, self.detached)?,
        };
        Ok(())
    }

    /// Suspends the TPM and lets it go on: `TPM2_Shutdown(STATE)`, loss of power, `TPM2_Startup(STATE)`. Its PCRs stay
    /// and its restart count rises.
    ///
    /// # Errors
    /// It does not go or come.
    pub fn suspend(&mut self) -> Result<()> {
        let mut stream = UnixStream::connect(self.folder.join("tpm"))?;
        // TPM_ST_NO_SESSIONS, 12 bytes, TPM_CC_Shutdown, TPM_SU_STATE.
        stream.write_all(&[0x80, 1, 0, 0, 0, 12, 0, 0, 1, 0x45, 0, 1])?;
        let mut answer = [0; 10];
        stream.read_exact(&mut answer)?;
        ensure!(answer[6..] == [0; 4], "TPM2_Shutdown: {answer:02x?}");
        self.process.kill()?;
        self.process = spawn(&self.folder, self.detached, self.count, "startup-state")?;
        Ok(())
    }

    /// The process.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }
}

/// The certificates of an authority for software TPMs: its root, and its issuing one, which comes with no TPM.
#[must_use]
pub fn authority_certificates(authority: &Path) -> [PathBuf; 2] {
    [authority.join("swtpm-localca-rootca-cert.pem"), authority.join("issuercert.pem")]
}

/// Fills a TPM's state as its maker would.
fn manufacture(folder: &Path, authority: &Path) -> Result<()> {
    for path in [&folder.join("state"), authority] {
        fs::create_dir_all(path)?;
    }
    let (shown, options, setup, local) = (
        authority.display().to_string(),
        authority.join("options"),
        authority.join("setup.conf"),
        authority.join("localca.conf"),
    );
    let paths = format!(
        "statedir = {shown}\nsigningkey = {shown}/signkey.pem\nissuercert = {shown}/issuercert.pem\n\
         certserial = {shown}/certserial\n"
    );
    fs::write(&local, paths)?;
    fs::write(&options, "--platform-manufacturer Onequote\n--platform-version 1\n--platform-model lab\n")?;
    let tools = format!(
        "create_certs_tool = /usr/bin/swtpm_localca\ncreate_certs_tool_config = {}\n\
         create_certs_tool_options = {}\n",
        local.display(),
        options.display()
    );
    fs::write(&setup, tools)?;
    let mut command = Command::new("swtpm_setup");
    command.args(["--tpm2", "--create-ek-cert", "--not-overwrite", "--tpmstate"]).arg(folder.join("state"));
    // All banks, as a TPM has them that was not manufactured.
    command.args(["--pcr-banks", "sha1,sha256,sha384,sha512"]).arg("--config").arg(setup);
    super::command::output(&mut command).context("is the package swtpm-tools installed?")?;
    Ok(())
}

fn spawn(folder: &Path, detached: bool, count: bool, startup: &str) -> Result<Process> {
    for socket in ["tpm", "tpm.ctrl"] {
        let _ = fs::remove_file(folder.join(socket));
    }
    let mut command = Command::new("swtpm");
    command
        .args(["socket", "--tpm2", "--tpmstate", "dir=state"])
        .arg("--server")
        .arg(format!("type=unixio,path={}", folder.join("tpm").display()))
        .arg("--ctrl")
        .arg(format!("type=unixio,path={}", folder.join("tpm.ctrl").display()))
        .arg("--flags")
        .arg(format!("not-need-init,{startup}"))
        .current_dir(folder);
    if count {
        command.args(["--log", "file=commands.log,level=20"]);
    }
    let mut process = Process::spawn("swtpm", &command, &folder.join("swtpm.log"), detached)
        .context("is the package swtpm installed?")?;
    wait::for_true("the TPM's sockets", Duration::from_secs(20), || {
        process.check_alive()?;
        Ok(wait::listens(&folder.join("tpm"))? && wait::listens(&folder.join("tpm.ctrl"))?)
    })?;
    Ok(process)
}

fn spawn_for_machine(folder: &Path, socket: &Path, detached: bool) -> Result<Process> {
    let _ = fs::remove_file(socket);
    let mut command = Command::new("swtpm");
    command.args(["socket", "--tpm2", "--tpmstate", "dir=state", "--log", "file=commands.log,level=20", "--ctrl"]);
    command.arg(format!("type=unixio,path={}", socket.display())).current_dir(folder);
    let mut process = Process::spawn("swtpm", &command, &folder.join("swtpm.log"), detached)
        .context("is the package swtpm installed?")?;
    wait::for_true("the TPM's socket", Duration::from_secs(20), || {
        process.check_alive()?;
        wait::listens(socket)
    })?;
    Ok(process)
}

/// Counts commands in swtpm's log: the line after "SWTPM_IO_Read" begins with the command's header (tag u16, size u32,
/// code u32, big-endian, in hex).
fn count(log: &str) -> BTreeMap<TpmCommand, u64> {
    let mut counts = BTreeMap::new();
    let mut lines = log.lines();
    while let Some(line) = lines.next() {
        if !line.contains("SWTPM_IO_Read:") {
            continue;
        }
        let digits: String = lines.next().unwrap_or_default().split_whitespace().skip(6).take(4).collect();
        if let Ok(code) = u32::from_str_radix(&digits, 16) {
            *counts.entry(TpmCommand(code)).or_default() += 1;
        }
    }
    counts
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_counted_and_answers_are_not() {
        let log = " SWTPM_IO_Read: length 22\n 80 01 00 00 00 16 00 00 01 7A 00 00\n 00\n SWTPM_IO_Write: length 43\n 80 01 00 00 00 2B 00 00 00 00\n SWTPM_IO_Read: length 65\n 80 02 00 00 00 41 00 00 01 82 00\n";
        let counts = count(log);
        assert_eq!(counts.len(), 2);
        assert_eq!(counts[&TpmCommand::PCR_EXTEND], 1);
    }
}
