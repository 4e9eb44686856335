//! Step 6: the firmware's event log, edited in every way, and the rules about what it shows.

use onequote_evidence::{
    digest::{HashAlg, sha256},
    firmware::{EventType, FirmwareLog, Guid, Variable},
    id::{Blob, Sha256},
    pcr::{Register, RegisterValue},
};

use super::*;

const IMAGE: EventType = EventType::BOOT_SERVICES_APPLICATION;
const CALLING: &[u8] = b"Calling EFI Application from Boot Option";

/// An event: register, type, what was measured, what the log has as data.
type Entry = (u32, EventType, Vec<u8>, Vec<u8>);

fn proven(pcr: u32, kind: EventType, data: &[u8]) -> Entry {
    (pcr, kind, data.to_vec(), data.to_vec())
}

fn wide(text: &str) -> Vec<u8> {
    text.encode_utf16().flat_map(u16::to_le_bytes).collect()
}

fn variable(guid: Guid, name: &str, data: &[u8]) -> Vec<u8> {
    Variable { guid, name: &wide(name), data }.to_bytes()
}

/// A database with image digests and one certificate.
fn database(images: &[u8], certificate: &[u8]) -> Vec<u8> {
    let list = |kind: Guid, size: usize, entries: Vec<u8>| {
        let head = [28 + entries.len() as u32, 0, size as u32].map(u32::to_le_bytes).concat();
        [&kind.0[..], &head, &entries].concat()
    };
    let sha256_kind = Guid::from_fields(0xc1c4_1626, 0x504c, 0x4092, 0xaca9_41f9_3693_4328);
    let x509 = Guid::from_fields(0xa5c0_59a1, 0x94e4, 0x4aa7, 0x87b5_ab15_5c2b_f072);
    let images: Vec<u8> = images.iter().flat_map(|&n| [[7; 16].to_vec(), vec![n; 32]].concat()).collect();
    [list(sha256_kind, 48, images), list(x509, 16 + certificate.len(), [&[7; 16], certificate].concat())].concat()
}

/// A boot with shim, GRUB and a kernel under Secure Boot, as OVMF and Debian log it.
fn usual() -> Vec<Entry> {
    let config = EventType::VARIABLE_DRIVER_CONFIG;
    let separator = |pcr| proven(pcr, EventType::SEPARATOR, &[0; 4]);
    let mut entries = vec![
        proven(0, EventType(8), &[0, 0]),
        proven(7, config, &variable(Guid::GLOBAL, "SecureBoot", &[1])),
        proven(7, config, &variable(Guid::GLOBAL, "PK", &database(&[], b"pk"))),
        proven(7, config, &variable(Guid::IMAGE_SECURITY, "db", &database(&[1, 2], b"microsoft"))),
        proven(7, config, &variable(Guid::IMAGE_SECURITY, "dbx", &database(&[9], b"revoked"))),
        separator(7),
        proven(4, EventType::EFI_ACTION, CALLING),
    ];
    entries.extend((0..7).map(separator));
    entries.extend([
        (4, IMAGE, b"shim".to_vec(), b"?".to_vec()),
        proven(7, EventType::VARIABLE_AUTHORITY, &variable(Guid::SHIM, "SbatLevel", b"sbat,1")),
        (14, EventType::IPL, b"mok".to_vec(), b"MokList\0".to_vec()),
        (4, IMAGE, b"grub".to_vec(), b"?".to_vec()),
        (8, EventType::IPL, b"linux /vmlinuz quiet".to_vec(), b"grub_cmd: linux /vmlinuz quiet\0".to_vec()),
        (9, EventType::IPL, b"the kernel's file".to_vec(), b"/vmlinuz\0".to_vec()),
        (4, IMAGE, b"kernel".to_vec(), b"?".to_vec()),
        (9, EventType::IPL, b"the initrd".to_vec(), b"/initrd\0".to_vec()),
        proven(5, EventType::EFI_ACTION, b"Exit Boot Services Invocation"),
    ]);
    entries
}

