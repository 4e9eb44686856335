//! Attacks on steps 1 to 10: whose evidence it is, how new, how whole.

use onequote_evidence::{
    digest::{HashAlg, sha256},
    event::{EventBody, GuestEntries},
    id::{Blob, Epoch, EpochId, Sha256, TimeMs},
    pcr::{self, RegisterValue},
    record::Record,
    statement::Statement,
    stream::{Evidence, Guest, Item, Pieces},
    tpm::Public,
};
use proptest::prelude::*;

use super::*;
use crate::appraise::{Received, freshness::Freshness};

fn untouched(_: &mut Statement, _: &mut AttestFields) {}

fn forge_head(forge: impl FnOnce(&World, &mut Parts)) -> Finding {
    let world = World::with_two_vms();
    let mut parts = world.quote(&nonce(1), untouched);
    forge(&world, &mut parts);
    only(&world.judge(&parts)).clone()
}

fn forge_quote(forge: impl FnOnce(&mut Statement, &mut AttestFields)) -> Code {
    let world = World::with_two_vms();
    only(&world.judge(&world.quote(&nonce(1), forge))).code
}

/// Evidence with other records than were extended.
fn forge_log(forge: impl FnOnce(&mut Vec<Record>)) -> Finding {
    forge_head(|world, parts| {
        let mut records = world.records.clone();
        forge(&mut records);
        parts.records = records.iter().flat_map(Record::to_bytes).collect();
    })
}

#[test]
fn a_stream_that_is_none() {
    let world = World::with_two_vms();
    let mut stream = world.quote(&nonce(1), untouched).stream();
    stream.pop();
    assert_eq!(world.judge_stream(&stream, &nonce(1)).unwrap_err().code, Code::EvidenceMalformed);
    assert_eq!(Received::read(b"no zstd").unwrap_err().code, Code::EvidenceMalformed);
}

#[test]
fn another_key_or_signature() {
    assert_eq!(
        forge_head(|_, parts| parts.head.signature = Blob(Ak::generate().unwrap().sign(&parts.head.attest.0).unwrap()))
            .code,
        Code::SignatureInvalid
    );
    assert_eq!(forge_head(|_, parts| parts.head.attest.0[60] ^= 1).code, Code::SignatureInvalid);
    assert_eq!(forge_head(|_, parts| parts.head.signature.0.truncate(9)).code, Code::SignatureMalformed);
    for (at, value) in [(1, 0x14), (3, 0x0c), (3, 0x04)] {
        // RSASSA has one integer: its form differs too, so the scheme is swapped on a signature of that form.
        let finding = forge_head(|_, parts| {
            parts.head.signature.0[at] = value;
            if value == 0x14 {
                parts.head.signature.0 = vec![0, 0x14, 0, 0x0b, 0, 1, 9];
            }
        });
        assert_eq!(finding.code, Code::SignatureAlgorithm);
    }
}

#[test]
fn a_key_that_may_not_attest() {
    let world = World::with_two_vms();
    let received = Received::parse(&world.quote(&nonce(1), untouched).stream()).unwrap();
    let public = Public::parse(&world.ak.public_with(0x0004_0072)).unwrap();
    let appraisal = world.judge_with(&received, &public, &asked(&nonce(1)));
    assert_eq!(only(&appraisal).code, Code::AkAttributes);
}

#[test]
fn signed_but_no_quote() {
    assert_eq!(forge_quote(|_, attest| attest.magic = 1), Code::AttestMagic);
    assert_eq!(forge_quote(|_, attest| attest.kind = 0x8017), Code::AttestType);
    assert_eq!(forge_quote(|_, attest| attest.extra = vec![1; 65]), Code::AttestMalformed);
}

