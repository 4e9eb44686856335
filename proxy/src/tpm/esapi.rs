//! A real TPM, through libtss2.

use std::{collections::BTreeMap, ffi::CString, fs, io, os::unix::net::UnixStream, path::Path, thread, time::Duration};

use onequote_evidence::{
    digest::{BankDigest, HashAlg},
    pcr::{PCR_COUNT, Register, Registers},
    tpm::{KeyParameters, Public},
};
use tss_esapi::{constants::tss, tss2_esys as sys};

use super::{
    Clock, Endorsement, GivenCertificate, Quote, Tpm, TpmError, TpmErrorKind,
    error::Rc,
    esys::{self, Esys, Handle, Hierarchy, Use},
    options::{AkKind, EkKind, TpmOptions},
    template,
};

/// How often a command is sent to a TPM that says it is busy. With the pauses between, about one second.
const BUSY_ATTEMPTS: u32 = 10;

/// How often registers are read again because somebody extended one meanwhile.
const READ_ATTEMPTS: u32 = 64;

/// Values that one `TPM2_PCR_Read` can answer (the size of `TPML_DIGEST`).
const VALUES_PER_READ: usize = 8;

/// A TPM reached through libtss2.
///
/// Holds one transient object (the attestation key) and one session in the TPM, and takes both away when dropped.
pub struct EsapiTpm {
    pub(super) esys: Esys,
    tcti: String,
    pub(super) session: Handle,
    pub(super) ak: Handle,
    /// Whether the attestation key stays in the TPM.
    ak_stays: bool,
    ak_public: Vec<u8>,
    model: String,
    software: bool,
    /// Whether a lock-out can be ended: the authorisation is there and was not tried yet.
    can_unlock: bool,
}

impl EsapiTpm {
    /// Opens a TPM: `device:/dev/tpmrm0`, `device:/dev/tpm0`, `swtpm:path=SOCKET`, or what else libtss2-tctildr
    /// knows. Removes left-overs where there is no resource manager (see [`crate::tpm`]), makes the keys and starts
    /// the session.
    ///
    /// # Errors
    /// Also when the endorsement hierarchy is disabled or has an authorisation value.
    pub fn open(tcti: &str) -> Result<Self, TpmError> {
        Self::open_with(&TpmOptions::new(tcti))
    }

    /// The same with the operator's choice of keys and authorisations.
    ///
    /// # Errors
    /// Also when an authorisation is wrong, or the attestation key's handle holds another key.
    pub fn open_with(options: &TpmOptions) -> Result<Self, TpmError> {
        let tcti = options.tcti.as_str();
        let fail = |command, kind| TpmError { tcti: tcti.to_owned(), command, kind };
        if !tcti.contains(':') {
            return Err(fail("connect", TpmErrorKind::BadTcti { why: "it has no `:`" }));
        }
        let name_conf = CString::new(tcti)
            .map_err(|_| fail("connect", TpmErrorKind::BadTcti { why: "it contains a zero byte" }))?;
        let mut esys = Esys::connect(&name_conf).map_err(|rc| {
            let kind = match rc.kind(1) {
                TpmErrorKind::Gone { code, .. } => TpmErrorKind::Gone { code, hint: hint(tcti) },
                other => other,
            };
            fail("connect", kind)
        })?;
        if !has_resource_manager(tcti) {
            remove_left_overs(&mut esys).map_err(|kind| fail("TPM2_FlushContext", kind))?;
        }
        let (model, software) = busy_retry(|| model(&mut esys)).map_err(|kind| fail("TPM2_GetCapability", kind))?;
        set_authorisations(&mut esys, options).map_err(|rc| fail("authorisations", rc.kind(1)))?;
        let ak_template = template::attestation_key(options.ak).map_err(|rc| fail("key template", rc.kind(1)))?;
        let session = salted_session(&mut esys, options).map_err(|(command, kind)| fail(command, kind))?;
        let mut tpm = Self {
            esys,
            tcti: tcti.to_owned(),
            session,
            ak: Handle::PASSWORD,
            ak_stays: true,
            ak_public: Vec::new(),
            model,
            software,
            can_unlock: options.auth.lockout.is_some(),
        };
        match options.ak_handle {
            None => (tpm.ak, tpm.ak_public, tpm.ak_stays) = tpm.make_ak(&ak_template)?,
            Some(number) => tpm.keep_ak(number, options.ak, &ak_template)?,
        }
        Ok(tpm)
    }