fn log_of(banks: &[HashAlg], entries: &[Entry]) -> Vec<u8> {
    let le = |value: usize| (value as u32).to_le_bytes();
    let mut header = b"Spec ID Event03\0\0\0\0\0\0\x02\0\x02".to_vec();
    header.extend(le(banks.len()));
    for bank in banks {
        header.extend([bank.tpm_id().to_le_bytes(), (bank.size() as u16).to_le_bytes()].concat());
    }
    header.push(0);
    let mut out = [&le(0)[..], &le(3), &[0; 20], &le(header.len()), &header].concat();
    for (pcr, kind, measured, data) in entries {
        out.extend([*pcr, kind.0, banks.len() as u32].map(u32::to_le_bytes).concat());
        for bank in banks {
            out.extend([&bank.tpm_id().to_le_bytes()[..], &bank.hash(measured)].concat());
        }
        out.extend([&le(data.len())[..], data].concat());
    }
    out
}

/// A host that booted so. What the log shows of other registers than the log's own is in the TPM.
fn booted(world: &mut World, entries: &[Entry]) {
    world.firmware = log_of(&BANKS, entries);
    let log = FirmwareLog::parse(&world.firmware).unwrap();
    world.pcrs = log
        .extended()
        .into_iter()
        .map(|pcr| (pcr, Sha256(log.value(Register { bank: HashAlg::Sha256, pcr }).unwrap().try_into().unwrap())))
        .collect();
}

fn world(rules: &str) -> World {
    let mut world = World::new();
    world.policy = Some(format!("[host]\n[host.firmware]\n{rules}"));
    booted(&mut world, &usual());
    world
}

fn sha(text: &[u8]) -> String {
    format!("\"sha256:{}\"", sha256(&[text]))
}

/// Rules that [`usual`] keeps.
fn rules() -> String {
    format!(
        "secure_boot = true\nseparators = true\nkernel = [{}]\nimages = [{}, {}]\nfiles = [{}, {}]\n\
         db = {{ include = [{}, \"sha256:{}\"], exclude = [{}] }}\ndbx = {{ include = [\"sha256:{}\"] }}\npk = {{ only = [{}] }}\n",
        sha(b"kernel"),
        sha(b"shim"),
        sha(b"grub"),
        sha(b"the kernel's file"),
        sha(b"the initrd"),
        sha(b"microsoft"),
        Sha256([1; 32]),
        sha(b"snakeoil"),
        Sha256([9; 32]),
        sha(b"pk"),
    )
}

/// Changes the log after the boot: the registers stay.
fn edited(world: &mut World, entries: &[Entry]) {
    world.firmware = log_of(&BANKS, entries);
}

fn notes(appraisal: &Appraisal) -> String {
    appraisal.verdict.notes.join("\n")
}

fn skipped(appraisal: &Appraisal, check: &str) -> String {
    let reasons = appraisal.verdict.skipped.iter().filter(|s| s.check == check).map(|s| s.reason.clone());
    reasons.collect::<Vec<_>>().join("\n")
}

#[test]
fn a_boot_that_keeps_every_rule_is_trusted_and_says_by_what() {
    let mut world = world(&rules());
    let appraisal = world.round();
    assert!(appraisal.verdict.all_trusted(), "{:#?}", appraisal.verdict);
    let notes = notes(&appraisal);
    for (rule, by) in [
        ("secure_boot", "event 2 in PCR 7"),
        ("db", "event 4 in PCR 7"),
        ("separators", "PCR 0 to 7"),
        ("images", "3 events in PCR 4"),
        ("files", "2 events in PCR 9"),
        ("kernel", "event 21 in PCR 4"),
    ] {
        assert!(notes.contains(&format!("firmware: {rule} is shown by")) && notes.contains(by), "{rule}: {notes}");
    }
    // Without rules the log is replayed, and the verdict says that nothing of it was judged.
    world.policy = Some("[host]\n".into());
    let appraisal = world.round();
    assert!(appraisal.verdict.all_trusted());
    assert!(skipped(&appraisal, "firmware-rules").contains("[host.firmware]"));
}

