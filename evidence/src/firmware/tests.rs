//! Logs made by hand, attacks on them, and properties. Logs of real firmware are in `tests/tests/firmware.rs`.

use proptest::prelude::*;

use super::*;
use crate::pcr;

mod decoding;

pub(crate) const BANKS: [HashAlg; 2] = [HashAlg::Sha1, HashAlg::Sha256];

/// A crypto-agile log in the making.
pub(crate) struct Builder {
    pub(crate) bytes: Vec<u8>,
    banks: Vec<HashAlg>,
}

impl Builder {
    pub(crate) fn new(banks: &[HashAlg]) -> Self {
        let mut data = SPEC_ID.to_vec();
        data.extend([0, 0, 0, 0, 0, 2, 0, 2]);
        data.extend((banks.len() as u32).to_le_bytes());
        for bank in banks {
            data.extend([bank.tpm_id().to_le_bytes(), (bank.size() as u16).to_le_bytes()].concat());
        }
        data.push(0);
        Self { bytes: sha1_event(0, EventType::NO_ACTION, &[0; 20], &data), banks: banks.to_vec() }
    }

    /// An event with the digest of `measured`.
    pub(crate) fn event(mut self, pcr: u32, kind: EventType, measured: &[u8], data: &[u8]) -> Self {
        let digests: Vec<(u16, Vec<u8>)> = self.banks.iter().map(|b| (b.tpm_id(), b.hash(measured))).collect();
        self.bytes.extend(agile_event(pcr, kind, &digests, data));
        self
    }

    pub(crate) fn proven(self, pcr: u32, kind: EventType, data: &[u8]) -> Self {
        self.event(pcr, kind, data, data)
    }

    fn no_action(mut self, data: &[u8]) -> Self {
        let digests: Vec<(u16, Vec<u8>)> = self.banks.iter().map(|b| (b.tpm_id(), vec![0; b.size()])).collect();
        self.bytes.extend(agile_event(0, EventType::NO_ACTION, &digests, data));
        self
    }

    fn parse(&self) -> FirmwareLog<'_> {
        FirmwareLog::parse(&self.bytes).unwrap()
    }
}

fn sha1_event(pcr: u32, kind: EventType, digest: &[u8; 20], data: &[u8]) -> Vec<u8> {
    let head = [pcr.to_le_bytes(), kind.0.to_le_bytes()].concat();
    [&head[..], digest, &(data.len() as u32).to_le_bytes(), data].concat()
}

fn agile_event(pcr: u32, kind: EventType, digests: &[(u16, Vec<u8>)], data: &[u8]) -> Vec<u8> {
    let mut out = [pcr, kind.0, digests.len() as u32].map(u32::to_le_bytes).concat();
    for (id, digest) in digests {
        out.extend(id.to_le_bytes());
        out.extend(digest);
    }
    out.extend((data.len() as u32).to_le_bytes());
    out.extend(data);
    out
}

pub(crate) fn variable(guid: Guid, name: &str, data: &[u8]) -> Vec<u8> {
    let name: Vec<u8> = name.encode_utf16().flat_map(u16::to_le_bytes).collect();
    Variable { guid, name: &name, data }.to_bytes()
}

fn usual() -> Builder {
    Builder::new(&BANKS)
        .proven(0, EventType(8), &[0, 0])
        .proven(7, EventType::VARIABLE_DRIVER_CONFIG, &variable(Guid::GLOBAL, "SecureBoot", &[1]))
        .proven(7, EventType::SEPARATOR, &[0; 4])
        .proven(4, EventType::EFI_ACTION, b"Calling EFI Application from Boot Option")
        .proven(4, EventType::SEPARATOR, &[0; 4])
        .event(4, EventType::BOOT_SERVICES_APPLICATION, b"the image", b"short")
        .event(8, EventType::IPL, b"linux /vmlinuz quiet", b"grub_cmd: linux /vmlinuz quiet\0")
        .event(9, EventType::IPL, b"the kernel", b"/vmlinuz\0")
        .proven(5, EventType::EFI_ACTION, b"Exit Boot Services Invocation")
}

fn value(log: &FirmwareLog<'_>, bank: HashAlg, pcr: u8) -> Vec<u8> {
    log.value(Register { bank, pcr }).unwrap().to_vec()
}

/// The value after extends, by the crate's general function.
fn extended(bank: HashAlg, measured: &[&[u8]]) -> Vec<u8> {
    let mut value = pcr::zeros(bank);
    for bytes in measured {
        pcr::extend(bank, &mut value, &bank.hash(bytes));
    }
    value
}