    /// Makes the attestation key anew: the same as always.
    fn make_ak(&mut self, template: &sys::TPM2B_PUBLIC) -> Result<(Handle, Vec<u8>, bool), TpmError> {
        const COMMAND: &str = "TPM2_CreatePrimary (attestation key)";
        let (ak, public) = self.call(COMMAND, |tpm| {
            tpm.esys.set_use(tpm.session, Use::Encrypt)?;
            tpm.esys.create_endorsement_primary(tpm.session, template)
        })?;
        let public = esys::marshal_public(&public).map_err(|rc| self.error("TPM2B_PUBLIC", rc.kind(1)))?;
        Ok((ak, public, false))
    }

    /// Takes the attestation key that is at a persistent handle, or makes it and puts it there.
    fn keep_ak(&mut self, number: u32, kind: AkKind, template: &sys::TPM2B_PUBLIC) -> Result<(), TpmError> {
        let there = self.call("TPM2_GetCapability (handles)", |tpm| tpm.esys.tpm_handles(number))?;
        if !there.contains(&number) {
            let (made, public, _) = self.make_ak(template)?;
            let kept = self.call("TPM2_EvictControl (attestation key)", |tpm| {
                tpm.esys.set_use(tpm.session, Use::Plain)?;
                tpm.esys.make_persistent(tpm.session, made, number)
            });
            self.call("TPM2_FlushContext", |tpm| tpm.esys.flush(made))?;
            (self.ak, self.ak_public) = (kept?, public);
            return Ok(());
        }
        let (ak, described) = self.call("TPM2_ReadPublic", |tpm| {
            let ak = tpm.esys.existing(number)?;
            Ok((ak, tpm.esys.read_public(ak)?))
        })?;
        let taken = |why| TpmErrorKind::Taken { handle: number, why };
        let public = Public::parse(&described.public);
        let fits = match &public {
            Ok(public) => matches!(public.key, KeyParameters::Ecc(_)) == (kind == AkKind::EccP256),
            Err(_) => false,
        };
        if !fits || !public.is_ok_and(|public| public.attributes.ak_defect().is_none()) {
            return Err(self.error("TPM2_ReadPublic", taken("it is no attestation key of the configured kind")));
        }
        // Elsewhere than directly under the endorsement hierarchy the TPM would mask its counters (see the module's doc).
        let hierarchy = tss::TPM2_RH_ENDORSEMENT.to_be_bytes();
        let digest = HashAlg::Sha256.hash_parts(&[&hierarchy, &described.name]);
        if described.qualified_name != [&HashAlg::Sha256.tpm_id().to_be_bytes()[..], &digest].concat() {
            return Err(self.error("TPM2_ReadPublic", taken("it is no primary key of the endorsement hierarchy")));
        }
        (self.ak, self.ak_public) = (ak, described.public);
        Ok(())
    }

    pub(super) fn call<T>(
        &mut self,
        command: &'static str,
        mut send: impl FnMut(&mut Self) -> Result<T, Rc>,
    ) -> Result<T, TpmError> {
        let mut sent = busy_retry(|| send(self));
        if matches!(sent, Err(TpmErrorKind::LockedOut)) && self.end_lockout()? {
            sent = busy_retry(|| send(self));
        }
        sent.map_err(|kind| self.error(command, kind))
    }

    /// Ends a dictionary-attack lock-out, once: with a wrong value the TPM would lock that, too, for a day.
    fn end_lockout(&mut self) -> Result<bool, TpmError> {
        if !std::mem::take(&mut self.can_unlock) {
            return Ok(false);
        }
        self.call("TPM2_DictionaryAttackLockReset", |tpm| {
            tpm.esys.set_use(tpm.session, Use::Plain)?;
            tpm.esys.reset_lockout(tpm.session)
        })?;
        tracing::warn!("the TPM was in dictionary-attack lock-out; it was ended with the configured authorisation");
        Ok(true)
    }

    pub(super) fn error(&self, command: &'static str, kind: TpmErrorKind) -> TpmError {
        let kind = match kind {
            TpmErrorKind::Gone { code, .. } => TpmErrorKind::Gone { code, hint: hint(&self.tcti) },
            other => other,
        };
        TpmError { tcti: self.tcti.clone(), command, kind }
    }

