//! What QEMU's machine object says it loads.

use qapi::qmp::qom_get;
use serde::Deserialize;
use serde_json::{Value, json};

use super::Arguments;
use crate::qmp::{Qmp, QmpError};

/// The machine without a default firmware to be told.
const MICROVM: &str = "microvm";

/// Properties of `/machine` that name what is loaded. Empty strings stand for nothing given.
///
/// Once a guest runs these are claims only: `qom-set` changes them without effect.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Machine {
    /// The machine type: `pc-q35-7.2`.
    pub machine: String,
    /// The kernel's file, as it was given.
    pub kernel: String,
    /// The initial RAM disk's file, as it was given.
    pub initrd: String,
    /// The kernel's command line.
    pub append: String,
    /// The firmware's file as the machine tells it.
    pub firmware: String,
    /// The block node of the firmware in pflash, which is measured as an image.
    pub pflash: String,
    /// `off` where the machine's default firmware depends on that, and it goes without ACPI.
    pub acpi: String,
}

impl Machine {
    /// Asks QEMU.
    ///
    /// # Errors
    /// When QEMU does not answer.
    pub async fn ask(qmp: &Qmp) -> Result<Self, QmpError> {
        let nothing = Self::default();
        let (kind, pflash, loaded) = tokio::try_join!(text(qmp, "type"), text(qmp, "pflash0"), nothing.again(qmp))?;
        let machine = kind.strip_suffix("-machine").unwrap_or(&kind).to_owned();
        let asks = machine == MICROVM && loaded.firmware.is_empty();
        let acpi = if asks { text(qmp, "acpi").await? } else { String::new() };
        Ok(Self { machine, pflash, acpi, ..loaded })
    }

    /// Asks again for what `qom-set` changes.
    ///
    /// # Errors
    /// When QEMU does not answer.
    pub async fn again(&self, qmp: &Qmp) -> Result<Self, QmpError> {
        let (kernel, initrd, append, firmware) =
            tokio::try_join!(text(qmp, "kernel"), text(qmp, "initrd"), text(qmp, "append"), text(qmp, "firmware"))?;
        Ok(Self { kernel, initrd, append, firmware, ..self.clone() })
    }

    /// The file of its firmware, as QEMU looks it up: as it was given, or the machine's default. None when firmware is in
    /// pflash, or when there is none.
    #[must_use]
    pub fn firmware_file(&self) -> Option<&str> {
        if !self.pflash.is_empty() {
            None
        } else if !self.firmware.is_empty() {
            Some(&self.firmware)
        } else if self.machine == MICROVM {
            // It says nothing of its default. QEMU hw/i386/microvm.c, microvm_memory_init.
            Some(if self.acpi == "off" { "qboot.rom" } else { "bios-microvm.bin" })
        } else {
            None
        }
    }
}

/// What executes the guest, and whether it has executed anything.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Execution {
    /// `kvm`, `tcg`, or what the arguments ask for where QEMU does not tell (`xen`, `hvf`).
    pub accelerator: String,
    /// Whether the guest has executed anything, where QEMU tells. A VM that waits in `prelaunch` has not, unless somebody
    /// let it run, stopped it and reset it: QEMU puts it back into `prelaunch` then (`softmmu/runstate.c`,
    /// `main_loop_should_exit`).
    pub has_run: Option<bool>,
}

impl Execution {
    /// Asks QEMU.
    ///
    /// # Errors
    /// When QEMU does not answer.
    pub async fn ask(qmp: &Qmp, given: &Arguments) -> Result<Self, QmpError> {
        if let Some(text) = jit(qmp).await? {
            return Ok(Self { accelerator: "tcg".to_owned(), has_run: jit_has_run(&text) });
        }
        let (kvm, has_run) = tokio::try_join!(qmp.execute(qapi::qmp::query_kvm {}), came_back(qmp))?;
        let accelerator = if kvm.enabled { "kvm".to_owned() } else { asked_for(given) };
        Ok(Self { accelerator, has_run })
    }
}

/// The accelerator that arguments ask for where QEMU tells that it is not KVM.
fn asked_for(given: &Arguments) -> String {
    let asked = given.of_machine("accel", "accel").last().cloned().unwrap_or_default();
    let first = asked.split(',').next().unwrap_or_default();
    // Several stand for the first one that works; that KVM does not was told.
    let rest: Vec<&str> = first.split(':').filter(|name| !name.is_empty() && *name != "kvm").collect();
    if rest.is_empty() { "tcg".to_owned() } else { rest.join(":") }
}

/// Whether a processor ever came back from the guest under KVM.
async fn came_back(qmp: &Qmp) -> Result<Option<bool>, QmpError> {
    let stats = json!({"target": "vcpu", "providers": [{"provider": "kvm", "names": ["exits"]}]});
    match qmp.call::<Value>("query-stats", stats).await {
        Ok(stats) => Ok(exits(&stats).map(|exits| exits > 0)),
        Err(QmpError::Refused { .. }) => Ok(None),
        Err(e) => Err(e),
    }
}

/// What TCG tells of its translations; none with another accelerator, and before QEMU 6.2.
async fn jit(qmp: &Qmp) -> Result<Option<String>, QmpError> {
    #[derive(Deserialize)]
    struct Text {
        #[serde(rename = "human-readable-text")]
        text: String,
    }
    match qmp.call::<Text>("x-query-jit", json!({})).await {
        Ok(answer) => Ok(Some(answer.text)),
        Err(QmpError::Refused { .. }) => Ok(None),
        Err(e) => Err(e),
    }
}

/// Whether a block was ever translated: there are some, or all were thrown away (QEMU `accel/tcg/translate-all.c`,
/// `dump_exec_info`).
fn jit_has_run(text: &str) -> Option<bool> {
    let count = |name: &str| {
        let rest = text.lines().find_map(|line| line.strip_prefix(name))?;
        rest.split_ascii_whitespace().next()?.parse::<u64>().ok()
    };
    Some(count("TB count")? > 0 || count("TB flush count")? > 0)
}

/// How often all processors came back from the guest.
fn exits(stats: &Value) -> Option<u64> {
    let of = |cpu: &Value| cpu["stats"].as_array()?.iter().find(|s| s["name"] == "exits")?["value"].as_u64();
    stats.as_array()?.iter().map(of).sum()
}

/// A property of the machine; empty when the machine has none of that name.
async fn text(qmp: &Qmp, property: &str) -> Result<String, QmpError> {
    let get = qom_get { path: "/machine".to_owned(), property: property.to_owned() };
    match qmp.execute(get).await {
        Ok(Value::String(text)) => Ok(text),
        Ok(_) | Err(QmpError::Refused { .. }) => Ok(String::new()),
        Err(e) => Err(e),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;

    #[test]
    fn what_tcg_and_kvm_tell() {
        let text = |count, flushes| {
            format!(
                "Translation buffer state:\nTB count            {count}\nStatistics:\nTB flush count      {flushes}\n"
            )
        };
        assert_eq!(jit_has_run(&text(0, 0)), Some(false));
        assert_eq!(jit_has_run(&text(1, 0)), Some(true));
        assert_eq!(jit_has_run(&text(0, 2)), Some(true));
        assert_eq!(jit_has_run("TB count ?"), None);
        let cpu = |exits: u64| json!({"provider": "kvm", "stats": [{"name": "exits", "value": exits}]});
        assert_eq!(exits(&json!([cpu(0), cpu(3)])), Some(3));
        assert_eq!(exits(&json!([cpu(0)])), Some(0));
        assert_eq!(exits(&json!([{"stats": []}])), None);
    }
}
