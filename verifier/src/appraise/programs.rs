//! Between steps 8 and 11: that the programs which the log names are those that the host's kernel measured.
//!
//! The log is the proxy's word, of itself too. The host's IMA list is the kernel's: with the usual policy it has every
//! program that was executed, by path and digest, each pair once. So the proxy and every QEMU must be in it as the
//! log names them. What the list cannot show is an order: a program that was there before and comes back is not
//! listed again. Any other content at the proxy's path is therefore held against it, whenever that was.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use onequote_evidence::{
    digest::{FileDigest, FileDigestAlg, HashAlg},
    event::{EventBody, ProxyStart, Role},
    id::Sha256,
    ima::{DigestKind, Entry},
};

use super::{host_ima::HostList, ima::Judge, log::VerifiedLog, sessions::Sessions};
use crate::{
    finding::{Code, Finding},
    policy::{Allowed, Consent, HostRule},
    result::Skipped,
};

/// What the kernel puts behind the path of a program whose file has another name now, or none.
const DELETED: &str = " (deleted)";

/// The files of a host's list with a SHA-256 digest of their bytes.
#[derive(Default)]
struct Listed<'a> {
    by_path: HashMap<&'a [u8], Vec<(Sha256, &'a Entry<'a>)>>,
    by_digest: HashMap<Sha256, &'a [u8]>,
}

impl<'a> Listed<'a> {
    fn new(entries: &'a [Entry<'a>]) -> Self {
        let mut listed = Self::default();
        for entry in entries.iter().filter(|entry| !entry.is_violation()) {
            let Ok(fields) = entry.fields() else { continue };
            let of_bytes = fields.digest_kind != DigestKind::Verity && fields.buffer.is_none();
            let digest = fields.digest.try_into().map(Sha256);
            if let Ok(digest) = digest
                && of_bytes
                && fields.digest_alg == HashAlg::Sha256.name()
            {
                listed.by_path.entry(fields.path).or_default().push((digest, entry));
                listed.by_digest.entry(digest).or_insert(fields.path);
            }
        }
        listed
    }

    fn at(&self, path: &str) -> &[(Sha256, &'a Entry<'a>)] {
        self.by_path.get(path.as_bytes()).map(Vec::as_slice).unwrap_or_default()
    }

    fn has(&self, path: &str, digest: &FileDigest) -> bool {
        self.at(path).iter().any(|(listed, _)| *listed == digest.value)
    }

    /// The finding that a program is not there.
    fn missing(&self, code: Code, item: String, path: &str, digest: &FileDigest) -> Finding {
        let finding = Finding::new(code, item).actual(format!("{path}, {digest}"));
        let there: Vec<String> = self.at(path).iter().map(|(value, _)| format!("sha256:{value}")).collect();
        match (there.is_empty(), self.by_digest.get(&digest.value)) {
            (false, _) => finding.expected(format!("there: {}", there.join(", "))),
            (true, Some(other)) => finding.expected(format!("the same content as {}", String::from_utf8_lossy(other))),
            (true, None) => finding,
        }
    }
}

/// Checks the proxy's and all QEMUs' programs. Findings about VMs go to their sessions. The caller must trust list and
/// log.
#[must_use]
pub fn check(
    list: &HostList<'_>,
    log: &VerifiedLog,
    sessions: &mut Sessions,
    rule: &HostRule,
    skipped: &mut Vec<Skipped>,
) -> Vec<Finding> {
    let mut starts: Vec<(u64, &ProxyStart)> = Vec::new();
    for (recnum, event) in log.events() {
        if let EventBody::ProxyStart(start) = &event.body {
            starts.push((*recnum, start));
        }
    }
    let mut findings: Vec<Finding> =
        starts.iter().filter_map(|(recnum, start)| not_allowed(*recnum, start, rule)).collect();
    // That there is none, or none that can be believed, was said before.
    if list.entries.is_empty() {
        return findings;
    }
    let listed = Listed::new(&list.entries);
    if listed.by_path.is_empty() {
        let why = "the host's list has no SHA-256 digests: the programs of proxy and QEMU are not held against it";
        skipped.push(Skipped::new("host-programs", why));
        return findings;
    }
    if rule.unlisted_programs == Consent::Allowed {
        skipped.push(Skipped::new("host-programs", "the policy allows programs that the host's list does not have"));
    } else {
        findings.extend(unlisted_proxies(&listed, &starts));
        unlisted_qemus(&listed, sessions);
    }
    findings.extend(replaced(&listed, &starts, rule));
    findings
}