    /// Reads at most [`VALUES_PER_READ`] registers by one command. Gives the counter of register updates with them.
    fn read_some(&mut self, registers: &[Register]) -> Result<(u32, Registers), TpmError> {
        const COMMAND: &str = "TPM2_PCR_Read";
        let wanted = selection(registers).map_err(|kind| self.error(COMMAND, kind))?;
        let (counter, read, values) = self.call(COMMAND, |tpm| tpm.esys.pcr_read(&wanted))?;
        let mut values = values.digests.iter().take(values.count as usize);
        let mut found = Registers::new();
        for (algorithm, pcr) in selected(&read) {
            let nonsense = || TpmErrorKind::Nonsense { what: "registers that were not asked for" };
            let value = values.next().ok_or_else(|| self.error(COMMAND, nonsense()))?;
            let register = HashAlg::from_tpm(algorithm)
                .map(|bank| Register { bank, pcr })
                .filter(|register| registers.contains(register) && register.bank.size() == usize::from(value.size))
                .ok_or_else(|| self.error(COMMAND, nonsense()))?;
            found.insert(register, value.buffer[..register.bank.size()].to_vec());
        }
        if found.is_empty()
            && let Some(&register) = registers.first()
        {
            return Err(self.error(COMMAND, TpmErrorKind::NoRegister { register }));
        }
        Ok((counter, found))
    }

    /// One pass over all registers; `None` when one was updated between two commands.
    fn read_all(&mut self, registers: &[Register]) -> Result<Option<Registers>, TpmError> {
        let mut left = registers.to_vec();
        left.sort_unstable();
        left.dedup();
        let mut all = Registers::new();
        let mut first = None;
        while !left.is_empty() {
            let (counter, found) = self.read_some(&left[..left.len().min(VALUES_PER_READ)])?;
            if *first.get_or_insert(counter) != counter {
                return Ok(None);
            }
            // A TPM may answer fewer than were asked for in one command.
            left.retain(|register| !found.contains_key(register));
            all.extend(found);
        }
        Ok(Some(all))
    }
}

impl Tpm for EsapiTpm {
    fn active_banks(&mut self) -> Result<Vec<HashAlg>, TpmError> {
        const COMMAND: &str = "TPM2_GetCapability (PCR allocation)";
        let allocated = self.call(COMMAND, |tpm| tpm.esys.allocated_banks())?;
        let mut banks = Vec::new();
        for (algorithm, _) in selected(&allocated) {
            let bank = HashAlg::from_tpm(algorithm)
                .ok_or_else(|| self.error(COMMAND, TpmErrorKind::UnsupportedBank { algorithm }))?;
            banks.push(bank);
        }
        banks.sort_unstable();
        banks.dedup();
        if banks.is_empty() { Err(self.error(COMMAND, TpmErrorKind::NoBank)) } else { Ok(banks) }
    }

    fn pcr_read(&mut self, registers: &[Register]) -> Result<Registers, TpmError> {
        for _ in 0..READ_ATTEMPTS {
            if let Some(values) = self.read_all(registers)? {
                return Ok(values);
            }
        }
        Err(self.error("TPM2_PCR_Read", TpmErrorKind::Unsteady { attempts: READ_ATTEMPTS }))
    }

    fn extend(&mut self, pcr: u8, digests: &[BankDigest]) -> Result<(), TpmError> {
        const COMMAND: &str = "TPM2_PCR_Extend";
        let digests = digest_values(pcr, digests).map_err(|kind| self.error(COMMAND, kind))?;
        self.call(COMMAND, |tpm| {
            tpm.esys.set_use(tpm.session, Use::Plain)?;
            tpm.esys.pcr_extend(tpm.session, pcr, &digests)
        })
    }

    fn quote(&mut self, qualifying_data: &[u8], registers: &[Register]) -> Result<Quote, TpmError> {
        const COMMAND: &str = "TPM2_Quote";
        let selection = selection(registers).map_err(|kind| self.error(COMMAND, kind))?;
        let mut data = sys::TPM2B_DATA::default();
        let Some(place) = data.buffer.get_mut(..qualifying_data.len()) else {
            return Err(self.error(COMMAND, TpmErrorKind::Argument { what: "qualifying data over 64 bytes" }));
        };
        place.copy_from_slice(qualifying_data);
        data.size = u16::try_from(qualifying_data.len()).unwrap_or(u16::MAX);
        let (attest, signature) = self.call(COMMAND, |tpm| {
            tpm.esys.set_use(tpm.session, Use::Encrypt)?;
            tpm.esys.quote(tpm.session, tpm.ak, &data, &selection)
        })?;
        Ok(Quote { attest, signature })
    }

    fn clock(&mut self) -> Result<Clock, TpmError> {
        let info = self.call("TPM2_ReadClock", |tpm| tpm.esys.read_clock())?;
        Ok(Clock {
            clock: info.clock,
            reset_count: info.resetCount,
            restart_count: info.restartCount,
            safe: info.safe != 0,
        })
    }

    fn endorsement(&mut self, kind: Option<EkKind>, given: Option<&GivenCertificate>) -> Result<Endorsement, TpmError> {
        // The inherent one.
        Self::endorsement(self, kind, given)
    }

