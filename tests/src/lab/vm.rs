//! One VM: its folder, its QEMU process, its vsock back end.

use std::fs;
use std::io::{Read as _, Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde_json::json;

use super::assets::Assets;
use super::console::{Answer, Console};
use super::machine::Machine;
use super::process::Process;
use super::qmp::Qmp;
use super::{base64, vsock, wait};

/// How long a guest may take until it is ready: UEFI under TCG on a busy machine is the slowest.
const BOOT_LIMIT: Duration = Duration::from_secs(180);
const ANSWER_LIMIT: Duration = Duration::from_secs(60);

/// What a VM is to be.
#[derive(Debug, Clone)]
pub struct VmSpec {
    /// Its name, also of its monitor socket.
    pub name: String,
    /// Its configuration.
    pub machine: Machine,
    /// Start QEMU with `-S`, so that somebody has to let it go (default).
    pub gated: bool,
    /// Give it a monitor in the proxy's folder (default).
    pub monitor: bool,
    /// Give it a vsock device (default).
    pub vsock: bool,
    /// Further words for the kernel's command line (not for UEFI): `lab.shim=no`, `lab.policy=no`.
    pub append: String,
    /// Further arguments for QEMU.
    pub arguments: Vec<String>,
}

impl VmSpec {
    /// A gated VM with monitor and vsock.
    #[must_use]
    pub fn new(name: &str, machine: Machine) -> Self {
        Self {
            name: name.to_owned(),
            machine,
            gated: true,
            monitor: true,
            vsock: true,
            append: String::new(),
            arguments: Vec::new(),
        }
    }
}

/// One VM, running or not.
#[derive(Debug)]
pub struct Vm {
    spec: VmSpec,
    folder: PathBuf,
    monitors: PathBuf,
    assets: &'static Assets,
    detached: bool,
    cid: u32,
    qemu: Option<Process>,
    back_end: Option<Process>,
    started: Instant,
    console: Console,
}

impl Vm {
    /// Makes the VM's folder; nothing is started.
    pub(crate) fn install(
        spec: VmSpec,
        folder: PathBuf,
        monitors: PathBuf,
        assets: &'static Assets,
        detached: bool,
    ) -> Result<Self> {
        fs::create_dir_all(&folder)?;
        spec.machine.install(&folder, assets, &spec.append)?;
        Ok(Self {
            console: Console::new(&folder),
            spec,
            folder,
            monitors,
            assets,
            detached,
            cid: vsock::fresh_cid(),
            qemu: None,
            back_end: None,
            started: Instant::now(),
        })
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.spec.name
    }

    /// What it was made to be; changes show at the next start.
    pub fn spec(&mut self) -> &mut VmSpec {
        &mut self.spec
    }

    /// Its folder, in which QEMU runs: `vm.cfg`, images, `console.log`, `qemu.log`.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Its monitor's socket.
    #[must_use]
    pub fn monitor(&self) -> PathBuf {
        self.monitors.join(format!("{}.qmp", self.spec.name))
    }

    /// Its guest CID.
    #[must_use]
    pub fn cid(&self) -> u32 {
        self.cid
    }

    /// The path without port of its vsock Unix sockets, where a back end is used.
    #[must_use]
    pub fn vsock_path(&self) -> PathBuf {
        self.monitors.join(format!("{}.vsock", self.spec.name))
    }

    /// The running QEMU.
    ///
    /// # Errors
    /// It was not started.
    pub fn qemu(&mut self) -> Result<&mut Process> {
        let name = &self.spec.name;
        self.qemu.as_mut().with_context(|| format!("VM {name} isn't running"))
    }

    /// Starts QEMU, and the vsock back end where one is needed. A gated VM then waits for the proxy, or for
    /// [`Self::release`].
    ///
    /// # Errors
    /// It runs already or does not start.
    pub fn start(&mut self) -> Result<()> {
        let mut command = Command::new("qemu-system-x86_64");
        command.args(self.arguments()?);
        if self.spec.gated {
            command.arg("-S");
        }
        if self.spec.monitor {
            let socket = self.monitor();
            let _ = fs::remove_file(&socket);
            command.arg("-qmp").arg(format!("unix:{},server=on,wait=off", socket.display()));
        }
        self.spawn(command)
    }

    /// Starts it by `onequote-proxy launch`, which adds `-S` and the monitor.
    ///
    /// # Errors
    /// It runs already or does not start.
    pub fn launch(&mut self, config: &Path) -> Result<()> {
        let mut command = Command::new(&self.assets.proxy);
        command.arg("--config").arg(config).args(["launch", "--name", &self.spec.name, "--"]);
        command.arg("qemu-system-x86_64").args(self.arguments()?);
        self.spawn(command)
    }

    fn spawn(&mut self, mut command: Command) -> Result<()> {
        command.current_dir(&self.folder);
        let _ = fs::remove_file(self.folder.join("console.sock"));
        // What the guest said before must not be taken for what it says now.
        let _ = fs::write(self.folder.join("console.log"), "");
        let log = self.folder.join("qemu.log");
        self.started = Instant::now();
        self.qemu = Some(Process::spawn(&format!("QEMU of {}", self.spec.name), &command, &log, self.detached)?);
        Ok(())
    }

    fn arguments(&mut self) -> Result<Vec<String>> {
        if let Some(qemu) = &mut self.qemu {
            ensure!(qemu.exited()?.is_some(), "VM {} runs already", self.spec.name);
        }
        let mut arguments: Vec<String> =
            ["-nodefaults", "-no-user-config", "-display", "none", "-readconfig", "vm.cfg"].map(str::to_owned).to_vec();
        arguments.extend(["-name".to_owned(), self.spec.name.clone()]);
        if let Some(mut old) = self.back_end.take() {
            old.kill()?;
        }
        if self.spec.vsock {
            let (more, back_end) = vsock::attach(
                &self.assets.transport,
                self.spec.machine,
                self.cid,
                &self.folder,
                &self.vsock_path(),
                self.detached,
            )?;
            arguments.extend(more);
            self.back_end = back_end;
        }
        arguments.extend(self.spec.arguments.iter().cloned());
        Ok(arguments)
    }

    /// Lets a gated VM go, where no proxy does.
    ///
    /// # Errors
    /// The monitor does not come or refuses.
    pub fn release(&mut self) -> Result<()> {
        self.qmp()?.execute("cont", &json!({}))?;
        Ok(())
    }

    /// A monitor connection, where no proxy has it.
    ///
    /// # Errors
    /// QEMU ends or there is no monitor.
    pub fn qmp(&mut self) -> Result<Qmp> {
        let socket = self.monitor();
        let qemu = self.qemu()?;
        wait::for_true("the monitor's socket", Duration::from_secs(20), || {
            qemu.check_alive()?;
            wait::listens(&socket)
        })?;
        Qmp::connect(&socket)
    }

    /// Waits until the guest's init has done all it does by itself. Returns the time since QEMU was started.
    ///
    /// # Errors
    /// QEMU ends, or the guest is not ready in time.
    pub fn wait_ready(&mut self) -> Result<Duration> {
        self.wait_boots(1)
    }

    /// Waits until the guest became ready for the `boots`th time in this QEMU process.
    ///
    /// # Errors
    /// As [`Self::wait_ready`].
    pub fn wait_boots(&mut self, boots: usize) -> Result<Duration> {
        let what = format!("the guest of {} to be ready", self.spec.name);
        let console = self.console.clone();
        let qemu = self.qemu()?;
        wait::for_true(&what, BOOT_LIMIT, || {
            qemu.check_alive()?;
            Ok(console.boots() >= boots)
        })?;
        Ok(self.started.elapsed())
    }

    /// True once the guest is ready.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.console.boots() > 0
    }

    /// The guest's console.
    pub fn console(&mut self) -> &mut Console {
        &mut self.console
    }

    /// Gives the guest a command of `image/init.sh` (`sh …`, `shim restart`, `dmesg`) and waits for the answer.
    ///
    /// # Errors
    /// There is no answer.
    pub fn ask(&mut self, command: &str) -> Result<Answer> {
        self.qemu()?.check_alive()?;
        self.console.ask(command, ANSWER_LIMIT)
    }

    /// Runs a program in the guest and returns its output.
    ///
    /// # Errors
    /// It fails, or there is no answer.
    pub fn run(&mut self, program: &str) -> Result<String> {
        let answer = self.ask(&format!("run {program}"))?;
        ensure!(answer.status == 0, "{program} in the guest: {answer:?}");
        Ok(answer.output)
    }

    /// Makes an executable script on the guest's disk (below `/disk`); `\n` begins a new line.
    ///
    /// # Errors
    /// It cannot be written, or there is no answer.
    pub fn write_program(&mut self, path: &str, script: &str) -> Result<()> {
        let answer = self.ask(&format!("write {path} {script}"))?;
        ensure!(answer.status == 0, "writing {path} in the guest: {answer:?}");
        Ok(())
    }

    /// The guest's IMA list as its kernel has it now, binary.
    ///
    /// # Errors
    /// There is no whole answer.
    pub fn ima_list(&mut self) -> Result<Vec<u8>> {
        let answer = self.ask("cat-ima")?;
        ensure!(answer.status == 0, "reading the list in the guest: {answer:?}");
        base64::decode(&answer.output)
    }

    /// The length of the guest's IMA list now.
    ///
    /// # Errors
    /// There is no answer.
    pub fn ima_count(&mut self) -> Result<u64> {
        // No `cat`: reading must not run (and so measure) a program.
        let answer = self.ask("sh read -r count </sys/kernel/security/ima/runtime_measurements_count; echo $count")?;
        answer.output.trim().parse().with_context(|| format!("the guest's count of measurements: {answer:?}"))
    }

    /// Lets the guest power itself off, and waits for QEMU to end.
    ///
    /// # Errors
    /// It does not.
    pub fn power_off(&mut self) -> Result<ExitStatus> {
        self.ask("poweroff")?;
        self.qemu()?.wait(Duration::from_secs(60))
    }

    /// Resets the guest from inside, and waits until it is ready again.
    ///
    /// # Errors
    /// It does not come back.
    pub fn reboot(&mut self) -> Result<()> {
        let boots = self.console.boots();
        self.ask("reboot")?;
        self.wait_boots(boots + 1)?;
        Ok(())
    }

    /// Kills QEMU and its back end, as a power cut does.
    ///
    /// # Errors
    /// They do not go.
    pub fn kill(&mut self) -> Result<()> {
        for process in [&mut self.qemu, &mut self.back_end].into_iter().flatten() {
            process.kill()?;
        }
        Ok(())
    }

    /// The processes, for whoever has to end a detached VM later.
    pub(crate) fn processes(&self) -> impl Iterator<Item = &Process> {
        self.qemu.iter().chain(&self.back_end)
    }

    /// Changes one byte of a file in the VM's folder, in its middle unless `offset` is given.
    ///
    /// # Errors
    /// There is no such file or it is shorter.
    pub fn flip_byte(&self, file: &str, offset: Option<u64>) -> Result<()> {
        let path = self.folder.join(file);
        let mut file = fs::File::options()
            .read(true)
            .write(true)
            .open(&path)
            .with_context(|| format!("cannot change {}", path.display()))?;
        let at = SeekFrom::Start(offset.unwrap_or(file.metadata()?.len() / 2));
        let mut byte = [0];
        file.seek(at)?;
        file.read_exact(&mut byte)?;
        byte[0] ^= 1;
        file.seek(at)?;
        file.write_all(&byte)?;
        Ok(())
    }

    /// Replaces a part of the VM's configuration file.
    ///
    /// # Errors
    /// `from` is not in it.
    pub fn edit_config(&self, from: &str, to: &str) -> Result<()> {
        let path = self.folder.join("vm.cfg");
        let text = fs::read_to_string(&path)?;
        ensure!(text.contains(from), "{} has no {from}", path.display());
        fs::write(&path, text.replace(from, to))?;
        Ok(())
    }
}