#[test]
fn what_is_learned_of_a_boot_is_trusted() {
    for (drop_shim, kernel) in [(false, &b"kernel"[..]), (true, b"the kernel's file")] {
        let mut world = world("");
        if drop_shim {
            // GRUB alone starts its kernel without an image event.
            booted(
                &mut world,
                &usual().into_iter().filter(|e| !matches!(e.2.as_slice(), b"shim" | b"kernel")).collect::<Vec<_>>(),
            );
        }
        world.policy = None;
        let proposal = crate::policy::learn::propose(&world.round().facts.unwrap());
        for line in ["secure_boot = true", "separators = true", "db = { content"] {
            assert!(proposal.contains(line), "{proposal}");
        }
        let (_, kernels) = proposal.split_once("kernel = [").unwrap();
        assert!(kernels.split(']').next().unwrap().contains(&sha(kernel)), "{proposal}");
        world.policy = Some(proposal);
        assert!(world.round().verdict.all_trusted(), "{}\n{:#?}", world.policy.clone().unwrap(), world.round().verdict);
    }
}

#[test]
fn a_log_that_is_missing_or_malformed() {
    let mut world = world("");
    world.firmware.clear();
    let appraisal = world.round();
    assert_eq!(only(&appraisal).code, Code::FirmwareLogMissing);
    assert!(only(&appraisal).actual.as_ref().unwrap().contains("PCR 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 14"));
    // The same without a section in the policy: the registers show that there was a boot.
    world.policy = Some("[host]\n".into());
    assert_eq!(only(&world.round()).code, Code::FirmwareLogMissing);
    world.policy = Some("[host]\n[host.firmware]\nlog = \"optional\"\n".into());
    let appraisal = world.round();
    assert!(appraisal.verdict.all_trusted());
    assert!(skipped(&appraisal, "firmware-log").contains("firmware-log-missing"));

    // No firmware, no log: not checked, unless the policy wants one.
    let mut empty = World::new();
    let appraisal = empty.round();
    assert!(appraisal.verdict.all_trusted() && !skipped(&appraisal, "firmware-log").is_empty());
    empty.policy = Some("[host]\n[host.firmware]\n".into());
    assert_eq!(only(&empty.round()).code, Code::FirmwareLogMissing);

    booted(&mut world, &usual());
    world.policy = Some("[host]\n[host.firmware]\nsecure_boot = true\n".into());
    for len in 1..world.firmware.len() {
        let whole = std::mem::take(&mut world.firmware);
        world.firmware = whole[..len].to_vec();
        let codes = host_codes(&world.round());
        let cut = codes.contains(&Code::FirmwareLogMalformed) || codes.contains(&Code::FirmwareLogReplay);
        assert!(cut, "{len}: {codes:?}");
        world.firmware = whole;
    }
    // What cannot be read proves nothing: the rule is not shown.
    world.firmware.pop();
    assert_eq!(host_codes(&world.round()), [Code::FirmwareLogMalformed, Code::FirmwareNotShown]);
}

#[test]
fn a_changed_digest_names_the_register() {
    let mut world = world(&rules());
    let mut entries = usual();
    entries[20].2 = b"another kernel".to_vec();
    edited(&mut world, &entries);
    let appraisal = world.round();
    let finding = &appraisal.verdict.host.findings[0];
    assert_eq!((finding.code, finding.item.as_str()), (Code::FirmwareLogReplay, "sha256:PCR4"));
    assert_eq!(finding.expected, Some(world.pcrs[&4].to_string()));
    // What rests on that register is not shown, and everything else still is.
    let rest: Vec<(Code, &str)> =
        (appraisal.verdict.host.findings[1..].iter()).map(|f| (f.code, f.item.as_str())).collect();
    use Code::{BootKernel, FirmwareNotShown as NotShown};
    assert_eq!(rest, [(NotShown, "separators: PCR 4"), (NotShown, "images"), (BootKernel, "kernel")]);
    assert!(notes(&appraisal).contains("firmware: secure_boot is shown"));
    // It does not say that the evidence is not the host's: what was accepted goes on.
    assert!(appraisal.state.is_some());
}

