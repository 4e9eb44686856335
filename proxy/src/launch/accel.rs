//! Which accelerator really works here.
//!
//! `/dev/kvm` being there says little: its user may lack the right to it, and some hosts that are VMs themselves have
//! a KVM that starts and then cannot run what an ordinary kernel does. So it is tried: QEMU is started with the VM's
//! machine and processor and, as firmware, a few instructions that go the way of every kernel (real mode, protected
//! mode, page tables, long mode, an address in the upper half) and then tell QEMU to end with a certain exit code.

use std::{
    ffi::OsStr,
    fs::File,
    io::{Read as _, Write as _},
    process::{Child, Command, Stdio},
    time::Duration,
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::{MemfdFlags, memfd_create},
    process::{Pid, PidfdFlags, pidfd_open},
};

/// How long QEMU may take to start and to run some forty instructions: on a busy host that is a VM itself and has no KVM
/// below it, QEMU alone starts for seconds.
const LIMIT: Duration = Duration::from_secs(20);

/// The exit code of QEMU when the firmware wrote 16 to the debug-exit port: 2 × 16 + 1 (QEMU `hw/misc/debugexit.c`).
const EXIT_CODE: i32 = 33;

/// The smallest firmware that QEMU takes as such (QEMU `hw/i386/x86.c`: a multiple of 64 KiB).
const FIRMWARE_SIZE: usize = 64 * 1024;

/// Where in the firmware the program lies; its last 16 bytes are the processor's first.
const PROGRAM_AT: usize = FIRMWARE_SIZE - 256;

/// The program, at the address FFF00₁₆. GNU assembler, from `cli` on: `lgdt %cs:gdtr`; CR0.PE on; `ljmp $8`; in 32 bits
/// DS = 16, page tables at 1000₁₆ (its entries 0 and 511 to 2000₁₆, of that 0 and 510 to 3000₁₆, of that 0 a page of
/// 2 MiB), CR3, CR4.PAE, EFER.LME, CR0.PG; `ljmp $24`; in 64 bits a jump to FFFFFFFF800FFF87₁₆, `swapgs`, CR0 read,
/// `invlpg`; `outb $16, $0xf4`; `hlt`. Behind it the descriptor table (0; code 32; data 32; code 64) and its pointer.
const PROGRAM: [u8; 200] = [
    0xfa, 0x2e, 0x66, 0x0f, 0x01, 0x16, 0xc0, 0xff, 0x0f, 0x20, 0xc0, 0x0c, 0x01, 0x0f, 0x22, 0xc0, 0x66, 0xea, 0x18,
    0xff, 0x0f, 0x00, 0x08, 0x00, 0x66, 0xb8, 0x10, 0x00, 0x8e, 0xd8, 0xc7, 0x05, 0x00, 0x10, 0x00, 0x00, 0x03, 0x20,
    0x00, 0x00, 0xc7, 0x05, 0xf8, 0x1f, 0x00, 0x00, 0x03, 0x20, 0x00, 0x00, 0xc7, 0x05, 0x00, 0x20, 0x00, 0x00, 0x03,
    0x30, 0x00, 0x00, 0xc7, 0x05, 0xf0, 0x2f, 0x00, 0x00, 0x03, 0x30, 0x00, 0x00, 0xc7, 0x05, 0x00, 0x30, 0x00, 0x00,
    0x83, 0x00, 0x00, 0x00, 0xb8, 0x00, 0x10, 0x00, 0x00, 0x0f, 0x22, 0xd8, 0x0f, 0x20, 0xe0, 0x0c, 0x20, 0x0f, 0x22,
    0xe0, 0xb9, 0x80, 0x00, 0x00, 0xc0, 0x0f, 0x32, 0x80, 0xcc, 0x01, 0x0f, 0x30, 0x0f, 0x20, 0xc0, 0x0d, 0x00, 0x00,
    0x00, 0x80, 0x0f, 0x22, 0xc0, 0xea, 0x7e, 0xff, 0x0f, 0x00, 0x18, 0x00, 0x48, 0xc7, 0xc0, 0x87, 0xff, 0x0f, 0x80,
    0xff, 0xe0, 0x0f, 0x01, 0xf8, 0x0f, 0x20, 0xc0, 0x0f, 0x01, 0x3c, 0x25, 0x00, 0x10, 0x00, 0x00, 0xb0, 0x10, 0xe6,
    0xf4, 0xf4, 0xeb, 0xfd, 0x8d, 0xb4, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0xff, 0xff, 0x00,
    0x00, 0x00, 0x9b, 0xcf, 0x00, 0xff, 0xff, 0x00, 0x00, 0x00, 0x93, 0xcf, 0x00, 0xff, 0xff, 0x00, 0x00, 0x00, 0x9b,
    0xaf, 0x00, 0x1f, 0x00, 0xa0, 0xff, 0x0f, 0x00, 0x00, 0x00,
];

