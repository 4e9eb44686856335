//! A host made of software, whose evidence is true to the byte: what attacks are tried on.

use std::collections::BTreeMap;

use onequote_evidence::{
    digest::{FileDigest, HashAlg, sha256},
    event::{
        Component, Depth, Event, EventBody, GuestEntries, GuestHello, Image, ProxyStart, Role, StopCause, VmCreate,
        VmRef, VmResume, VmStart, VmStop,
    },
    id::{Blob, BootId, Epoch, EpochId, Nonce, SessionId, Sha256, TimeMs, VmId},
    ima::{Aggregate, Entry},
    log::Replay,
    nonce_tree,
    pcr::{self, QUOTED_PCRS, Register, RegisterValue},
    record::Record,
    statement::{self, GuestBoot, Statement, VmState},
    stream::{self, Guest, Head, Item, Pieces},
    tpm::{Attest, ClockInfo, PcrSelection, Public},
};

pub(crate) use onequote_evidence::tpm::software::Ak;

use super::{Appraisal, Context, Received, Shared, appraise, freshness::Freshness, state::HostState};
use crate::{finding::Finding, policy::Policy};

/// The fields of a `TPMS_ATTEST`, each to be forged.
pub(crate) struct AttestFields {
    pub(crate) magic: u32,
    pub(crate) kind: u16,
    pub(crate) extra: Vec<u8>,
    pub(crate) clock: ClockInfo,
    pub(crate) pcrs: Vec<u8>,
    pub(crate) digest: Vec<u8>,
}

impl AttestFields {
    fn bytes(&self) -> Vec<u8> {
        let attest = Attest {
            qualified_signer: vec![7; 34],
            extra_data: self.extra.clone(),
            clock: self.clock,
            firmware_version: 42,
            selection: PcrSelection { banks: vec![(0x000b, self.pcrs.iter().copied().collect())] },
            pcr_digest: self.digest.clone(),
        };
        [self.magic.to_be_bytes().as_slice(), &self.kind.to_be_bytes(), &attest.to_bytes()[6..]].concat()
    }
}

/// A stream's parts, each to be forged after signing.
pub(crate) struct Parts {
    pub(crate) head: Head,
    pub(crate) firmware: Vec<u8>,
    pub(crate) host_ima: Vec<u8>,
    pub(crate) records: Vec<u8>,
    pub(crate) dictionary: Vec<Blob>,
    pub(crate) guests: Vec<Guest>,
}

impl Parts {
    /// The expanded stream.
    pub(crate) fn stream(&self) -> Vec<u8> {
        let mut pieces = Pieces::default();
        pieces.push_log(Item::Firmware, 0, &self.firmware);
        pieces.push_log(Item::HostIma, 0, &self.host_ima);
        pieces.push_log(Item::Records, 0, &self.records);
        pieces.push_dictionary(0, self.dictionary.clone());
        for guest in &self.guests {
            pieces.push_guest(guest);
        }
        pieces.stream(self.head.clone())
    }
}

/// The host.
pub(crate) struct World {
    pub(crate) ak: Ak,
    pub(crate) records: Vec<Record>,
    pub(crate) statement: Statement,
    pub(crate) clock: ClockInfo,
    /// What its kernel's boot id is made of.
    pub(crate) boot: u8,
    /// SHA-256 registers other than the log's; zeros unless set.
    pub(crate) pcrs: BTreeMap<u8, Sha256>,
    pub(crate) firmware: Vec<u8>,
    pub(crate) host_ima: Vec<u8>,
    pub(crate) dictionary: Vec<Blob>,
    pub(crate) guests: Vec<Guest>,
    /// Other monitors of VMs that are created from now on.
    pub(crate) monitors: Vec<String>,
    pub(crate) policy: Option<String>,
    pub(crate) state: HostState,
    pub(crate) now: TimeMs,
}

pub(crate) const BANKS: [HashAlg; 2] = [HashAlg::Sha1, HashAlg::Sha256];

pub(crate) fn nonce(n: u8) -> Nonce {
    Nonce::new(vec![n; 32]).unwrap()
}