#[test]
fn dropped_inserted_and_swapped_events_are_found() {
    let whole = usual();
    for at in 0..whole.len() {
        let mut world = world("");
        let mut entries = whole.clone();
        let (pcr, ..) = entries.remove(at);
        edited(&mut world, &entries);
        assert_eq!(only(&world.round()).item, format!("sha256:PCR{pcr}"), "dropped {at}");
        let mut entries = whole.clone();
        entries.insert(at, proven(u32::from(pcr == 1) + 1, EventType::IPL, b"more"));
        edited(&mut world, &entries);
        assert_eq!(only(&world.round()).code, Code::FirmwareLogReplay, "inserted {at}");
    }
    // The order within a register counts, between registers it does not.
    let mut world = world("");
    let mut entries = whole.clone();
    entries.swap(14, 17);
    edited(&mut world, &entries);
    assert_eq!(only(&world.round()).item, "sha256:PCR4");
    let mut entries = whole;
    entries.swap(0, 1);
    edited(&mut world, &entries);
    assert!(world.round().verdict.all_trusted());
}

#[test]
fn another_type_is_taken_as_data_not_as_meaning() {
    let strict = rules();
    let others = [EventType::IPL, EventType::SEPARATOR, IMAGE, EventType::VARIABLE_DRIVER_CONFIG, EventType(0x1234)];
    for at in 0..usual().len() {
        for kind in others {
            let mut world = world(&strict);
            let mut entries = usual();
            entries[at].1 = kind;
            edited(&mut world, &entries);
            let appraisal = world.round();
            assert!(appraisal.verdict.all_trusted(), "{at} {kind}: {:#?}", appraisal.verdict.host.findings);
        }
        // Only as an event that is not extended it is missing from its register.
        let mut world = world("");
        let mut entries = usual();
        entries[at].1 = EventType::NO_ACTION;
        edited(&mut world, &entries);
        assert_eq!(only(&world.round()).code, Code::FirmwareLogReplay, "{at}");
    }
}

#[test]
fn banks_that_are_missing() {
    let mut world = world("separators = true");
    world.firmware = log_of(&[HashAlg::Sha1, HashAlg::Sha384], &usual());
    let appraisal = world.round();
    let codes = host_codes(&appraisal);
    assert_eq!(codes[0], Code::FirmwareLogBank);
    assert_eq!(appraisal.verdict.host.findings[0].actual.as_deref(), Some("sha1, sha384"));
    assert!(codes[1..].iter().all(|code| *code == Code::FirmwareNotShown) && codes.len() == 9, "{codes:?}");
    // A log of old firmware has SHA-1 only.
    let digest = HashAlg::Sha1.hash(b"x");
    world.firmware = [&[4, 0, 0, 0, 13, 0, 0, 0][..], &digest, &[1, 0, 0, 0], b"x"].concat();
    assert_eq!(host_codes(&world.round())[0], Code::FirmwareLogBank);
}

#[test]
fn registers_of_others_are_findings_and_unquoted_ones_are_named() {
    for (pcr, found) in [(10, true), (16, true), (23, true), (11, false), (15, false), (17, false)] {
        let mut world = world("");
        let mut entries = usual();
        entries.push(proven(pcr, EventType::IPL, b"x"));
        edited(&mut world, &entries);
        let appraisal = world.round();
        if found {
            assert_eq!(only(&appraisal).code, Code::FirmwareLogRegister, "{pcr}");
        } else {
            assert!(appraisal.verdict.all_trusted(), "{pcr}");
            assert!(skipped(&appraisal, "firmware-log").contains(&format!("PCR {pcr} is not quoted")));
        }
    }
}

#[test]
fn firmware_that_omits_events_can_be_named() {
    let mut world = world("unexplained = [\"2\"]\nseparators = true\n");
    let entries: Vec<Entry> = usual().into_iter().filter(|entry| entry.0 != 2).collect();
    edited(&mut world, &entries);
    let appraisal = world.round();
    assert!(appraisal.verdict.all_trusted(), "{:#?}", appraisal.verdict.host.findings);
    assert!(skipped(&appraisal, "firmware-log").contains("PCR2 is not what the log gives"));
    world.policy = Some("[host]\n[host.firmware]\nunexplained = [\"3\"]\n".into());
    let appraisal = world.round();
    assert_eq!(only(&appraisal).item, "sha256:PCR2");
    let proposal = crate::policy::learn::propose(&appraisal.facts.unwrap());
    assert!(proposal.contains("# unexplained = [\"2\"]"), "{proposal}");
    world.policy = Some(proposal.replace("# unexplained", "unexplained"));
    assert!(world.round().verdict.all_trusted());
}

