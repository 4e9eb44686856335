//! One host and its verifier, in a folder of their own.

use std::fs;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context as _, Result};

use super::assets::Assets;
use super::process::Process;
use super::proxy::ProxySettings;
use super::tpm::Tpm;
use super::vm::{Vm, VmSpec};
use super::vsock::Turn;
use super::{report, wait};

/// How a world differs from the usual one of a test.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// Leave processes and folder in place when the value goes.
    pub keep: bool,
    /// TCTI of a TPM that is there already (`device:/dev/tpmrm0`) instead of a software TPM of its own.
    pub tcti: Option<String>,
    /// Don't count the TPM's commands: for benches.
    pub no_count: bool,
    /// The software TPM has certificates for its endorsement keys, from the authority in this folder.
    pub tpm_authority: Option<PathBuf>,
}

/// A host with its TPM, proxy and VMs, and a verifier.
///
/// Folder layout: `tpm/`, `proxy/` (state), `proxy.toml`, `run/vms/` (monitors), `vm/NAME/`, `verifier/` (state), `log/`.
#[derive(Debug)]
pub struct World {
    // Order matters: VMs go before the proxy, the proxy before the TPM, the folder last.
    pub(crate) vms: Vec<Vm>,
    pub(crate) proxy: Option<Process>,
    pub(crate) serve: Option<Process>,
    pub(crate) tpm: Option<Tpm>,
    pub(crate) settings: ProxySettings,
    pub(crate) options: Options,
    /// The URL of the verifier's database; its folder's own file unless given.
    pub(crate) database: Option<String>,
    assets: &'static Assets,
    folder: Option<tempfile::TempDir>,
    path: PathBuf,
    guard: Guard,
    /// With the kernel's vsock all worlds share one port: one world at a time.
    _turn: Option<Turn>,
}

impl World {
    /// The host's id in every world.
    pub const HOST: &'static str = "lab-host";

    /// A world with a running software TPM and nothing else.
    ///
    /// # Errors
    /// A guest part cannot be built, or the TPM does not start.
    pub fn new() -> Result<Self> {
        Self::with(Options::default())
    }

    /// As [`Self::new`], with options.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn with(options: Options) -> Result<Self> {
        let assets = Assets::prepare()?;
        let turn = if assets.kernel_vsock() { Some(Turn::take()?) } else { None };
        // Short, whatever TMPDIR is: a Unix socket's path has 108 bytes at most.
        let folder = tempfile::Builder::new().prefix("oq-").tempdir_in("/tmp")?;
        let path = folder.path().to_owned();
        let guard = Guard::set(&path)?;
        for part in ["tpm", "proxy", "run/vms", "vm", "verifier", "log"] {
            fs::create_dir_all(path.join(part))?;
        }
        let tpm = match options.tcti {
            Some(_) => None,
            None => {
                let (folder, count) = (path.join("tpm"), !options.no_count);
                Some(match &options.tpm_authority {
                    Some(authority) => Tpm::start_certified(&folder, authority, options.keep, count)?,
                    None => Tpm::start(&folder, options.keep, count)?,
                })
            }
        };
        Ok(Self {
            vms: Vec::new(),
            proxy: None,
            serve: None,
            tpm,
            settings: ProxySettings::default(),
            options,
            database: None,
            assets,
            folder: Some(folder),
            path,
            guard,
            _turn: turn,
        })
    }

    /// Runs a test in a world of its own: when it fails or panics, every log of the world is printed.
    ///
    /// # Panics
    /// The test failed.
    pub fn test(test: impl FnOnce(&mut Self) -> Result<()>) {
        Self::test_with(Options::default(), test);
    }

    /// As [`Self::test`], in a world with these options.
    ///
    /// # Panics
    /// The test failed.
    #[allow(clippy::panic)]
    pub fn test_with(options: Options, test: impl FnOnce(&mut Self) -> Result<()>) {
        let mut world = match Self::with(options) {
            Ok(world) => world,
            Err(error) => panic!("no world for this test: {error:#}"),
        };
        if let Err(error) = test(&mut world) {
            // Panicking is how a test fails; the world prints its logs while it goes.
            panic!("{error:#}");
        }
    }

    /// Its folder.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.path
    }

    /// The folder of monitors that the proxy watches.
    #[must_use]
    pub fn monitors(&self) -> PathBuf {
        self.path.join("run/vms")
    }

    /// What guests and host are made of.
    #[must_use]
    pub fn assets(&self) -> &'static Assets {
        self.assets
    }

    /// The software TPM.
    ///
    /// # Errors
    /// This world uses another TPM.
    pub fn tpm(&mut self) -> Result<&mut Tpm> {
        self.tpm.as_mut().context("this world has no TPM of its own")
    }

    /// The TCTI of the world's TPM.
    #[must_use]
    pub fn tcti(&self) -> String {
        match (&self.options.tcti, &self.tpm) {
            (Some(tcti), _) => tcti.clone(),
            (None, Some(tpm)) => tpm.tcti(),
            (None, None) => String::new(),
        }
    }

    /// Makes a VM, not started.
    ///
    /// # Errors
    /// Its folder cannot be filled.
    pub fn add_vm(&mut self, spec: VmSpec) -> Result<&mut Vm> {
        let folder = self.path.join("vm").join(&spec.name);
        let vm = Vm::install(spec, folder, self.monitors(), self.assets, self.options.keep)?;
        self.vms.push(vm);
        self.vms.last_mut().context("a VM was just added")
    }

    /// The VM called `name`.
    ///
    /// # Errors
    /// There is none.
    pub fn vm(&mut self, name: &str) -> Result<&mut Vm> {
        self.vms.iter_mut().find(|vm| vm.name() == name).with_context(|| format!("no VM {name} in this world"))
    }

    /// All VMs.
    pub fn vms(&mut self) -> &mut [Vm] {
        &mut self.vms
    }

    /// Waits until every VM's guest is ready.
    ///
    /// # Errors
    /// One of them isn't in time.
    pub fn wait_all_ready(&mut self) -> Result<()> {
        for vm in &mut self.vms {
            vm.wait_ready()?;
        }
        Ok(())
    }

    /// Prints the end of every log of this world to standard error.
    pub fn print_logs(&self) {
        report::print_logs(&self.path);
    }

    /// The process ids of all that runs here, first those to be ended first.
    #[must_use]
    pub fn process_ids(&mut self) -> Vec<u32> {
        let mut ids: Vec<u32> = self.vms.iter().flat_map(Vm::processes).map(Process::id).collect();
        ids.extend(self.serve.as_ref().map(Process::id));
        ids.extend(self.proxy.as_ref().map(Process::id));
        ids.extend(self.tpm.as_mut().map(|tpm| tpm.process().id()));
        ids
    }

    /// Waits for a condition on this world, with the proxy's life as part of it.
    ///
    /// # Errors
    /// The proxy ends, the condition fails, or `limit` passes.
    pub fn wait_until<T>(
        &mut self,
        what: &str,
        limit: std::time::Duration,
        mut condition: impl FnMut(&mut Self) -> Result<Option<T>>,
    ) -> Result<T> {
        wait::until(what, limit, || {
            if let Some(proxy) = &mut self.proxy {
                proxy.check_alive()?;
            }
            condition(self)
        })
    }
}

