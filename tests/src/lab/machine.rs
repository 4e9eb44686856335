//! The three configurations of `qemu-configs`, put into a VM's folder.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};

use super::{assets::Assets, command};

/// Which configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Machine {
    /// q35, direct kernel boot.
    Q35,
    /// microvm, direct kernel boot.
    Microvm,
    /// q35, OVMF, qcow2 overlay over a base image.
    Uefi,
}

impl Machine {
    /// All three.
    pub const ALL: [Self; 3] = [Self::Q35, Self::Microvm, Self::Uefi];

    /// The name of the configuration's file, without ending.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Q35 => "q35",
            Self::Microvm => "microvm",
            Self::Uefi => "uefi",
        }
    }

    /// The disk that the guest writes to, relative to the VM's folder.
    #[must_use]
    pub fn disk(self) -> &'static str {
        match self {
            Self::Q35 | Self::Microvm => "disk.img",
            Self::Uefi => "overlay.qcow2",
        }
    }

    /// Where `qemu-configs` is.
    pub(crate) fn template(self) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../qemu-configs").join(self.name()).with_extension("cfg")
    }

    /// Fills `folder` with copies of all that the VM is started from (so that a test may change one byte and hurt
    /// nobody else), and the configuration as `vm.cfg`. `append` goes to the end of the kernel's command line of the
    /// two direct configurations.
    pub(crate) fn install(self, folder: &Path, assets: &Assets, append: &str) -> Result<()> {
        match self {
            Self::Q35 | Self::Microvm => {
                copy(&assets.vmlinux, &folder.join("vmlinux"))?;
                copy(&assets.initrd, &folder.join("initrd"))?;
                copy(&assets.disk, &folder.join("disk.img"))?;
            }
            Self::Uefi => {
                copy(&assets.uefi, &folder.join("base.qcow2"))?;
                copy(Path::new("/usr/share/OVMF/OVMF_VARS_4M.fd"), &folder.join("vars.fd"))
                    .context("the package ovmf is needed")?;
                command::output(
                    Command::new("qemu-img")
                        .args(["create", "-q", "-f", "qcow2", "-b", "base.qcow2"])
                        .args(["-F", "qcow2", "overlay.qcow2"])
                        .current_dir(folder),
                )?;
            }
        }
        let template = fs::read_to_string(self.template())
            .with_context(|| format!("no configuration {}", self.template().display()))?;
        fs::write(folder.join("vm.cfg"), adapt(&template, accelerator(), tsc_khz(), append))?;
        Ok(())
    }
}

/// The template with this host's accelerator and clock, and further words for the kernel.
pub(super) fn adapt(template: &str, accelerator: &str, khz: u64, append: &str) -> String {
    let mut text = String::new();
    for line in template.lines() {
        let (key, value) = line.split_once(" = ").unwrap_or((line, ""));
        match key.trim() {
            "accel" => text += &format!("  accel = \"{accelerator}\""),
            "append" => {
                let words: Vec<String> = value
                    .trim_matches('"')
                    .split(' ')
                    .map(|word| match word.split_once('=') {
                        Some(("tsc_early_khz", _)) => format!("tsc_early_khz={khz}"),
                        _ => word.to_owned(),
                    })
                    .chain(append.split_whitespace().map(str::to_owned))
                    .collect();
                text += &format!("  append = \"{}\"", words.join(" "));
            }
            _ => text += line,
        }
        text.push('\n');
    }
    text
}

/// The words of the configuration's `append`.
pub(crate) fn template_append(machine: Machine) -> Result<String> {
    let template = fs::read_to_string(machine.template())?;
    let line = template
        .lines()
        .find_map(|line| line.trim().strip_prefix("append = "))
        .with_context(|| format!("{} has no append", machine.template().display()))?;
    Ok(line.trim_matches('"').to_owned())
}

/// `ONEQUOTE_ACCEL`, or tcg, which runs everywhere. `/dev/kvm` alone says nothing: a paravirtual KVM runs no
/// stock kernel.
pub(crate) fn accelerator() -> &'static str {
    static CHOICE: OnceLock<&'static str> = OnceLock::new();
    CHOICE.get_or_init(|| match std::env::var("ONEQUOTE_ACCEL").as_deref() {
        Ok("kvm") => "kvm",
        _ => "tcg",
    })
}

/// The rate of this host's time-stamp counter in kHz, rounded to MHz: under TCG it is the guest's, too.
fn tsc_khz() -> u64 {
    static RATE: OnceLock<u64> = OnceLock::new();
    *RATE.get_or_init(|| {
        const SPAN: Duration = Duration::from_millis(50);
        let (start, first) = (Instant::now(), ticks());
        while start.elapsed() < SPAN {
            std::hint::spin_loop();
        }
        let micros = start.elapsed().as_micros() as u64;
        let mhz = (ticks().wrapping_sub(first) + micros / 2) / micros;
        mhz.max(1) * 1000
    })
}

#[allow(unsafe_code)]
fn ticks() -> u64 {
    // SAFETY: every x86-64 processor has RDTSC, and it touches no memory.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// A copy of its own, sharing blocks where the file system can.
pub(crate) fn copy(from: &Path, to: &Path) -> Result<()> {
    command::output(
        Command::new("cp").args(["--reflink=auto", "--sparse=auto", "--no-preserve=mode", "--"]).args([from, to]),
    )?;
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;

    #[test]
    fn a_template_takes_accelerator_clock_and_words() {
        let template = "# accel\n  accel = \"tcg\"\n  append = \"a tsc_early_khz=1 b\"\n  kernel = \"k\"\n";
        let adapted = adapt(template, "kvm", 2_600_000, "c d");
        assert_eq!(
            adapted,
            "# accel\n  accel = \"kvm\"\n  append = \"a tsc_early_khz=2600000 b c d\"\n  kernel = \"k\"\n"
        );
    }

    #[test]
    fn the_configurations_have_what_the_lab_looks_for() {
        for machine in Machine::ALL {
            let template = fs::read_to_string(machine.template()).unwrap();
            assert!(template.contains("\n  accel = \"tcg\"\n"), "{machine:?}");
            assert!(template.contains(machine.disk()), "{machine:?}");
        }
        assert!(template_append(Machine::Microvm).unwrap().contains("tsc_early_khz="));
    }

    #[test]
    fn the_clock_is_a_plausible_one() {
        assert!((500_000..10_000_000).contains(&tsc_khz()), "{}", tsc_khz());
    }
}