pub(crate) fn digest(n: u8) -> FileDigest {
    FileDigest::sha256(Sha256([n; 32]))
}

pub(crate) fn vm_ref(n: u8, session: u8) -> VmRef {
    VmRef { vm: vm_id(n), session: SessionId([session; 8]) }
}

pub(crate) fn vm_id(n: u8) -> VmId {
    VmId(uuid::Uuid::from_bytes([n; 16]))
}

/// An `ima-ng` entry for a file with SHA-256 `[n; 32]`.
pub(crate) fn ima_entry(path: &str, n: u8) -> Blob {
    ima_entry_of(path, &[n; 32], false)
}

pub(crate) fn ima_entry_of(path: &str, value: &[u8], violation: bool) -> Blob {
    let block = |bytes: &[u8]| [&(bytes.len() as u32).to_le_bytes(), bytes].concat();
    let data = [block(&[b"sha256:\0", value].concat()), block(&[path.as_bytes(), &[0]].concat())].concat();
    let hash = if violation { vec![0; 20] } else { HashAlg::Sha1.hash(&data) };
    Blob([&10_u32.to_le_bytes(), hash.as_slice(), &block(b"ima-ng"), &block(&data)].concat())
}

pub(crate) fn component(role: Role, n: u8) -> Component {
    Component { role, path: format!("/vm/{role}"), size: 9, digest: digest(n), text: None, memory: None }
}

pub(crate) fn image(slot: &str, n: u8, read_only: bool) -> Image {
    Image {
        slot: slot.into(),
        path: format!("/vm/{slot}.img"),
        format: "raw".into(),
        read_only,
        size: 9,
        digest: digest(n),
    }
}

impl World {
    /// A host on which nothing has happened yet but the start of its proxy.
    pub(crate) fn new() -> Self {
        Self::with_history(Self::empty())
    }

    pub(crate) fn with_history(history: Vec<RegisterValue>) -> Self {
        let epoch = Epoch { number: 1, id: EpochId([1; 16]) };
        let statement = Statement {
            version: statement::VERSION,
            host: "host-1".parse().unwrap(),
            epoch,
            log_len: 0,
            registers: Vec::new(),
            vms: Vec::new(),
            unmanaged: Vec::new(),
            time: TimeMs(1000),
        };
        let mut world = Self {
            ak: Ak::generate().unwrap(),
            records: Vec::new(),
            statement,
            clock: ClockInfo { clock: 1000, reset_count: 5, restart_count: 1, safe: true },
            boot: 3,
            pcrs: BTreeMap::new(),
            firmware: Vec::new(),
            host_ima: Vec::new(),
            dictionary: Vec::new(),
            guests: Vec::new(),
            monitors: Vec::new(),
            policy: Some("[host]\n".into()),
            state: HostState::default(),
            now: TimeMs(5000),
        };
        world.begin(history);
        world
    }

    /// Begins the log of the statement's epoch.
    pub(crate) fn begin(&mut self, history: Vec<RegisterValue>) {
        self.records.clear();
        self.proxy_start(history);
    }

    /// A proxy starts.
    pub(crate) fn proxy_start(&mut self, history: Vec<RegisterValue>) {
        let start = ProxyStart {
            host: self.statement.host.clone(),
            epoch: self.statement.epoch,
            boot_id: BootId([self.boot; 16]),
            version: "0.1.0".into(),
            binary: Some(digest(8)),
            history,
            pcr_vm: 12,
            pcr_guest: 13,
            reset_count: self.clock.reset_count,
            restart_count: self.clock.restart_count,
            path: Some("/usr/bin/onequote-proxy".into()),
        };
        self.log(12, None, start);
    }

    /// The host is rebooted: everything ends, the TPM is reset, a new epoch begins.
    pub(crate) fn reboot(&mut self) {
        self.boot += 1;
        self.reset_tpm();
        self.statement.vms.clear();
        self.guests.clear();
    }

    /// The TPM is reset, and a new epoch begins.
    pub(crate) fn reset_tpm(&mut self) {
        self.clock = ClockInfo { clock: self.clock.clock + 1, reset_count: self.clock.reset_count + 1, ..self.clock };
        self.next_epoch(Self::empty());
    }

