//! The rules of `[host.firmware]`: each is shown by events of explained registers, or it is a finding.

use onequote_evidence::{
    firmware::{Event, Guid, Separator, Signature, SignatureLists, Variable},
    id::Sha256,
};

use super::{BANK, Boot, is_text, shown};
use crate::{
    appraise::found::Notes,
    finding::{Code, Finding},
    policy::{DatabaseRule, Digests, FirmwareRule, PlainDigest},
};

/// The register of Secure Boot's variables.
const SECURE_BOOT_PCR: u8 = 7;
/// The register of started images.
const IMAGES_PCR: u8 = 4;
/// The register of files that GRUB reads.
const FILES_PCR: u8 = 9;
/// The registers that firmware ends with a separator.
const SEPARATED: std::ops::RangeInclusive<u8> = 0..=7;

/// The most digests that one finding names.
const NAMED: usize = 8;

/// Judges the boot. `notes` gets what each rule that is kept relies on.
#[must_use]
pub fn judge(rule: &FirmwareRule, boot: Option<&Boot<'_>>, notes: &mut Notes) -> Vec<Finding> {
    let mut rules = Rules { boot, notes, findings: Vec::new() };
    if let Some(on) = rule.secure_boot {
        rules.secure_boot(on);
    }
    for (name, database) in rule.databases() {
        rules.database(name, database);
    }
    if rule.separators {
        rules.separators(rule);
    }
    rules.images(rule);
    rules.files(rule);
    rules.kernel(rule);
    rules.findings
}

struct Rules<'b, 'a> {
    boot: Option<&'b Boot<'a>>,
    notes: &'b mut Notes,
    findings: Vec<Finding>,
}

impl<'b, 'a> Rules<'b, 'a> {
    /// The events of a register with the log, or a finding that the rule cannot be shown.
    fn extends(&mut self, rule: &str, pcr: u8) -> Option<(&'b Boot<'a>, Vec<&'b Event<'a>>)> {
        let found = self.boot.and_then(|boot| Some((boot, boot.extends(pcr)?)));
        if found.is_none() {
            let why = match self.boot {
                None => "there is no log".to_owned(),
                Some(_) => format!("the log does not explain PCR {pcr}"),
            };
            self.findings.push(Finding::new(Code::FirmwareNotShown, rule).actual(why));
        }
        found
    }

    fn keeps(&mut self, rule: &str, by: &str) {
        self.notes.push(format!("firmware: {rule} is shown by {by}"));
    }

    /// The one variable of this name that firmware measured. Whatever comes after the separator may have been extended by
    /// anybody.
    fn variable(&mut self, rule: &str, guid: Guid, name: &str) -> Option<(Variable<'a>, u32)> {
        let (_, events) = self.extends(rule, SECURE_BOOT_PCR)?;
        let own: Vec<_> = events.into_iter().take_while(|event| event.separator(BANK).is_none()).collect();
        let claimed = |event: &&&Event<'a>| Variable::parse(event.data).is_ok_and(|v| v.is(guid, name));
        let claims: Vec<_> = own.iter().filter(claimed).collect();
        match claims[..] {
            [event] => match event.variable(BANK) {
                Some(variable) => Some((variable, event.number)),
                None => {
                    let finding = Finding::new(Code::FirmwareEventData, format!("{rule}: event {}", event.number));
                    self.findings.push(finding.expected(format!("data of variable {name} with the event's digest")));
                    None
                }
            },
            [] => {
                let finding = Finding::new(Code::FirmwareNotShown, rule);
                self.findings.push(finding.actual(format!("PCR {SECURE_BOOT_PCR} has no variable {name}")));
                None
            }
            [first, second, ..] => {
                let (first, second) = (first.number, second.number);
                let finding = Finding::new(Code::FirmwareNotShown, rule);
                self.findings.push(finding.actual(format!("variable {name} twice: events {first} and {second}")));
                None
            }
        }
    }

