//! The proxy's configuration: one TOML file, unknown keys refused by name.

use std::{
    net::SocketAddr,
    num::NonZeroUsize,
    path::{Path, PathBuf},
    time::Duration,
};

use onequote_evidence::{
    guest_frame,
    id::HostId,
    pcr::{DEFAULT_PCR_GUEST, DEFAULT_PCR_VM, PCR_COUNT},
};
use serde::Deserialize;

use crate::{
    intercept,
    measure::MeasureLimits,
    tpm::{AkKind, AuthFiles, EkKind, TpmOptions},
    vm::is_valid_name,
};

/// A Unix socket's path has at most 107 bytes (Linux `struct sockaddr_un`).
const MAX_SOCKET_PATH: usize = 107;

/// The configuration file.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The host's name in statements and certificates.
    pub host_id: HostId,
    /// Where log, lists and identity are kept.
    #[serde(default = "default_state_dir")]
    pub state_dir: PathBuf,
    /// Where sockets are; monitors of VMs are in its folder `vms`.
    #[serde(default = "default_run_dir")]
    pub run_dir: PathBuf,
    /// Where verifiers connect. With port 0 the system chooses; `listen.addr` in the state folder has the address.
    #[serde(default = "default_listen")]
    pub listen: SocketAddr,
    /// The register for host and VM life cycle.
    #[serde(default = "default_pcr_vm")]
    pub pcr_vm: u8,
    /// The register for guests' run time.
    #[serde(default = "default_pcr_guest")]
    pub pcr_guest: u8,
    /// The TPM.
    pub tpm: Tpm,
    /// Who may ask.
    #[serde(default)]
    pub verifiers: Vec<Verifier>,
    /// References that a VM must match to be started.
    pub enforce: Option<Enforce>,
    /// Monitors of VMs elsewhere than in the watched folder.
    #[serde(default, rename = "monitor")]
    pub monitors: Vec<Monitor>,
    /// Measuring.
    #[serde(default)]
    pub measure: Measure,
    /// VMs.
    #[serde(default)]
    pub vms: Vms,
    /// Monitors that are served to management tools.
    pub intercept: Option<Intercept>,
    /// Guests.
    #[serde(default)]
    pub guest: Guest,
    /// The host's own logs.
    #[serde(default)]
    pub host: Host,
    /// The measurement log.
    #[serde(default)]
    pub log: Log,
    /// Reports to verifiers that were joined.
    #[serde(default)]
    pub report: Report,
}

/// The TPM.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tpm {
    /// How to reach it: `device:/dev/tpmrm0`, or `swtpm:path=SOCKET` for a software TPM.
    pub tcti: String,
    /// The attestation key's kind. Another kind is another key: the host must be enrolled again.
    #[serde(default)]
    pub ak: AkKind,
    /// The persistent handle at which the attestation key is kept, `0x81000000` to `0x817fffff`; made anew at each start
    /// when absent.
    pub ak_handle: Option<u32>,
    /// The endorsement key's kind; that of the first certificate in the TPM when absent.
    pub ek: Option<EkKind>,
    /// The endorsement key's certificate where the TPM has none: PEM, its own first, then those of issuers.
    pub ek_certificate: Option<PathBuf>,
    /// Files with authorisation values.
    #[serde(default)]
    pub auth: AuthFiles,
}

impl Tpm {
    /// How the TPM is opened. Reads the authorisation values; see [`AuthFiles::read`].
    ///
    /// # Errors
    /// A file cannot be read. The error names it.
    pub fn options(&self) -> std::io::Result<TpmOptions> {
        let credentials = std::env::var_os("CREDENTIALS_DIRECTORY").map(PathBuf::from);
        let auth = self.auth.read(credentials.as_deref())?;
        Ok(TpmOptions { tcti: self.tcti.clone(), ak: self.ak, ak_handle: self.ak_handle, auth })
    }
}

/// A verifier that may ask for evidence.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Verifier {
    /// Its name in our log.
    pub name: String,
    /// Its certificate, PEM.
    pub certificate: PathBuf,
}

