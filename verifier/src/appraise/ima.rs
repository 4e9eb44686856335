//! Judging measurement lists: each distinct entry once for each rule, however many guests have it.
//!
//! Of an entry its data are proven, its template's name is not: what is taken for a buffer must have the digest of
//! that buffer, and what is taken for a file must be in the allow list or signed.

use std::collections::{BTreeSet, HashMap, HashSet};

use onequote_evidence::ima::{DigestKind, Entry, Fields};

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

/// Judges the entries of lists by one rule, and remembers what it judged.
pub struct Judge<'r> {
    rule: &'r ImaRule,
    judged: HashMap<(usize, u32), Option<Finding>>,
    unchecked: BTreeSet<&'static str>,
}

impl<'r> Judge<'r> {
    /// By this rule; where it says nothing of files, only form and violations count.
    #[must_use]
    pub fn new(rule: &'r ImaRule) -> Self {
        Self { rule, judged: HashMap::new(), unchecked: BTreeSet::new() }
    }

    /// Judges a dictionary's entry, which must always be the same for the same hash size and index.
    pub fn shared(&mut self, hash_size: usize, index: u32, entry: &Entry<'_>) -> Option<&Finding> {
        let (rule, unchecked) = (self.rule, &mut self.unchecked);
        self.judged.entry((hash_size, index)).or_insert_with(|| judge(rule, entry, unchecked)).as_ref()
    }

    /// Judges a list of distinct entries.
    #[must_use]
    pub fn list(&mut self, entries: &[Entry<'_>]) -> Vec<Finding> {
        let mut seen = HashSet::new();
        let new = entries.iter().filter(|entry| seen.insert(entry.raw));
        new.filter_map(|entry| judge(self.rule, entry, &mut self.unchecked)).collect()
    }

    /// What of the entries so far could not be checked, in words.
    pub fn unchecked(&self) -> impl Iterator<Item = &'static str> {
        self.unchecked.iter().copied()
    }
}

fn judge(rule: &ImaRule, entry: &Entry<'_>, unchecked: &mut BTreeSet<&'static str>) -> Option<Finding> {
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
fn judge_file(
    rule: &ImaRule,
    path: String,
    fields: &Fields<'_>,
    unchecked: &mut BTreeSet<&'static str>,
) -> Option<Finding> {
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
        unchecked
            .insert("appended signatures (ima-modsig) are not checked: files with one count by digest or security.ima");
    }
    let signed = keys::check(&rule.keys, fields);
    if signed == Signed::Uncheckable {
        unchecked
            .insert("portable signatures of EVM are not checked: a list does not have the metadata that they sign");
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