    fn secure_boot(&mut self, on: bool) {
        const RULE: &str = "secure_boot";
        let Some((variable, number)) = self.variable(RULE, Guid::GLOBAL, "SecureBoot") else { return };
        let word = |on: bool| if on { "on" } else { "off" };
        let found = match variable.data {
            [0] => "off".to_owned(),
            [1] => "on".to_owned(),
            other => hex::encode(other),
        };
        if found != word(on) {
            let finding = Finding::new(Code::SecureBoot, format!("event {number}"));
            self.findings.push(finding.expected(word(on)).actual(found));
            return;
        }
        // Shim can be told not to verify what it starts. It says so here, under whatever name the log gives it.
        let Some((_, events)) = self.extends(RULE, SECURE_BOOT_PCR) else { return };
        for name in ["MokSBState", "MokDBState"] {
            let wide: Vec<u8> = name.encode_utf16().flat_map(u16::to_le_bytes).collect();
            let weakened = Variable { guid: Guid::SHIM, name: &wide, data: &[1] }.to_bytes();
            if let Some(event) = events.iter().find(|event| on && event.is_digest_of(BANK, &[&weakened])) {
                let finding = Finding::new(Code::SecureBoot, format!("event {}", event.number));
                self.findings.push(finding.expected("on").actual(format!("shim does not verify ({name} is set)")));
                return;
            }
        }
        self.keeps(RULE, &format!("event {number} in PCR {SECURE_BOOT_PCR}"));
    }

    fn database(&mut self, name: &'static str, rule: &DatabaseRule) {
        let guid = if matches!(name, "PK" | "KEK") { Guid::GLOBAL } else { Guid::IMAGE_SECURITY };
        let Some((variable, number)) = self.variable(&name.to_lowercase(), guid, name) else { return };
        let before = self.findings.len();
        let item = format!("{name}: event {number}");
        let found = PlainDigest(onequote_evidence::digest::sha256(&[variable.data]));
        if !rule.content.is_empty() && !rule.content.contains(&found) {
            let expected = rule.content.iter().map(ToString::to_string).collect::<Vec<_>>().join(" or ");
            self.findings.push(Finding::new(Code::SecureBootDatabase, &item).expected(expected).actual(found));
        }
        let entries: Result<Vec<Signature<'_>>, _> = SignatureLists::new(variable.data).collect();
        let entries: Vec<PlainDigest> = match entries {
            Ok(entries) => entries.iter().map(|entry| PlainDigest(entry.digest())).collect(),
            Err(e) => {
                if rule.include.len() + rule.exclude.len() > 0 || rule.only.is_some() {
                    self.findings.push(Finding::new(Code::SecureBootDatabase, item).actual(e));
                }
                return;
            }
        };
        let mut wrong = |what: &str, digest: &PlainDigest| {
            let finding = Finding::new(Code::SecureBootDatabase, &item);
            self.findings.push(match what {
                "missing" => finding.expected(digest).actual("missing"),
                _ => finding.expected(what).actual(digest),
            });
        };
        rule.include.iter().filter(|digest| !entries.contains(digest)).for_each(|digest| wrong("missing", digest));
        rule.exclude.iter().filter(|digest| entries.contains(digest)).for_each(|digest| wrong("not in it", digest));
        if let Some(only) = &rule.only {
            entries
                .iter()
                .filter(|digest| !only.contains(digest))
                .for_each(|digest| wrong("only what is listed", digest));
        }
        if self.findings.len() == before {
            self.keeps(&name.to_lowercase(), &format!("event {number} in PCR {SECURE_BOOT_PCR}"));
        }
    }

    fn separators(&mut self, rule: &FirmwareRule) {
        let before = self.findings.len();
        for pcr in SEPARATED.filter(|pcr| !rule.unexplained.iter().any(|known| known.0 == *pcr)) {
            let Some((_, events)) = self.extends(&format!("separators: PCR {pcr}"), pcr) else { continue };
            let found: Vec<Separator> = events.iter().filter_map(|event| event.separator(BANK)).collect();
            let actual = match found.as_slice() {
                [] => "none",
                list if list.contains(&Separator::Error) => "one after an error",
                _ => continue,
            };
            self.findings.push(Finding::new(Code::BootSeparator, format!("PCR {pcr}")).actual(actual));
        }
        if self.findings.len() == before {
            self.keeps("separators", "their digests in PCR 0 to 7");
        }
    }

