//! Step 7: the host's own measurement list, which proves the proxy's binary among others.
//!
//! The list may run ahead of the quote; what is believed of it is the longest beginning whose replay is the quoted
//! PCR 10. What is behind that is kept until a quote covers it. Kernels before 5.8 extended the SHA-256 bank with the
//! SHA-1 digest padded with zeros: a list that does not replay with its own digests is replayed so.
//!
//! The list is not kept. Of what is believed stay the replay's value, findings, and the programs that the log has spoken
//! of until then ([`Programs`]).

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use onequote_evidence::{
    Malformed,
    digest::{HashAlg, sha256},
    id::Sha256,
    ima::{Aggregate, DigestKind, Entry, Fields, ListReader, SHA1_HASH_SIZE},
    pcr::extend_sha256,
};

use super::{
    ima::{Judge, Opinion, Unchecked},
    logs::Part,
    registers::QuotedRegisters,
};
use crate::{
    finding::{Code, Finding},
    result::Skipped,
};

const IMA_PCR: u8 = 10;

/// What the kernel extends for an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    /// SHA-256 of its data.
    Own,
    /// SHA-1 of its data and zeros.
    Padded,
}

/// How far the host's list was taken in.
#[derive(Debug, Clone)]
pub struct HostProgress {
    /// Bytes of the list.
    len: u64,
    /// Those behind the believed part.
    ahead: Arc<[u8]>,
    /// How the kernel extends; none as long as nothing is believed.
    mode: Option<Mode>,
    /// The register after the believed part.
    value: Sha256,
    /// Entries of IMA's register in the believed part.
    pub count: u64,
    /// The first of them.
    first: Arc<[u8]>,
    /// What is wrong with believed entries, each once.
    bad: Arc<Bad>,
    /// What of believed entries could not be checked.
    pub unchecked: Unchecked,
    /// Files among them that the log has spoken of.
    pub programs: Programs,
}

impl Default for HostProgress {
    fn default() -> Self {
        Self {
            len: 0,
            ahead: Arc::default(),
            mode: None,
            value: Sha256::ZERO,
            count: 0,
            first: Arc::default(),
            bad: Arc::default(),
            unchecked: Unchecked::default(),
            programs: Programs::default(),
        }
    }
}

/// Entries that are not as they should be, by what they are.
#[derive(Debug, Clone, Default)]
struct Bad {
    known: BTreeSet<Sha256>,
    opinions: Vec<Arc<Opinion>>,
}

/// A content of a file, with the entry that lists it.
pub type Content = (Sha256, Arc<[u8]>);

/// Files of a list with a SHA-256 digest of their bytes, as far as somebody asks for them.
#[derive(Debug, Clone, Default)]
pub struct Programs {
    /// Whether there is any such file.
    pub any: bool,
    /// The contents of paths, each in the order in which they were listed, with the entry.
    pub by_path: BTreeMap<Vec<u8>, Vec<Content>>,
    /// The first path of a content.
    pub by_digest: BTreeMap<Sha256, Option<Vec<u8>>>,
}

impl Programs {
    /// To look for these paths and contents.
    #[must_use]
    pub fn wanted<'a>(wanted: impl IntoIterator<Item = (&'a str, Sha256)>) -> Self {
        let mut programs = Self::default();
        for (path, digest) in wanted {
            programs.by_path.entry(path.as_bytes().to_vec()).or_default();
            programs.by_digest.entry(digest).or_default();
        }
        programs
    }

    /// Whether this was looked for, from the list's start.
    #[must_use]
    pub fn knows(&self, path: &str, digest: &Sha256) -> bool {
        self.by_path.contains_key(path.as_bytes()) && self.by_digest.contains_key(digest)
    }

    fn take(&mut self, entry: &Entry<'_>, fields: &Fields<'_>) {
        let of_bytes = fields.digest_kind != DigestKind::Verity && fields.buffer.is_none();
        if !of_bytes || fields.digest_alg != HashAlg::Sha256.name() || entry.is_violation() {
            return;
        }
        let Ok(digest) = fields.digest.try_into().map(Sha256) else { return };
        self.any = true;
        if let Some(contents) = self.by_path.get_mut(fields.path) {
            contents.push((digest, entry.raw.into()));
        }
        if let Some(first) = self.by_digest.get_mut(&digest) {
            first.get_or_insert_with(|| fields.path.to_vec());
        }
    }
}

/// The part of a list that went into the quoted PCR 10. Can be had only through [`check`].
#[derive(Debug, Clone, Default)]
pub struct HostList {
    progress: HostProgress,
    /// What is said of the first entry, unless that is a boot aggregate that was checked: it says no more than the
    /// registers do.
    first: Option<Arc<Opinion>>,
    /// Whether it is one.
    boot_aggregate: bool,
}

