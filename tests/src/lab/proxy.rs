//! The proxy of a world: its configuration, its life, its commands.

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result};
use serde_json::Value;

use super::process::Process;
use super::verifier::Run;
use super::world::World;
use super::{command, wait};

/// How long a guest's list may take to reach the proxy once the guest is up.
const REPORT_LIMIT: Duration = Duration::from_secs(60);

/// What a test may want otherwise in the proxy's configuration. Takes effect at the next start.
#[derive(Debug, Clone, Default)]
pub struct ProxySettings {
    /// Reference file: a VM that does not match it is not let go.
    pub enforce: Option<PathBuf>,
    /// Further lines at the head of the configuration, before its tables.
    pub head: String,
    /// Run it as this user, from this copy of the program. Needs root.
    pub user: Option<(u32, PathBuf)>,
    /// Run this program instead of the one that was built.
    pub program: Option<PathBuf>,
    /// Another way to the TPM than the world's own.
    pub tcti: Option<String>,
    /// Further lines of the table `tpm`.
    pub tpm: String,
    /// Further lines of the table `guest`.
    pub guest: String,
    /// Further tables.
    pub tables: String,
    /// Environment of the process.
    pub environment: Vec<(String, String)>,
    /// The certificate of a verifier that may ask.
    pub(crate) verifier: Option<PathBuf>,
}

impl World {
    /// The proxy's settings.
    pub fn settings(&mut self) -> &mut ProxySettings {
        &mut self.settings
    }

    /// The proxy's configuration file.
    #[must_use]
    pub fn proxy_config(&self) -> PathBuf {
        self.folder().join("proxy.toml")
    }

    /// The proxy's state folder.
    #[must_use]
    pub fn proxy_state(&self) -> PathBuf {
        self.folder().join("proxy")
    }

