//! Judging measurement lists: each distinct entry once for each rule, however many guests have it, on whatever hosts.
//!
//! Of an entry its data are proven, its template's name is not: what is taken for a buffer must have the digest of
//! that buffer, and what is taken for a file must be in the allow list or signed.
//!
//! Most entries are files that the allow list has, which is one look. What takes more than that, signatures and patterns, or
//! ends in a finding, is remembered in [`Judgements`] for every host whose policy has the same rule.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
};

use onequote_evidence::{
    digest::sha256,
    id::Sha256,
    ima::{DigestKind, Entry, Fields},
};

use crate::{
    finding::{Code, Finding},
    policy::{
        Content, FileHash, ImaRule, Judgement, VERITY, is_keyring,
        keys::{self, Signed},
    },
};

/// The register of IMA's lists.
const IMA_PCR: u32 = 10;

/// The longest part of a buffer that a finding shows, in characters.
const MAX_SHOWN: usize = 200;

/// Opinions that are remembered before the older half is forgotten, for each part of the memory.
const MAX_OPINIONS: usize = 8192;

/// Parts of the memory that are locked each for itself.
const SHARDS: usize = 16;

/// What of an entry could not be checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Unchecked {
    modsig: bool,
    evm: bool,
}

impl Unchecked {
    /// Adds what could not be checked of another.
    pub fn add(&mut self, other: Self) {
        self.modsig |= other.modsig;
        self.evm |= other.evm;
    }

    /// In words.
    pub fn words(self) -> impl Iterator<Item = &'static str> {
        let modsig = "appended signatures (ima-modsig) are not checked: files with one count by digest or security.ima";
        let evm = "portable signatures of EVM are not checked: a list does not have the metadata that they sign";
        [self.modsig.then_some(modsig), self.evm.then_some(evm)].into_iter().flatten()
    }
}

/// What a rule says of an entry.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Opinion {
    /// What is wrong with it.
    pub finding: Option<Finding>,
    /// What of it was not checked.
    pub unchecked: Unchecked,
}

/// A rule by the content of its policy and its place there: equal ones say the same of every entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct RuleId {
    /// SHA-256 of the policy's text.
    pub policy: Sha256,
    /// Which rule of it: 0 the host's, then those of VMs.
    pub rule: u32,
}

/// Opinions that took more than a look at an allow list, of all rules.
#[derive(Debug, Default)]
pub struct Judgements {
    shards: [Mutex<Shard>; SHARDS],
}

#[derive(Debug, Default)]
struct Shard {
    newer: HashMap<Key, Arc<Opinion>>,
    older: HashMap<Key, Arc<Opinion>>,
}

/// A rule, the entry's SHA-256, and the size of the template hash that it was read with.
type Key = (RuleId, Sha256, usize);

impl Judgements {
    fn of(&self, key: Key, judge: impl FnOnce() -> Opinion) -> Arc<Opinion> {
        let shard = &self.shards[usize::from(key.1.0[0]) % SHARDS];
        // What a thread that panicked had locked is whole: every change is an insertion.
        let lock = || shard.lock().unwrap_or_else(PoisonError::into_inner);
        let known = {
            let mut locked = lock();
            if let Some(known) = locked.newer.get(&key) {
                return known.clone();
            }
            locked.older.remove(&key)
        };
        let opinion = known.unwrap_or_else(|| Arc::new(judge()));
        let mut locked = lock();
        if locked.newer.len() >= MAX_OPINIONS {
            locked.older = std::mem::take(&mut locked.newer);
        }
        locked.newer.insert(key, opinion.clone());
        opinion
    }
}

/// Judges the entries of lists by one rule.
#[derive(Debug, Clone, Copy)]
pub struct Judge<'r> {
    rule: &'r ImaRule,
    memory: Option<(&'r Judgements, RuleId)>,
}

impl<'r> Judge<'r> {
    /// By this rule; where it says nothing of files, only form and violations count.
    #[must_use]
    pub fn new(rule: &'r ImaRule) -> Self {
        Self { rule, memory: None }
    }

