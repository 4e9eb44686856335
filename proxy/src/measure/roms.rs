//! Option ROMs: code that a guest's firmware runs, loaded by devices and by the machine without being named in any
//! argument. QEMU tells of them in two texts for people, which have kept their form since QEMU 2: `info qtree` with each
//! device's `romfile`, and `info roms` with what lies under `genroms` and `vgaroms` in fw_cfg.

use serde_json::json;

use crate::qmp::{Qmp, QmpError};

/// The most names that are taken.
const MAX_ROMS: usize = 256;

/// The names of all option ROMs, as QEMU looks them up, each once.
pub(super) async fn ask(qmp: &Qmp) -> Result<Vec<String>, QmpError> {
    let ask = async |line: &str| qmp.call::<String>("human-monitor-command", json!({"command-line": line})).await;
    let (devices, roms) = tokio::try_join!(ask("info qtree"), ask("info roms"))?;
    let mut names: Vec<String> = of_devices(&devices).chain(of_machine(&roms)).map(str::to_owned).collect();
    names.sort_unstable();
    names.dedup();
    names.truncate(MAX_ROMS);
    Ok(names)
}

/// Lines `romfile = "NAME"`.
fn of_devices(tree: &str) -> impl Iterator<Item = &str> {
    tree.lines()
        .filter_map(|line| line.trim().strip_prefix("romfile = \"")?.strip_suffix('"'))
        .filter(|name| !name.is_empty())
}

/// Lines `fw=genroms/FILE size=… name="NAME"`.
fn of_machine(roms: &str) -> impl Iterator<Item = &str> {
    roms.lines().filter_map(|line| {
        let line = line.trim_end();
        let rom = line.starts_with("fw=genroms/") || line.starts_with("fw=vgaroms/");
        let (_, name) = line.split_once(" name=\"").filter(|_| rom)?;
        name.strip_suffix('"')
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;

    #[test]
    fn texts_of_the_human_monitor() {
        let tree = "bus: main-system-bus\r\n  dev: virtio-net-pci, id \"\"\r\n    romfile = \"efi-virtio.rom\"\r\n    romfile = \"\"\r\n    x-romfile = \"no\"\r\n";
        assert_eq!(of_devices(tree).collect::<Vec<_>>(), ["efi-virtio.rom"]);
        let roms = "fw=genroms/kvmvapic.bin size=0x002400 name=\"kvmvapic.bin\"\r\n\
                    addr=00000000ffff0000 size=0x010000 mem=rom name=\"halt.bin\"\r\n\
                    fw=vgaroms/v.bin size=0x1 name=\"/a \"b\"\"\r\n/rom@etc/acpi/tables size=0x200000 name=\"etc/acpi/tables\"\r\n";
        assert_eq!(of_machine(roms).collect::<Vec<_>>(), ["kvmvapic.bin", "/a \"b\""]);
    }
}
