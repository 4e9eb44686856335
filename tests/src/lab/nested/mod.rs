//! A whole host in a VM: UEFI firmware that measures, a TPM, Debian with systemd and IMA, our proxy as its service, KVM, and
//! VMs of its own with the shim, reached over the kernel's AF_VSOCK.
//!
//! The verifier stays outside, in the [`World`]; so does the software TPM's process, as the chip is outside of what runs on a
//! machine.

mod image;
mod sleep;

use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context as _, Result, bail, ensure};
use onequote_proxy::launch::try_accelerator;
use serde_json::Value;

use super::console::{Answer, Console};
use super::image::ext4;
use super::machine::copy;
use super::process::{self, Process};
use super::tpm::{Tpm, authority_certificates};
use super::trees::{ignoring, with_lines, without_table};
use super::world::{Options, World};
use super::{machine, wait};

const CONFIGURATION: &str = include_str!("../../../../qemu-configs/nested-host/nested-host.cfg");

/// From power-on to systemd's units: 25 s on two idle cores under TCG.
const BOOT_LIMIT: Duration = Duration::from_secs(300);
const ANSWER_LIMIT: Duration = Duration::from_secs(120);
const STATUS_LIMIT: Duration = Duration::from_secs(30);
/// How long all guests of the host may take. A guest that hangs is told by the limit, and tried once more.
const GUEST_LIMIT: Duration = Duration::from_secs(240);

/// A host that is a VM.
#[derive(Debug)]
pub struct NestedHost {
    // QEMU goes before its TPM.
    qemu: Option<Process>,
    tpm: Tpm,
    folder: PathBuf,
    parts: image::Parts,
    guests: Vec<String>,
    /// Where the outer host leads to its proxy, which listens on the same port.
    port: u16,
    agent: Console,
    /// Lines of a policy's rule that allow the files of its disk's tree.
    rule: String,
    /// Whether it has a disk to swap to.
    swap: bool,
    detached: bool,
    /// Accelerator and processor.
    accelerator: (&'static str, &'static str),
    started: Instant,
}

impl NestedHost {
    /// A world for it: one without TPM and proxy of its own.
    ///
    /// # Errors
    /// As [`World::with`].
    pub fn world(keep: bool) -> Result<World> {
        // No TPM is started, and none is asked for by that name.
        World::with(Options { keep, tcti: Some("none".to_owned()), ..Options::default() })
    }

    /// Makes its disks and its TPM in the world's folder, with VMs of these names; nothing runs yet.
    ///
    /// # Errors
    /// A part cannot be made.
    pub fn install(world: &World, guests: &[&str]) -> Result<Self> {
        let folder = world.folder().join("host");
        let detached = world.options.keep;
        fs::create_dir_all(folder.join("agent"))?;
        let parts = image::Parts::prepare(world.assets(), &folder)?;
        copy(&parts.debian.root(), &folder.join("root.img"))?;
        let guests: Vec<String> = guests.iter().map(|&name| name.to_owned()).collect();
        let port = free_port()?;
        let host = image::Host { id: World::HOST, port, guests: &guests };
        host.install(world.assets(), &folder)?;
        parts.boot_disk(&folder, image::CMDLINE)?;
        let tree = tempfile::tempdir()?;
        ext4::extract(&folder.join("root.img"), tree.path())?;
        let (_, rule) = world.from_tree(&[tree.path()], &["/"], "host-files")?;
        copy(Path::new("/usr/share/OVMF/OVMF_VARS_4M.fd"), &folder.join("vars.fd"))
            .context("the package ovmf is needed")?;
        let accelerator = accelerator();
        configure(&folder, accelerator, port)?;
        let authority = authority(world);
        let tpm = Tpm::for_machine(&folder.join("tpm"), &folder.join("tpm.sock"), &authority, detached)?;
        let agent = Console::new(&folder.join("agent"));
        let (qemu, started) = (None, Instant::now());
        Ok(Self { qemu, tpm, folder, parts, guests, port, agent, rule, swap: false, detached, accelerator, started })
    }