    /// A new epoch begins with these values.
    pub(crate) fn next_epoch(&mut self, history: Vec<RegisterValue>) {
        let number = self.statement.epoch.number + 1;
        self.statement.epoch = Epoch { number, id: EpochId([number as u8; 16]) };
        self.begin(history);
    }

    /// The log's registers after a TPM reset.
    pub(crate) fn empty() -> Vec<RegisterValue> {
        let zero = |bank: HashAlg, pcr| RegisterValue { bank, pcr, value: Blob(vec![0; bank.size()]) };
        BANKS.into_iter().flat_map(|bank| [zero(bank, 12), zero(bank, 13)]).collect()
    }

    /// The usual host: `web` and `db` run, and their guests have sent two and three entries.
    pub(crate) fn with_two_vms() -> Self {
        let mut world = Self::new();
        world.start("web", 1, 1, vec![image("disk0", 5, false), image("disk0/1", 6, true)]);
        world.start("db", 2, 2, vec![]);
        world.entries(1, 1, &[ima_entry("/bin/init", 1), ima_entry("/bin/sh", 2)]);
        world.entries(2, 2, &[ima_entry("/bin/init", 1), ima_entry("/bin/sh", 2), ima_entry("/bin/db", 3)]);
        world.policy = Some(POLICY.into());
        world
    }

    pub(crate) fn log(&mut self, pcr: u8, vm: Option<VmRef>, body: impl Into<EventBody>) {
        let event = Event { time: TimeMs(1000), vm, body: body.into() };
        self.records.push(Record::new(self.records.len() as u64, pcr, &BANKS, &[event]));
    }

    pub(crate) fn create(&mut self, name: &str, n: u8, session: u8) {
        let create = VmCreate {
            name: name.into(),
            pid: 77,
            depth: Depth::Gate,
            uuid_given: true,
            qemu: "7.2.0".into(),
            machine: "q35".into(),
            memory: 1 << 28,
            cpus: 1,
            accelerator: "tcg".into(),
            guest_cid: None,
            devices: Vec::new(),
            monitors: self.monitors.clone(),
        };
        self.log(12, Some(vm_ref(n, session)), create);
        let vm = VmState {
            vm: vm_id(n),
            session: SessionId([session; 8]),
            name: name.into(),
            run_state: "running".into(),
            depth: Depth::Gate,
            boots: Vec::new(),
            last_contact: Some(10),
            late: false,
        };
        self.statement.vms.retain(|other| other.vm != vm.vm);
        self.statement.vms.push(vm);
        self.statement.vms.sort_by_key(|vm| vm.vm);
    }

    /// A VM is created, measured and run.
    pub(crate) fn start(&mut self, name: &str, n: u8, session: u8, images: Vec<Image>) {
        self.create(name, n, session);
        self.log(12, Some(vm_ref(n, session)), VmStart { components: components(), images });
        self.log(12, Some(vm_ref(n, session)), VmResume { run_state: "running".into() });
    }

    /// A VM ends and leaves its images so.
    pub(crate) fn stop(&mut self, n: u8, session: u8, cause: StopCause, images: Vec<Image>) {
        self.log(12, Some(vm_ref(n, session)), VmStop { cause, images, unmeasured: Vec::new(), read: Vec::new() });
        self.statement.vms.retain(|vm| vm.vm != vm_id(n));
        self.guests.retain(|guest| guest.vm != vm_id(n));
    }