/// A start of a proxy that the policy does not allow.
fn not_allowed(recnum: u64, start: &ProxyStart, rule: &HostRule) -> Option<Finding> {
    let Allowed::Digests(list) = &rule.proxy else { return None };
    if start.binary.is_some_and(|binary| list.iter().any(|reference| reference.digest == binary)) {
        return None;
    }
    let finding = Finding::new(Code::ProxyBinary, format!("proxy-start in record {recnum}")).expected(&rule.proxy);
    Some(finding.actual(start.binary.map_or_else(|| "not named".to_owned(), |binary| binary.to_string())))
}

fn unlisted_proxies(listed: &Listed<'_>, starts: &[(u64, &ProxyStart)]) -> Vec<Finding> {
    let mut seen = BTreeSet::new();
    let unlisted = starts.iter().filter_map(|(recnum, start)| {
        let item = format!("proxy-start in record {recnum}");
        let Some((path, binary)) = program(start) else {
            return Some(Finding::new(Code::ProxyUnlisted, item).actual("the log names no program"));
        };
        if listed.has(&path, &binary) || !seen.insert((path.clone(), binary)) {
            return None;
        }
        Some(listed.missing(Code::ProxyUnlisted, item, &path, &binary))
    });
    unlisted.collect()
}

fn unlisted_qemus(listed: &Listed<'_>, sessions: &mut Sessions) {
    for session in sessions.by_id.values_mut() {
        let Some(start) = &session.start else { continue };
        for program in start.components.iter().filter(|component| component.role == Role::QemuBinary) {
            let path = as_listed(&program.path);
            if program.digest.alg == FileDigestAlg::Sha256 && !listed.has(&path, &program.digest) {
                let finding = listed.missing(Code::QemuUnlisted, Role::QemuBinary.to_string(), &path, &program.digest);
                session.findings.push(finding);
            }
        }
    }
}

/// More than one program in the proxy's place, in list or log, where the policy does not allow them all.
fn replaced(listed: &Listed<'_>, starts: &[(u64, &ProxyStart)], rule: &HostRule) -> Vec<Finding> {
    let Some(now) = starts.last().and_then(|(_, start)| program(start)) else { return Vec::new() };
    let mut seen: BTreeMap<(String, FileDigest), String> = BTreeMap::new();
    for (digest, _) in listed.at(&now.0) {
        seen.insert((now.0.clone(), FileDigest::sha256(*digest)), now.0.clone());
    }
    for (recnum, start) in starts {
        if let Some(program) = program(start) {
            seen.entry(program).or_insert_with(|| format!("proxy-start in record {recnum}"));
        }
    }
    if seen.len() < 2 {
        return Vec::new();
    }
    let mut judge = Judge::new(&rule.ima);
    let mut allowed = |(path, digest): &(String, FileDigest)| {
        let named = matches!(&rule.proxy, Allowed::Digests(list) if list.iter().any(|one| one.digest == *digest));
        let entry = listed.at(path).iter().find(|(listed, _)| *listed == digest.value);
        named || rule.ima.judges_files() && entry.is_some_and(|(_, entry)| judge.list(&[**entry]).is_empty())
    };
    let show = |(path, digest): &(String, FileDigest)| format!("{path}, {digest}");
    let mut unknown: Vec<_> = seen.iter().filter(|(program, _)| !allowed(program)).collect();
    // Where nothing says which is right, the others are told, not the one that runs.
    if unknown.iter().any(|(program, _)| **program != now) {
        unknown.retain(|(program, _)| **program != now);
    }
    let finding = |(program, item): (&(String, FileDigest), &String)| {
        let others: Vec<String> = seen.keys().filter(|other| *other != program).map(show).collect();
        Finding::new(Code::ProxyReplaced, item).expected(others.join(" or ")).actual(show(program))
    };
    unknown.into_iter().map(finding).collect()
}

/// Path and digest of a proxy's program, as IMA would list them.
fn program(start: &ProxyStart) -> Option<(String, FileDigest)> {
    let binary = start.binary.filter(|binary| binary.alg == FileDigestAlg::Sha256)?;
    Some((as_listed(start.path.as_deref()?), binary))
}

/// A program's path as IMA lists it: an underscore for each space.
fn as_listed(path: &str) -> String {
    path.strip_suffix(DELETED).unwrap_or(path).replace(' ', "_")
}