    /// Its folder: disks, `console.log`, `qemu.log`, `console.sock` with a shell of root behind it.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// What runs it: `kvm` or `tcg`.
    #[must_use]
    pub fn accelerator(&self) -> &'static str {
        self.accelerator.0
    }

    /// Names of its VMs.
    #[must_use]
    pub fn guests(&self) -> &[String] {
        &self.guests
    }

    /// How many quotes its TPM has made.
    ///
    /// # Errors
    /// The TPM's log is gone.
    pub fn quotes(&self) -> Result<u64> {
        self.tpm.quotes()
    }

    /// The process ids of all that runs for it, first those to be ended first.
    #[must_use]
    pub fn process_ids(&mut self) -> Vec<u32> {
        let mut ids: Vec<u32> = self.qemu.iter().map(Process::id).collect();
        ids.push(self.tpm.process().id());
        ids
    }

    /// Turns it on.
    ///
    /// # Errors
    /// QEMU cannot be started.
    fn start(&mut self) -> Result<()> {
        // It goes when its machine is turned off.
        if self.tpm.process().exited()?.is_some() {
            self.tpm.reset()?;
        }
        for file in ["agent/console.log", "console.log"] {
            fs::write(self.folder.join(file), "")?;
        }
        let mut command = Command::new("qemu-system-x86_64");
        command.args(["-nodefaults", "-no-user-config", "-display", "none", "-readconfig", "vm.cfg"]);
        command.args(["-cpu", self.accelerator.1, "-name", "nested-host"]);
        command.args(["-qmp", "unix:qmp.sock,server=on,wait=off"]);
        if self.swap {
            command.args([
                "-drive",
                "file=swap.img,if=none,id=swap,format=raw",
                "-device",
                "virtio-blk-pci,drive=swap",
            ]);
        }
        let agent = "socket,id=agent,path=agent/console.sock,server=on,wait=off,logfile=agent/console.log";
        command.args(["-chardev", agent, "-device", "isa-serial,chardev=agent"]);
        command.current_dir(&self.folder);
        self.started = Instant::now();
        let log = self.folder.join("qemu.log");
        self.qemu = Some(Process::spawn("QEMU of the nested host", &command, &log, self.detached)?);
        Ok(())
    }

    /// Waits until its system takes commands for the `boots`th time. Returns the time since it was turned on.
    ///
    /// # Errors
    /// QEMU ends, or it does not come up in time.
    fn wait_up(&mut self, boots: usize) -> Result<Duration> {
        let agent = self.agent.clone();
        let console = self.folder.join("console.log");
        let qemu = self.qemu.as_mut().context("the nested host is off")?;
        wait::for_true("the nested host to be up", BOOT_LIMIT, || {
            qemu.check_alive()?;
            let text = fs::read_to_string(&console).unwrap_or_default();
            ensure!(!text.contains("Kernel panic"), "its console ends:\n{}", process::tail(&console, 30));
            Ok(agent.boots() >= boots)
        })
        .with_context(|| format!("its console ends:\n{}", process::tail(&console, 20)))?;
        Ok(self.started.elapsed())
    }

    /// Runs a line of shell on it, as root.
    ///
    /// # Errors
    /// It fails, or there is no answer.
    pub fn run(&mut self, line: &str) -> Result<String> {
        let answer = self.ask(line)?;
        ensure!(answer.status == 0, "`{line}` on the nested host: {answer:?}");
        Ok(answer.output)
    }

    /// As [`Self::run`], whatever it ends with.
    ///
    /// # Errors
    /// There is no answer.
    pub fn ask(&mut self, line: &str) -> Result<Answer> {
        self.qemu.as_mut().context("the nested host is off")?.check_alive()?;
        self.agent.ask(&format!("sh {line}"), ANSWER_LIMIT)
    }

    /// Gives a command (of `image/init.sh`) to the guest of one of its VMs.
    ///
    /// # Errors
    /// It fails, or there is no answer.
    pub fn guest(&mut self, vm: &str, words: &str) -> Result<String> {
        let answer = self.agent.ask(&format!("guest /srv/vm/{vm}/console.sock {words}"), ANSWER_LIMIT)?;
        ensure!(answer.status == 0, "`{words}` in the guest of {vm}: {answer:?}");
        Ok(answer.output)
    }

    /// Turns it on, and waits until its system is up, its proxy answers and each of its VMs has a guest whose list arrived. What
    /// did not come at first is tried once more and told: a guest that hangs, a host whose kernel dies of the emulated SVM.
    ///
    /// # Errors
    /// It does not come in two times.
    pub fn boot(&mut self, tell: &dyn Fn(&str)) -> Result<()> {
        self.start()?;
        let outcome = self.wait_all(tell);
        if outcome.is_err() && self.panicked() {
            tell("the nested host's kernel died; it is turned off and on again");
            if let Some(mut qemu) = self.qemu.take() {
                qemu.kill()?;
            }
            self.start()?;
            return self.wait_all(tell);
        }
        outcome
    }

    fn wait_all(&mut self, tell: &dyn Fn(&str)) -> Result<()> {
        self.wait_up(1)?;
        tell("the nested host's system is up");
        for vm in self.wait_guests()? {
            tell(&format!("the guest of {vm} hung and was started once more"));
        }
        tell(if self.guests.is_empty() {
            "its proxy answers"
        } else {
            "the lists of all guests have arrived at its proxy"
        });
        Ok(())
    }

    fn panicked(&self) -> bool {
        fs::read(self.folder.join("console.log"))
            .is_ok_and(|text| String::from_utf8_lossy(&text).contains("Kernel panic"))
    }

    /// Waits for its proxy and its guests' lists. Returns the VMs that had to be started again.
    fn wait_guests(&mut self) -> Result<Vec<String>> {
        let mut again = Vec::new();
        let mut since = Instant::now();
        loop {
            ensure!(!self.panicked(), "the nested host's kernel died");
            let missing = match self.missing_guests()? {
                Some(missing) if missing.is_empty() => return Ok(again),
                missing => missing.unwrap_or_else(|| self.guests.clone()),
            };
            if since.elapsed() > GUEST_LIMIT {
                ensure!(again.is_empty(), "no list from the guests of {missing:?}: {}", self.state());
                for vm in &missing {
                    self.run(&format!("systemctl restart onequote-vm@{vm}"))?;
                }
                (again, since) = (missing, Instant::now());
            }
            // Each look is a command on the nested host, which has other things to do.
            std::thread::sleep(Duration::from_millis(500));
        }
    }

    /// VMs whose guest's list has not arrived at its proxy; none while the proxy does not answer.
    fn missing_guests(&mut self) -> Result<Option<Vec<String>>> {
        self.qemu.as_mut().context("the nested host is off")?.check_alive()?;
        // What does not answer in time is asked again, or found dead.
        let answer = self.agent.ask("sh onequote-proxy status --json", STATUS_LIMIT);
        let Some(answer) = answer.ok().filter(|answer| answer.status == 0) else { return Ok(None) };
        let status: Value = serde_json::from_str(&answer.output).with_context(|| answer.output.clone())?;
        let vms = status["vms"].as_array().cloned().unwrap_or_default();
        let arrived =
            |name: &String| vms.iter().any(|vm| vm["name"] == **name && vm["entries"].as_u64().unwrap_or(0) > 0);
        Ok(Some(self.guests.iter().filter(|name| !arrived(name)).cloned().collect()))
    }

    /// For people: how its services are.
    fn state(&mut self) -> String {
        let line = "systemctl --no-pager --failed; journalctl --no-pager -n 60; tail -n 5 /srv/vm/*/console.log";
        self.ask(line).map_or_else(|error| format!("{error:#}"), |answer| answer.output)
    }

    /// Where its proxy is reached from outside.
    #[must_use]
    pub fn url(&self) -> String {
        format!("https://127.0.0.1:{}", self.port)
    }

    /// From its next start on its proxy is elsewhere.
    ///
    /// # Errors
    /// Its proxy's configuration, or that of its QEMU, cannot be changed.
    pub fn move_proxy(&mut self) -> Result<()> {
        let port = free_port()?;
        self.run(&format!("sed -i 's/:{}\"$/:{port}\"/' /etc/onequote/proxy.toml", self.port))?;
        self.port = port;
        configure(&self.folder, self.accelerator, port)
    }

    /// From its next start on it has no VMs.
    ///
    /// # Errors
    /// Its service manager refuses.
    pub fn forget_guests(&mut self) -> Result<()> {
        for vm in std::mem::take(&mut self.guests) {
            self.run(&format!("systemctl -q disable onequote-vm@{vm}; onequote-proxy kill {vm}"))?;
        }
        Ok(())
    }

    /// Puts a boot disk into its place whose kernel is told `words` as well; what is told at the next start.
    ///
    /// # Errors
    /// The disk cannot be made.
    pub fn tell_kernel(&self, words: &str) -> Result<()> {
        self.parts.boot_disk(&self.folder, &format!("{} {words}", image::CMDLINE))
    }

    /// Shuts its system down and waits for QEMU to end.
    ///
    /// # Errors
    /// It does not.
    pub fn power_off(&mut self) -> Result<()> {
        // Their guests do not listen to a power button; systemd would wait a minute and more for them.
        for vm in self.guests.clone() {
            self.run(&format!("onequote-proxy kill {vm}"))?;
        }
        // The answer may be cut by the end.
        let _ = self.agent.ask("sh systemctl --no-block poweroff", ANSWER_LIMIT);
        let mut qemu = self.qemu.take().context("the nested host is off")?;
        let status = qemu.wait(BOOT_LIMIT)?;
        if !status.success() {
            bail!("QEMU of the nested host ended with {status}: {}", process::tail(qemu.log(), 10));
        }
        Ok(())
    }
}

