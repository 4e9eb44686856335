//! A software TPM for tests, in a folder of its own.

use std::{
    fs::File,
    io::{Read as _, Write as _},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

/// `TPM_SU`: what is kept over a loss of power.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Startup {
    Clear,
    State,
}

/// A running swtpm; killed when dropped.
pub(crate) struct Swtpm {
    dir: tempfile::TempDir,
    child: Child,
}

impl Swtpm {
    /// Starts one with fresh state.
    pub(crate) fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let child = spawn(dir.path(), Startup::Clear);
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
        self.restart_with(None, Startup::Clear);
    }

    /// Takes its power away, after a `TPM2_Shutdown` or without, and starts it again.
    pub(crate) fn restart_with(&mut self, shutdown: Option<Startup>, startup: Startup) {
        if let Some(shutdown) = shutdown {
            // TPM_ST_NO_SESSIONS, 12 bytes, TPM_CC_Shutdown, TPM_SU; answered with 10 bytes.
            let mut stream = UnixStream::connect(self.socket()).unwrap();
            stream.write_all(&[0x80, 1, 0, 0, 0, 12, 0, 0, 1, 0x45, 0, shutdown as u8]).unwrap();
            let mut answer = [0; 10];
            stream.read_exact(&mut answer).unwrap();
            assert_eq!(answer, [0x80, 1, 0, 0, 0, 10, 0, 0, 0, 0], "TPM2_Shutdown");
        }
        self.kill();
        self.child = spawn(self.dir.path(), startup);
    }
}

impl Drop for Swtpm {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn spawn(dir: &Path, startup: Startup) -> Child {
    let socket = dir.join("tpm.sock");
    let _ = std::fs::remove_file(&socket);
    let log = File::create(dir.join("swtpm.log")).unwrap();
    let flags = match startup {
        Startup::Clear => "not-need-init,startup-clear",
        Startup::State => "not-need-init,startup-state",
    };
    let child = Command::new("swtpm")
        .args(["socket", "--tpm2", "--flags", flags])
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
