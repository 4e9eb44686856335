//! A software TPM for tests, in a folder of its own.

use std::{
    fs::File,
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

/// A running swtpm; killed when dropped.
pub(crate) struct Swtpm {
    dir: tempfile::TempDir,
    child: Child,
}

impl Swtpm {
    /// Starts one with fresh state.
    pub(crate) fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let child = spawn(dir.path());
        Self { dir, child }
    }

    /// The TCTI to reach it.
    pub(crate) fn tcti(&self) -> String {
        format!("swtpm:path={}", self.socket().display())
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("tpm.sock")
    }

    /// Kills it as a crash would.
    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Starts it again on the same state: a TPM reset.
    pub(crate) fn restart(&mut self) {
        self.kill();
        self.child = spawn(self.dir.path());
    }
}

impl Drop for Swtpm {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn spawn(dir: &Path) -> Child {
    let socket = dir.join("tpm.sock");
    let _ = std::fs::remove_file(&socket);
    let log = File::create(dir.join("swtpm.log")).unwrap();
    let child = Command::new("swtpm")
        .args(["socket", "--tpm2", "--flags", "not-need-init,startup-clear"])
        .args(["--tpmstate", &format!("dir={}", dir.display())])
        .args(["--server", &format!("type=unixio,path={}", socket.display())])
        .args(["--ctrl", &format!("type=unixio,path={}.ctrl", socket.display())])
        .stdin(Stdio::null())
        .stdout(log.try_clone().unwrap())
        .stderr(log)
        .spawn()
        .expect("swtpm must be installed");
    let deadline = Instant::now() + Duration::from_secs(20);
    while UnixStream::connect(&socket).is_err() {
        assert!(Instant::now() < deadline, "swtpm did not open {}", socket.display());
        thread::sleep(Duration::from_millis(2));
    }
    child
}
