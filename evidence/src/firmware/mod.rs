//! The firmware's event log: what was measured before the operating system ran, and its replay.
//!
//! Firmware, boot loader and boot stubs extend PCR 0 to 9 and some others, and keep a log of it that the kernel shows
//! in `/sys/kernel/security/tpm0/binary_bios_measurements`. There are two forms (TCG PC Client Platform Firmware
//! Profile, *PFP*, version 1.06, section 10), all numbers little-endian:
//!
//! ```text
//! TCG_PCR_EVENT    u32 pcr, u32 type, digest[20], u32 length, data            every event of a SHA-1 log
//! TCG_PCR_EVENT2   u32 pcr, u32 type, u32 count, count × (u16 algorithm, digest), u32 length, data
//! ```
//!
//! A *crypto-agile* log begins with one `TCG_PCR_EVENT` whose data begin with `Spec ID Event03` and name the log's
//! algorithms with the sizes of their digests; everything behind it is `TCG_PCR_EVENT2`. Firmware may fill the rest of
//! the log's area with 00 or FF (the area of ACPI's table `TPM2` has a fixed length): that is padding.
//!
//! # What can be believed
//! An extend covers the digest and the register, nothing else. A log that replays to quoted registers has therefore
//! true digests in a true order *within each register*. Not proven are an event's type, its data, the order between
//! registers, and events of type `EV_NO_ACTION`, which are not extended. So:
//! - [`Event::kind`] is data. It is shown to people and decides only whether an event is extended, where a lie makes
//!   the replay fail.
//! - Data are believed where the digest is theirs: [`Event::meaning`] reads them only then, and says what it is that
//!   the digest proves. [`Event::claim`] is what the log says beyond that, for people.
//! - Whoever controls the host after the boot can extend any of these registers further. What must come from the
//!   firmware is looked for before the register's first separator.

mod claim;
mod describe;
mod event;
mod meaning;
mod path;
mod replay;
mod signatures;
mod variable;

pub use claim::{Claim, ImageLoad};
pub use event::{Event, EventType};
pub use meaning::{Meaning, Separator};
pub use path::DevicePath;
pub use signatures::{Signature, SignatureKind, SignatureLists};
pub use variable::{Guid, LoadOption, Variable, wide_text};

use crate::{
    Malformed, MalformedKind,
    digest::HashAlg,
    pcr::{PCR_COUNT, Register, Registers},
    reader::Reader,
};

/// The longest log that is read. Real ones have tens of kilobytes, with long `dbx` lists a few hundred.
pub const MAX_LOG: usize = 8 * 1024 * 1024;

/// The most algorithms that a log may name: more than the TCG Algorithm Registry has hashes.
const MAX_ALGORITHMS: u32 = 16;

/// What an `EV_NO_ACTION` event's data begin with that names the log's algorithms (PFP section 10.4.5.1).
const SPEC_ID: &[u8; 16] = b"Spec ID Event03\0";

/// The same for the locality from which the TPM was started (PFP section 10.4.5.3).
const STARTUP_LOCALITY: &[u8; 16] = b"StartupLocality\0";

const WHAT: &str = "firmware log";

/// The form of a log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// SHA-1 only (TCG 1.2).
    Sha1,
    /// As many algorithms as the log names.
    CryptoAgile,
}

/// A log that was read to its end, and the register values that it leads to.
///
/// A pure function of the bytes. Whether any of it is true is for the caller to find out, by comparing
/// [`FirmwareLog::registers`] with quoted values.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FirmwareLog<'a> {
    format: Format,
    banks: Vec<HashAlg>,
    locality: u8,
    wide_pointers: bool,
    events: Vec<Event<'a>>,
    registers: Registers,
    len: usize,
}

