//! Disk images: held against the policy's digests, or against how the VM's last run left them.
//!
//! ```text
//!           start, digest fits          stop, digest D
//! New ────────────────────────► InUse ─────────────────► Left(D) ──┐ start, digest is D
//!                                 ▲ └─ unseen, unmeasured ► Unknown │
//!                                 └───────────────────────────────┘
//! ```
//!
//! A start that breaks the expectation leaves it in force: what that run makes of the image is never taken as the
//! next expectation, so that a change is not forgotten by starting and stopping the VM once. Only the operator's
//! word ends it. An image that its VM cannot write is expected as it was seen last.

use onequote_evidence::{
    digest::FileDigest,
    event::{Image, MigrateOut, StopCause, VmStop},
    id::SessionId,
};

use super::state::{ImageExpectation, ImageStatus, Origin, Place, StartedImage, VmExpectation};
use crate::{
    finding::{Code, Finding},
    policy::{Consent, ImageRule, VmRule},
};

/// When images were measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Seen {
    /// Nothing could have changed them since.
    BeforeItRan,
    /// They may have been other ones at the start.
    WhileItRan,
}

/// Judges the images of a start, whose event is `by`, and notes that they are in use.
pub(super) fn start(
    vm: &mut VmExpectation,
    session: SessionId,
    images: &[Image],
    rule: Option<&VmRule>,
    by: &Place,
    seen: Seen,
) -> Vec<Finding> {
    let mut findings = Vec::new();
    for image in images {
        let expectation = vm.images.entry(image.slot.clone()).or_default();
        let rule_for = rule.and_then(|rule| rule.images.get(&image.slot));
        let (origin, broken) = match (rule, rule_for) {
            (Some(_), None) => (Origin::Policy, Some(of(Code::ImageUnlisted, image).expected("no such image"))),
            (_, Some(listed)) if !listed.continuity => (Origin::Policy, by_digest(image, listed)),
            _ => by_continuity(expectation, session, image, rule_for, seen),
        };
        let keep = broken.as_ref().map(|_| Box::new(expectation.now.clone()));
        findings.extend(broken);
        expectation.remember(image.digest, by);
        let (path, digest, read_only) = (image.path.clone(), image.digest, image.read_only);
        expectation.started = Some(StartedImage { session, path, digest, read_only, origin });
        expectation.now = match (image.read_only, keep) {
            (true, None) => ImageStatus::Left { digest: image.digest, by: Some(by.clone()) },
            (true, Some(kept)) => *kept,
            (false, broken) => ImageStatus::InUse { session, broken },
        };
    }
    let listed = rule.into_iter().flat_map(|rule| rule.images.keys());
    for slot in listed.filter(|slot| !images.iter().any(|image| image.slot == **slot)) {
        findings.push(Finding::new(Code::ImageMissing, slot));
    }
    findings
}

/// Judges images that a running VM was given. Their past is not known.
pub(super) fn changed(vm: &mut VmExpectation, images: &[Image], rule: Option<&VmRule>, by: &Place) -> Vec<Finding> {
    let mut findings = Vec::new();
    for image in images {
        match rule.and_then(|rule| rule.images.get(&image.slot)) {
            None => findings.push(of(Code::ImageUnlisted, image).expected("no such image")),
            Some(listed) if !listed.continuity => findings.extend(by_digest(image, listed)),
            Some(_) => {}
        }
    }
    forget(vm, images, "it was changed while the VM ran", by);
    findings
}

/// Notes how images were left that a running VM no longer has: so they are expected when it has them again.
pub(super) fn gone(vm: &mut VmExpectation, images: &[Image], by: &Place) {
    for image in images {
        let Some(expectation) = vm.images.get_mut(&image.slot) else { continue };
        expectation.remember(image.digest, by);
        expectation.now = match &mut expectation.now {
            ImageStatus::InUse { broken: Some(still), .. } => (**still).clone(),
            ImageStatus::InUse { broken: None, .. } => ImageStatus::Left { digest: image.digest, by: Some(by.clone()) },
            known => known.clone(),
        };
    }
}

/// Notes that nobody knows any more what these images should be, and how they were last seen.
pub(super) fn forget(vm: &mut VmExpectation, images: &[Image], why: &str, by: &Place) {
    for image in images {
        if let Some(expectation) = vm.images.get_mut(&image.slot) {
            expectation.remember(image.digest, by);
            expectation.now = ImageStatus::Unknown { why: why.to_owned() };
        }
    }
}

/// Notes that the VM's state went elsewhere. What becomes of its images there is not in this host's log, unless the
/// rule says that migration is nothing to worry about: then they are expected as this host left them.
pub(super) fn migrated_out(vm: &mut VmExpectation, out: &MigrateOut, rule: Option<&VmRule>, by: &Place) {
    let allowed = rule.is_some_and(|rule| rule.migration == Consent::Allowed);
    for image in &out.images {
        let Some(expectation) = vm.images.get_mut(&image.slot) else { continue };
        expectation.remember(image.digest, by);
        expectation.now = match &mut expectation.now {
            ImageStatus::InUse { broken: Some(still), .. } => (**still).clone(),
            _ if allowed => ImageStatus::Left { digest: image.digest, by: Some(by.clone()) },
            _ => ImageStatus::Unknown { why: "the VM's state was taken elsewhere".to_owned() },
        };
    }
}

