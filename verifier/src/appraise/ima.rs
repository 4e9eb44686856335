//! Judging measurement lists: each distinct entry once for each rule, however many guests have it.

use std::collections::{HashMap, HashSet};

use onequote_evidence::ima::Entry;

use crate::{
    finding::{Code, Finding},
    policy::{AllowList, FileHash, Judgement, Pattern},
};

/// The register of IMA's lists.
const IMA_PCR: u32 = 10;

/// Judges the entries of lists by one rule, and remembers what it judged.
pub struct Judge<'r> {
    allow: Option<&'r AllowList>,
    ignore: &'r [Pattern],
    judged: HashMap<(usize, u32), Option<Finding>>,
}

impl<'r> Judge<'r> {
    /// By this allow list; without one only form and violations count.
    #[must_use]
    pub fn new(allow: Option<&'r AllowList>, ignore: &'r [Pattern]) -> Self {
        Self { allow, ignore, judged: HashMap::new() }
    }

    /// Judges a dictionary's entry, which must always be the same for the same hash size and index.
    pub fn shared(&mut self, hash_size: usize, index: u32, entry: &Entry<'_>) -> Option<&Finding> {
        let (allow, ignore) = (self.allow, self.ignore);
        self.judged.entry((hash_size, index)).or_insert_with(|| judge(allow, ignore, entry)).as_ref()
    }

    /// Judges a list of distinct entries.
    #[must_use]
    pub fn list(&self, entries: &[Entry<'_>]) -> Vec<Finding> {
        let mut seen = HashSet::new();
        let new = entries.iter().filter(|entry| seen.insert(entry.raw));
        new.filter_map(|entry| judge(self.allow, self.ignore, entry)).collect()
    }
}

fn judge(allow: Option<&AllowList>, ignore: &[Pattern], entry: &Entry<'_>) -> Option<Finding> {
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
    if !ignore.is_empty() && ignore.iter().any(|pattern| pattern.fits(&path)) {
        return None;
    }
    if entry.is_violation() {
        return Some(Finding::new(Code::ImaViolation, path));
    }
    // A kernel without a TPM lists a boot aggregate of zeros.
    if fields.path == b"boot_aggregate" && fields.digest.iter().all(|&byte| byte == 0) {
        return None;
    }
    let actual = format!("{}:{}", fields.digest_alg, hex::encode(fields.digest));
    match allow?.judge(fields.path, fields.digest_alg, fields.digest) {
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
