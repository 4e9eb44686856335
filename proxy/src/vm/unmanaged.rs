//! Finding VMs that nobody told the proxy about.

use std::{
    collections::HashSet,
    fs, io,
    os::unix::fs::{FileTypeExt as _, MetadataExt as _},
    path::Path,
    time::Duration,
};

use serde::Serialize;

use crate::measure::process;

/// The device `/dev/kvm`: 10, 232 (Linux `Documentation/admin-guide/devices.txt`).
const KVM: u64 = 10 << 8 | 232;

/// Processes that are named. One is enough to say that the host is not complete; with no bound, any user of the host
/// could fill the log.
const MAX_FOUND: usize = 256;

/// How the host is searched.
#[derive(Debug, Clone)]
pub struct Scan {
    /// How often.
    pub every: Duration,
    /// A younger process may still be on its way to a monitor.
    pub older_than: Duration,
}

impl Default for Scan {
    fn default() -> Self {
        Self { every: Duration::from_secs(10), older_than: Duration::from_secs(15) }
    }
}

/// A process that looks like a VM and is not managed.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize)]
pub struct UnmanagedProcess {
    /// Its id.
    pub pid: u32,
    /// When it started, in clock ticks since the host's boot.
    pub start_time: u64,
    /// Its program's path.
    pub program: String,
    /// Its arguments, joined by spaces, cut at 1,024 bytes.
    pub arguments: String,
}

/// Looks at every process: its program's name begins with `qemu-system` or `qemu-kvm`, or it holds `/dev/kvm` or a VM
/// made by it.
/// Processes that may not be looked at are passed over: run the proxy with the rights to see them.
pub(super) fn find(managed: &HashSet<u32>, older_than: Duration) -> io::Result<Vec<UnmanagedProcess>> {
    let now = process::uptime()?;
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let entry = entry?;
        let Some(pid) = entry.file_name().to_str().and_then(|n| n.parse::<u32>().ok()) else { continue };
        if pid == std::process::id() || managed.contains(&pid) || !looks_like_vm(&entry.path()) {
            continue;
        }
        let Ok(start_time) = process::start_time(pid) else { continue };
        let age = now.saturating_sub(Duration::from_millis(start_time.saturating_mul(1000 / process::TICKS)));
        if age >= older_than {
            let program = fs::read_link(entry.path().join("exe")).unwrap_or_default();
            let arguments = process::arguments(pid).unwrap_or_default();
            found.push(UnmanagedProcess {
                pid,
                start_time,
                program: program.to_string_lossy().into_owned(),
                arguments: cut(&arguments.iter().map(|a| a.to_string_lossy()).collect::<Vec<_>>().join(" ")),
            });
        }
    }
    found.sort_by_key(|p| p.pid);
    found.truncate(MAX_FOUND);
    Ok(found)
}

fn looks_like_vm(proc: &Path) -> bool {
    let program = fs::read_link(proc.join("exe")).unwrap_or_default();
    let name = program.file_name().unwrap_or_default().to_string_lossy();
    name.starts_with("qemu-system") || name.starts_with("qemu-kvm") || holds_kvm(&proc.join("fd"))
}

fn holds_kvm(fds: &Path) -> bool {
    let Ok(entries) = fs::read_dir(fds) else { return false };
    entries.flatten().map(|fd| fd.path()).any(|fd| {
        fs::read_link(&fd).is_ok_and(|to| names_kvm(&to))
            || fs::metadata(&fd).is_ok_and(|m| m.file_type().is_char_device() && m.rdev() == KVM)
    })
}

/// Whether a descriptor is one of KVM's. The device itself can be closed once the VM is made, and can have any name;
/// the VM and its CPUs are without a name in the file system.
fn names_kvm(to: &Path) -> bool {
    to == Path::new("/dev/kvm") || to.to_str().is_some_and(|to| to.starts_with("anon_inode:kvm-v"))
}

fn cut(text: &str) -> String {
    let mut end = text.len().min(1024);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text[..end].to_owned()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_of_kvm() {
        for name in ["/dev/kvm", "anon_inode:kvm-vm", "anon_inode:kvm-vcpu:0", "anon_inode:kvm-vcpu"] {
            assert!(names_kvm(Path::new(name)), "{name}");
        }
        for name in ["/dev/kvmalloc", "anon_inode:[eventfd]", "/tmp/anon_inode:kvm-vm"] {
            assert!(!names_kvm(Path::new(name)), "{name}");
        }
        assert!(!holds_kvm(Path::new("/proc/self/fd")));
    }
}