#[test]
fn old_nonces_and_other_connections() {
    let world = World::with_two_vms();
    let received = Received::parse(&world.quote(&nonce(2), untouched).stream()).unwrap();
    let public = Public::parse(&world.ak.public()).unwrap();
    let judge = |change: &dyn Fn(&mut Freshness), received: &Received| {
        let mut freshness = asked(&nonce(1));
        change(&mut freshness);
        only(&world.judge_with(received, &public, &freshness)).code
    };
    assert_eq!(judge(&|_| {}, &received), Code::NonceOther);
    let replayed = |f: &mut Freshness| {
        if let Freshness::Asked { claimed_was_answered, .. } = f {
            *claimed_was_answered = true;
        }
    };
    assert_eq!(judge(&replayed, &received), Code::NonceReused);

    let received = Received::parse(&world.quote(&nonce(1), untouched).stream()).unwrap();
    let used = |f: &mut Freshness| {
        if let Freshness::Asked { unused, .. } = f {
            *unused = false;
        }
    };
    assert_eq!(judge(&used, &received), Code::NonceReused);
    let late = |f: &mut Freshness| {
        if let Freshness::Asked { expires, .. } = f {
            *expires = TimeMs(4999);
        }
    };
    assert_eq!(judge(&late, &received), Code::NonceExpired);
    let other = |f: &mut Freshness| {
        if let Freshness::Asked { binding, .. } = f {
            *binding = vec![1; 32];
        }
    };
    assert_eq!(judge(&other, &received), Code::ChannelBinding);
    // Whoever lies about nonce or binding beside the quote gains nothing.
    let lie = |parts: &mut Parts| parts.head.nonce = Blob(nonce(1).as_bytes().to_vec());
    let mut parts = world.quote(&nonce(2), untouched);
    lie(&mut parts);
    assert_eq!(only(&world.judge(&parts)).code, Code::QualifyingData);
}

#[test]
fn saved_evidence_is_held_against_what_is_known() {
    let world = World::with_two_vms();
    let received = Received::parse(&world.quote(&nonce(2), untouched).stream()).unwrap();
    let public = Public::parse(&world.ak.public()).unwrap();
    let judge = |nonce| world.judge_with(&received, &public, &Freshness::Offline { nonce });
    assert!(judge(Some(nonce(2))).verdict.all_trusted());
    assert_eq!(only(&judge(Some(nonce(1)))).code, Code::NonceOther);
    let verdict = judge(None).verdict;
    assert!(verdict.all_trusted() && verdict.skipped.iter().any(|s| s.check == "freshness"));
}

#[test]
fn a_quote_for_something_else() {
    assert_eq!(forge_quote(|_, attest| attest.extra = vec![1; 32]), Code::QualifyingData);
    let finding = forge_head(|world, parts| {
        let mut statement = world.statement.clone();
        statement.time = TimeMs(1);
        parts.head.statement = Blob(statement.to_bytes());
    });
    assert_eq!(finding.code, Code::QualifyingData);
    assert_eq!(forge_head(|_, parts| parts.head.path.reverse()).code, Code::QualifyingData);
    assert_eq!(forge_quote(|statement, _| statement.version = 9), Code::StatementMalformed);
    assert_eq!(forge_quote(|statement, _| statement.host = "host-2".parse().unwrap()), Code::HostMismatch);
}

#[test]
fn other_registers_than_asked() {
    assert_eq!(forge_quote(|_, attest| attest.pcrs.retain(|&pcr| pcr != 12)), Code::PcrSelection);
    assert_eq!(forge_quote(|_, attest| attest.pcrs.push(16)), Code::PcrSelection);
    assert_eq!(forge_quote(|_, attest| attest.digest = vec![1; 32]), Code::PcrValues);
    assert_eq!(forge_head(|_, parts| parts.head.registers[0].value.0[0] ^= 1).code, Code::PcrValues);
    let extra = |_: &World, parts: &mut Parts| {
        let value = RegisterValue { bank: HashAlg::Sha256, pcr: 16, value: Blob(vec![0; 32]) };
        parts.head.registers.push(value);
    };
    assert_eq!(forge_head(extra).code, Code::PcrValues);
}

