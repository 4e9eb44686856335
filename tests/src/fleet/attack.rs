//! Attackers: what a host's root, a thief of its files or a guest may try, each with the finding that it must give.

use std::{sync::PoisonError, time::Duration};

use anyhow::{Context as _, Result};
use onequote_evidence::{
    event::{Event, GuestRewind, StopCause, VmRef, VmStop},
    id::{BootId, Sha256},
    statement::Unmanaged,
};
use onequote_proxy::log::PcrRole;
use onequote_verifier::{
    finding::{Code, Finding},
    result::{State, Verdict},
};

use super::{Host, now};
use crate::lab::Random;

/// What an attacker does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Attack {
    /// Signs with another key than the enrolled one.
    OtherKey,
    /// Leaves a register out of the quote.
    FewerRegisters,
    /// Sets the TPM's clock back, as who puts an old state of a software TPM back.
    ClockBack,
    /// Puts TPM and log back to an earlier time, and lets the clock run on.
    LogBack,
    /// Extends the log's register past the proxy.
    ForeignExtend,
    /// Leaves a VM that runs out of the statement.
    HiddenVm,
    /// Sends another entry of a guest's list than was logged.
    ChangedEntry,
    /// Changes a record on disk after it was extended.
    ChangedRecord,
    /// Runs a VM past the proxy.
    Unmanaged,
    /// Boots other firmware.
    Firmware,
    /// Has the kernel measure a file that it then takes off its list.
    HostList,
    /// Resets the TPM under the running kernel.
    TpmReset,
    /// A guest runs a program that it may not.
    Program,
    /// A guest tells another past.
    Rewind,
    /// A VM's image is changed while it is off.
    Image,
    /// The machine was copied, and the copy reports in its place while it goes on itself.
    Clone,
}

impl Attack {
    /// All of them.
    pub const ALL: [Self; 16] = [
        Self::OtherKey,
        Self::FewerRegisters,
        Self::ClockBack,
        Self::LogBack,
        Self::ForeignExtend,
        Self::HiddenVm,
        Self::ChangedEntry,
        Self::ChangedRecord,
        Self::Unmanaged,
        Self::Firmware,
        Self::HostList,
        Self::TpmReset,
        Self::Program,
        Self::Rewind,
        Self::Image,
        Self::Clone,
    ];

    /// The finding that it must give.
    #[must_use]
    pub fn code(self) -> Code {
        match self {
            Self::OtherKey => Code::SignatureInvalid,
            Self::FewerRegisters => Code::PcrSelection,
            Self::ClockBack => Code::ClockRegression,
            Self::LogBack | Self::Clone => Code::LogRollback,
            Self::ForeignExtend => Code::ForeignExtend,
            Self::HiddenVm => Code::VmMissing,
            Self::ChangedEntry => Code::GuestListAggregate,
            Self::ChangedRecord => Code::LogDigest,
            Self::Unmanaged => Code::UnmanagedVm,
            Self::Firmware => Code::HostRegister,
            Self::HostList => Code::HostImaReplay,
            Self::TpmReset => Code::TpmReset,
            Self::Program => Code::ImaUnknownFile,
            Self::Rewind => Code::GuestRewind,
            Self::Image => Code::ImageDiscontinuity,
        }
    }

    /// Whether it is a VM that must not be trusted, and not the whole host.
    #[must_use]
    pub fn is_of_a_vm(self) -> bool {
        matches!(self, Self::Program | Self::Rewind | Self::Image | Self::ChangedEntry)
    }

    /// Whether a verdict sees through it: its finding is there, and who did it is not trusted.
    #[must_use]
    pub fn found_in(self, verdict: &Verdict) -> bool {
        let has = |findings: &[Finding]| findings.iter().any(|finding| finding.code == self.code());
        match self.is_of_a_vm() {
            true => verdict.vms.iter().any(|vm| vm.state == State::Untrusted && has(&vm.findings)),
            false => verdict.host.state == State::Untrusted && has(&verdict.host.findings),
        }
    }

    /// Whether the verifier must have taken evidence of the host before.
    #[must_use]
    pub fn needs_a_past(self) -> bool {
        matches!(self, Self::ClockBack | Self::LogBack | Self::Image | Self::Clone | Self::TpmReset)
    }

