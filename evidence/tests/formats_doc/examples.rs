//! The values that `docs/formats.md` shows, written by the code.

use std::collections::BTreeMap;

use onequote_evidence::{
    cbor,
    digest::{FileDigest, HashAlg, sha256},
    event::{Component, Depth, Event, HowRead, Image, ImageRead, MemoryCheck, Role, VmPause, VmRef},
    guest_frame::{self, GuestFrame, HostFrame, to_wire},
    id::{Blob, BootId, Epoch, EpochId, Nonce, SessionId, Sha256, TimeMs, VmId},
    ima::{Aggregate, FileSignature, ListReader, SignatureKind},
    nonce_tree::{self, Step},
    pcr::{RegisterValue, extend},
    record::Record,
    report::{self, Ask, ProxyFrame},
    statement::{self, GuestBoot, Statement, Unmanaged, VmState},
    stream::{self, Dictionary, Guest, Head, Item, Piece},
};

fn block(bytes: &[u8]) -> Vec<u8> {
    [&(bytes.len() as u32).to_le_bytes(), bytes].concat()
}

fn listed(template_hash: &[u8], name: &[u8], data: &[u8]) -> Vec<u8> {
    [&10_u32.to_le_bytes(), template_hash, &block(name), data].concat()
}

fn ng_entry() -> Vec<u8> {
    let data = [block(&[b"sha256:\0".as_slice(), &[0xab; 32]].concat()), block(b"/bin/sh\0")].concat();
    listed(&HashAlg::Sha1.hash(&data), b"ima-ng", &block(&data))
}

fn legacy_entry() -> Vec<u8> {
    let mut hashed = [[0xcd; 20].as_slice(), b"/bin/sh"].concat();
    hashed.resize(20 + 256, 0);
    let data = [[0xcd; 20].as_slice(), &block(b"/bin/sh")].concat();
    listed(&HashAlg::Sha1.hash(&hashed), b"ima", &data)
}

fn violation_entry() -> Vec<u8> {
    let data = [block(&[b"sha1:\0".as_slice(), &[0; 20]].concat()), block(b"/tmp/log\0")].concat();
    listed(&[0; 20], b"ima-ng", &block(&data))
}

/// What is read of a signature, written by hand: only the kernel and signing tools write them.
fn signature() -> Vec<u8> {
    let bytes = [&[3, 2, 4, 0xde, 0xad, 0xbe, 0xef, 0, 8][..], &[0x30, 6, 2, 1, 1, 2, 1, 1]].concat();
    let read = FileSignature::parse(&bytes).unwrap();
    assert_eq!((read.kind, read.version, read.hash_alg()), (SignatureKind::File, 2, Some(HashAlg::Sha256)));
    assert_eq!((read.key.to_string().as_str(), read.signature), ("deadbeef", &bytes[9..]));
    bytes
}

fn aggregate() -> Aggregate {
    let list = [ng_entry(), legacy_entry(), violation_entry()].concat();
    let mut aggregate = Aggregate::EMPTY;
    ListReader::new(&list, 20).for_each(|entry| aggregate.push(&entry.unwrap()));
    aggregate
}

fn vm() -> VmRef {
    VmRef { vm: VmId(uuid::Uuid::from_bytes([0x11; 16])), session: SessionId([0x22; 8]) }
}

fn record() -> Record {
    let body = VmPause { run_state: "paused".into() }.into();
    Record::new(7, 12, &[HashAlg::Sha256], &[Event { time: TimeMs(1_700_000_000_000), vm: Some(vm()), body }])
}

fn register(pcr: u8) -> RegisterValue {
    let mut value = vec![0; 32];
    extend(HashAlg::Sha256, &mut value, &record().digests[&HashAlg::Sha256].0);
    RegisterValue { bank: HashAlg::Sha256, pcr, value: value.into() }
}

fn statement() -> Statement {
    Statement {
        version: statement::VERSION,
        host: "host-1".parse().unwrap(),
        epoch: Epoch { number: 1, id: EpochId([0x33; 16]) },
        log_len: 8,
        registers: vec![register(12), RegisterValue { value: vec![0; 32].into(), ..register(13) }],
        vms: vec![VmState {
            vm: vm().vm,
            session: vm().session,
            name: "web".into(),
            run_state: "running".into(),
            depth: Depth::Gate,
            boots: vec![GuestBoot { boot: 0, count: 3, aggregate: aggregate().value }],
            last_contact: Some(250),
            late: false,
        }],
        unmanaged: vec![Unmanaged { pid: 4242, program: "/usr/bin/qemu-system-x86_64".into() }],
        time: TimeMs(1_700_000_000_500),
    }
}

fn ask() -> Ask {
    let (nonce, statement) = (Blob(vec![1; 32]), Some(Sha256([2; 32])));
    Ask { nonce, statement, expires_ms: 1, period_ms: 60_000, gap_ms: 500, now: true }
}

fn nonce() -> Nonce {
    Nonce::new(vec![0x44; 16]).unwrap()
}