#[test]
fn every_bank_is_replayed() {
    let builder = usual();
    let log = builder.parse();
    assert_eq!((log.format(), log.banks()), (Format::CryptoAgile, &BANKS[..]));
    assert_eq!(log.content_len(), builder.bytes.len());
    assert_eq!(log.extended(), [0, 4, 5, 7, 8, 9]);
    for bank in BANKS {
        let action = b"Calling EFI Application from Boot Option";
        assert_eq!(value(&log, bank, 4), extended(bank, &[action, &[0; 4], b"the image"]));
        assert_eq!(value(&log, bank, 2), pcr::zeros(bank));
        assert_eq!(value(&log, bank, 18), vec![0xff; bank.size()]);
    }
    assert_eq!(log.value(Register { bank: HashAlg::Sha512, pcr: 0 }), None);
}

#[test]
fn sha1_logs_are_read() {
    let digest: [u8; 20] = HashAlg::Sha1.hash(b"x").try_into().unwrap();
    let mut bytes = sha1_event(0, EventType::NO_ACTION, &[0; 20], b"Spec ID Event00\0\0\0\0\0\x02\x01\0\x01\0");
    bytes.extend(sha1_event(4, EventType::IPL, &digest, b"x"));
    let log = FirmwareLog::parse(&bytes).unwrap();
    assert_eq!((log.format(), log.banks(), log.events().len()), (Format::Sha1, &[HashAlg::Sha1][..], 2));
    assert_eq!(value(&log, HashAlg::Sha1, 4), extended(HashAlg::Sha1, &[b"x"]));
    assert!(log.events()[1].proves_data(HashAlg::Sha1) && !log.events()[1].proves_data(HashAlg::Sha256));
    // Without any header too.
    assert_eq!(FirmwareLog::parse(&sha1_event(4, EventType::IPL, &digest, b"x")).unwrap().events().len(), 1);
}

#[test]
fn events_without_action_extend_nothing_but_may_set_the_start() {
    let plain = usual();
    let builder = usual().no_action(b"anything");
    assert_eq!(plain.parse().registers(), builder.parse().registers());
    let builder = Builder::new(&BANKS).no_action(b"StartupLocality\0\x03").proven(0, EventType(8), &[0, 0]);
    let log = builder.parse();
    assert_eq!(log.startup_locality(), 3);
    let mut start = pcr::zeros(HashAlg::Sha256);
    *start.last_mut().unwrap() = 3;
    pcr::extend(HashAlg::Sha256, &mut start, &HashAlg::Sha256.hash(&[0, 0]));
    assert_eq!(value(&log, HashAlg::Sha256, 0), start);
    for wrong in [&b"StartupLocality\0\x05"[..], b"StartupLocality\0", b"StartupLocality\0\x03\0"] {
        assert!(FirmwareLog::parse(&usual().no_action(wrong).bytes).is_err());
    }
    let twice = usual().no_action(b"StartupLocality\0\x03").no_action(b"StartupLocality\0\x04");
    assert!(FirmwareLog::parse(&twice.bytes).is_err());
}

#[test]
fn registers_out_of_range_are_for_events_without_action_only() {
    let mut bytes = usual().bytes;
    bytes.extend(agile_event(u32::MAX, EventType::NO_ACTION, &[(4, vec![0; 20]), (11, vec![0; 32])], b"x"));
    assert!(FirmwareLog::parse(&bytes).is_ok());
    assert!(FirmwareLog::parse(&usual().proven(24, EventType::IPL, b"x").bytes).is_err());
}

#[test]
fn padding_ends_a_log() {
    let plain = usual();
    for filler in [0, 0xff] {
        for len in [1, 31, 4096] {
            let padded = [plain.bytes.as_slice(), &vec![filler; len]].concat();
            let log = FirmwareLog::parse(&padded).unwrap();
            assert_eq!(log.registers(), plain.parse().registers());
            assert_eq!(log.content_len(), plain.bytes.len());
            // Anything behind it is no padding.
            assert!(FirmwareLog::parse(&[padded.as_slice(), &[7]].concat()).is_err(), "{filler} {len}");
        }
    }
    let mixed = [plain.bytes.as_slice(), &[0; 64], &[0xff; 64]].concat();
    assert!(FirmwareLog::parse(&mixed).is_err());
    // Of zeros alone, a SHA-1 log reads an event, and nothing is made up of less.
    assert!(FirmwareLog::parse(&[]).unwrap_err().is_truncated());
    assert!(FirmwareLog::parse(&[0; 8]).unwrap_err().is_truncated());
}

#[test]
fn a_bank_with_a_hole_cannot_be_replayed() {
    let mut builder = usual();
    builder.bytes.extend(agile_event(1, EventType::IPL, &[(11, vec![1; 32])], b""));
    let log = builder.parse();
    assert_eq!(log.banks(), [HashAlg::Sha256]);
    assert_eq!(log.value(Register { bank: HashAlg::Sha1, pcr: 0 }), None);
}

