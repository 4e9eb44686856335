//! Between steps 8 and 11: that the programs which the log names are those that the host's kernel measured.
//!
//! The log is the proxy's word, of itself too. The host's IMA list is the kernel's: with the usual policy it has every
//! program that was executed, by path and digest, each pair once. So the proxy and every QEMU must be in it as the
//! log names them. What the list cannot show is an order: a program that was there before and comes back is not
//! listed again. Any other content at the proxy's path is therefore held against it, whenever that was.

use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use onequote_evidence::{
    digest::{FileDigest, FileDigestAlg, sha256},
    event::{Component, ProxyStart, Role},
    id::{SessionId, Sha256},
    ima::{Entry, SHA1_HASH_SIZE},
};

use super::{
    host_ima::{HostList, Programs},
    ima::Judge,
    log::VerifiedLog,
    sessions::{Session, Sessions},
};
use crate::{
    finding::{Code, Finding},
    policy::{Allowed, Consent, HostRule},
    result::Skipped,
};

/// What the kernel puts behind the path of a program whose file has another name now, or none.
const DELETED: &str = " (deleted)";

/// The programs that log and sessions name, as a list has them.
fn named<'a>(log: &'a VerifiedLog, sessions: &'a Sessions) -> impl Iterator<Item = (Cow<'a, str>, Sha256)> {
    let proxies = log.starts().iter().filter_map(|(_, start)| program(start));
    let qemus = sessions.by_id.values().flat_map(|session| qemus(session));
    proxies
        .chain(qemus.map(|component| (as_listed(&component.path), component.digest)))
        .map(|(path, d)| (path, d.value))
}

fn qemus(session: &Session) -> impl Iterator<Item = &Component> {
    let components = session.start.iter().flat_map(|start| &start.components);
    components.filter(|c| c.role == Role::QemuBinary && c.digest.alg == FileDigestAlg::Sha256)
}

/// What to look for in a host's list, which is at hand from its start.
#[must_use]
pub fn wanted(log: &VerifiedLog, sessions: &Sessions) -> Programs {
    let named: BTreeSet<(Cow<'_, str>, Sha256)> = named(log, sessions).collect();
    Programs::wanted(named.iter().map(|(path, digest)| (&**path, *digest)))
}

/// Whether all that is asked for now was looked for.
#[must_use]
pub fn known(programs: &Programs, log: &VerifiedLog, sessions: &Sessions) -> bool {
    named(log, sessions).all(|(path, digest)| programs.knows(&path, &digest))
}

/// What was found of the programs in a list.
#[derive(Clone, Copy)]
struct Listed<'a>(&'a Programs);

impl<'a> Listed<'a> {
    fn at(self, path: &str) -> &'a [(Sha256, Arc<[u8]>)] {
        self.0.by_path.get(path.as_bytes()).map(Vec::as_slice).unwrap_or_default()
    }

    fn has(self, path: &str, digest: &FileDigest) -> bool {
        self.at(path).iter().any(|(listed, _)| *listed == digest.value)
    }

    /// The finding that a program is not there.
    fn missing(self, code: Code, item: String, path: &str, digest: &FileDigest) -> Finding {
        let finding = Finding::new(code, item).actual(format!("{path}, {digest}"));
        let there: Vec<String> = self.at(path).iter().map(|(value, _)| format!("sha256:{value}")).collect();
        match (there.is_empty(), self.0.by_digest.get(&digest.value)) {
            (false, _) => finding.expected(format!("there: {}", there.join(", "))),
            (true, Some(Some(other))) => {
                finding.expected(format!("the same content as {}", String::from_utf8_lossy(other)))
            }
            (true, _) => finding,
        }
    }
}

/// What is wrong with programs.
#[derive(Debug, Default)]
pub struct Unlisted {
    /// Findings about the host.
    pub host: Vec<Finding>,
    /// By QEMU process.
    pub sessions: BTreeMap<SessionId, Vec<Finding>>,
}

