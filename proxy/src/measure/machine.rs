//! What QEMU's machine object says it loads.

use qapi::qmp::qom_get;
use serde_json::Value;

use crate::qmp::{Qmp, QmpError};

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
    /// The firmware's file as it was given, or the machine's default; empty when firmware is in pflash, which is
    /// measured as an image, or when there is none.
    pub firmware: String,
}

impl Machine {
    /// Asks QEMU.
    ///
    /// # Errors
    /// When QEMU does not answer.
    pub async fn ask(qmp: &Qmp) -> Result<Self, QmpError> {
        let kind = text(qmp, "type").await?;
        let machine = kind.strip_suffix("-machine").unwrap_or(&kind).to_owned();
        let mut firmware = text(qmp, "firmware").await?;
        if !text(qmp, "pflash0").await?.is_empty() {
            firmware.clear();
        } else if firmware.is_empty() && machine == "microvm" {
            // It says nothing of its default. QEMU hw/i386/microvm.c, microvm_memory_init.
            firmware = if text(qmp, "acpi").await? == "off" { "qboot.rom" } else { "bios-microvm.bin" }.to_owned();
        }
        Ok(Self {
            machine,
            kernel: text(qmp, "kernel").await?,
            initrd: text(qmp, "initrd").await?,
            append: text(qmp, "append").await?,
            firmware,
        })
    }
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