/// The monitor of one VM.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Monitor {
    /// The VM's name.
    pub name: String,
    /// The socket. Its folder must be there when the proxy starts.
    pub socket: PathBuf,
}

/// Local enforcement.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Enforce {
    /// The reference list, TOML.
    pub references: PathBuf,
}

/// Measuring: how much of the host it may take.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Measure {
    /// Whether at the end of a run every image is read whole, also where QEMU can tell what the run changed.
    pub read_whole: bool,
    /// Files that are read at a time, for all VMs together; as many as there are cores, and at least 4, when absent.
    pub parallel: Option<NonZeroUsize>,
    /// Whether reads wait for everybody else's, where the disk's scheduler knows of priorities.
    pub idle_io: bool,
}

impl Measure {
    /// The limits.
    #[must_use]
    pub fn limits(&self) -> MeasureLimits {
        let usual = MeasureLimits::default();
        MeasureLimits { parallel: self.parallel.unwrap_or(usual.parallel), idle_io: self.idle_io }
    }
}

/// VMs.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Vms {
    /// Milliseconds between two looks at a VM in which nothing happens.
    pub look_ms: u64,
    /// How many such looks there are in a second at most, over all VMs.
    pub looks_per_second: u32,
}

impl Default for Vms {
    fn default() -> Self {
        Self { look_ms: 10_000, looks_per_second: 20 }
    }
}

/// Monitors that are served to management tools: the section switches it on.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Intercept {
    /// Names of VMs; `*` stands for any characters.
    pub vms: Vec<String>,
    /// Commands that are refused, with the same wildcard.
    pub refuse: Vec<String>,
    /// Clients that one monitor serves at a time.
    pub clients: usize,
}

/// Guests.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Guest {
    /// The vsock port on which shims connect.
    pub port: u32,
    /// Listen on AF_VSOCK: `true`, `false`, or where the kernel has it when absent.
    pub vsock: Option<bool>,
    /// Listen on a Unix socket `NAME.vsock_PORT` for each VM, for vhost-user back ends.
    pub unix: bool,
    /// Milliseconds that a quote waits for guests to send what is new.
    pub collect_ms: u64,
    /// Entries that one guest may send in one session, all boots together.
    pub max_entries: u64,
    /// Bytes of entries, new to the host, that one guest may send in one session.
    pub max_bytes: u64,
}

/// Reports to verifiers that were joined. How often they want them they say themselves.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Report {
    /// Whether a connection to each of them is held, over which the host reports and can be asked.
    pub enabled: bool,
    /// Whether a change on the host is reported at once, if the verifier wants that.
    pub changes: bool,
}

impl Default for Report {
    fn default() -> Self {
        Self { enabled: true, changes: true }
    }
}

/// The host's own logs. Absent files are not sent, and the verifier says what it could not check.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Host {
    /// The firmware's event log; see [`Config::firmware_log`] for what counts when it is absent.
    pub firmware_log: Option<PathBuf>,
    /// The host's IMA list, `/sys/kernel/security/ima/binary_runtime_measurements`.
    pub ima_list: Option<PathBuf>,
}

/// The measurement log.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Log {
    /// From which size on, in bytes, a file of the log is long enough for a next one to begin.
    pub segment_bytes: u64,
}

/// The least that a segment may be asked to hold: a few records with their digests.
const MIN_SEGMENT: u64 = 4096;

impl Default for Log {
    fn default() -> Self {
        Self { segment_bytes: 8 * 1024 * 1024 }
    }
}

impl Default for Intercept {
    fn default() -> Self {
        let clients = intercept::Limits::default().clients;
        Self { vms: vec!["*".to_owned()], refuse: Vec::new(), clients }
    }
}

impl Default for Guest {
    fn default() -> Self {
        let limits = crate::guest::Limits::default();
        Self {
            port: guest_frame::DEFAULT_PORT,
            vsock: None,
            unix: true,
            collect_ms: 500,
            max_entries: limits.entries,
            max_bytes: limits.bytes,
        }
    }
}

