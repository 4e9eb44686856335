//! A host's TPM as a program in this process: true registers, clock and counters, true quotes by a P-256 key, and true
//! credential activation. A [`Chip`] outlives the connections to it, as a TPM outlives the proxy.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use onequote_evidence::{
    digest::{BankDigest, HashAlg, sha256},
    id::Sha256,
    pcr::{PCR_COUNT, QUOTED_PCRS, Register, Registers, extend_sha256},
    tpm::{
        Attest, ClockInfo, PcrSelection, Public,
        software::{Ak, Ek},
    },
};
use onequote_proxy::tpm::{Clock, EkKind, Endorsement, GivenCertificate, Quote, Tpm, TpmError, TpmErrorKind};

/// `TPM_RC_FAILURE`: what a chip answers that cannot do what it must.
const FAILURE: u32 = 0x101;

/// The chip. Clones are the same one.
#[derive(Clone)]
pub struct Chip(Arc<Mutex<State>>);

#[derive(Clone)]
struct State {
    ak: Arc<Ak>,
    ek: Arc<Ek>,
    /// `TPM2B_PUBLIC` of `ak`, which is asked for often.
    ak_public: Arc<[u8]>,
    qualified_signer: Vec<u8>,
    values: [Sha256; PCR_COUNT as usize],
    powered: Instant,
    clock: Clock,
    /// Signs in place of `ak` when it is set: somebody else's quotes.
    other: Option<Arc<Ak>>,
    quotes: u64,
    extends: u64,
}

/// A chip's memory at some time, to be put back: a software TPM's files, or a VM's snapshot.
#[derive(Clone)]
pub struct SavedChip {
    values: [Sha256; PCR_COUNT as usize],
    clock: Clock,
}

impl Chip {
    /// A chip that was used for a month before, in a host that was switched on a moment ago.
    ///
    /// # Errors
    /// The random generator fails.
    pub fn new() -> anyhow::Result<Self> {
        let no_key = |_| anyhow::anyhow!("no key could be made");
        let (ak, ek) = (Ak::generate().map_err(no_key)?, Ek::generate().map_err(no_key)?);
        let ak_public = ak.public();
        let name = Public::parse(&ak_public)?.name();
        let mut state = State {
            // Part 1, section 16.3: over the handle of the hierarchy and the name.
            qualified_signer: [&[0, 0x0b], sha256(&[&0x4000_000b_u32.to_be_bytes(), &name]).as_bytes()].concat(),
            ak_public: ak_public.into(),
            ak: Arc::new(ak),
            ek: Arc::new(ek),
            values: [Sha256::ZERO; PCR_COUNT as usize],
            powered: Instant::now(),
            // It has been powered for a month: the clock can be set back.
            clock: Clock { clock: 30 * 24 * 3600 * 1000, reset_count: 0, restart_count: 0, safe: true },
            other: None,
            quotes: 0,
            extends: 0,
        };
        state.reset();
        Ok(Self(Arc::new(Mutex::new(state))))
    }

    /// A connection.
    #[must_use]
    pub fn connect(&self) -> Box<dyn Tpm> {
        let ak_public = Arc::clone(&self.lock().ak_public);
        Box::new(Connected { chip: self.clone(), ak_public })
    }

    /// `TPM2B_PUBLIC` of the attestation key.
    #[must_use]
    pub fn ak_public(&self) -> Arc<[u8]> {
        Arc::clone(&self.lock().ak_public)
    }

    /// `TPM2B_PUBLIC` of the endorsement key.
    #[must_use]
    pub fn ek_public(&self) -> Vec<u8> {
        self.lock().ek.public()
    }

    /// The host is booted: registers begin anew, the counter of resets goes up.
    pub fn reset(&self) {
        self.lock().reset();
    }

    /// Somebody extends a register.
    pub fn extend(&self, pcr: u8, what: &[u8]) {
        self.lock().extend(pcr, &sha256(&[what]));
    }

    /// Somebody extends a register with this digest.
    pub fn extend_digest(&self, pcr: u8, digest: &Sha256) {
        self.lock().extend(pcr, digest);
    }

    /// What is in a register.
    #[must_use]
    pub fn value(&self, pcr: u8) -> Sha256 {
        self.lock().values.get(usize::from(pcr)).copied().unwrap_or(Sha256::ZERO)
    }

    /// Registers and clock as they are.
    #[must_use]
    pub fn save(&self) -> SavedChip {
        let state = self.lock();
        SavedChip { values: state.values, clock: state.now() }
    }

    /// Puts back what was saved: no chip can be made to do this, a program can.
    pub fn put_back(&self, saved: &SavedChip) {
        let mut state = self.lock();
        (state.values, state.clock, state.powered) = (saved.values, saved.clock, Instant::now());
    }

    /// The same by somebody who thinks of the clock and lets it run on.
    pub fn put_back_registers(&self, saved: &SavedChip) {
        self.lock().values = saved.values;
    }

    /// Another chip with the same keys and the same memory: no chip can be copied, a program can.
    #[must_use]
    pub fn copy(&self) -> Self {
        Self(Arc::new(Mutex::new(self.lock().clone())))
    }

    /// Sets the clock back.
    pub fn set_back(&self, by: Duration) {
        let mut state = self.lock();
        let now = state.now();
        let by = u64::try_from(by.as_millis()).unwrap_or(u64::MAX);
        (state.clock.clock, state.powered) = (now.clock.saturating_sub(by), Instant::now());
    }