impl HostList {
    /// How far the list was taken in.
    #[must_use]
    pub fn progress(&self) -> &HostProgress {
        &self.progress
    }

    /// No list, or none that can be believed: nothing was found of what `from` looks for.
    #[must_use]
    pub fn nothing(from: &HostProgress) -> Self {
        let wanted = &from.programs;
        let programs = Programs {
            any: false,
            by_path: wanted.by_path.keys().map(|path| (path.clone(), Vec::new())).collect(),
            by_digest: wanted.by_digest.keys().map(|digest| (*digest, None)).collect(),
        };
        Self { progress: HostProgress::begin(programs), ..Self::default() }
    }

    /// Whether there is no believed entry.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.progress.count == 0
    }

    /// What is wrong with entries.
    pub fn findings(&self) -> impl Iterator<Item = Finding> + '_ {
        self.first.iter().chain(&self.progress.bad.opinions).filter_map(|opinion| opinion.finding.clone())
    }

    /// What of entries could not be checked.
    #[must_use]
    pub fn unchecked(&self) -> Unchecked {
        let mut unchecked = self.progress.unchecked;
        unchecked.add(self.first.as_ref().map(|first| first.unchecked).unwrap_or_default());
        unchecked
    }

    /// The believed entries of a list that was given whole, as listed, without a boot aggregate that was checked.
    #[must_use]
    pub fn entries(&self, list: &[u8]) -> Vec<Vec<u8>> {
        let believed = list.len().saturating_sub(self.progress.ahead.len());
        let entries = ours(&list[..believed]).filter_map(Result::ok);
        entries.skip(usize::from(self.boot_aggregate)).map(|(entry, _)| entry.raw.to_vec()).collect()
    }
}

impl HostProgress {
    /// Before the first entry, to look for these programs.
    #[must_use]
    pub fn begin(programs: Programs) -> Self {
        Self { programs, ..Self::default() }
    }

    /// Bytes of the list that were sent.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether there is no list.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

/// Replays the host's list, which goes on where `from` stands, and judges what is new of it. The caller must have kept
/// `from` itself, and made it by this judge. `demanded` says whether the policy wants a list.
///
/// # Errors
/// The finding.
pub fn check(
    from: &HostProgress,
    list: &Part<u8>,
    quoted: &QuotedRegisters,
    demanded: bool,
    judge: Option<&Judge<'_>>,
    skipped: &mut Vec<Skipped>,
) -> Result<HostList, Finding> {
    let target = quoted.sha256(IMA_PCR).unwrap_or(Sha256::ZERO);
    if list.end() == 0 {
        if demanded || target != Sha256::ZERO {
            return Err(Finding::new(Code::HostImaMissing, "PCR 10").actual(target));
        }
        let why = "the host measures no files (PCR 10 is empty): the proxy's own binary is not proven";
        skipped.push(Skipped::new("host-ima", why));
        return Ok(HostList::nothing(from));
    }
    let joined: Vec<u8>;
    let bytes = match from.ahead.is_empty() {
        true => &list.items,
        false => {
            joined = [&*from.ahead, &list.items].concat();
            &joined
        }
    };
    let mode = from.mode.unwrap_or(Mode::Own);
    let mut replay = Replay::run(from, mode, bytes, target)?;
    if replay.believed.is_none() && from.mode.is_none() {
        let padded = Replay::run(from, Mode::Padded, bytes, target)?;
        if padded.believed.is_some() {
            replay = padded;
        }
    }
    let Some(believed) = replay.believed else {
        let finding = Finding::new(Code::HostImaReplay, format!("{} entries", replay.count));
        return Err(finding.expected(target).actual(replay.value));
    };
    let mut progress = HostProgress {
        len: list.end(),
        ahead: bytes[believed.offset..].into(),
        mode: Some(replay.mode),
        value: target,
        count: believed.count,
        ..from.clone()
    };
    progress.take(&bytes[..believed.offset], judge);
    let boot_aggregate = check_boot_aggregate(&progress.first, quoted, skipped)?;
    let first = Entry::parse(&progress.first, SHA1_HASH_SIZE).ok().filter(|_| !boot_aggregate);
    let first = first.zip(judge).and_then(|(first, judge)| judge.judge(&first, || sha256(&[first.raw])));
    Ok(HostList { progress, first, boot_aggregate })
}

/// The entries of IMA's register, each with the offset of its end. A policy can send others to other registers, where
/// this replay proves nothing of them.
fn ours(bytes: &[u8]) -> impl Iterator<Item = Result<(Entry<'_>, usize), Malformed>> {
    let mut reader = ListReader::new(bytes, SHA1_HASH_SIZE);
    std::iter::from_fn(move || {
        loop {
            match reader.next()? {
                Ok(entry) if entry.pcr != u32::from(IMA_PCR) => {}
                read => return Some(read.map(|entry| (entry, reader.offset()))),
            }
        }
    })
}

/// A list as it was replayed.
struct Replay {
    mode: Mode,
    value: Sha256,
    count: u64,
    /// The longest beginning whose replay is the register.
    believed: Option<Believed>,
}

/// Where a beginning ends.
struct Believed {
    offset: usize,
    count: u64,
}

impl Replay {
    fn run(from: &HostProgress, mode: Mode, bytes: &[u8], target: Sha256) -> Result<Self, Finding> {
        let mut replay = Self { mode, value: from.value, count: from.count, believed: None };
        replay.compare(0, target);
        for read in ours(bytes) {
            let (entry, offset) = read.map_err(|mut e| {
                e.offset += (from.len as usize).saturating_sub(from.ahead.len());
                Finding::new(Code::HostImaMalformed, format!("entry {}", replay.count)).actual(e)
            })?;
            let digest = match mode {
                Mode::Own => Aggregate::digest(&entry),
                Mode::Padded => {
                    let mut digest = Sha256::ZERO;
                    digest.0.copy_from_slice(&entry.padded_sha1(HashAlg::Sha256));
                    digest
                }
            };
            replay.value = extend_sha256(&replay.value, &digest);
            replay.count += 1;
            replay.compare(offset, target);
        }
        Ok(replay)
    }