    fn activate(&mut self, ek: &Endorsement, blob: &[u8], secret: &[u8]) -> Result<Vec<u8>, TpmError> {
        Self::activate(self, ek, blob, secret)
    }

    fn ak_public(&self) -> &[u8] {
        &self.ak_public
    }

    fn is_software(&self) -> bool {
        self.software
    }

    fn model(&self) -> &str {
        &self.model
    }
}

impl Drop for EsapiTpm {
    fn drop(&mut self) {
        // The TPM may be gone, and the next opening removes what is left behind.
        if !self.ak_stays {
            let _ = self.esys.flush(self.ak);
        }
        let _ = self.esys.flush(self.session);
    }
}

fn set_authorisations(esys: &mut Esys, options: &TpmOptions) -> Result<(), Rc> {
    esys.set_authorisation(Hierarchy::Owner, &options.auth.owner)?;
    esys.set_authorisation(Hierarchy::Endorsement, &options.auth.endorsement)?;
    match &options.auth.lockout {
        Some(value) => esys.set_authorisation(Hierarchy::Lockout, value),
        None => Ok(()),
    }
}

/// A session that is salted with an endorsement key: P-256, or RSA where the TPM has no curves.
fn salted_session(esys: &mut Esys, options: &TpmOptions) -> Result<Handle, (&'static str, TpmErrorKind)> {
    const CREATE: &str = "TPM2_CreatePrimary (endorsement key)";
    const START: &str = "TPM2_StartAuthSession (salted with the endorsement key)";
    let kind = |command| move |rc: Rc| (command, rc.kind(1));
    // The very first command that needs authorisation has no key to salt a session with yet. A secret value must not be
    // seen on the way, nevertheless: it goes into an HMAC.
    let first = match options.auth.endorsement.as_slice() {
        [] => Handle::PASSWORD,
        _ => esys.start_unsalted_session(false).map_err(kind(START))?,
    };
    let mut made = Err((CREATE, TpmErrorKind::Nonsense { what: "no template" }));
    for ek in [EkKind::EccP256, EkKind::Rsa2048] {
        let template = ek.template(&[]).map_err(kind("key template"))?;
        made = busy_retry(|| {
            if first != Handle::PASSWORD {
                esys.set_use(first, Use::Plain)?;
            }
            esys.create_endorsement_primary(first, &template)
        })
        .map_err(|kind| (CREATE, kind));
        if !matches!(made, Err((_, TpmErrorKind::Refused { .. }))) {
            break;
        }
    }
    if first != Handle::PASSWORD {
        let _ = esys.flush(first);
    }
    let (ek, _) = made?;
    let session = busy_retry(|| esys.start_salted_session(ek)).map_err(|kind| (START, kind))?;
    // Only the start of a session needs the key; three transient objects may be all that a TPM can hold.
    busy_retry(|| esys.flush(ek)).map_err(|kind| ("TPM2_FlushContext", kind))?;
    Ok(session)
}

/// Sends a command again, after a growing pause, while the TPM is busy.
fn busy_retry<T>(mut send: impl FnMut() -> Result<T, Rc>) -> Result<T, TpmErrorKind> {
    let mut attempts = 0;
    loop {
        attempts += 1;
        match send() {
            Ok(value) => return Ok(value),
            Err(rc) if rc.is_busy() && attempts < BUSY_ATTEMPTS => {
                thread::sleep(Duration::from_millis(1 << attempts.min(7)));
            }
            Err(rc) => return Err(rc.kind(attempts)),
        }
    }
}

/// Whether something between us and the TPM keeps other users' objects apart from ours.
fn has_resource_manager(tcti: &str) -> bool {
    tcti.starts_with("tabrmd") || tcti.strip_prefix("device:").is_some_and(|path| path.contains("tpmrm"))
}

/// Flushes every transient object and every loaded session. A busy TPM is asked again for each command, not for all of them.
fn remove_left_overs(esys: &mut Esys) -> Result<(), TpmErrorKind> {
    const TRANSIENT: u32 = 0x8000_0000;
    const LOADED_SESSION: u32 = 0x0200_0000;
    for first in [TRANSIENT, LOADED_SESSION] {
        for handle in busy_retry(|| esys.tpm_handles(first))? {
            busy_retry(|| esys.flush_tpm_handle(handle))?;
        }
    }
    Ok(())
}