impl<'a> FirmwareLog<'a> {
    /// Reads and replays a log.
    ///
    /// # Errors
    /// [`Malformed`]; nothing of a log is accepted that is not whole.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, Malformed> {
        if bytes.len() > MAX_LOG {
            return Err(Malformed::new(WHAT, MAX_LOG, MalformedKind::TooLarge { limit: MAX_LOG }));
        }
        let end = end_of_content(bytes);
        let mut r = Reader::new(WHAT, bytes);
        let first = Event::parse_sha1(&mut r, 0)?;
        let agile = (first.kind == EventType::NO_ACTION).then(|| first.data.strip_prefix(SPEC_ID)).flatten();
        let at = r.at() - first.data.len();
        let header = agile.map(|data| Header::parse(data, at + SPEC_ID.len())).transpose()?;
        let mut events = vec![first];
        while r.at() < end {
            let number = u32::try_from(events.len()).unwrap_or(u32::MAX);
            events.push(match &header {
                None => Event::parse_sha1(&mut r, number)?,
                Some(header) => Event::parse_agile(&mut r, number, &header.algorithms)?,
            });
        }
        let locality = startup_locality(&events)?;
        let named = header.as_ref().map_or(vec![HashAlg::Sha1], Header::known);
        let whole = |bank: &HashAlg| events.iter().all(|e| !e.is_extended() || e.digest(*bank).is_some());
        let banks: Vec<HashAlg> = named.into_iter().filter(whole).collect();
        let registers = replay::replay(&events, &banks, locality);
        Ok(Self {
            format: if header.is_some() { Format::CryptoAgile } else { Format::Sha1 },
            wide_pointers: header.is_none_or(|header| header.wide_pointers),
            banks,
            locality,
            events,
            registers,
            len: r.at(),
        })
    }

    /// The form.
    #[must_use]
    pub fn format(&self) -> Format {
        self.format
    }

    /// The banks in which every extended event has a digest, ascending. Other banks cannot be replayed.
    #[must_use]
    pub fn banks(&self) -> &[HashAlg] {
        &self.banks
    }

    /// The locality from which the TPM was started, by the log's word: PCR 0 begins with it.
    #[must_use]
    pub fn startup_locality(&self) -> u8 {
        self.locality
    }

    /// The events in the order of the log, the header among them.
    #[must_use]
    pub fn events(&self) -> &[Event<'a>] {
        &self.events
    }

    /// The values of all registers of [`FirmwareLog::banks`] after the last event, those that it does not extend among
    /// them.
    #[must_use]
    pub fn registers(&self) -> &Registers {
        &self.registers
    }

    /// The value of one register; none for a bank that cannot be replayed.
    #[must_use]
    pub fn value(&self, register: Register) -> Option<&[u8]> {
        self.registers.get(&register).map(Vec::as_slice)
    }

    /// The events that extend a register, in order.
    pub fn extends(&self, pcr: u8) -> impl Iterator<Item = &Event<'a>> {
        self.events.iter().filter(move |event| event.is_extended() && event.pcr == u32::from(pcr))
    }

    /// Whether any event extends a register.
    #[must_use]
    pub fn is_extended(&self, pcr: u8) -> bool {
        self.extends(pcr).next().is_some()
    }

    /// The registers that it extends, ascending.
    #[must_use]
    pub fn extended(&self) -> Vec<u8> {
        (0..PCR_COUNT).filter(|&pcr| self.is_extended(pcr)).collect()
    }

    /// Length in bytes without padding.
    #[must_use]
    pub fn content_len(&self) -> usize {
        self.len
    }

    /// What the log says of an event beyond what its digest proves, for people.
    #[must_use]
    pub fn claim(&self, event: &Event<'a>) -> Claim<'a> {
        event.claim(self.wide_pointers)
    }

    /// An event in words: what its digest in `bank` proves, or else what the log says.
    #[must_use]
    pub fn describe(&self, event: &Event<'a>, bank: HashAlg) -> String {
        describe::describe(event, bank, self.wide_pointers)
    }
}

/// Where the content ends that is followed by nothing but 00, or nothing but FF. The content's own last bytes may be of
/// that kind: this is compared with the beginnings of events only.
fn end_of_content(bytes: &[u8]) -> usize {
    match bytes.last() {
        Some(&filler @ (0 | 0xff)) => bytes.iter().rposition(|&byte| byte != filler).map_or(0, |at| at + 1),
        _ => bytes.len(),
    }
}

/// `TCG_EfiSpecIdEvent` behind its signature.
struct Header {
    /// Algorithms with the sizes of their digests, as named.
    algorithms: Vec<(u16, usize)>,
    wide_pointers: bool,
}

impl Header {
    fn parse(data: &[u8], at: usize) -> Result<Self, Malformed> {
        Self::read(&mut Reader::new(WHAT, data)).map_err(|mut e| {
            e.offset += at;
            e
        })
    }

    fn read(r: &mut Reader<'_>) -> Result<Self, Malformed> {
        r.u32_le()?; // platform class
        r.array::<3>()?; // minor, major, errata
        let wide_pointers = match r.u8()? {
            1 => false,
            // 2 says 64 bits; some firmware writes the size in bytes.
            2 | 8 => true,
            _ => return Err(r.invalid("size of UINTN is neither 1 nor 2")),
        };
        let count = r.u32_le()?;
        if count == 0 || count > MAX_ALGORITHMS {
            return Err(r.invalid("number of algorithms"));
        }
        let mut algorithms: Vec<(u16, usize)> = Vec::with_capacity(count as usize);
        for _ in 0..count {
            let (algorithm, size) = (r.u16_le()?, usize::from(r.u16_le()?));
            if HashAlg::from_tpm(algorithm).is_some_and(|known| known.size() != size) || size == 0 || size > 64 {
                return Err(r.invalid("size of an algorithm's digest"));
            }
            if algorithms.iter().any(|(other, _)| *other == algorithm) {
                return Err(r.invalid("an algorithm stands twice"));
            }
            algorithms.push((algorithm, size));
        }
        let vendor = usize::from(r.u8()?);
        r.take(vendor)?;
        r.end()?;
        Ok(Self { algorithms, wide_pointers })
    }

    fn known(&self) -> Vec<HashAlg> {
        HashAlg::ALL.into_iter().filter(|alg| self.algorithms.iter().any(|(id, _)| *id == alg.tpm_id())).collect()
    }
}

/// The locality by the log's word; 0 without one. It cannot be a lie that matters: PCR 0 would not replay.
fn startup_locality(events: &[Event<'_>]) -> Result<u8, Malformed> {
    let mut found = None;
    for event in events.iter().filter(|event| event.kind == EventType::NO_ACTION) {
        let Some(rest) = event.data.strip_prefix(STARTUP_LOCALITY) else { continue };
        match rest {
            &[locality @ 0..=4] if found.is_none_or(|other| other == locality) => found = Some(locality),
            _ => return Err(Malformed::invalid(WHAT, event.offset, "startup locality")),
        }
    }
    Ok(found.unwrap_or(0))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
pub(crate) mod tests;
