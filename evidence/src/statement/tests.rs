//! Statements: round trip, truncation, mutation, order.

use proptest::prelude::*;

use super::*;
use crate::{
    digest::HashAlg,
    id::{Blob, EpochId},
};

fn value(bank: HashAlg, pcr: u8, byte: u8) -> RegisterValue {
    RegisterValue { bank, pcr, value: Blob(vec![byte; bank.size()]) }
}

fn any_vm() -> impl Strategy<Value = VmState> {
    (
        any::<([u8; 16], [u8; 8])>(),
        "[a-z0-9-]{0,20}",
        prop::sample::select(vec![Depth::Gate, Depth::Observe]),
        prop::collection::btree_map(any::<u32>(), any::<(u64, [u8; 32])>(), 0..3),
        prop::option::of(any::<u64>()),
        any::<bool>(),
    )
        .prop_map(|((id, session), name, depth, boots, last_contact, late)| VmState {
            vm: VmId(uuid::Uuid::from_bytes(id)),
            session: SessionId(session),
            name,
            run_state: "running".into(),
            depth,
            boots: boots
                .into_iter()
                .map(|(boot, (count, aggregate))| GuestBoot { boot, count, aggregate: Sha256(aggregate) })
                .collect(),
            last_contact,
            late,
        })
}

fn any_statement() -> impl Strategy<Value = Statement> {
    (
        any::<(u64, [u8; 16], u64, u8, u64)>(),
        prop::collection::vec(any_vm(), 0..4),
        prop::collection::btree_map(any::<u32>(), "[a-z/]{0,20}", 0..3),
    )
        .prop_map(|((number, id, log_len, byte, time), mut vms, unmanaged)| {
            vms.sort_by_key(|vm| (vm.vm, vm.session));
            vms.dedup_by_key(|vm| (vm.vm, vm.session));
            Statement {
                version: VERSION,
                host: "host-1".parse().unwrap(),
                epoch: Epoch { number, id: EpochId(id) },
                log_len,
                registers: vec![
                    value(HashAlg::Sha1, 12, byte),
                    value(HashAlg::Sha1, 13, byte),
                    value(HashAlg::Sha256, 12, byte),
                    value(HashAlg::Sha256, 13, byte),
                ],
                vms,
                unmanaged: unmanaged.into_iter().map(|(pid, program)| Unmanaged { pid, program }).collect(),
                time: TimeMs(time),
            }
        })
}

proptest! {
    #[test]
    fn round_trip(statement in any_statement(), cut in any::<prop::sample::Index>()) {
        let bytes = statement.to_bytes();
        prop_assert_eq!(Statement::parse(&bytes).unwrap(), statement);
        prop_assert!(Statement::parse(&bytes[..cut.index(bytes.len())]).unwrap_err().is_truncated());
        prop_assert!(Statement::parse(&[bytes.as_slice(), &[0]].concat()).is_err());
    }

    #[test]
    fn any_change_is_seen(statement in any_statement(), at in any::<prop::sample::Index>(), bit in 0_u8..8) {
        let mut bytes = statement.to_bytes();
        let at = at.index(bytes.len());
        bytes[at] ^= 1 << bit;
        if let Ok(changed) = Statement::parse(&bytes) {
            prop_assert_eq!(changed.to_bytes(), bytes);
            prop_assert_ne!(changed, statement);
        }
    }

    #[test]
    fn rubbish_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = Statement::parse(&bytes);
    }
}

/// A statement of one VM with two boots, changed, must be refused with this word in the error.
fn refused(change: fn(&mut Statement), why: &str) {
    let boot = |boot| GuestBoot { boot, count: 1, aggregate: Sha256([1; 32]) };
    let vm = |byte: u8| VmState {
        vm: VmId(uuid::Uuid::from_bytes([byte; 16])),
        session: SessionId([byte; 8]),
        name: "vm".into(),
        run_state: "running".into(),
        depth: Depth::Gate,
        boots: vec![boot(0), boot(1)],
        last_contact: None,
        late: false,
    };
    let mut statement = Statement {
        version: VERSION,
        host: "host-1".parse().unwrap(),
        epoch: Epoch { number: 1, id: EpochId([1; 16]) },
        log_len: 1,
        registers: vec![value(HashAlg::Sha256, 12, 1), value(HashAlg::Sha256, 13, 1)],
        vms: vec![vm(1), vm(2)],
        unmanaged: vec![Unmanaged { pid: 1, program: "a".into() }, Unmanaged { pid: 2, program: "a".into() }],
        time: TimeMs(1),
    };
    assert!(Statement::parse(&statement.to_bytes()).is_ok());
    change(&mut statement);
    let err = Statement::parse(&statement.to_bytes()).unwrap_err().to_string();
    assert!(err.contains(why), "{err}");
}

#[test]
fn order_and_doubles() {
    refused(|s| s.version = 2, "version");
    refused(|s| s.vms.swap(0, 1), "process stands twice");
    refused(|s| s.vms[1] = s.vms[0].clone(), "process stands twice");
    refused(|s| s.vms[1] = VmState { session: SessionId([0; 8]), ..s.vms[0].clone() }, "out of order");
    refused(|s| s.unmanaged.swap(0, 1), "unmanaged");
    refused(|s| s.unmanaged[1].pid = 1, "unmanaged");
    refused(|s| s.vms[0].boots.swap(0, 1), "boots");
    refused(|s| s.vms[0].boots[1].boot = 0, "boots");
    refused(|s| s.registers.swap(0, 1), "register");
    refused(|s| s.registers[1].pcr = 12, "register");
    refused(|s| s.registers[1].pcr = 24, "register");
    refused(|s| s.registers[1].value.0.truncate(31), "register");
}

#[test]
fn more_registers_than_there_are_cost_no_memory() {
    refused(|s| s.registers = vec![value(HashAlg::Sha1, 1, 1); MAX_REGISTERS + 1], "more items");
}

#[test]
fn two_processes_with_one_uuid_are_both_stated() {
    let mut statement = Statement {
        version: VERSION,
        host: "host-1".parse().unwrap(),
        epoch: Epoch { number: 1, id: EpochId([1; 16]) },
        log_len: 1,
        registers: Vec::new(),
        vms: Vec::new(),
        unmanaged: Vec::new(),
        time: TimeMs(1),
    };
    statement.vms = [1, 2]
        .map(|session| VmState {
            vm: VmId(uuid::Uuid::from_bytes([7; 16])),
            session: SessionId([session; 8]),
            name: format!("vm-{session}"),
            run_state: "prelaunch".into(),
            depth: Depth::Gate,
            boots: Vec::new(),
            last_contact: None,
            late: false,
        })
        .into();
    assert_eq!(Statement::parse(&statement.to_bytes()).unwrap(), statement);
}