    /// A guest's first boot sends more entries.
    pub(crate) fn entries(&mut self, n: u8, session: u8, entries: &[Blob]) {
        let vm = vm_ref(n, session);
        let at = self.guests.iter().position(|g| g.session == vm.session);
        let at = at.unwrap_or_else(|| {
            let hello = GuestHello { boot: 0, boot_id: BootId([9; 16]), hash_size: 20, count: 0 };
            self.log(13, Some(vm), hello);
            self.guests.push(Guest { vm: vm.vm, session: vm.session, boot: 0, first: 0, entries: Vec::new() });
            self.guests.len() - 1
        });
        let first = self.guests[at].entries.len() as u64;
        for entry in entries {
            let known = self.dictionary.iter().position(|other| other == entry).unwrap_or_else(|| {
                self.dictionary.push(entry.clone());
                self.dictionary.len() - 1
            });
            self.guests[at].entries.push(known as u32);
        }
        let aggregate = self.aggregate(&self.guests[at].entries.clone());
        let count = entries.len() as u64;
        self.log(13, Some(vm), GuestEntries { boot: 0, first, count, aggregate });
        let stated = self.statement.vms.iter_mut().find(|stated| stated.vm == vm.vm).unwrap();
        stated.boots = vec![GuestBoot { boot: 0, count: first + count, aggregate }];
    }

    pub(crate) fn aggregate(&self, references: &[u32]) -> Sha256 {
        let mut aggregate = Aggregate::EMPTY;
        for &i in references {
            aggregate.push(&Entry::parse(&self.dictionary[i as usize].0, 20).unwrap());
        }
        aggregate.value
    }

    /// Evidence for this nonce; `forge` may change statement and quote before they are signed.
    pub(crate) fn quote(&self, nonce: &Nonce, forge: impl FnOnce(&mut Statement, &mut AttestFields)) -> Parts {
        self.quote_for(nonce, BINDING, forge)
    }

    /// The same for a connection with this exporter value.
    pub(crate) fn quote_for(
        &self,
        nonce: &Nonce,
        binding: &[u8],
        forge: impl FnOnce(&mut Statement, &mut AttestFields),
    ) -> Parts {
        let mut replay = Replay::begin(&self.records[0]).unwrap();
        for record in &self.records[1..] {
            replay.apply(record).unwrap();
        }
        let mut statement = self.statement.clone();
        statement.log_len = self.records.len() as u64;
        statement.registers = pcr::to_list(replay.registers());
        let value = |pcr: u8| {
            let register = Register { bank: HashAlg::Sha256, pcr };
            let known = replay.registers().get(&register).cloned();
            known.unwrap_or_else(|| self.pcrs.get(&pcr).copied().unwrap_or(Sha256::ZERO).0.to_vec())
        };
        let values: Vec<Vec<u8>> = QUOTED_PCRS.iter().map(|&pcr| value(pcr)).collect();
        let mut attest = AttestFields {
            magic: 0xff54_4347,
            kind: 0x8018,
            extra: Vec::new(),
            clock: self.clock,
            pcrs: QUOTED_PCRS.to_vec(),
            digest: HashAlg::Sha256.hash(&values.concat()),
        };
        forge(&mut statement, &mut attest);
        let statement = statement.to_bytes();
        let others: Vec<Sha256> = (1..4).map(|n| sha256(&[&[n]])).collect();
        let leaves = [others[0], nonce_tree::leaf(nonce, binding), others[1], others[2]];
        let (root, paths) = nonce_tree::build(&leaves).unwrap();
        if attest.extra.is_empty() {
            attest.extra = nonce_tree::qualifying_data(&root, &statement).0.to_vec();
        }
        let attest = attest.bytes();
        let registers = QUOTED_PCRS.iter().zip(values).map(|(&pcr, value)| RegisterValue {
            bank: HashAlg::Sha256,
            pcr,
            value: Blob(value),
        });
        let head = Head {
            version: stream::VERSION,
            statement: Blob(statement),
            signature: Blob(self.ak.sign(&attest).unwrap()),
            attest: Blob(attest),
            path: paths[1].clone(),
            registers: registers.collect(),
            nonce: Blob(nonce.as_bytes().to_vec()),
            binding: Blob(binding.to_vec()),
        };
        Parts {
            head,
            firmware: self.firmware.clone(),
            host_ima: self.host_ima.clone(),
            records: self.records.iter().flat_map(Record::to_bytes).collect(),
            dictionary: self.dictionary.clone(),
            guests: self.guests.clone(),
        }
    }