/// Manufacturer and vendor string, and whether they are those of a program.
fn model(esys: &mut Esys) -> Result<(String, bool), Rc> {
    let properties: BTreeMap<u32, u32> = esys.properties(tss::TPM2_PT_MANUFACTURER, 5)?.into_iter().collect();
    let text = |tags: std::ops::RangeInclusive<u32>| -> String {
        let bytes = tags.filter_map(|tag| properties.get(&tag)).flat_map(|value| value.to_be_bytes());
        bytes.filter(|b| b.is_ascii_graphic() || *b == b' ').map(char::from).collect()
    };
    let manufacturer = text(tss::TPM2_PT_MANUFACTURER..=tss::TPM2_PT_MANUFACTURER);
    let vendor = text(tss::TPM2_PT_VENDOR_STRING_1..=tss::TPM2_PT_VENDOR_STRING_4);
    let words = vendor.split_whitespace().collect::<Vec<_>>();
    // libtpms (swtpm, and QEMU's vTPM with it) says `IBM` and `SW TPM`; Microsoft's reference code, also as the vTPM
    // of clouds, `MSFT` or `XYZZ`, `XYZ `.
    let software = words.contains(&"SW") || matches!(manufacturer.trim(), "MSFT" | "XYZZ" | "XYZ" | "GOOG");
    Ok((format!("{} {}", manufacturer.trim(), words.join(" ")).trim().to_owned(), software))
}

/// What the operating system says about the device or socket, `: ` in front.
fn hint(tcti: &str) -> String {
    let outcome = if let Some(device) = tcti.strip_prefix("device:") {
        match Path::new(device).exists() {
            true => fs::OpenOptions::new().read(true).write(true).open(device).map(drop),
            false => Err(io::ErrorKind::NotFound.into()),
        }
        .map_err(|error| (device, error))
    } else if let Some(socket) = tcti.strip_prefix("swtpm:path=") {
        UnixStream::connect(socket).map(drop).map_err(|error| (socket, error))
    } else {
        Ok(())
    };
    match outcome {
        Ok(()) => String::new(),
        Err((path, error)) => format!(": {path}: {error}"),
    }
}

/// The registers of a selection in the order in which a TPM takes them: bank after bank as listed, then by index.
fn selected(list: &sys::TPML_PCR_SELECTION) -> impl Iterator<Item = (u16, u8)> + '_ {
    list.pcrSelections.iter().take(list.count as usize).flat_map(|bank| {
        let size = usize::from(bank.sizeofSelect).min(bank.pcrSelect.len());
        (0..).zip(&bank.pcrSelect[..size]).flat_map(move |(i, &bits)| {
            (0..8).filter(move |bit| bits & (1 << bit) != 0).map(move |bit| (bank.hash, i * 8 + bit))
        })
    })
}

/// The wire form of a set of registers, banks ascending.
fn selection(registers: &[Register]) -> Result<sys::TPML_PCR_SELECTION, TpmErrorKind> {
    let mut banks = BTreeMap::<HashAlg, [u8; 4]>::new();
    for register in registers {
        if register.pcr >= PCR_COUNT {
            return Err(TpmErrorKind::Argument { what: "a register's index is over 23" });
        }
        banks.entry(register.bank).or_default()[usize::from(register.pcr / 8)] |= 1 << (register.pcr % 8);
    }
    let mut list = sys::TPML_PCR_SELECTION::default();
    for (place, (bank, bits)) in list.pcrSelections.iter_mut().zip(banks) {
        *place = sys::TPMS_PCR_SELECTION { hash: bank.tpm_id(), sizeofSelect: PCR_COUNT / 8, pcrSelect: bits };
        list.count += 1;
    }
    Ok(list)
}

/// The wire form of one extend.
fn digest_values(pcr: u8, digests: &[BankDigest]) -> Result<sys::TPML_DIGEST_VALUES, TpmErrorKind> {
    if pcr >= PCR_COUNT {
        return Err(TpmErrorKind::Argument { what: "a register's index is over 23" });
    }
    let mut list = sys::TPML_DIGEST_VALUES::default();
    if digests.is_empty() || digests.len() > list.digests.len() {
        return Err(TpmErrorKind::Argument { what: "an extend needs one digest for each active bank" });
    }
    for (place, digest) in list.digests.iter_mut().zip(digests) {
        if digest.value.0.len() != digest.alg.size() {
            return Err(TpmErrorKind::Argument { what: "a digest has not the size of its bank" });
        }
        let mut buffer = [0; 64];
        buffer[..digest.value.0.len()].copy_from_slice(&digest.value.0);
        *place = sys::TPMT_HA { hashAlg: digest.alg.tpm_id(), digest: sys::TPMU_HA { sha512: buffer } };
        list.count += 1;
    }
    Ok(list)
}