#[test]
fn secure_boot_must_be_shown_on() {
    let on = variable(Guid::GLOBAL, "SecureBoot", &[1]);
    let off = variable(Guid::GLOBAL, "SecureBoot", &[0]);
    let found = |entry: Entry| {
        let mut world = world("secure_boot = true");
        let mut entries = usual();
        entries[1] = entry;
        booted(&mut world, &entries);
        let appraisal = world.round();
        (only(&appraisal).code, only(&appraisal).actual.clone())
    };
    let config = EventType::VARIABLE_DRIVER_CONFIG;
    assert_eq!(found(proven(7, config, &off)), (Code::SecureBoot, Some("off".into())));
    // The log says on, but that was not measured.
    assert_eq!(found((7, config, off.clone(), on.clone())).0, Code::FirmwareEventData);
    // In another register, or as another vendor's variable, it is not the firmware's word.
    assert_eq!(found(proven(1, config, &on)).0, Code::FirmwareNotShown);
    assert_eq!(found(proven(7, config, &variable(Guid::SHIM, "SecureBoot", &[1]))).0, Code::FirmwareNotShown);
    assert_eq!(found(proven(7, config, &variable(Guid::GLOBAL, "SecureBoot", &[]))).0, Code::SecureBoot);

    // After the separator anybody can extend PCR 7, and add what he likes to the log.
    let mut world = world("secure_boot = true");
    let mut entries = usual();
    entries.remove(1);
    entries.push(proven(7, config, &on));
    booted(&mut world, &entries);
    assert_eq!(only(&world.round()).code, Code::FirmwareNotShown);
    // Said twice before it, nobody knows which counts.
    let mut entries = usual();
    entries.insert(2, proven(7, config, &off));
    booted(&mut world, &entries);
    assert_eq!(only(&world.round()).code, Code::FirmwareNotShown);
    // It may be demanded to be off, too.
    world.policy = Some("[host]\n[host.firmware]\nsecure_boot = false\n".into());
    booted(&mut world, &usual());
    assert_eq!(only(&world.round()).actual.as_deref(), Some("on"));
}

#[test]
fn a_shim_that_does_not_verify_is_found_whatever_its_event_is_called() {
    for name in ["MokSBState", "MokDBState"] {
        let mut world = world("secure_boot = true");
        let mut entries = usual();
        let measured = variable(Guid::SHIM, name, &[1]);
        entries.push((7, EventType::IPL, measured, b"SbatLevel".to_vec()));
        booted(&mut world, &entries);
        let appraisal = world.round();
        assert_eq!(only(&appraisal).code, Code::SecureBoot);
        assert!(only(&appraisal).actual.as_ref().unwrap().contains(name));
    }
}

#[test]
fn databases_are_judged_entry_by_entry() {
    let db = |content: Vec<u8>, rule: &str| {
        let mut world = world(&format!("db = {rule}"));
        let mut entries = usual();
        entries[3] = proven(7, EventType::VARIABLE_DRIVER_CONFIG, &variable(Guid::IMAGE_SECURITY, "db", &content));
        booted(&mut world, &entries);
        let appraisal = world.round();
        assert!(host_codes(&appraisal).iter().all(|code| *code == Code::SecureBootDatabase));
        appraisal.verdict.host.findings.len()
    };
    let usual = database(&[1, 2], b"microsoft");
    let (one, certificate) = (format!("\"sha256:{}\"", Sha256([1; 32])), sha(b"microsoft"));
    let content = format!("{{ content = [{}] }}", sha(&usual));
    assert_eq!(db(usual.clone(), &content), 0);
    assert_eq!(db(database(&[1, 2, 3], b"microsoft"), &content), 1);
    let include = format!("{{ include = [{one}, {certificate}] }}");
    assert_eq!(db(usual.clone(), &include), 0);
    assert_eq!(db(database(&[2], b"snakeoil"), &include), 2);
    let exclude = format!("{{ exclude = [{}] }}", sha(b"snakeoil"));
    assert_eq!(db(usual.clone(), &exclude), 0);
    assert_eq!(db(database(&[], b"snakeoil"), &exclude), 1);
    let only = format!("{{ only = [{one}, {certificate}] }}");
    assert_eq!(db(usual, &only), 1);
    assert_eq!(db(database(&[1], b"microsoft"), &only), 0);
    // A content that cannot be read holds nothing that could be shown.
    assert_eq!(db(vec![1, 2, 3], &exclude), 1);
}

