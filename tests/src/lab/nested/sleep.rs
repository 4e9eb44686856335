//! What a host does beside being turned on and off: suspend to memory, suspend to disk, another kernel by kexec.

use std::fs::File;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::json;

use super::{ANSWER_LIMIT, BOOT_LIMIT, NestedHost};
use crate::lab::qmp::Qmp;
use crate::lab::wait;

/// Room for the memory's image, most of which is holes.
const SWAP: u64 = 2 << 30;

impl NestedHost {
    /// Gives it a disk to swap to, which it has from its next start on.
    ///
    /// # Errors
    /// The file cannot be made.
    pub fn add_swap(&mut self) -> Result<()> {
        File::create(self.folder.join("swap.img"))?.set_len(SWAP)?;
        self.swap = true;
        Ok(())
    }

    /// Suspends it to memory (ACPI S3), and wakes it up.
    ///
    /// # Errors
    /// It does not sleep, or does not wake up.
    pub fn suspend(&mut self) -> Result<()> {
        // The answer must be out before the serial port sleeps.
        self.run("(sleep 1; echo mem >/sys/power/state) >/dev/null 2>&1 &")?;
        let mut monitor = Qmp::connect(&self.folder.join("qmp.sock"))?;
        wait::for_true("the nested host to sleep", ANSWER_LIMIT, || {
            Ok(monitor.execute("query-status", &json!({}))?["status"] == "suspended")
        })?;
        monitor.execute("system_wakeup", &json!({}))?;
        let answer = self.answers()?;
        ensure!(answer.contains("Waking up from system sleep state S3"), "it did not sleep: {answer}");
        Ok(())
    }

    /// Suspends it to disk, which turns it off, and turns it on again.
    ///
    /// # Errors
    /// It does not go, or what comes is not what went.
    pub fn hibernate(&mut self) -> Result<()> {
        let before = self.boot_id()?;
        self.run("mkswap -q /dev/vdc && swapon /dev/vdc && echo 0 >/sys/power/image_size")?;
        self.run("echo shutdown >/sys/power/disk; (sleep 1; echo disk >/sys/power/state) >/dev/null 2>&1 &")?;
        let mut qemu = self.qemu.take().context("the nested host is off")?;
        let status = qemu.wait(BOOT_LIMIT).context("the nested host did not hibernate")?;
        ensure!(status.success(), "QEMU of the nested host ended with {status}");
        self.start()?;
        self.answers()?;
        let after = self.boot_id()?;
        ensure!(before == after, "boot {before} did not come back, but {after} did");
        Ok(())
    }

    /// Has its kernel start another one, the same again, in an orderly way; waits until its proxy is there again.
    ///
    /// # Errors
    /// The kernel refuses, or what is started does not come up.
    pub fn kexec(&mut self) -> Result<()> {
        let (boots, before) = (self.agent.boots(), self.boot_id()?);
        self.run("kexec -s -l /boot/vmlinuz-* --initrd=/boot/initrd --reuse-cmdline")?;
        // The answer may be cut by the end.
        let _ = self.agent.ask("sh systemctl --no-block kexec", ANSWER_LIMIT);
        self.wait_up(boots + 1)?;
        ensure!(before != self.boot_id()?, "no other kernel was started");
        self.wait_guests().map(drop)
    }

    fn boot_id(&mut self) -> Result<String> {
        self.run("cat /proc/sys/kernel/random/boot_id")
    }

    /// Waits until it takes commands again. Gives what its kernel has said.
    fn answers(&mut self) -> Result<String> {
        let (mut agent, limit) = (self.agent.clone(), Duration::from_secs(5));
        let qemu = self.qemu.as_mut().context("the nested host is off")?;
        wait::until("the nested host to answer", BOOT_LIMIT, || {
            qemu.check_alive()?;
            // What was asked while nobody listened is asked again.
            Ok(agent.ask("sh dmesg", limit).ok().map(|answer| answer.output))
        })
    }
}