#[test]
fn time_does_not_run_backwards() {
    let mut world = World::with_two_vms();
    world.round();
    let mut codes = Vec::new();
    for change in [
        |attest: &mut AttestFields| attest.clock.clock -= 1,
        |attest: &mut AttestFields| attest.clock.restart_count -= 1,
        |attest: &mut AttestFields| attest.clock.reset_count -= 1,
    ] {
        let parts = world.quote(&nonce(1), |_, attest| change(attest));
        let appraisal = world.judge(&parts);
        assert!(appraisal.state.is_none(), "the state must stay");
        codes.push(host_codes(&appraisal)[0]);
    }
    // With another reset count the epoch should be another one too, which is found first.
    assert_eq!(codes, [Code::ClockRegression, Code::RestartCountRegression, Code::EpochReused]);
    world.clock.reset_count = 3;
    world.reboot();
    let appraisal = world.judge(&world.quote(&nonce(1), untouched));
    assert_eq!(only(&appraisal).code, Code::ResetCountRegression);
}

#[test]
fn edited_logs_name_the_record() {
    let finding = forge_log(|records| {
        records.remove(3);
    });
    assert_eq!((finding.code, finding.item.as_str()), (Code::LogOrder, "record 3"));
    let finding = forge_log(|records| records.swap(2, 3));
    assert_eq!((finding.code, finding.item.as_str()), (Code::LogOrder, "record 2"));
    let finding = forge_log(|records| {
        let at = records[4].content.0.len() - 3;
        records[4].content.0[at] ^= 1;
    });
    assert_eq!((finding.code, finding.item.as_str()), (Code::LogDigest, "record 4"));
    let finding = forge_log(|records| {
        records.pop();
    });
    assert_eq!((finding.code, finding.item.as_str()), (Code::LogLength, "record 10"));
    let finding = forge_head(|_, parts| {
        parts.records.pop();
    });
    assert_eq!((finding.code, finding.item.as_str()), (Code::LogTruncated, "record 10"));
    let finding = forge_head(|_, parts| parts.records[0] = 0xff);
    assert_eq!((finding.code, finding.item.as_str()), (Code::LogMalformed, "record 0"));
    let finding = forge_log(|records| records[5].pcr = 11);
    assert_eq!((finding.code, finding.item.as_str()), (Code::LogRegister, "record 5"));
    let finding = forge_log(|records| {
        records[5].digests.remove(&HashAlg::Sha1);
    });
    assert_eq!((finding.code, finding.item.as_str()), (Code::LogRegister, "record 5"));
    assert_eq!(forge_head(|_, parts| parts.records.clear()).code, Code::LogLength);
}

#[test]
fn a_log_edited_with_care_does_not_replay() {
    let rewrite = |records: &mut Vec<Record>| {
        let mut events = records[2].events().unwrap();
        events[0].time = TimeMs(1);
        records[2] = Record::new(2, 12, &BANKS, &events);
    };
    assert_eq!(forge_log(rewrite).code, Code::LogReplay);
    let mut world = World::with_two_vms();
    world.round();
    rewrite(&mut world.records);
    let finding = only(&world.judge(&world.quote(&nonce(1), untouched))).clone();
    assert_eq!((finding.code, finding.item.as_str()), (Code::LogRollback, "records 0 to 10"));
}

#[test]
fn a_log_of_another_start() {
    let finding = forge_log(|records| *records = vec![Record { recnum: 0, ..records[1].clone() }]);
    assert_eq!(finding.code, Code::LogStart);
    assert_eq!(forge_quote(|s, _| s.epoch.number = 2), Code::LogStart);
}