#[test]
fn separators_must_be_there_and_without_error() {
    let mut world = world("separators = true");
    let mut entries = usual();
    let at = entries.iter().position(|e| e.0 == 3).unwrap();
    entries[at] = proven(3, EventType::SEPARATOR, &[1, 0, 0, 0]);
    booted(&mut world, &entries);
    let appraisal = world.round();
    assert_eq!((only(&appraisal).code, only(&appraisal).item.as_str()), (Code::BootSeparator, "PCR 3"));
    entries[at] = (3, EventType::SEPARATOR, b"no separator".to_vec(), vec![0; 4]);
    booted(&mut world, &entries);
    assert_eq!(only(&world.round()).actual.as_deref(), Some("none"));
}

#[test]
fn a_host_that_boots_another_kernel_is_found() {
    let mut world = world(&rules());
    assert!(world.round().verdict.all_trusted());
    world.reboot();
    let mut entries = usual();
    entries[20].2 = b"other kernel".to_vec();
    booted(&mut world, &entries);
    let appraisal = world.round();
    assert_eq!(host_codes(&appraisal), [Code::BootImage, Code::BootKernel]);
    let finding = &appraisal.verdict.host.findings[1];
    assert!(finding.actual.as_ref().unwrap().contains(&sha256(&[b"other kernel"]).to_string()), "{finding:?}");
    // Extending the right one afterwards does not help: the other one was started.
    entries.push((4, IMAGE, b"kernel".to_vec(), b"?".to_vec()));
    booted(&mut world, &entries);
    assert_eq!(host_codes(&world.round()), [Code::BootImage]);
    // Nor does it help to call it a text: its digest is not that of one.
    entries[20].3 = b"Returning from EFI Application from Boot Option".to_vec();
    entries[20].1 = EventType::EFI_ACTION;
    edited(&mut world, &entries);
    assert_eq!(host_codes(&world.round()), [Code::BootImage]);
}

#[test]
fn a_kernel_that_is_only_a_file_needs_all_files() {
    let base = format!(
        "images = [{}, {}, {}]\nkernel = [{}]\n",
        sha(b"shim"),
        sha(b"grub"),
        sha(b"kernel"),
        sha(b"the kernel's file")
    );
    let mut world = world(&base);
    assert_eq!(only(&world.round()).code, Code::FirmwareNotShown);
    world.policy = Some(format!("[host]\n[host.firmware]\n{base}files = \"any\"\n"));
    assert!(world.round().verdict.all_trusted());
    let files = format!("files = [{}]\n", sha(b"the initrd"));
    world.policy = Some(format!("[host]\n[host.firmware]\n{base}{files}"));
    assert!(world.round().verdict.all_trusted());
    // Another kernel is read too, under a harmless name.
    let mut entries = usual();
    entries.push((9, EventType::IPL, b"evil kernel".to_vec(), b"/boot/grub/grubenv\0".to_vec()));
    booted(&mut world, &entries);
    let appraisal = world.round();
    assert_eq!(only(&appraisal).code, Code::BootFile);
    assert!(only(&appraisal).item.contains("grubenv"));
    // Images that are not named are not taken for boot loaders.
    world.policy =
        Some(format!("[host]\n[host.firmware]\nkernel = [{}]\nfiles = \"any\"\n", sha(b"the kernel's file")));
    assert_eq!(host_codes(&world.round()), [Code::BootImage; 3]);
}