fn leaf() -> Sha256 {
    nonce_tree::leaf(&nonce(), &[0x55; 32])
}

fn root() -> Sha256 {
    let other = nonce_tree::leaf(&Nonce::new(vec![0x66; 16]).unwrap(), &[0x77; 32]);
    nonce_tree::build(&[leaf(), other]).unwrap().0
}

fn head() -> Head {
    let other = nonce_tree::leaf(&Nonce::new(vec![0x66; 16]).unwrap(), &[0x77; 32]);
    Head {
        version: stream::VERSION,
        statement: vec![0x01].into(),
        attest: vec![0x02].into(),
        signature: vec![0x03].into(),
        path: vec![Step { from_left: false, hash: other }],
        registers: vec![register(12)],
        nonce: nonce().as_bytes().to_vec().into(),
        binding: vec![0x55; 32].into(),
    }
}

fn guest() -> Guest {
    Guest { vm: vm().vm, session: vm().session, boot: 0, first: 0, entries: vec![0, 1, 2, 0] }
}

/// What the document shows as written.
pub(crate) fn written() -> BTreeMap<&'static str, Vec<u8>> {
    let entry = ng_entry();
    let mut pieces = stream::Pieces::default();
    pieces.push_log(Item::Records, 0, &[0xa4]);
    pieces.push_dictionary(0, [entry.clone().into()]);
    pieces.push_guest(&guest());
    BTreeMap::from([
        ("ima-ng", entry.clone()),
        ("ima-legacy", legacy_entry()),
        ("ima-violation", violation_entry()),
        ("ima-signature", signature()),
        ("ima-aggregate", aggregate().value.0.to_vec()),
        ("record", record().to_bytes()),
        ("register", register(12).value.0),
        ("fs-verity-empty", sha256(&[&[1, 1, 12], &[0; 253]]).0.to_vec()),
        ("session", SessionId::of_process(BootId([0x88; 16]), 4242, 123_456).0.to_vec()),
        ("vm-uuid", VmId::from_name(&"host-1".parse().unwrap(), "web").0.as_bytes().to_vec()),
        ("leaf", leaf().0.to_vec()),
        ("root", root().0.to_vec()),
        ("statement", statement().to_bytes()),
        ("statement-digest", sha256(&[&statement().to_bytes()]).0.to_vec()),
        ("qualifying-data", nonce_tree::qualifying_data(&root(), &statement().to_bytes()).0.to_vec()),
        ("stream", pieces.stream(head())),
        (
            "report-hello",
            report::to_wire(&ProxyFrame::Hello { version: report::VERSION, host: "host-1".parse().unwrap() }),
        ),
        (
            "hello",
            to_wire(&GuestFrame::Hello {
                version: guest_frame::VERSION,
                boot_id: BootId([0x99; 16]),
                hash_size: 20,
                count: 3,
            }),
        ),
        ("have", to_wire(&HostFrame::Have { count: 0, aggregate: Sha256::ZERO })),
        ("resume", to_wire(&GuestFrame::Resume { count: 0, aggregate: Sha256::ZERO })),
        ("entries", to_wire(&GuestFrame::Entries { first: 0, entries: entry.into() })),
        ("heartbeat", to_wire(&GuestFrame::Heartbeat { count: 1 })),
        ("collect", to_wire(&HostFrame::Collect { id: 9 })),
        ("collected", to_wire(&GuestFrame::Collected { id: 9, count: 1 })),
    ])
}

/// A value of every map that is not an event's body, with all its keys.
pub(crate) fn maps() -> Vec<(&'static str, Vec<u8>)> {
    let digest = FileDigest::sha256(Sha256([1; 32]));
    let component = Component {
        role: Role::KernelCmdline,
        path: "/boot/vmlinuz".into(),
        size: 9,
        digest,
        text: Some("quiet".into()),
        memory: Some(MemoryCheck::Hidden),
    };
    let image =
        Image { slot: "disk0".into(), path: "/disk".into(), format: "raw".into(), read_only: true, size: 9, digest };
    let image_read = ImageRead { slot: "disk0".into(), how: HowRead::Full, bytes: 1, why: "x".into() };
    let statement = statement();
    vec![
        ("ask", cbor::encode(&ask())),
        ("component", cbor::encode(&component)),
        ("image", cbor::encode(&image)),
        ("image-read", cbor::encode(&image_read)),
        ("epoch", cbor::encode(&statement.epoch)),
        ("statement", statement.to_bytes()),
        ("vm", cbor::encode(&statement.vms[0])),
        ("boot", cbor::encode(&statement.vms[0].boots[0])),
        ("unmanaged", cbor::encode(&statement.unmanaged[0])),
        ("answer", cbor::encode(&head().split().0)),
        ("quote", cbor::encode(&head().split().1)),
        ("piece", cbor::encode(&Piece { offset: 0, bytes: vec![1].into() })),
        ("dictionary", cbor::encode(&Dictionary { first: 0, entries: vec![ng_entry().into()] })),
        ("guest", cbor::encode(&guest())),
    ]
}