    /// By this rule, which has this id; `memory` has what was judged before.
    #[must_use]
    pub fn remembering(rule: &'r ImaRule, id: RuleId, memory: &'r Judgements) -> Self {
        Self { rule, memory: Some((memory, id)) }
    }

    /// Judges an entry; none says that it is as it should be and all of it was checked. `id` gives SHA-256 of the entry as
    /// listed.
    #[must_use]
    pub fn judge(&self, entry: &Entry<'_>, id: impl FnOnce() -> Sha256) -> Option<Arc<Opinion>> {
        match entry.fields() {
            Ok(fields) => self.judge_read(entry, &fields, entry.hash_matches(), id),
            Err(_) => Some(Arc::new(judge(self.rule, entry))),
        }
    }

    /// What is wrong with an entry.
    #[must_use]
    pub fn finding(&self, entry: &Entry<'_>) -> Option<Finding> {
        self.judge(entry, || sha256(&[entry.raw]))?.finding.clone()
    }

    /// As [`Self::judge`], of an entry with these fields; `hash_matches` says whether its template hash is that of its data.
    #[must_use]
    pub fn judge_read(
        &self,
        entry: &Entry<'_>,
        fields: &Fields<'_>,
        hash_matches: bool,
        id: impl FnOnce() -> Sha256,
    ) -> Option<Arc<Opinion>> {
        if hash_matches && is_listed(self.rule, entry, fields) {
            return None;
        }
        let opinion = match self.memory {
            Some((memory, rule)) => memory.of((rule, id(), entry.template_hash.len()), || judge(self.rule, entry)),
            None => Arc::new(judge(self.rule, entry)),
        };
        (*opinion != Opinion::default()).then_some(opinion)
    }
}

/// Whether an entry is a file that the allow list has, and nothing else has to be looked at: what [`judge`] would say
/// without a finding. The caller must have checked the template hash.
fn is_listed(rule: &ImaRule, entry: &Entry<'_>, fields: &Fields<'_>) -> bool {
    entry.pcr == IMA_PCR
        && fields.buffer.is_none()
        && fields.digest_kind != DigestKind::Verity
        && rule.signed.is_empty()
        && rule.allow.as_ref().is_some_and(|allow| allow.has(fields.path, fields.digest_alg, fields.digest))
        && !entry.is_violation()
}

fn judge(rule: &ImaRule, entry: &Entry<'_>) -> Opinion {
    let mut unchecked = Unchecked::default();
    let finding = find(rule, entry, &mut unchecked);
    Opinion { finding, unchecked }
}

fn find(rule: &ImaRule, entry: &Entry<'_>, unchecked: &mut Unchecked) -> Option<Finding> {
    let fields = match entry.fields() {
        Ok(fields) => fields,
        Err(e) => return Some(Finding::new(Code::ImaMalformed, String::from_utf8_lossy(entry.name)).actual(e)),
    };
    let path = fields.path_lossy();
    if !entry.hash_matches() {
        return Some(Finding::new(Code::ImaMalformed, path).actual("its template hash is not that of its data"));
    }
    // The register is not extended: only an entry of IMA's own register is what it seems.
    if entry.pcr != IMA_PCR {
        let finding = Finding::new(Code::ImaMalformed, path).expected(format!("PCR {IMA_PCR}"));
        return Some(finding.actual(format!("PCR {}", entry.pcr)));
    }
    let buffer = fields.buffer.filter(|_| !entry.is_violation());
    if buffer.is_some() && fields.buffer_matches() != Some(true) {
        let actual = format!("a buffer of another digest than {}:{}", fields.digest_alg, hex::encode(fields.digest));
        return Some(Finding::new(Code::ImaMalformed, path).actual(actual));
    }
    if rule.ignores(&path) {
        return None;
    }
    if entry.is_violation() {
        return Some(Finding::new(Code::ImaViolation, path));
    }
    if let Some(buffer) = buffer {
        return judge_buffer(rule, &path, buffer, &fields);
    }
    // A kernel without a TPM lists a boot aggregate of zeros.
    if fields.path == b"boot_aggregate" && fields.digest.iter().all(|&byte| byte == 0) {
        return None;
    }
    if !rule.judges_files() {
        return None;
    }
    judge_file(rule, path, &fields, unchecked)
}