/// The configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the configuration {path}: {error}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        error: std::io::Error,
    },
    /// Not TOML, an unknown key, or a value of the wrong kind. The message has line and key.
    #[error("{path}: {error}")]
    Parse {
        /// The file.
        path: PathBuf,
        /// What and where.
        error: Box<toml::de::Error>,
    },
    /// A value that cannot be.
    #[error("{path}: {key}: {why}")]
    Value {
        /// The file.
        path: PathBuf,
        /// The key.
        key: &'static str,
        /// Why.
        why: String,
    },
}

impl Config {
    /// Reads and checks a configuration.
    ///
    /// # Errors
    /// [`ConfigError`], naming file and key.
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path).map_err(|error| ConfigError::Read { path: path.to_owned(), error })?;
        let config: Self = toml::from_str(&text)
            .map_err(|error| ConfigError::Parse { path: path.to_owned(), error: Box::new(error) })?;
        config.check(path)?;
        Ok(config)
    }

    fn check(&self, path: &Path) -> Result<(), ConfigError> {
        let bad = |key, why: String| Err(ConfigError::Value { path: path.to_owned(), key, why });
        for (key, pcr) in [("pcr_vm", self.pcr_vm), ("pcr_guest", self.pcr_guest)] {
            // 0–7 are the firmware's, 10 is IMA's, 16 and up can be reset or need another locality.
            if pcr >= PCR_COUNT || !matches!(pcr, 8 | 9 | 11..=15) {
                return bad(key, format!("PCR {pcr} is not one of 8, 9, 11 to 15"));
            }
        }
        if self.pcr_vm == self.pcr_guest {
            return bad("pcr_guest", "is the same register as pcr_vm".to_owned());
        }
        for (key, dir) in [("state_dir", &self.state_dir), ("run_dir", &self.run_dir)] {
            if !dir.is_absolute() {
                return bad(key, format!("{} is not an absolute path", dir.display()));
            }
        }
        if let Some(handle) = self.tpm.ak_handle.filter(|handle| !(0x8100_0000..=0x817F_FFFF).contains(handle)) {
            return bad("tpm.ak_handle", format!("{handle:#010x} is not one of 0x81000000 to 0x817fffff"));
        }
        self.check_monitors(path)?;
        if !(50..=3_600_000).contains(&self.vms.look_ms) {
            return bad("vms.look_ms", format!("{} is not one of 50 to 3600000", self.vms.look_ms));
        }
        if !(1..=10_000).contains(&self.vms.looks_per_second) {
            return bad("vms.looks_per_second", format!("{} is not one of 1 to 10000", self.vms.looks_per_second));
        }
        if self.intercept.as_ref().is_some_and(|i| i.clients == 0) {
            return bad("intercept.clients", "0 clients can do nothing; leave the section out".to_owned());
        }
        if self.log.segment_bytes < MIN_SEGMENT {
            return bad("log.segment_bytes", format!("{} is less than {MIN_SEGMENT}", self.log.segment_bytes));
        }
        // A Unix socket's path has at most 107 bytes (Linux `struct sockaddr_un`).
        if self.vms_dir().as_os_str().len() > 80 {
            return bad("run_dir", "is too long: sockets of VMs in it would not fit 107 bytes".to_owned());
        }
        Ok(())
    }

    fn check_monitors(&self, path: &Path) -> Result<(), ConfigError> {
        let bad = |key, why: String| Err(ConfigError::Value { path: path.to_owned(), key, why });
        for (n, Monitor { name, socket }) in self.monitors.iter().enumerate() {
            let shown = socket.display();
            if !is_valid_name(name) {
                let rule = "1 to 64 of A-Z a-z 0-9 . _ -, a letter or digit first";
                return bad("monitor.name", format!("{name:?} is no name for a VM: {rule}"));
            }
            if !socket.is_absolute() {
                return bad("monitor.socket", format!("{shown} is not an absolute path"));
            }
            if socket.as_os_str().len() > MAX_SOCKET_PATH {
                return bad("monitor.socket", format!("{shown} is longer than {MAX_SOCKET_PATH} bytes"));
            }
            if socket.parent() == Some(&self.vms_dir()) {
                return bad("monitor.socket", format!("{shown} is in the watched folder, where it is found anyway"));
            }
            let before = &self.monitors[..n];
            if before.iter().any(|other| other.name == *name) {
                return bad("monitor.name", format!("{name:?} is there twice"));
            }
            if before.iter().any(|other| other.socket == *socket) {
                return bad("monitor.socket", format!("{shown} is there twice"));
            }
        }
        Ok(())
    }

    /// Where monitors of VMs are.
    #[must_use]
    pub fn vms_dir(&self) -> PathBuf {
        self.run_dir.join("vms")
    }

    /// Where intercepted monitors are served.
    #[must_use]
    pub fn monitors_dir(&self) -> PathBuf {
        self.run_dir.join("monitors")
    }

    /// How monitors are served, if any is.
    #[must_use]
    pub fn intercept(&self) -> Option<intercept::Settings> {
        self.intercept.clone().map(|Intercept { vms, refuse, clients }| intercept::Settings {
            dir: self.monitors_dir(),
            vms,
            refuse,
            limits: intercept::Limits { clients, ..intercept::Limits::default() },
        })
    }

    /// The socket at which the proxy answers its own command line.
    #[must_use]
    pub fn admin_socket(&self) -> PathBuf {
        self.run_dir.join("proxy.sock")
    }

    /// The folder of the measurement log.
    #[must_use]
    pub fn log_dir(&self) -> PathBuf {
        self.state_dir.join("log")
    }

    /// The folder of guests' lists.
    #[must_use]
    pub fn guests_dir(&self) -> PathBuf {
        self.state_dir.join("guests")
    }

    /// The event log of the firmware that started the TPM: as configured, or where the kernel shows that of a TPM
    /// device, if it has one. A software TPM (`swtpm:`) was not started by this machine's firmware.
    #[must_use]
    pub fn firmware_log(&self) -> Option<PathBuf> {
        self.host.firmware_log.clone().or_else(|| kernel_firmware_log(&self.tpm.tcti).filter(|path| path.exists()))
    }

    /// The folder where trees of images are kept while VMs run; none if they are read whole at the end.
    #[must_use]
    pub fn trees_dir(&self) -> Option<PathBuf> {
        (!self.measure.read_whole).then(|| self.state_dir.join("trees"))
    }

    /// How long a quote waits for guests.
    #[must_use]
    pub fn collect_wait(&self) -> Duration {
        Duration::from_millis(self.guest.collect_ms)
    }
}