    /// Appraises a stream as the answer to `nonce`.
    pub(crate) fn judge_stream(&self, stream: &[u8], nonce: &Nonce) -> Result<Appraisal, Finding> {
        let received = Received::parse(stream)?;
        let public = Public::parse(&self.ak.public()).unwrap();
        Ok(self.judge_with(&received, &public, &asked(nonce)))
    }

    pub(crate) fn judge_with(&self, received: &Received, ak: &Public, freshness: &Freshness) -> Appraisal {
        let policy = self.policy.as_ref().map(|text| Policy::parse(text, "policy").unwrap());
        let host = "host-1".parse().unwrap();
        let context = Context {
            host: Some(&host),
            ak,
            software_tpm: true,
            freshness,
            state: &self.state,
            policy: policy.as_ref().map(|policy| (policy, 1)),
            now: self.now,
            lifetime: 1000,
            facts: true,
            shared: &Shared::default(),
        };
        appraise(received, &context)
    }

    /// Appraises these parts as the answer to nonce 1.
    pub(crate) fn judge(&self, parts: &Parts) -> Appraisal {
        self.judge_stream(&parts.stream(), &nonce(1)).unwrap()
    }

    /// An honest round: quote, appraise, keep the state.
    pub(crate) fn round(&mut self) -> Appraisal {
        self.clock.clock += 1;
        let appraisal = self.judge(&self.quote(&nonce(1), |_, _| {}));
        if let Some(state) = &appraisal.state {
            // What is kept is kept as JSON.
            self.state = serde_json::from_str(&serde_json::to_string(state).unwrap()).unwrap();
        }
        appraisal
    }
}

/// The exporter value of the connection in tests.
pub(crate) const BINDING: &[u8] = &[0xbb; 32];

pub(crate) fn asked(nonce: &Nonce) -> Freshness {
    Freshness::Asked {
        nonce: nonce.clone(),
        binding: BINDING.to_vec(),
        expires: TimeMs(10_000),
        unused: true,
        claimed_was_answered: false,
    }
}

pub(crate) fn components() -> Vec<Component> {
    let roles = [Role::QemuBinary, Role::Kernel, Role::Initrd, Role::KernelCmdline, Role::Firmware];
    let mut parts: Vec<Component> = roles.into_iter().enumerate().map(|(i, role)| component(role, i as u8)).collect();
    parts[3].text = Some("console=ttyS0".into());
    parts[3].digest = FileDigest::sha256(sha256(&[b"console=ttyS0"]));
    parts
}

/// For the end of a policy: registers of the firmware are judged without its log.
pub(crate) const NO_FIRMWARE_LOG: &str = "[host.firmware]\nlog = \"optional\"\n";

/// A policy that the host of [`World::with_two_vms`] keeps.
pub(crate) const POLICY: &str = r#"
[host]
registers = { "0" = "0000000000000000000000000000000000000000000000000000000000000000" }

[[vm]]
name = "web"
qemu = ["sha256:0000000000000000000000000000000000000000000000000000000000000000"]
kernel = ["sha256:0101010101010101010101010101010101010101010101010101010101010101"]
initrd = ["sha256:0202020202020202020202020202020202020202020202020202020202020202"]
kernel_cmdline = ["console=ttyS0"]
firmware = ["sha256:0404040404040404040404040404040404040404040404040404040404040404"]
runtime = "required"
[vm.images]
disk0 = { digests = ["sha256:0505050505050505050505050505050505050505050505050505050505050505"], continuity = true }
"disk0/1" = { digests = ["sha256:0606060606060606060606060606060606060606060606060606060606060606"] }
[vm.ima]
"/bin/init" = ["sha256:0101010101010101010101010101010101010101010101010101010101010101"]
"/bin/sh" = ["sha256:0202020202020202020202020202020202020202020202020202020202020202"]

[[vm]]
name = "d*"
kernel = "any"
initrd = "any"
kernel_cmdline = "any"
firmware = "any"
[vm.ima]
"/bin/init" = ["sha256:0101010101010101010101010101010101010101010101010101010101010101"]
"/bin/sh" = ["sha256:0202020202020202020202020202020202020202020202020202020202020202"]
"/bin/db" = ["sha256:0303030303030303030303030303030303030303030303030303030303030303"]
"#;