impl Drop for World {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.print_logs();
        }
        if self.options.keep {
            self.guard.dismiss();
        }
        if self.options.keep
            && let Some(folder) = self.folder.take()
        {
            let _ = folder.keep();
        }
    }
}

/// Removes a world's folder when this program ends without doing so: it was killed, or interrupted by Ctrl-C. A shell that
/// waits for the end of a pipe whose other end nobody but this program has.
#[derive(Debug)]
struct Guard(Child);

impl Guard {
    fn set(folder: &Path) -> Result<Self> {
        // The world's processes are killed at the same moment; one that writes its last makes `rm` fail once.
        const SCRIPT: &str = "cat; for try in 1 2 3 4 5; do rm -rf \"$0\" && exit; sleep 0.2; done";
        let child = Command::new("sh")
            .args(["-c", SCRIPT])
            .arg(folder)
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        Ok(Self(child))
    }

    /// Leaves the folder.
    fn dismiss(&mut self) {
        // It can only have ended already.
        let _ = self.0.kill();
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        // Closes the pipe first.
        let _ = self.0.wait();
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;
    use crate::lab::{Machine, TpmCommand};

    /// Each configuration boots by `-readconfig`, waits for its release, and takes commands.
    #[test]
    fn vm_guests_of_all_configurations_boot_and_answer() {
        World::test(|world| {
            for machine in Machine::ALL {
                let vm = world.add_vm(VmSpec::new(machine.name(), machine))?;
                vm.start()?;
                vm.release()?;
            }
            for machine in Machine::ALL {
                let vm = world.vm(machine.name())?;
                let time = vm.wait_ready()?;
                eprintln!("{} ready after {:.1} s", machine.name(), time.as_secs_f32());
                assert_eq!(vm.run("/disk/bin/hello lab")?, "hello lab\n");
                let before = vm.ima_list()?;
                vm.write_program("/disk/bin/new", "echo new\\necho program")?;
                assert_eq!(vm.run("/disk/bin/new")?, "new\nprogram\n");
                let after = vm.ima_list()?;
                assert!(after.starts_with(&before) && after.len() > before.len());
                assert!(String::from_utf8_lossy(&after).contains("/disk/bin/new\0"));
            }
            world.vm("q35")?.reboot()?;
            for machine in Machine::ALL {
                assert!(world.vm(machine.name())?.power_off()?.success());
            }
            assert_eq!(world.tpm()?.commands(TpmCommand::QUOTE)?, 0);
            Ok(())
        });
    }

    #[test]
    fn vm_folders_are_their_own() {
        World::test(|world| {
            let untouched = fs::read(&world.assets().initrd)?;
            let vm = world.add_vm(VmSpec::new("one", Machine::Q35))?;
            vm.flip_byte("initrd", None)?;
            let changed = fs::read(vm.folder().join("initrd"))?;
            assert_eq!(changed.len(), untouched.len());
            assert_ne!(changed, untouched);
            assert_eq!(fs::read(&world.assets().initrd)?, untouched);
            Ok(())
        });
    }
}
