//! Management tools at an intercepted monitor: our own client, and the library of QEMU's developers.

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::Result;

use super::cache::{Cache, Key};
use super::command;
use super::qmp::Qmp;
use super::wait;
use super::world::World;

/// `qemu.qmp` on PyPI, on which `qmp-shell` is built, pinned.
const LIBRARY: &str = "qemu.qmp==0.0.6 --hash=sha256:5d7c5af0e9de427696e3bf72e333965c3a697929f77f6b7ddc30c989fc7b539b";

impl World {
    /// Where the proxy serves the monitor of VM `name`, if it intercepts it.
    #[must_use]
    pub fn intercepted(&self, name: &str) -> PathBuf {
        self.folder().join("run/monitors").join(format!("{name}.sock"))
    }

    /// A management tool at that socket, as soon as it is there.
    ///
    /// # Errors
    /// It is not served in time.
    pub fn tool(&self, name: &str) -> Result<Qmp> {
        let socket = self.intercepted(name);
        wait::for_true("the intercepted monitor", Duration::from_secs(60), || wait::listens(&socket))?;
        Qmp::connect(&socket)
    }
}

/// The folder of the library, for `PYTHONPATH`; downloaded once.
///
/// # Errors
/// Python or pip is missing, or the package cannot be had.
pub fn python_library() -> Result<PathBuf> {
    Cache::open()?.entry("qemu-qmp", &Key::new(1).text(LIBRARY), |folder| {
        let wanted = folder.join("requirements.txt");
        fs::write(&wanted, LIBRARY)?;
        let mut pip = command::program("python3");
        pip.args([
            "-m",
            "pip",
            "--disable-pip-version-check",
            "download",
            "--quiet",
            "--no-deps",
            "--only-binary",
            ":all:",
        ]);
        command::output(pip.args(["--require-hashes", "--dest"]).arg(folder).arg("-r").arg(&wanted))?;
        for item in fs::read_dir(folder)?.collect::<Result<Vec<_>, _>>()? {
            if item.path().extension().is_some_and(|end| end == "whl") {
                let mut unpack: Command = command::program("python3");
                command::output(unpack.args(["-m", "zipfile", "-e"]).arg(item.path()).arg(folder))?;
            }
        }
        Ok(())
    })
}