    /// Every image in PCR 4 must be known, a kernel among them: whoever boots has started all of them.
    fn images(&mut self, rule: &FirmwareRule) {
        let allowed = match (&rule.images, &rule.kernel) {
            (Some(Digests::Any), _) | (None, None) => return,
            (Some(images), _) => images.clone(),
            (None, Some(_)) => Digests::List(Vec::new()),
        };
        let kernels = rule.kernel.as_deref().unwrap_or_default();
        let Some((boot, events)) = self.extends("images", IMAGES_PCR) else { return };
        let images = events.iter().filter(|event| event.separator(BANK).is_none() && !is_text(event));
        let known = |digest: Sha256| allowed.allow(digest) || kernels.contains(&PlainDigest(digest));
        self.all_known("images", Code::BootImage, boot, images, known, IMAGES_PCR);
    }

    /// Every file in PCR 9 must be known: names of files are the log's word only.
    fn files(&mut self, rule: &FirmwareRule) {
        let Some(allowed @ Digests::List(_)) = &rule.files else { return };
        let kernels = rule.kernel.as_deref().unwrap_or_default();
        let Some((boot, events)) = self.extends("files", FILES_PCR) else { return };
        let known = |digest: Sha256| allowed.allow(digest) || kernels.contains(&PlainDigest(digest));
        self.all_known("files", Code::BootFile, boot, events.iter(), known, FILES_PCR);
    }

    fn all_known<'e>(
        &mut self,
        rule: &str,
        code: Code,
        boot: &Boot<'a>,
        events: impl Iterator<Item = &'e &'b Event<'a>>,
        known: impl Fn(Sha256) -> bool,
        pcr: u8,
    ) where
        'a: 'e,
        'b: 'e,
    {
        let mut count = 0;
        let before = self.findings.len();
        for event in events {
            count += 1;
            let digest = digest(event);
            if !known(digest) {
                let finding = Finding::new(code, shown(boot.log(), event));
                self.findings.push(finding.actual(PlainDigest(digest)));
            }
        }
        if self.findings.len() == before {
            self.keeps(rule, &format!("the digests of {count} events in PCR {pcr}"));
        }
    }

    /// One of the kernels must have been started. That no other was, is shown by the rules for images and files.
    fn kernel(&mut self, rule: &FirmwareRule) {
        let Some(kernels) = &rule.kernel else { return };
        let Some(boot) = self.boot else {
            return self.findings.push(Finding::new(Code::FirmwareNotShown, "kernel").actual("there is no log"));
        };
        let is_kernel = |event: &&&Event<'a>| kernels.contains(&PlainDigest(digest(event)));
        let find = |pcr: u8| boot.extends(pcr).and_then(|events| events.iter().find(is_kernel).map(|e| e.number));
        if let Some(number) = find(IMAGES_PCR) {
            return self.keeps("kernel", &format!("event {number} in PCR {IMAGES_PCR}"));
        }
        if let Some(number) = find(FILES_PCR) {
            if rule.files.is_none() {
                let finding = Finding::new(Code::FirmwareNotShown, format!("kernel: event {number}"));
                let needed = "files: a list of all files that GRUB may read, or \"any\"";
                return self.findings.push(finding.expected(needed).actual(format!("a file in PCR {FILES_PCR}")));
            }
            return self.keeps("kernel", &format!("event {number} in PCR {FILES_PCR}"));
        }
        let (expected, actual) = (names(kernels.iter().copied()), started(boot));
        self.findings.push(Finding::new(Code::BootKernel, "kernel").expected(expected).actual(actual));
    }
}

/// What was started or read last, as far as the log says, to find the kernel that it was.
fn started(boot: &Boot<'_>) -> String {
    let images = boot.extends(IMAGES_PCR).into_iter().flatten();
    let images: Vec<_> = images.filter(|event| event.separator(BANK).is_none() && !is_text(event)).collect();
    match images.last() {
        Some(last) => format!("{} (the last image: {})", PlainDigest(digest(last)), shown(boot.log(), last)),
        None => format!("no image in PCR {IMAGES_PCR}"),
    }
}

fn names(digests: impl Iterator<Item = PlainDigest>) -> String {
    let all: Vec<String> = digests.map(|digest| digest.to_string()).collect();
    match all.len().checked_sub(NAMED) {
        Some(more @ 1..) => format!("{} or {more} more", all[..NAMED].join(" or ")),
        _ => all.join(" or "),
    }
}

fn digest(event: &Event<'_>) -> Sha256 {
    event.digest(BANK).and_then(|digest| digest.try_into().ok()).map_or(Sha256::ZERO, Sha256)
}