    /// From now on another key signs.
    ///
    /// # Errors
    /// The random generator fails.
    pub fn exchange_key(&self) -> anyhow::Result<()> {
        let key = Ak::generate().map_err(|_| anyhow::anyhow!("no key could be made"))?;
        self.lock().other = Some(Arc::new(key));
        Ok(())
    }

    /// Extends and quotes so far.
    #[must_use]
    pub fn counts(&self) -> (u64, u64) {
        let state = self.lock();
        (state.extends, state.quotes)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn reset(&mut self) {
        self.clock = Clock { reset_count: self.clock.reset_count + 1, restart_count: 0, ..self.now() };
        self.powered = Instant::now();
        self.values = [Sha256::ZERO; PCR_COUNT as usize];
        // PCR 17 to 22 begin with ones (TCG PC Client Platform TPM Profile, section 4.6.1).
        self.values[17..23].fill(Sha256([0xff; 32]));
    }

    fn now(&self) -> Clock {
        let passed = u64::try_from(self.powered.elapsed().as_millis()).unwrap_or(u64::MAX);
        Clock { clock: self.clock.clock.saturating_add(passed), ..self.clock }
    }

    fn extend(&mut self, pcr: u8, digest: &Sha256) {
        self.extends += 1;
        if let Some(value) = self.values.get_mut(usize::from(pcr)) {
            *value = extend_sha256(value, digest);
        }
    }
}

/// A connection to a chip.
struct Connected {
    chip: Chip,
    ak_public: Arc<[u8]>,
}

fn failure(command: &'static str) -> TpmError {
    TpmError { tcti: "memory".to_owned(), command, kind: TpmErrorKind::Failed { code: FAILURE } }
}

impl Tpm for Connected {
    fn active_banks(&mut self) -> Result<Vec<HashAlg>, TpmError> {
        Ok(vec![HashAlg::Sha256])
    }

    fn pcr_read(&mut self, registers: &[Register]) -> Result<Registers, TpmError> {
        let state = self.chip.lock();
        let read = |register: &Register| {
            let value = state.values.get(usize::from(register.pcr)).filter(|_| register.bank == HashAlg::Sha256);
            Some((*register, value?.0.to_vec()))
        };
        registers.iter().map(|register| read(register).ok_or_else(|| failure("TPM2_PCR_Read"))).collect()
    }

    fn extend(&mut self, pcr: u8, digests: &[BankDigest]) -> Result<(), TpmError> {
        let [BankDigest { alg: HashAlg::Sha256, value }] = digests else { return Err(failure("TPM2_PCR_Extend")) };
        let digest = value.0.as_slice().try_into().map_err(|_| failure("TPM2_PCR_Extend"))?;
        self.chip.lock().extend(pcr, &Sha256(digest));
        Ok(())
    }

    fn quote(&mut self, qualifying_data: &[u8], registers: &[Register]) -> Result<Quote, TpmError> {
        let mut state = self.chip.lock();
        state.quotes += 1;
        let pcrs: std::collections::BTreeSet<u8> = registers.iter().map(|register| register.pcr).collect();
        let values: Vec<&[u8]> = pcrs.iter().map(|&pcr| state.values[usize::from(pcr)].as_bytes()).collect();
        let pcr_digest = sha256(&values).0.to_vec();
        let Clock { clock, reset_count, restart_count, safe } = state.now();
        let attest = Attest {
            qualified_signer: state.qualified_signer.clone(),
            extra_data: qualifying_data.to_vec(),
            clock: ClockInfo { clock, reset_count, restart_count, safe },
            firmware_version: 1,
            selection: PcrSelection { banks: vec![(HashAlg::Sha256.tpm_id(), pcrs)] },
            pcr_digest,
        }
        .to_bytes();
        let key = state.other.as_ref().unwrap_or(&state.ak);
        let signature = key.sign(&attest).map_err(|_| failure("TPM2_Quote"))?;
        Ok(Quote { attest, signature })
    }

    fn clock(&mut self) -> Result<Clock, TpmError> {
        Ok(self.chip.lock().now())
    }

    fn endorsement(
        &mut self,
        _kind: Option<EkKind>,
        _given: Option<&GivenCertificate>,
    ) -> Result<Endorsement, TpmError> {
        Ok(Endorsement::in_memory(self.chip.ek_public()))
    }

    fn activate(&mut self, _ek: &Endorsement, blob: &[u8], secret: &[u8]) -> Result<Vec<u8>, TpmError> {
        let (ek, name) = {
            let state = self.chip.lock();
            (Arc::clone(&state.ek), Public::parse(&state.ak_public).map(|ak| ak.name()))
        };
        let name = name.map_err(|_| failure("TPM2_ActivateCredential"))?;
        ek.activate(&name, blob, secret).map_err(|_| failure("TPM2_ActivateCredential"))
    }

    fn ak_public(&self) -> &[u8] {
        &self.ak_public
    }

    fn is_software(&self) -> bool {
        true
    }

    fn model(&self) -> &str {
        "a TPM in the fleet simulator"
    }
}

/// The registers that a host's quotes cover.
#[must_use]
pub(super) fn quoted() -> Vec<u8> {
    QUOTED_PCRS.to_vec()
}
