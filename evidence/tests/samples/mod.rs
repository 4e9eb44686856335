//! One body of every kind, with every optional field present, filled from a number.

use onequote_evidence::{
    digest::{FileDigest, FileDigestAlg, HashAlg},
    event::*,
    id::{Blob, BootId, Epoch, EpochId, Sha256},
    pcr::RegisterValue,
};

/// Gives values that follow from a seed.
pub(crate) struct Gen(pub(crate) u64);

impl Gen {
    /// The next number (Weyl sequence, mixed as in SplitMix64).
    pub(crate) fn u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed ^ (mixed >> 27)
    }

    fn u32(&mut self) -> u32 {
        (self.u64() >> 32) as u32
    }

    fn bool(&mut self) -> bool {
        self.u64() & 1 == 1
    }

    fn bytes<const N: usize>(&mut self) -> [u8; N] {
        std::array::from_fn(|_| self.u64() as u8)
    }

    fn text(&mut self) -> String {
        (0..self.u64() % 40).map(|_| char::from(b' ' + (self.u64() % 95) as u8)).collect()
    }

    fn sha256(&mut self) -> Sha256 {
        Sha256(self.bytes())
    }

    fn digest(&mut self) -> FileDigest {
        let alg = if self.bool() { FileDigestAlg::Sha256 } else { FileDigestAlg::FsVerity };
        FileDigest { alg, value: self.sha256() }
    }

    fn component(&mut self, role: Role) -> Component {
        Component {
            role,
            path: self.text(),
            size: self.u64(),
            digest: self.digest(),
            text: Some(self.text()),
            memory: Some(MemoryCheck::Differs),
        }
    }

    fn image(&mut self) -> Image {
        Image {
            slot: "disk0".into(),
            path: self.text(),
            format: "qcow2".into(),
            read_only: self.bool(),
            size: self.u64(),
            digest: self.digest(),
        }
    }

    fn register(&mut self, bank: HashAlg, pcr: u8) -> RegisterValue {
        RegisterValue { bank, pcr, value: Blob((0..bank.size()).map(|_| self.u64() as u8).collect()) }
    }
}

/// A start of a proxy.
fn proxy_start(g: &mut Gen) -> ProxyStart {
    ProxyStart {
        host: "host-1".parse().unwrap(),
        epoch: Epoch { number: g.u64(), id: EpochId(g.bytes()) },
        boot_id: BootId(g.bytes()),
        version: g.text(),
        binary: Some(g.digest()),
        history: vec![g.register(HashAlg::Sha256, 12), g.register(HashAlg::Sha256, 13)],
        pcr_vm: 12,
        pcr_guest: 13,
        reset_count: g.u32(),
        restart_count: g.u32(),
        path: Some(g.text()),
    }
}

/// One body of every kind, in the order of [`EventBody::KINDS`].
pub(crate) fn bodies(g: &mut Gen) -> Vec<EventBody> {
    let components = vec![g.component(Role::Kernel), g.component(Role::KernelCmdline)];
    vec![
        proxy_start(g).into(),
        VmCreate {
            name: g.text(),
            pid: g.u32(),
            depth: Depth::Observe,
            uuid_given: g.bool(),
            qemu: "7.2.22".into(),
            machine: g.text(),
            memory: g.u64(),
            cpus: g.u32(),
            accelerator: "kvm".into(),
            guest_cid: Some(g.u64()),
            devices: vec![g.text(), g.text()],
            monitors: vec![g.text()],
        }
        .into(),
        VmStart { components: components.clone(), images: vec![g.image(), g.image()] }.into(),
        VmAttach { components, images: vec![g.image()], again: g.bool() }.into(),
        VmRefuse { reason: g.text(), item: g.text(), cause: RefuseCause::LoadedDiffers }.into(),
        VmPause { run_state: g.text() }.into(),
        VmResume { run_state: g.text() }.into(),
        VmReset { by_guest: g.bool(), reason: g.text() }.into(),
        VmStop {
            cause: StopCause::Lost,
            images: vec![g.image()],
            unmeasured: vec![g.text()],
            read: vec![ImageRead { slot: g.text(), how: HowRead::Changed, bytes: g.u64(), why: g.text() }],
        }
        .into(),
        VmCrash { cause: CrashCause::Watchdog, detail: g.text() }.into(),
        VmDelete { name: g.text(), images: vec![g.image()], unmeasured: vec![g.text()] }.into(),
        MediumChange { slot: g.text(), before: g.text(), after: g.text(), images: vec![g.image()] }.into(),
        SnapshotSave { tag: g.text(), images: vec![g.image()] }.into(),
        SnapshotLoad { tag: g.text(), images: vec![g.image()] }.into(),
        MigrateOut {
            status: MigrationStatus::Completed,
            target: g.text(),
            images: vec![g.image()],
            unmeasured: vec![g.text()],
        }
        .into(),
        MigrateIn { status: MigrationStatus::Failed, source: g.text() }.into(),
        MonitorCommand {
            client: g.text(),
            command: g.text(),
            arguments: g.text(),
            digest: g.sha256(),
            outcome: CommandOutcome::Refused,
            detail: g.text(),
            files: vec![g.component(Role::ArgumentFile)],
        }
        .into(),
        ConfigChange { what: g.text(), before: g.text(), after: g.text(), images: vec![g.image()] }.into(),
        UnmanagedVm { pid: g.u32(), program: g.text(), arguments: g.text() }.into(),
        LogGap { reason: GapReason::MonitorLost, detail: g.text() }.into(),
        LogSegment {
            number: g.u64(),
            start: proxy_start(g),
            registers: vec![g.register(HashAlg::Sha256, 12)],
            snapshot: g.sha256(),
        }
        .into(),
        GuestHello { boot: g.u32(), boot_id: BootId(g.bytes()), hash_size: 20, count: g.u64() }.into(),
        GuestEntries { boot: g.u32(), first: g.u64(), count: g.u64(), aggregate: g.sha256() }.into(),
        GuestLost { boot: g.u32(), reason: g.text(), count: g.u64() }.into(),
        GuestRewind {
            boot: g.u32(),
            count: g.u64(),
            aggregate: g.sha256(),
            claimed_count: g.u64(),
            claimed: g.sha256(),
            boot_id: BootId(g.bytes()),
        }
        .into(),
        GuestOverflow { boot: g.u32(), count: g.u64(), limit: g.text() }.into(),
    ]
}