/// Notes that the VM was deleted: should it come back, somebody must say what its images are then.
pub(super) fn deleted(vm: &mut VmExpectation, images: &[Image], by: &Place) {
    for (slot, expectation) in &mut vm.images {
        if let Some(last) = images.iter().find(|image| image.slot == *slot) {
            expectation.remember(last.digest, by);
        }
        expectation.now = ImageStatus::Unknown { why: "the VM was deleted".to_owned() };
    }
}

/// Notes that images of a start, named as in their findings, were not taken over: they count as never seen.
pub(super) fn still_new(vm: &mut VmExpectation, images: &[Image], items: &[String]) {
    for image in images.iter().filter(|image| items.contains(&format!("{} {}", image.slot, image.path))) {
        let Some(expectation) = vm.images.get_mut(&image.slot) else { continue };
        match &mut expectation.now {
            ImageStatus::InUse { broken, .. } => *broken = Some(Box::new(ImageStatus::New)),
            other => *other = ImageStatus::New,
        }
    }
}

/// Takes over how a run left its images.
pub(super) fn stop(vm: &mut VmExpectation, session: SessionId, stop: &VmStop, by: &Place) {
    for (slot, expectation) in &mut vm.images {
        let ImageStatus::InUse { session: user, broken } = &mut expectation.now else { continue };
        if *user != session {
            continue;
        }
        let broken = broken.take();
        let left = stop.images.iter().find(|image| image.slot == *slot);
        if let Some(left) = left {
            expectation.remember(left.digest, by);
        }
        expectation.now = match (broken, left) {
            (Some(still), _) => *still,
            (None, _) if stop.cause == StopCause::Unwatched => {
                ImageStatus::Unknown { why: "the VM ended while nobody watched".into() }
            }
            (None, Some(left)) => ImageStatus::Left { digest: left.digest, by: Some(by.clone()) },
            (None, None) => ImageStatus::Unknown { why: "it could not be measured when the VM ended".into() },
        };
    }
}

fn by_digest(image: &Image, rule: &ImageRule) -> Option<Finding> {
    let known = rule.digests.contains(&image.digest);
    (!known).then(|| of(Code::ImageMismatch, image).expected(any_of(&rule.digests)))
}

/// Whose word the image is held against, and whether it breaks it.
fn by_continuity(
    expectation: &mut ImageExpectation,
    session: SessionId,
    image: &Image,
    rule: Option<&ImageRule>,
    seen: Seen,
) -> (Origin, Option<Finding>) {
    let unwatched = |why: &str| {
        let finding = of(Code::ImageUnwatched, image).expected(format!("unknown: {why}"));
        (Origin::Unknown { why: why.to_owned() }, finding)
    };
    let (origin, finding) = match &expectation.now {
        ImageStatus::New => match rule.filter(|rule| !rule.digests.is_empty()) {
            Some(rule) => match by_digest(image, rule) {
                Some(finding) => (Origin::Policy, finding),
                None => return (Origin::Policy, None),
            },
            None => return (Origin::FirstSeen, None),
        },
        ImageStatus::Left { digest, by } => {
            let origin = Origin::Continuity { by: by.clone() };
            if *digest == image.digest {
                return (origin, None);
            }
            if digest.alg == image.digest.alg {
                (origin, of(Code::ImageDiscontinuity, image).expected(digest))
            } else {
                unwatched(&format!("it was left as {digest}, which was computed in another way"))
            }
        }
        ImageStatus::InUse { session: user, .. } if *user == session => {
            let before = expectation.started.as_ref().map(|started| started.origin.clone());
            return (before.unwrap_or(Origin::FirstSeen), None);
        }
        ImageStatus::InUse { .. } => unwatched("the end of the VM's last run was not recorded"),
        ImageStatus::Unknown { why } => unwatched(why),
    };
    if let Some(at) = expectation.accepted.iter().position(|digest| *digest == image.digest) {
        expectation.accepted.remove(at);
        return (Origin::Operator, None);
    }
    if seen == Seen::WhileItRan && finding.code == Code::ImageDiscontinuity {
        // The VM has written to it since its start: the two digests cannot be held against each other.
        return (origin, Some(of(Code::ImageUnwatched, image).expected("measured before the VM ran")));
    }
    (origin, Some(finding))
}

fn of(code: Code, image: &Image) -> Finding {
    Finding::new(code, format!("{} {}", image.slot, image.path)).actual(image.digest)
}

fn any_of(digests: &[FileDigest]) -> String {
    digests.iter().map(ToString::to_string).collect::<Vec<_>>().join(" or ")
}