#[test]
fn a_foreign_extend_is_told_from_an_edited_log() {
    let world = World::with_two_vms();
    let mut parts = world.quote(&nonce(1), untouched);
    // Somebody extends PCR 12 after the proxy's last record: the quote signs the other value.
    let at = parts.head.registers.iter().position(|r| r.pcr == 12).unwrap();
    pcr::extend(HashAlg::Sha256, &mut parts.head.registers[at].value.0, &[1; 32]);
    let values: Vec<u8> = parts.head.registers.iter().flat_map(|r| r.value.0.clone()).collect();
    let honest = world.quote(&nonce(1), |_, attest| attest.digest = HashAlg::Sha256.hash(&values));
    parts.head.attest = honest.head.attest;
    parts.head.signature = honest.head.signature;
    assert_eq!(only(&world.judge(&parts)).code, Code::ForeignExtend);
}

#[test]
fn old_epochs_and_old_logs() {
    let mut world = World::with_two_vms();
    let early = world.records.len();
    world.round();
    world.entries(1, 1, &[ima_entry("/bin/sh", 2)]);
    world.round();
    world.records.truncate(early);
    let finding = only(&world.judge(&world.quote(&nonce(1), untouched))).clone();
    assert_eq!((finding.code, finding.item.as_str()), (Code::LogRollback, "record 11"));

    let mut world = World::with_two_vms();
    world.round();
    world.clock.reset_count += 1;
    assert_eq!(only(&world.judge(&world.quote(&nonce(1), untouched))).code, Code::EpochReused);

    let mut world = World::with_two_vms();
    world.round();
    world.statement.epoch = Epoch { number: 1, id: EpochId([9; 16]) };
    assert_eq!(only(&world.judge(&world.quote(&nonce(1), untouched))).code, Code::EpochRollback);
}

#[test]
fn edited_guest_lists_name_vm_and_record() {
    let judge = |forge: &dyn Fn(&mut Parts)| {
        let world = World::with_two_vms();
        let mut parts = world.quote(&nonce(1), untouched);
        forge(&mut parts);
        let appraisal = world.judge(&parts);
        assert_eq!(vm_state(&appraisal, "web"), State::Untrusted);
        let finding = vm_findings(&appraisal, "web")[0].clone();
        (finding.code, finding.item)
    };
    let is = |code, item: &str| (code, item.to_owned());
    assert_eq!(judge(&|p| p.guests[0].entries[1] = 0), is(Code::GuestListAggregate, "boot 0, record 8"));
    assert_eq!(judge(&|p| p.guests[0].entries.swap(0, 1)), is(Code::GuestListAggregate, "boot 0, record 8"));
    assert_eq!(judge(&|p| p.guests[0].entries.truncate(1)), is(Code::GuestListCount, "boot 0, record 8"));
    assert_eq!(judge(&|p| p.guests[0].entries.push(0)), is(Code::GuestListCount, "boot 0"));
    assert_eq!(judge(&|p| p.guests[0].entries[1] = 77), is(Code::GuestListReference, "boot 0, entry 1"));
    assert_eq!(judge(&|p| p.dictionary[1].0.truncate(40)), is(Code::GuestListReference, "boot 0, entry 1"));
    let edited = |p: &mut Parts| p.dictionary[1] = ima_entry("/bin/sh", 9);
    assert_eq!(judge(&edited), is(Code::GuestListAggregate, "boot 0, record 8"));
    assert_eq!(judge(&|p| drop(p.guests.remove(0))), is(Code::GuestListMissing, "boot 0"));
}