    /// Writes the proxy's configuration as the settings have it.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write_proxy_config(&self) -> Result<()> {
        let mut text = format!(
            "host_id = {:?}\nstate_dir = {:?}\nrun_dir = {:?}\nlisten = \"127.0.0.1:0\"\n{}\n",
            Self::HOST,
            self.proxy_state(),
            self.folder().join("run"),
            self.settings.head,
        );
        let tcti = self.settings.tcti.clone().unwrap_or_else(|| self.tcti());
        text += &format!("\n[tpm]\ntcti = {tcti:?}\n{}", self.settings.tpm);
        // One world's shims must not arrive at another's proxy: AF_VSOCK ports are one space for the whole machine.
        let vsock = self.assets().kernel_vsock();
        text += &format!("\n[guest]\nvsock = {vsock}\nunix = true\n{}", self.settings.guest);
        if let Some(references) = &self.settings.enforce {
            text += &format!("\n[enforce]\nreferences = {references:?}\n");
        }
        if let Some(certificate) = &self.settings.verifier {
            text += &format!("\n[[verifiers]]\nname = \"lab\"\ncertificate = {certificate:?}\n");
        }
        text += &self.settings.tables;
        fs::write(self.proxy_config(), text)?;
        Ok(())
    }

    /// Runs a command of the proxy to its end: `init`, `status --json`, `log --json`, `measure FILE`, …
    ///
    /// # Errors
    /// It cannot be started. Its exit code is in the result.
    pub fn proxy_command(&self, arguments: &[&str]) -> Result<Run> {
        let mut command = Command::new(&self.assets().proxy);
        command.arg("--config").arg(self.proxy_config()).args(arguments);
        Run::of(&mut command)
    }

    /// The list of the last boot of VM `name`'s guest as the proxy has it, in the kernel's binary format.
    ///
    /// # Errors
    /// The command fails.
    pub fn proxy_export(&self, name: &str) -> Result<Vec<u8>> {
        let mut command = Command::new(&self.assets().proxy);
        command.arg("--config").arg(self.proxy_config()).args(["export-ima", name]);
        command::output(&mut command)
    }

    /// The same of another boot.
    ///
    /// # Errors
    /// The command fails.
    pub fn proxy_export_boot(&self, name: &str, boot: u32) -> Result<Vec<u8>> {
        let mut command = Command::new(&self.assets().proxy);
        command.arg("--config").arg(self.proxy_config()).args(["export-ima", name, "--boot", &boot.to_string()]);
        command::output(&mut command)
    }

    /// What `status --json` has of VM `name`; null when it has nothing.
    ///
    /// # Errors
    /// The command fails.
    pub fn vm_status(&self, name: &str) -> Result<Value> {
        let status = self.proxy_status()?;
        let vms = status["vms"].as_array().map_or(&[][..], Vec::as_slice);
        Ok(vms.iter().find(|vm| vm["name"] == name).cloned().unwrap_or_default())
    }

    /// Makes the proxy's identity and starts it without a verifier: its own certificate stands in for one.
    ///
    /// # Errors
    /// One of these steps fails.
    pub fn start_proxy_alone(&mut self) -> Result<()> {
        self.write_proxy_config()?;
        self.proxy_command(&["init"])?.success()?;
        self.settings.verifier = Some(self.proxy_state().join("certificate.pem"));
        self.start_proxy()
    }

    /// Starts the proxy and waits until it listens.
    ///
    /// # Errors
    /// It ends, or does not listen in time.
    pub fn start_proxy(&mut self) -> Result<()> {
        self.spawn_proxy()?;
        self.wait_proxy_up()
    }

    /// Starts the proxy without waiting for it.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn spawn_proxy(&mut self) -> Result<()> {
        self.write_proxy_config()?;
        let _ = fs::remove_file(self.proxy_state().join("listen.addr"));
        let mut command = match &self.settings.user {
            None => Command::new(self.settings.program.as_ref().unwrap_or(&self.assets().proxy)),
            Some((user, program)) => {
                let mut command = Command::new("setpriv");
                command.args(["--reuid", &user.to_string(), "--regid", &user.to_string(), "--clear-groups", "--"]);
                command.arg(program);
                command
            }
        };
        command.arg("--config").arg(self.proxy_config()).arg("run");
        command.envs(self.settings.environment.iter().map(|(key, value)| (key, value)));
        let log = self.folder().join("log/proxy.log");
        self.proxy = Some(Process::spawn("onequote-proxy", &command, &log, self.options.keep)?);
        Ok(())
    }

    /// Waits until the started proxy listens.
    ///
    /// # Errors
    /// It ends, or does not listen in time.
    pub fn wait_proxy_up(&mut self) -> Result<()> {
        let address = self.proxy_state().join("listen.addr");
        let proxy = self.proxy()?;
        wait::for_true("the proxy to listen", Duration::from_secs(60), || {
            proxy.check_alive()?;
            Ok(fs::metadata(&address).is_ok_and(|data| data.len() > 0))
        })
    }

    /// The running proxy.
    ///
    /// # Errors
    /// It was not started.
    pub fn proxy(&mut self) -> Result<&mut Process> {
        self.proxy.as_mut().context("the proxy was not started")
    }

    /// `https://` and where the proxy listens.
    ///
    /// # Errors
    /// It does not listen.
    pub fn proxy_url(&self) -> Result<String> {
        let address = fs::read_to_string(self.proxy_state().join("listen.addr"))
            .context("the proxy does not say where it listens")?;
        Ok(format!("https://{}", address.trim()))
    }

    /// Waits until every running VM's guest is ready and the proxy has all that its guest has measured so far.
    ///
    /// # Errors
    /// A guest isn't ready in time, or its list does not arrive.
    pub fn wait_all_reported(&mut self) -> Result<()> {
        self.wait_all_ready()?;
        let names: Vec<String> = self.vms.iter().map(|vm| vm.name().to_owned()).collect();
        for name in names {
            self.wait_until(&format!("the list of {name}'s guest"), REPORT_LIMIT, |world| {
                let own = world.vm(&name)?.ima_count()?;
                Ok((world.vm_status(&name)?["entries"] == own).then_some(()))
            })?;
        }
        Ok(())
    }

    /// Waits until VM `name`, whose QEMU has ended, is gone for the proxy, too: its end is logged, with the digests of its
    /// images.
    ///
    /// # Errors
    /// It stays.
    pub fn wait_gone(&mut self, name: &str) -> Result<()> {
        let what = format!("the end of {name} to be logged");
        self.wait_until(&what, REPORT_LIMIT, |world| Ok(world.vm_status(name)?.is_null().then_some(())))
    }

    /// The proxy's `status --json`.
    ///
    /// # Errors
    /// The command fails.
    pub fn proxy_status(&self) -> Result<Value> {
        self.proxy_command(&["status", "--json"])?.json()
    }

    /// Waits until the proxy says that VM `name` runs.
    ///
    /// # Errors
    /// It doesn't in time.
    pub fn wait_running(&mut self, name: &str) -> Result<()> {
        self.wait_until("the proxy to let the VM run", Duration::from_secs(60), |world| {
            Ok((world.vm_status(name)?["run_state"] == "running").then_some(()))
        })
    }
}