/// What a host for VMs writes and reads beside what a distribution does: its VMs' disks, its own log.
const HOST_FILES: [&str; 2] = ["/srv/vm/*/*", "/var/lib/onequote/*"];

impl World {
    /// Puts a policy in force for the nested host: firmware rules and VMs as learnt from what runs now, the files that the host may
    /// use from its disk's tree as it was before it ever ran. Registers are judged by firmware rules, not by their values.
    ///
    /// # Errors
    /// The verifier cannot ask the host, or refuses.
    pub fn set_nested_policy(&self, host: &NestedHost) -> Result<PathBuf> {
        let lines = ignoring(&host.rule, &HOST_FILES)?;
        self.set_learnt(|learnt| {
            let policy = without_table(&learnt, "[host.registers]")?;
            let policy = without_table(&policy, "[host.ima]")?;
            with_lines(&policy, "[host]", &lines)
        })
    }

    /// Lets the nested host join the verifier outside, over its network, as the operations manual has it: `serve` is started,
    /// a token made, and given to `onequote-proxy join` there. The authority of its TPM is among the verifier's roots.
    ///
    /// # Errors
    /// The verifier refuses, or does not learn where the proxy is.
    pub fn join_nested(&mut self, host: &mut NestedHost) -> Result<()> {
        self.verifier(&["init"])?.success()?;
        let [root, issuer] = authority_certificates(&authority(self)).map(|path| path.display().to_string());
        let url = self.start_door(
            "127.0.0.1:0",
            &["--software-ek-roots", &root, "--ek-intermediates", &issuer, "--no-reports"],
        )?;
        // What is loopback here is 10.0.2.2 there: QEMU's user network.
        let url = url.replace("//127.0.0.1:", "//10.0.2.2:");
        let token = self.token(&["--host", Self::HOST, "--software-tpm"])?;
        host.run(&format!("printf %s {token} | onequote-proxy join {url} --token-file - --name outside"))?;
        self.wait_told(host)
    }