/// Checks the proxy's and all QEMUs' programs. The caller must trust list and log, and the list's programs must be
/// [`known`].
#[must_use]
pub fn check(
    list: &HostList,
    log: &VerifiedLog,
    sessions: &Sessions,
    rule: &HostRule,
    judge: &Judge<'_>,
    skipped: &mut Vec<Skipped>,
) -> Unlisted {
    let starts = log.starts();
    let mut out = Unlisted::default();
    out.host.extend(starts.iter().filter_map(|(recnum, start)| not_allowed(*recnum, start, rule)));
    // That there is none, or none that can be believed, was said before.
    if list.is_empty() {
        return out;
    }
    let programs = &list.progress().programs;
    if !programs.any {
        let why = "the host's list has no SHA-256 digests: the programs of proxy and QEMU are not held against it";
        skipped.push(Skipped::new("host-programs", why));
        return out;
    }
    let listed = Listed(programs);
    if rule.unlisted_programs == Consent::Allowed {
        skipped.push(Skipped::new("host-programs", "the policy allows programs that the host's list does not have"));
    } else {
        out.host.extend(unlisted_proxies(listed, starts));
        out.sessions = unlisted_qemus(listed, sessions);
    }
    out.host.extend(replaced(listed, starts, rule, judge));
    out
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

fn unlisted_proxies(listed: Listed<'_>, starts: &[(u64, ProxyStart)]) -> Vec<Finding> {
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

fn unlisted_qemus(listed: Listed<'_>, sessions: &Sessions) -> BTreeMap<SessionId, Vec<Finding>> {
    let mut out: BTreeMap<SessionId, Vec<Finding>> = BTreeMap::new();
    for (id, session) in &sessions.by_id {
        for program in qemus(session) {
            let path = as_listed(&program.path);
            if !listed.has(&path, &program.digest) {
                let finding = listed.missing(Code::QemuUnlisted, Role::QemuBinary.to_string(), &path, &program.digest);
                out.entry(*id).or_default().push(finding);
            }
        }
    }
    out
}

/// More than one program in the proxy's place, in list or log, where the policy does not allow them all.
fn replaced(listed: Listed<'_>, starts: &[(u64, ProxyStart)], rule: &HostRule, judge: &Judge<'_>) -> Vec<Finding> {
    let owned = |(path, digest): (Cow<'_, str>, FileDigest)| (path.into_owned(), digest);
    let Some(now) = starts.last().and_then(|(_, start)| program(start)).map(owned) else { return Vec::new() };
    let mut seen: BTreeMap<(String, FileDigest), String> = BTreeMap::new();
    for (digest, _) in listed.at(&now.0) {
        seen.insert((now.0.clone(), FileDigest::sha256(*digest)), now.0.clone());
    }
    for (recnum, start) in starts {
        if let Some(program) = program(start) {
            seen.entry(owned(program)).or_insert_with(|| format!("proxy-start in record {recnum}"));
        }
    }
    if seen.len() < 2 {
        return Vec::new();
    }
    let passes = |raw: &[u8]| {
        let entry = Entry::parse(raw, SHA1_HASH_SIZE).ok();
        entry.is_some_and(|entry| judge.judge(&entry, || sha256(&[raw])).is_none_or(|o| o.finding.is_none()))
    };
    let allowed = |(path, digest): &(String, FileDigest)| {
        let named = matches!(&rule.proxy, Allowed::Digests(list) if list.iter().any(|one| one.digest == *digest));
        let entry = listed.at(path).iter().find(|(listed, _)| *listed == digest.value);
        named || rule.ima.judges_files() && entry.is_some_and(|(_, raw)| passes(raw))
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
fn program(start: &ProxyStart) -> Option<(Cow<'_, str>, FileDigest)> {
    let binary = start.binary.filter(|binary| binary.alg == FileDigestAlg::Sha256)?;
    Some((as_listed(start.path.as_deref()?), binary))
}

/// A program's path as IMA lists it: an underscore for each space.
fn as_listed(path: &str) -> Cow<'_, str> {
    let path = path.strip_suffix(DELETED).unwrap_or(path);
    if path.contains(' ') { path.replace(' ', "_").into() } else { path.into() }
}