/// Where Linux shows the log of a TPM device (`drivers/char/tpm/eventlog/common.c`).
fn kernel_firmware_log(tcti: &str) -> Option<PathBuf> {
    let device = tcti.strip_prefix("device:")?.rsplit('/').next()?;
    let number = device.strip_prefix("tpmrm").or_else(|| device.strip_prefix("tpm"))?;
    let is_number = !number.is_empty() && number.bytes().all(|c| c.is_ascii_digit());
    is_number.then(|| format!("/sys/kernel/security/tpm{number}/binary_bios_measurements").into())
}

fn default_state_dir() -> PathBuf {
    "/var/lib/onequote".into()
}

fn default_run_dir() -> PathBuf {
    "/run/onequote".into()
}

fn default_listen() -> SocketAddr {
    SocketAddr::from(([0, 0, 0, 0], 20305))
}

fn default_pcr_vm() -> u8 {
    DEFAULT_PCR_VM
}

fn default_pcr_guest() -> u8 {
    DEFAULT_PCR_GUEST
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Config, ConfigError> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("proxy.toml");
        std::fs::write(&path, text).unwrap();
        Config::read(&path)
    }

    const LEAST: &str = "host_id = \"h1\"\n[tpm]\ntcti = \"device:/dev/tpmrm0\"\n";

    #[test]
    fn least() {
        let config = read(LEAST).unwrap();
        assert_eq!((config.pcr_vm, config.pcr_guest, config.guest.port), (12, 13, 20305));
    }

    #[test]
    fn unknown_keys_are_refused_by_name() {
        let err = read(&format!("{LEAST}tctl = \"x\"\n")).unwrap_err().to_string();
        assert!(err.contains("proxy.toml") && err.contains("tctl"), "{err}");
        let err = read(&format!("enforec = 1\n{LEAST}")).unwrap_err().to_string();
        assert!(err.contains("enforec"), "{err}");
    }

    #[test]
    fn a_tpm_device_has_its_own_firmware_log() {
        let path = |tcti| kernel_firmware_log(tcti).map(|path| path.display().to_string());
        let first = "/sys/kernel/security/tpm0/binary_bios_measurements";
        assert_eq!(path("device:/dev/tpmrm0").as_deref(), Some(first));
        assert_eq!(path("device:/dev/tpm0").as_deref(), Some(first));
        assert_eq!(path("device:/dev/tpmrm12"), Some(first.replace("tpm0", "tpm12")));
        for other in ["swtpm:path=/dev/tpm0", "device:/dev/tpm", "device:/dev/tpmx", "device", "tabrmd:"] {
            assert_eq!(path(other), None, "{other}");
        }
        let given = read(&format!("{LEAST}[host]\nfirmware_log = \"/log\"\n")).unwrap();
        assert_eq!(given.firmware_log(), Some("/log".into()));
    }

    #[test]
    fn monitors_are_named_once_and_elsewhere() {
        let monitor = |name: &str, socket: &str| format!("[[monitor]]\nname = {name:?}\nsocket = {socket:?}\n");
        let both = monitor("a", "/run/a/qmp") + &monitor("b", "/run/b/qmp");
        assert_eq!(read(&format!("{LEAST}{both}")).unwrap().monitors.len(), 2);
        for (more, words) in [
            (monitor("c/d", "/run/c"), ["monitor.name", "c/d"]),
            (monitor("c", "run/c"), ["monitor.socket", "absolute"]),
            (monitor("c", &format!("/{}", "x".repeat(107))), ["monitor.socket", "107"]),
            (monitor("c", "/run/onequote/vms/c.qmp"), ["monitor.socket", "watched folder"]),
            (monitor("a", "/run/c"), ["monitor.name", "twice"]),
            (monitor("c", "/run/b/qmp"), ["monitor.socket", "twice"]),
            (monitor("c", "/run/c") + "path = 1\n", ["path", "socket"]),
        ] {
            let err = read(&format!("{LEAST}{both}{more}")).unwrap_err().to_string();
            assert!(words.iter().all(|word| err.contains(word)), "{words:?}: {err}");
        }
    }

    #[test]
    fn a_timer_has_bounds() {
        for line in ["look_ms = 0", "look_ms = 9999999999", "looks_per_second = 0", "looks_per_second = 99999"] {
            let err = read(&format!("{LEAST}[vms]\n{line}\n")).unwrap_err().to_string();
            assert!(err.contains(line.split(' ').next().unwrap()), "{err}");
        }
    }

    #[test]
    fn keys_of_the_tpm() {
        let config = read(&format!("{LEAST}ak = \"rsa-2048\"\nak_handle = 0x81010010\nek = \"ecc-p384\"\n")).unwrap();
        let options = config.tpm.options().unwrap();
        assert_eq!((options.ak, options.ak_handle), (AkKind::Rsa2048, Some(0x8101_0010)));
        assert_eq!(config.tpm.ek, Some(EkKind::EccP384));
        for (line, word) in [
            ("ak = \"rsa-1024\"", "rsa-1024"),
            ("ak_handle = 0x80000000", "tpm.ak_handle"),
            ("[tpm.auth]\nplatform = \"x\"", "platform"),
        ] {
            let err = read(&format!("{LEAST}{line}\n")).unwrap_err().to_string();
            assert!(err.contains(word), "{err}");
        }
        let missing = read(&format!("{LEAST}[tpm.auth]\nowner = \"/no/such/file\"\n")).unwrap();
        let err = missing.tpm.options().unwrap_err().to_string();
        assert!(err.contains("/no/such/file"), "{err}");
    }

    #[test]
    fn impossible_registers_are_refused() {
        for text in ["pcr_vm = 10\n", "pcr_vm = 24\n", "pcr_guest = 12\n", "pcr_guest = 16\n"] {
            let err = read(&format!("{text}{LEAST}")).unwrap_err().to_string();
            assert!(err.contains("pcr_"), "{err}");
        }
    }
}