/// The values that a boot leaves in the log's registers.
fn history(entries: &[Entry]) -> Vec<RegisterValue> {
    let bytes = log_of(&BANKS, entries);
    let log = FirmwareLog::parse(&bytes).unwrap();
    let value = |bank, pcr| log.value(Register { bank, pcr }).unwrap().to_vec();
    BANKS
        .into_iter()
        .flat_map(|bank| [12, 13].map(|pcr| RegisterValue { bank, pcr, value: Blob(value(bank, pcr)) }))
        .collect()
}

#[test]
fn what_a_boot_stub_measured_is_the_logs_start_if_the_policy_knows_it() {
    let text = [wide("root=/dev/vda quiet"), vec![0, 0]].concat();
    let mut entries = usual();
    entries.push(proven(12, EventType::IPL, &text));
    entries.push((13, EventType::IPL, b"a system extension".to_vec(), wide("Sysext initrd")));
    let mut world = World::with_history(history(&entries));
    world.policy = Some("[host]\n[host.firmware]\n".into());
    booted(&mut world, &entries);
    world.pcrs.retain(|pcr, _| !matches!(pcr, 12 | 13));
    let appraisal = world.round();
    assert_eq!(host_codes(&appraisal), [Code::LogHistory; 2]);
    assert!(appraisal.verdict.host.findings[0].actual.as_ref().unwrap().contains("root=/dev/vda quiet"));
    // Learned, it is known, as events and not as values.
    world.policy = None;
    world.state = Default::default();
    let proposal = crate::policy::learn::propose(&world.round().facts.unwrap());
    assert!(
        proposal.contains("stub = [\n    \"root=/dev/vda quiet\",") && !proposal.contains("history ="),
        "{proposal}"
    );
    world.policy = Some(proposal.clone());
    world.state = Default::default();
    assert!(world.round().verdict.all_trusted(), "{:#?}", world.round().verdict.host.findings);
    // Another command line is not.
    world.policy = Some(proposal.replace("quiet\"", "single\""));
    world.state = Default::default();
    assert_eq!(host_codes(&world.round()), [Code::LogHistory]);
}

#[test]
fn a_log_that_lists_our_own_records_does_not_explain_them_away() {
    // What an earlier log of the same boot extended, hidden, and now called the firmware's.
    let hidden = b"a record of a VM that must not be seen".to_vec();
    let mut entries = usual();
    entries.push((12, EventType::IPL, hidden, wide("Kernel command line")));
    let mut world = World::with_history(history(&entries));
    booted(&mut world, &entries);
    world.pcrs.retain(|pcr, _| !matches!(pcr, 12 | 13));
    world.policy = Some(format!("[host]\n[host.firmware]\nstub = [{}]\n", sha(b"credentials")));
    assert_eq!(only(&world.round()).code, Code::LogHistory);
}

#[test]
fn a_log_whose_extends_never_came_is_found() {
    // The firmware says that it extended PCR 12, but the register was empty when the log began.
    let mut entries = usual();
    entries.push((12, EventType::IPL, b"credentials".to_vec(), wide("Credentials initrd")));
    let mut world = world("");
    edited(&mut world, &entries);
    let appraisal = world.round();
    assert_eq!(only(&appraisal).code, Code::FirmwareLogReplay);
    assert!(only(&appraisal).item.contains("sha256:PCR12"));
}

#[test]
fn rules_are_strict() {
    let refuse = |rules: &str, word: &str| {
        let e =
            crate::policy::Policy::parse(&format!("[host]\n[host.firmware]\n{rules}\n"), "p").unwrap_err().to_string();
        assert!(e.contains(word), "{rules}: {e}");
    };
    refuse("secureboot = true", "secureboot");
    refuse("db = {}", "include");
    refuse("db = { includes = [] }", "includes");
    refuse("kernel = []", "kernel");
    refuse("kernel = [\"sha256:12\"]", "sha256:12");
    refuse(&format!("kernel = [\"fs-verity:{}\"]", Sha256::ZERO), "fs-verity");
    refuse("images = \"all\"", "any");
    refuse("stub = [\"sha256:12\"]", "sha256:12");
    refuse("unexplained = [\"24\"]", "24");
}