    fn compare(&mut self, offset: usize, target: Sha256) {
        if self.value == target {
            self.believed = Some(Believed { offset, count: self.count });
        }
    }
}

impl HostProgress {
    /// Takes in what is believed now and was not before.
    fn take(&mut self, bytes: &[u8], judge: Option<&Judge<'_>>) {
        for (entry, _) in ours(bytes).filter_map(Result::ok) {
            if self.first.is_empty() {
                // It is judged for itself, since it may be the boot aggregate.
                self.first = entry.raw.into();
                if let Ok(fields) = entry.fields() {
                    self.programs.take(&entry, &fields);
                }
                continue;
            }
            let Ok(fields) = entry.fields() else {
                self.add(&entry, judge.and_then(|judge| judge.judge(&entry, || sha256(&[entry.raw]))));
                continue;
            };
            self.programs.take(&entry, &fields);
            if let Some(judge) = judge {
                let opinion = judge.judge_read(&entry, &fields, entry.hash_matches(), || sha256(&[entry.raw]));
                self.add(&entry, opinion);
            }
        }
    }

    fn add(&mut self, entry: &Entry<'_>, opinion: Option<Arc<Opinion>>) {
        let Some(opinion) = opinion else { return };
        self.unchecked.add(opinion.unchecked);
        if opinion.finding.is_some() && !self.bad.known.contains(&sha256(&[entry.raw])) {
            let bad = Arc::make_mut(&mut self.bad);
            bad.known.insert(sha256(&[entry.raw]));
            bad.opinions.push(opinion);
        }
    }
}

/// The first entry is the kernel's digest over the registers that firmware and boot loader had extended. False when it
/// could not be checked.
fn check_boot_aggregate(first: &[u8], quoted: &QuotedRegisters, skipped: &mut Vec<Skipped>) -> Result<bool, Finding> {
    let first = Entry::parse(first, SHA1_HASH_SIZE).ok();
    let Some(fields) = first.and_then(|entry| entry.fields().ok()).filter(|f| f.path == b"boot_aggregate") else {
        return Err(Finding::new(Code::HostImaBootAggregate, "entry 0").actual("another entry, or none"));
    };
    if fields.digest_alg != HashAlg::Sha256.name() {
        let why = format!("it is in {}, the quote in sha256", fields.digest_alg);
        skipped.push(Skipped::new("host-boot-aggregate", why));
        return Ok(false);
    }
    let values: Vec<Sha256> = (0..10).filter_map(|pcr| quoted.sha256(pcr)).collect();
    let parts: Vec<&[u8]> = values.iter().map(Sha256::as_bytes).collect();
    let expected = sha256(&parts);
    if fields.digest != expected.as_bytes() {
        let finding = Finding::new(Code::HostImaBootAggregate, "entry 0").expected(expected);
        return Err(finding.actual(hex::encode(fields.digest)));
    }
    Ok(true)
}