/// At the processor's first address, 16 bytes below 4 GiB: a jump to the program, 240 bytes before it.
const RESET_VECTOR: [u8; 3] = [0xe9, 0x0d, 0xff];

/// Tries an accelerator with a machine (`q35`, `microvm`) and a processor (`-cpu`).
///
/// # Errors
/// Why it does not work, for people.
pub fn try_accelerator(qemu: &OsStr, machine: &str, accelerator: &str, cpu: &str) -> Result<(), String> {
    let firmware = firmware().map_err(|e| format!("the program to try it with cannot be made: {e}"))?;
    let options = format!("{machine},accel={accelerator}");
    // A QEMU that fails often does so by an assertion: nobody wants the core.
    let child = Command::new("sh")
        .args(["-c", "ulimit -c 0; exec \"$@\"", "sh"])
        .arg(qemu)
        .args(["-machine", &options, "-cpu", cpu, "-m", "16", "-nodefaults", "-no-user-config", "-display", "none"])
        .args(["-no-reboot", "-bios", "/dev/stdin", "-device", "isa-debug-exit,iobase=0xf4,iosize=4"])
        .stdin(firmware)
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn();
    let mut child = child.map_err(|e| format!("sh: {e}"))?;
    let ended = ends_within(&child, LIMIT);
    if !ended {
        // It may have ended just now.
        let _ = child.kill();
    }
    let status = child.wait().map_err(|e| e.to_string())?;
    if ended && status.code() == Some(EXIT_CODE) {
        return Ok(());
    }
    let mut said = Vec::new();
    if let Some(stderr) = child.stderr.take() {
        // What cannot be read cannot be shown.
        let _ = stderr.take(4096).read_to_end(&mut said);
    }
    let said = String::from_utf8_lossy(&said);
    let said = said.lines().find(|l| !l.trim().is_empty() && !l.contains("warning:")).map(str::trim);
    Err(match said {
        Some(line) => line.to_owned(),
        None if !ended => format!("a guest of some forty instructions did not come to their end in {LIMIT:?}"),
        None => format!("QEMU ended with {status}"),
    })
}

fn firmware() -> std::io::Result<File> {
    let mut image = vec![0xf4; FIRMWARE_SIZE];
    image[PROGRAM_AT..PROGRAM_AT + PROGRAM.len()].copy_from_slice(&PROGRAM);
    image[FIRMWARE_SIZE - 16..FIRMWARE_SIZE - 16 + RESET_VECTOR.len()].copy_from_slice(&RESET_VECTOR);
    let mut file = File::from(memfd_create("onequote-accelerator", MemfdFlags::CLOEXEC)?);
    file.write_all(&image)?;
    Ok(file)
}

fn ends_within(child: &Child, limit: Duration) -> bool {
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    let Some(fd) = pid.and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok()) else { return false };
    let limit = Timespec { tv_sec: limit.as_secs().try_into().unwrap_or(i64::MAX), tv_nsec: 0 };
    let mut ends = [PollFd::new(&fd, PollFlags::IN)];
    matches!(poll(&mut ends, Some(&limit)), Ok(n) if n > 0)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;

    const QEMU: &str = "qemu-system-x86_64";

    #[test]
    fn tcg_works_everywhere() {
        for machine in ["q35", "microvm"] {
            try_accelerator(OsStr::new(QEMU), machine, "tcg", "max").unwrap();
        }
    }

    #[test]
    fn what_does_not_work_says_why() {
        let error =
            |qemu: &str, accelerator, cpu| try_accelerator(OsStr::new(qemu), "q35", accelerator, cpu).unwrap_err();
        // Xen's accelerator needs a Xen host.
        assert!(!error(QEMU, "xen", "max").is_empty());
        assert!(error(QEMU, "tcg", "no-such-cpu").contains("no-such-cpu"));
        assert!(error("/no/such/qemu", "tcg", "max").contains("/no/such/qemu"));
        // Starts and ends well, but has run nothing.
        assert!(error("true", "tcg", "max").contains("exit status: 0"));
    }
}