#[test]
fn algorithms_that_we_do_not_know_are_passed_over() {
    let mut data = SPEC_ID.to_vec();
    data.extend([0, 0, 0, 0, 0, 2, 0, 2, 2, 0, 0, 0, 0x0b, 0, 32, 0, 0x12, 0, 32, 0, 0]);
    let mut bytes = sha1_event(0, EventType::NO_ACTION, &[0; 20], &data);
    bytes.extend(agile_event(1, EventType::IPL, &[(0x12, vec![9; 32]), (11, HashAlg::Sha256.hash(b"x"))], b"x"));
    let log = FirmwareLog::parse(&bytes).unwrap();
    assert_eq!(log.banks(), [HashAlg::Sha256]);
    assert_eq!(value(&log, HashAlg::Sha256, 1), extended(HashAlg::Sha256, &[b"x"]));
}

#[test]
fn headers_that_contradict_themselves_are_refused() {
    let good = Builder::new(&BANKS).bytes;
    let count = 32 + 16 + 8;
    for (at, byte, why) in [
        (count, 0, "no algorithm"),
        (count, 17, "too many"),
        (count, 1, "bytes left"),
        (count + 4, 0x0b, "an algorithm twice"),
        (count + 6, 21, "another size"),
        (count - 1, 3, "size of UINTN"),
        (good.len() - 1, 1, "vendor's bytes missing"),
    ] {
        let mut bytes = good.clone();
        bytes[at] = byte;
        assert!(FirmwareLog::parse(&bytes).is_err(), "{why}");
    }
    let digest = |id: u16, size: usize| (id, vec![1; size]);
    for (digests, why) in [
        (vec![], "no digest"),
        (vec![digest(11, 32), digest(11, 32)], "twice"),
        (vec![digest(12, 48)], "not named"),
        (vec![digest(4, 20), digest(11, 32), digest(4, 20)], "too many"),
    ] {
        let bytes = [good.as_slice(), &agile_event(1, EventType::IPL, &digests, b"")].concat();
        assert!(FirmwareLog::parse(&bytes).is_err(), "{why}");
    }
}

#[test]
fn too_long_a_log_is_refused() {
    let bytes = [usual().bytes, vec![0; MAX_LOG]].concat();
    let error = FirmwareLog::parse(&bytes).unwrap_err();
    assert!(matches!(error.kind, MalformedKind::TooLarge { limit: MAX_LOG }));
}

#[test]
fn a_log_that_is_cut_is_refused_or_is_another() {
    let whole = usual();
    let registers = whole.parse().registers().clone();
    for len in 0..whole.bytes.len() {
        if let Ok(log) = FirmwareLog::parse(&whole.bytes[..len]) {
            assert_ne!(*log.registers(), registers, "{len}");
        }
    }
}

proptest! {
    #[test]
    fn any_bytes_are_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
        let _ = FirmwareLog::parse(&bytes);
    }

    /// A flipped bit is refused, or changes a register, or is in what no extend covers: types and data.
    #[test]
    fn a_flipped_bit_is_no_other_truth(bit in 0_usize..8 * 900) {
        let whole = usual();
        let log = whole.parse();
        let mut bytes = whole.bytes.clone();
        let bit = bit % (8 * bytes.len());
        bytes[bit / 8] ^= 1 << (bit % 8);
        if let Ok(other) = FirmwareLog::parse(&bytes) && other.registers() == log.registers() {
            for (old, new) in log.events().iter().zip(other.events()) {
                for bank in BANKS {
                    prop_assert_eq!(old.digest(bank).is_some() && old.is_extended(), new.digest(bank).is_some() && new.is_extended());
                    let (old, new) = (old.meaning(bank), new.meaning(bank));
                    // What was proven is still the same, or is now less.
                    let less = matches!(new, Meaning::Digest | Meaning::Content(_));
                    prop_assert!(old == new || less || matches!((old, new), (Meaning::Command { .. }, Meaning::Command { .. })), "{:?} {:?}", old, new);
                }
            }
        }
    }

    /// A type is data: no other type gives an event another meaning or the log other registers.
    #[test]
    fn another_type_is_no_other_meaning(number in 1_usize..10, kind in any::<u32>()) {
        prop_assume!(EventType(kind) != EventType::NO_ACTION);
        let whole = usual();
        let log = whole.parse();
        let at = log.events()[number].offset + 4;
        let mut bytes = whole.bytes.clone();
        bytes[at..at + 4].copy_from_slice(&kind.to_le_bytes());
        let other = FirmwareLog::parse(&bytes).unwrap();
        prop_assert_eq!(other.registers(), log.registers());
        for (old, new) in log.events().iter().zip(other.events()) {
            prop_assert_eq!(old.meaning(HashAlg::Sha256), new.meaning(HashAlg::Sha256));
        }
    }
}