#[test]
fn statements_that_contradict_the_log() {
    let judge = |forge: &dyn Fn(&mut Statement)| {
        let world = World::with_two_vms();
        world.judge(&world.quote(&nonce(1), |statement, _| forge(statement)))
    };
    let appraisal = judge(&|s| s.vms[0].boots[0].aggregate = Sha256::ZERO);
    assert_eq!(vm_codes(&appraisal, "web"), [Code::GuestListAggregate]);
    let appraisal = judge(&|s| s.vms[0].boots[0].count = 3);
    assert_eq!(vm_codes(&appraisal, "web"), [Code::GuestListCount]);
    let appraisal = judge(&|s| s.vms[0].boots.clear());
    assert!(vm_codes(&appraisal, "web").contains(&Code::GuestListCount));
    assert_eq!(host_codes(&appraisal), [Code::GuestListUnexpected]);
    let appraisal = judge(&|s| s.registers[0].value.0[0] ^= 1);
    assert_eq!(only(&appraisal).code, Code::LogReplay);

    let appraisal = judge(&|s| drop(s.vms.remove(1)));
    assert_eq!(host_codes(&appraisal), [Code::GuestListUnexpected, Code::VmMissing]);
    assert_eq!(vm_state(&appraisal, "db"), State::Untrusted);
    let appraisal = judge(&|s| {
        let mut ghost = s.vms[1].clone();
        (ghost.vm, ghost.name) = (vm_id(9), "ghost".into());
        s.vms.push(ghost);
    });
    assert!(host_codes(&appraisal).contains(&Code::VmNotInLog));
    assert_eq!(vm_state(&appraisal, "ghost"), State::Untrusted);
}

#[test]
fn entries_that_are_stated_but_not_recorded() {
    let mut world = World::with_two_vms();
    world.records.truncate(world.records.len() - 1);
    let appraisal = world.judge(&world.quote(&nonce(1), untouched));
    assert_eq!(vm_codes(&appraisal, "db"), [Code::GuestListCount]);
    assert_eq!(vm_state(&appraisal, "web"), State::Trusted);
}

#[test]
fn records_of_entries_follow_each_other() {
    let mut world = World::with_two_vms();
    let aggregate = world.aggregate(&world.guests[1].entries);
    world.log(13, Some(vm_ref(2, 2)), GuestEntries { boot: 0, first: 4, count: 1, aggregate });
    assert_eq!(vm_codes(&world.round(), "db"), [Code::GuestListCount]);
}

#[test]
fn a_guest_list_that_was_accepted_stays() {
    let mut world = World::with_two_vms();
    world.round();
    world.state.guests[0].aggregate = Sha256::ZERO;
    let appraisal = world.round();
    assert_eq!(vm_codes(&appraisal, "web"), [Code::GuestListRollback]);
    assert_eq!(vm_state(&appraisal, "db"), State::Trusted);
    assert!(world.state.guests.iter().any(|g| g.aggregate == Sha256::ZERO), "the accepted list stays in force");
}

#[test]
fn lists_that_nobody_states() {
    let mut world = World::with_two_vms();
    let stray = Guest { boot: 7, ..world.guests[0].clone() };
    world.guests.push(stray);
    assert_eq!(only(&world.round()).code, Code::GuestListUnexpected);
}

#[test]
fn unknown_events_are_findings() {
    let mut world = World::with_two_vms();
    let body = EventBody::Unknown { kind: "new-thing".into(), body: Blob(vec![0xa0]) };
    world.log(12, Some(vm_ref(1, 1)), body.clone());
    let appraisal = world.round();
    assert_eq!(vm_codes(&appraisal, "web"), [Code::UnknownEvent]);
    assert_eq!(vm_state(&appraisal, "db"), State::Trusted);
    world.log(12, None, body);
    assert_eq!(only(&world.round()).code, Code::UnknownEvent);
}