    /// Waits until the nested host's proxy has told the verifier where it is.
    ///
    /// # Errors
    /// It does not in time.
    pub fn wait_told(&self, host: &NestedHost) -> Result<()> {
        wait::for_true("the verifier to know where the nested host's proxy is", ANSWER_LIMIT, || {
            Ok(self.verifier(&["hosts", "--json"])?.json()?[0]["url"] == host.url().as_str())
        })
    }
}

/// Where the authority for the TPMs of a world's nested hosts is.
fn authority(world: &World) -> PathBuf {
    world.folder().join("tpm-authority")
}

/// A port that nobody has, outside of those that the kernel hands out, so that it is still free later.
fn free_port() -> Result<u16> {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let start = since.subsec_micros() % 9_000;
    for port in (20_000 + start..).take(1000) {
        let port = u16::try_from(port)?;
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return Ok(port);
        }
    }
    bail!("no port is free")
}

/// Writes the configuration of its QEMU.
fn configure(folder: &Path, accelerator: (&str, &str), port: u16) -> Result<()> {
    let mut text = machine::adapt(CONFIGURATION, accelerator.0, 0, "");
    // With two processors the emulated SVM now and then lets an interrupt in before the host's state is back.
    if accelerator == TCG {
        text = text.replace("cpus = \"2\"", "cpus = \"1\"");
    }
    text = text.replace("127.0.0.1:20305-:20305", &format!("127.0.0.1:{port}-:{port}"));
    Ok(fs::write(folder.join("vm.cfg"), text)?)
}

/// Accelerator and processor.
const KVM: (&str, &str) = ("kvm", "host");
const TCG: (&str, &str) = ("tcg", "max,avx=off,avx2=off");

/// KVM where it runs stock kernels and nests; else TCG, whose emulated processor has SVM. Without AVX: what the kernel gains
/// by it on a processor it loses many times over where each of these instructions is emulated.
fn accelerator() -> (&'static str, &'static str) {
    let nests = || {
        ["kvm_intel", "kvm_amd"].iter().any(|module| {
            let file = format!("/sys/module/{module}/parameters/nested");
            fs::read_to_string(file).is_ok_and(|value| matches!(value.trim(), "1" | "Y"))
        })
    };
    match std::env::var("ONEQUOTE_ACCEL").as_deref() {
        Ok("kvm") => KVM,
        Ok("tcg") => TCG,
        _ if nests() && try_accelerator("qemu-system-x86_64".as_ref(), "q35", "kvm", "host").is_ok() => KVM,
        _ => TCG,
    }
}