/// A file is allowed by its digest, or by a good signature; where the rule wants a signature, by that alone.
fn judge_file(rule: &ImaRule, path: String, fields: &Fields<'_>, unchecked: &mut Unchecked) -> Option<Finding> {
    let must = rule.signed.iter().any(|pattern| pattern.fits(&path));
    let alg = match fields.digest_kind {
        DigestKind::Untold | DigestKind::File => fields.digest_alg.to_owned(),
        DigestKind::Verity => format!("{VERITY}{}", fields.digest_alg),
    };
    let listed =
        rule.allow.as_ref().map_or(Judgement::UnknownFile(None), |allow| allow.judge(fields.path, &alg, fields.digest));
    if listed == Judgement::Allowed && !must {
        return None;
    }
    if !fields.modsig.is_empty() && !rule.keys.is_empty() {
        unchecked.modsig = true;
    }
    let signed = keys::check(&rule.keys, fields);
    if signed == Signed::Uncheckable {
        unchecked.evm = true;
    }
    let actual = format!("{alg}:{}", hex::encode(fields.digest));
    match signed {
        Signed::Good => return None,
        Signed::Bad(why) if must || !rule.keys.is_empty() => {
            return Some(Finding::new(Code::ImaSignatureBad, path).actual(format!("{actual}: {why}")));
        }
        Signed::UnknownKey(key) if must || !rule.keys.is_empty() && matches!(listed, Judgement::UnknownFile(_)) => {
            return Some(Finding::new(Code::ImaSignatureKey, path).actual(format!("{actual}: signed by key {key}")));
        }
        _ if must => return Some(Finding::new(Code::ImaSignatureMissing, path).actual(actual)),
        _ => {}
    }
    match listed {
        Judgement::Allowed => None,
        Judgement::WrongDigest(known) => {
            let known: Vec<String> = known.iter().map(FileHash::to_string).collect();
            Some(Finding::new(Code::ImaWrongDigest, path).expected(known.join(" or ")).actual(actual))
        }
        Judgement::UnknownFile(elsewhere) => {
            let finding = Finding::new(Code::ImaUnknownFile, path).actual(actual);
            Some(match elsewhere {
                Some(other) => finding.expected(format!("the same content as {}", String::from_utf8_lossy(other))),
                None => finding,
            })
        }
    }
}

/// The caller must have held the buffer against its digest.
fn judge_buffer(rule: &ImaRule, name: &str, buffer: &[u8], fields: &Fields<'_>) -> Option<Finding> {
    if !rule.judges_buffers() {
        return None;
    }
    let ring = is_keyring(name);
    let named = |pattern: &&crate::policy::Pattern| if ring { pattern.fits(name) } else { pattern.0 == name };
    if rule.ignored_keyrings.iter().find(named).is_some() {
        return None;
    }
    let known: Vec<&Content> =
        [&rule.buffers, &rule.keyrings].iter().filter_map(|map| map.get(name)).flatten().collect();
    if known.iter().any(|content| content.fits(buffer)) {
        return None;
    }
    let code = match (ring || rule.keyrings.contains_key(name), known.is_empty()) {
        (true, _) => Code::ImaKey,
        (false, true) => Code::ImaBufferUnknown,
        (false, false) => Code::ImaBufferDigest,
    };
    let finding = Finding::new(code, name).actual(shown(buffer, fields));
    if known.is_empty() {
        return Some(finding);
    }
    Some(finding.expected(known.iter().map(ToString::to_string).collect::<Vec<_>>().join(" or ")))
}

/// A buffer for people: its digest, and its text where it is one.
fn shown(buffer: &[u8], fields: &Fields<'_>) -> String {
    let digest = format!("{}:{}", fields.digest_alg, hex::encode(fields.digest));
    match std::str::from_utf8(buffer) {
        Ok(text) if !text.is_empty() && !text.chars().any(char::is_control) => {
            let cut: String = text.chars().take(MAX_SHOWN).collect();
            let rest = if cut.len() < text.len() { "…" } else { "" };
            format!("{cut}{rest} ({digest})")
        }
        _ => format!("{} bytes ({digest})", buffer.len()),
    }
}
