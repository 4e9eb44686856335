//! The event logs of real firmware: OVMF, Debian's shim and GRUB, systemd's stub, Linux' own stub.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use onequote_evidence::digest::HashAlg;
use onequote_evidence::firmware::{EventType, FirmwareLog};
use onequote_evidence::pcr::Register;
use onequote_tests::lab::{BootedBy, FirmwareBoot, World, skip};

const WAYS: [BootedBy; 3] = [BootedBy::Firmware, BootedBy::Stub, BootedBy::Grub];

/// IMA's own register, which goes on after the boot.
const IMA_PCR: u8 = 10;

/// The events in words, each with its register.
fn words(log: &FirmwareLog<'_>) -> Vec<String> {
    log.events().iter().map(|event| format!("{} {}", event.pcr, log.describe(event, HashAlg::Sha256))).collect()
}

#[test]
fn logs_replay_to_the_registers_of_their_tpm() {
    for by in WAYS {
        let boot = FirmwareBoot::of(by).unwrap();
        let log = FirmwareLog::parse(&boot.log).unwrap();
        assert_eq!(log.banks(), HashAlg::ALL, "{by:?}");
        assert_eq!(log.content_len(), boot.log.len(), "the kernel shows no padding");
        for (register, value) in boot.registers.iter().filter(|(register, _)| register.pcr != IMA_PCR) {
            assert_eq!(log.value(*register), Some(value.as_slice()), "{by:?}: {register}");
        }
    }
}

#[test]
fn events_are_shown_in_words() {
    let expected: [(BootedBy, &[&str]); 3] = [
        (
            BootedBy::Firmware,
            &[
                "7 variable SecureBoot = 00",
                "7 variable db = empty",
                "4 says: image VenMedia(1428f772-b64a-441e-b8c3-9ebdd7f893c7)/kernel",
                "1 variable, says: BootOrder = 0000",
                "4 \"Calling EFI Application from Boot Option\"",
                "0 separator",
                "9 says: \"Linux initrd\" (tag 0x8f3b22ec)",
                "5 \"Exit Boot Services Invocation\"",
                "5 \"Exit Boot Services Returned with Success\"",
            ],
        ),
        (
            BootedBy::Stub,
            &["12 \"console=ttyS0 quiet lab.words=given\"", "11 says: \".linux\"", "11 says: \".initrd\""],
        ),
        (
            BootedBy::Grub,
            &[
                "7 variable SecureBoot = 01",
                "14 says: \"MokList\"",
                "8 \"linux /vmlinuz console=ttyS0 quiet\" (says: grub_cmd)",
                "8 \"/vmlinuz console=ttyS0 quiet\" (says: kernel_cmdline)",
                "9 says: \"/vmlinuz\"",
                "4 says: image \\EFI\\BOOT\\grubx64.efi",
            ],
        ),
    ];
    for (by, expected) in expected {
        let boot = FirmwareBoot::of(by).unwrap();
        let words = words(&FirmwareLog::parse(&boot.log).unwrap());
        for one in expected {
            assert!(words.iter().any(|event| event == one), "{by:?}: no {one} in {words:#?}");
        }
        let begins = |beginning: &str| words.iter().any(|event| event.starts_with(beginning));
        if by == BootedBy::Grub {
            // Microsoft's certificate let shim run, Debian's let GRUB and kernel run.
            assert!(begins("7 variable db = certificate ") && begins("7 variable db = by certificate "), "{words:#?}");
            assert!(begins("7 variable MokListRT of 605dab50"), "{words:#?}");
        }
    }
}