    /// Does it. The host runs, with VMs; a verifier has taken evidence of it.
    ///
    /// # Errors
    /// The host cannot do it.
    pub async fn strike(self, host: &mut Host, random: &mut Random) -> Result<()> {
        match self {
            Self::OtherKey => host.chip.exchange_key()?,
            Self::FewerRegisters => {
                host.quoted_pcrs.retain(|&pcr| pcr != 14);
                host.restart_proxy().await?;
            }
            Self::ClockBack => host.chip.set_back(Duration::from_secs(3600)),
            // What it put back comes from before the verifier's last evidence: see `prepare`.
            Self::LogBack => {
                let (chip, disk) = host.saved.clone().context("nothing was saved")?;
                host.kill_proxy().await;
                host.chip.put_back_registers(&chip);
                host.disk.put_back(&disk);
                host.start_proxy()?;
            }
            Self::ForeignExtend => host.chip.extend(12, b"somebody else"),
            Self::HiddenVm => {
                let key = any(host, random)?;
                let stop = VmStop { cause: StopCause::Lost, images: vec![], unmeasured: vec![], read: vec![] };
                let event = Event { time: now(), vm: Some(key), body: stop.into() };
                host.inventory.write().unwrap_or_else(PoisonError::into_inner).apply(&event);
            }
            Self::ChangedEntry => {
                let (key, program) = (any(host, random)?, host.forbidden(random));
                host.run_programs(key, &[program]).await?;
                host.guests.exchange_last(key, 0);
            }
            Self::ChangedRecord => {
                let key = any(host, random)?;
                let program = host.forbidden(random);
                host.run_programs(key, &[program]).await?;
                // The last record's last byte is in the aggregate that it has.
                host.disk.edit(|log| {
                    if let Some(last) = log.last_mut() {
                        *last ^= 1;
                    }
                });
            }
            Self::Unmanaged => {
                let other = Unmanaged { pid: 4711, program: "/usr/bin/qemu-system-x86_64".to_owned() };
                host.unmanaged.lock().unwrap_or_else(PoisonError::into_inner).push(other);
            }
            Self::Firmware => host.chip.extend(0, b"other firmware"),
            Self::HostList => host.chip.extend(10, b"a file"),
            Self::TpmReset => {
                host.chip.reset();
                host.restart_proxy().await?;
            }
            Self::Program => {
                let (key, program) = (any(host, random)?, host.forbidden(random));
                host.run_programs(key, &[program]).await?;
            }
            Self::Rewind => {
                let key = any(host, random)?;
                let rewind = GuestRewind {
                    boot: 0,
                    count: 1,
                    aggregate: Sha256::ZERO,
                    claimed_count: 0,
                    claimed: Sha256::ZERO,
                    boot_id: BootId::ZERO,
                };
                host.say(PcrRole::Guest, Some(key), rewind).await?;
            }
            Self::Image => {
                host.change_image().context("every VM runs")?;
                host.start_vms(1).await?;
            }
            Self::Clone => {
                let mut copy = host.saved_copy.take().context("no copy was made")?;
                copy.start_proxy()?;
                let key = any(&copy, random)?;
                let program = copy.forbidden(random);
                copy.run_programs(key, &[program]).await?;
                host.kill_proxy().await;
                *host = *copy;
            }
        }
        Ok(())
    }

    /// What it needs before the verifier's last evidence: a copy of what is to be put back, a VM that is off.
    ///
    /// # Errors
    /// The host cannot do it.
    pub async fn prepare(self, host: &mut Host, random: &mut Random) -> Result<()> {
        match self {
            Self::LogBack => host.saved = Some((host.chip.save(), host.disk.save())),
            Self::Clone => host.saved_copy = Some(Box::new(host.copy())),
            Self::Image => {
                let key = any(host, random)?;
                host.stop_vm(key).await?;
            }
            _ => {}
        }
        Ok(())
    }
}

fn any(host: &Host, random: &mut Random) -> Result<VmRef> {
    host.any_running(random).context("no VM runs on the host")
}