#[test]
fn the_hosts_ima_list() {
    let mut world = World::with_two_vms();
    let zeros = vec![Sha256::ZERO; 10];
    let parts: Vec<&[u8]> = zeros.iter().map(Sha256::as_bytes).collect();
    let boot = ima_entry_of("boot_aggregate", &sha256(&parts).0, false);
    let proxy = ima_entry("/usr/bin/onequote-proxy", 8);
    let list = [boot.clone(), proxy, ima_entry("/vm/qemu-binary", 0), ima_entry("/bin/later", 9)];
    world.dictionary.extend(list.clone());
    world.pcrs.insert(10, world.aggregate(&[3, 4, 5]));
    let missing = world.round();
    assert_eq!(only(&missing).code, Code::HostImaMissing);
    world.host_ima = list.iter().flat_map(|blob| blob.0.clone()).collect();
    let appraisal = world.round();
    assert!(appraisal.verdict.all_trusted(), "the list may run ahead: {:#?}", appraisal.verdict.host);

    let with_list = format!(
        "{POLICY}\n[host.ima]\n\"/usr/bin/onequote-proxy\" = [\"sha256:{}\"]\n\"/vm/qemu-binary\" = [\"sha256:{}\"]\n",
        "08".repeat(32),
        "00".repeat(32)
    );
    world.policy = Some(with_list.clone());
    assert!(world.round().verdict.all_trusted());
    world.policy = Some(with_list.replace("0808", "0909"));
    assert_eq!(only(&world.round()).code, Code::ImaWrongDigest);

    world.policy = Some(POLICY.into());
    let whole = world.host_ima.clone();
    let mut parts = world.quote(&nonce(1), untouched);
    let at = parts.host_ima.len() / 2;
    parts.host_ima[at] ^= 1;
    assert!(matches!(only(&world.judge(&parts)).code, Code::HostImaReplay | Code::HostImaMalformed));
    parts.host_ima = whole[..whole.len() - 1].to_vec();
    assert_eq!(only(&world.judge(&parts)).code, Code::HostImaMalformed);
    world.policy = Some(format!("{POLICY}{NO_FIRMWARE_LOG}"));
    world.pcrs.insert(3, Sha256([1; 32]));
    assert_eq!(only(&world.round()).code, Code::HostImaBootAggregate);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(600))]

    #[test]
    fn no_flipped_bit_is_trusted(at in any::<prop::sample::Index>(), bit in 0_u8..8) {
        let world = World::with_two_vms();
        let parts = world.quote(&nonce(1), untouched);
        let mut stream = parts.stream();
        let at = at.index(stream.len());
        stream[at] ^= 1 << bit;
        if let Ok(appraisal) = world.judge_stream(&stream, &nonce(1)) {
            prop_assert!(!appraisal.verdict.all_trusted(), "byte {at}, bit {bit}");
        }
    }

    #[test]
    fn no_stream_panics(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        let _ = Received::read(&bytes);
        let _ = Received::parse(&bytes);
    }
}

/// The proxy goes on where the verifier's last evidence ended; what is judged is all of it.
#[test]
fn evidence_onto_what_came_before_is_replayed_whole() {
    let world = World::with_two_vms();
    let parts = world.quote(&nonce(1), untouched);
    let before = Received::parse(&parts.stream()).unwrap().into_evidence();
    let rest = {
        let mut rest = Pieces::default();
        rest.push_log(Item::HostIma, before.host_ima.len() as u64, &[]);
        rest.push_log(Item::Records, before.records.len() as u64, &[]);
        rest.push_dictionary(before.dictionary.len() as u64, []);
        for list in &before.guests {
            rest.push_guest(&Guest { first: list.entries.len() as u64, entries: Vec::new(), ..*list });
        }
        rest.stream(parts.head.clone())
    };
    let judged = |before: &Evidence| {
        let whole = Evidence::parse_onto(&rest, before).unwrap();
        world.judge_stream(&whole.stream(), &nonce(1)).unwrap()
    };
    assert!(before.guests.iter().any(|list| !list.entries.is_empty()));
    assert_eq!(judged(&before).verdict, world.judge(&parts).verdict);
    // A proxy that goes on with a log that is not its own.
    let mut other = before.clone();
    let last = other.records.len() - 1;
    other.records[last] ^= 1;
    assert!(!judged(&other).verdict.host.findings.is_empty());
    let mut other = before.clone();
    other.guests.iter_mut().flat_map(|list| list.entries.first_mut()).for_each(|reference| *reference = 1);
    assert!(judged(&other).verdict.vms.iter().any(|vm| !vm.findings.is_empty()));
}