/// What tpm2_eventlog of Debian's tpm2-tools computes: lines `  BANK:` and `    PCR : 0xHEX` under `pcrs:`.
fn of_tpm2_tools(file: &std::path::Path) -> Result<Vec<(Register, String)>> {
    let output = Command::new("tpm2_eventlog").arg(file).output()?;
    ensure!(output.status.success(), "tpm2_eventlog: {}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout)?;
    let (_, values) = text.split_once("\npcrs:\n").context("no values")?;
    let mut bank = HashAlg::Sha1;
    let mut out = Vec::new();
    for line in values.lines() {
        match line.split_once(':').context("a line without colon")? {
            (name, "") => bank = name.trim().parse().map_err(anyhow::Error::msg)?,
            (pcr, value) => {
                let value = value.trim().strip_prefix("0x").context("a value without 0x")?;
                out.push((Register { bank, pcr: pcr.trim().parse()? }, value.to_owned()));
            }
        }
    }
    Ok(out)
}

#[test]
fn tpm2_eventlog_computes_the_same_values() {
    if Command::new("tpm2_eventlog").arg("--version").output().is_err() {
        return skip("firmware logs against tpm2_eventlog", "tpm2-tools is not installed");
    }
    let folder = tempfile::tempdir().unwrap();
    for by in WAYS {
        let boot = FirmwareBoot::of(by).unwrap();
        let file = folder.path().join("log");
        fs::write(&file, &boot.log).unwrap();
        let log = FirmwareLog::parse(&boot.log).unwrap();
        let theirs = of_tpm2_tools(&file).unwrap();
        assert_eq!(theirs.len(), log.extended().len() * log.banks().len(), "{by:?}");
        for (register, value) in theirs {
            assert_eq!(log.value(register).map(hex::encode), Some(value), "{by:?}: {register}");
        }
    }
}

/// Brings the world's TPM to where a boot left the one that it ran with.
fn as_booted(world: &World, log: &[u8]) -> Result<()> {
    let log = FirmwareLog::parse(log)?;
    let mut arguments = Vec::new();
    for event in log.events().iter().filter(|event| event.is_extended()) {
        let digest = |bank: &HashAlg| Some(format!("{bank}={}", hex::encode(event.digest(*bank)?)));
        let digests: Vec<String> = log.banks().iter().filter_map(digest).collect();
        arguments.push(format!("{}:{}", event.pcr, digests.join(",")));
    }
    for some in arguments.chunks(8) {
        let status = Command::new("tpm2_pcrextend").args(some).env("TPM2TOOLS_TCTI", world.tcti()).status()?;
        ensure!(status.success(), "tpm2_pcrextend ended with {status}");
    }
    Ok(())
}

/// Replaces the host's log as its root could.
fn edited(world: &World, edit: impl FnOnce(&mut Vec<u8>)) -> Result<()> {
    let path = world.folder().join("firmware-log");
    let mut bytes = fs::read(&path)?;
    edit(&mut bytes);
    Ok(fs::write(path, bytes)?)
}

#[test]
fn a_real_boot_is_judged_and_an_edited_log_is_found() {
    World::test(|world| {
        let boot = FirmwareBoot::of(BootedBy::Grub)?;
        as_booted(world, &boot.log)?;
        let path = world.folder().join("firmware-log");
        fs::write(&path, &boot.log)?;
        world.settings().tables = format!("\n[host]\nfirmware_log = {path:?}\n");
        world.start_enrolled()?;
        let policy = world.learn_policy()?;
        let learned = fs::read_to_string(&policy)?;
        for line in ["[host.firmware]", "secure_boot = true", "separators = true", "db = { content"] {
            ensure!(learned.contains(line), "no {line} in {learned}");
        }
        world.verdict()?.host().is("trusted")?;

        // Another type is data.
        let log = FirmwareLog::parse(&boot.log)?;
        let secure_boot = log.events().iter().find(|event| event.kind == EventType::VARIABLE_DRIVER_CONFIG);
        let at = secure_boot.context("a variable")?.offset;
        edited(world, |bytes| bytes[at + 4..at + 8].copy_from_slice(&EventType::IPL.0.to_le_bytes()))?;
        world.verdict()?.host().is("trusted")?;
        // Other data are no proof: here Secure Boot's, whose last byte is before the next event.
        let next = log.events().iter().find(|event| event.offset > at).context("another event")?.offset;
        edited(world, |bytes| bytes[next - 1] ^= 1)?;
        world.verdict()?.host().is_untrusted_for("firmware-event-data", "secure_boot")?;
        edited(world, |bytes| bytes[next - 1] ^= 1)?;
        // Another digest: of SHA-256, which stands behind register, type, count, and SHA-1's.
        edited(world, |bytes| bytes[at + 12 + 2 + 20 + 2] ^= 1)?;
        world.verdict()?.host().is_untrusted_for("firmware-log-replay", "sha256:PCR7")?;
        edited(world, |bytes| bytes[at + 12 + 2 + 20 + 2] ^= 1)?;
        edited(world, |bytes| bytes.truncate(boot.log.len() - 1))?;
        world.verdict()?.host().is_untrusted_for("firmware-log-malformed", "")?;
        fs::write(&path, &boot.log)?;
        world.verdict()?.host().is("trusted")?;

        // What people see of it.
        let shown = world.verifier(&["firmware-log", &path.to_string_lossy()])?.success()?.output;
        ensure!(shown.contains("variable SecureBoot = 01") && shown.contains("linux /vmlinuz"), "{shown}");
        Ok(())
    });
}
