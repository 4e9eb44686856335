//! The expectation tree for people and programs: root → host → VM → image, each image with how it must be at its VM's
//! next start, whose word that is, and what it was before.
//!
//! Every node has a digest over the nodes below it, so that two verifiers, or the same one on two days, can be compared
//! from the root down. The digest of an image's node is SHA-256 over the JSON of its `expected`, of a VM's over the lines
//! `SLOT DIGEST`, of a host's over the lines `UUID DIGEST`, of the root's over the lines `HOST DIGEST`, each line ended by
//! a newline, in ascending order of the first word.

use std::collections::BTreeMap;

use serde::Serialize;

use onequote_evidence::{
    digest::{FileDigest, sha256},
    id::{HostId, SessionId, Sha256, VmId},
};

use crate::{
    appraise::state::{HostState, ImageExpectation, ImageStatus, PastImage, Place, StartedImage, VmExpectation},
    policy::{ImageRule, Policy},
};

/// A host's part of the tree.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct HostTree {
    /// The host.
    pub id: HostId,
    /// Over its VMs.
    pub digest: Sha256,
    /// Every VM that was ever seen on it, in ascending order of UUID.
    pub vms: Vec<VmTree>,
}

/// A VM's part.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct VmTree {
    /// The VM.
    pub uuid: VmId,
    /// Its last name.
    pub name: String,
    /// The QEMU process that runs it.
    pub session: Option<SessionId>,
    /// Over its images.
    pub digest: Sha256,
    /// In ascending order of slot.
    pub images: Vec<ImageTree>,
}

/// An image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ImageTree {
    /// Where it is used.
    pub slot: String,
    /// Over `expected`.
    pub digest: Sha256,
    /// What its VM's next start is held against.
    pub expected: Expected,
    /// Digests that the operator has accepted beside that, each for one start.
    pub accepted: Vec<FileDigest>,
    /// How it was at the last start, and whose word it was held against then.
    pub started: Option<StartedImage>,
    /// What it was before, oldest first.
    pub history: Vec<PastImage>,
}

/// What a start is held against.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "origin", rename_all = "kebab-case")]
pub enum Expected {
    /// The policy: one of these.
    Policy {
        /// Digests.
        digests: Vec<FileDigest>,
    },
    /// Continuity: as the last run left it.
    Continuity {
        /// So.
        digest: FileDigest,
        /// The event that told it.
        by: Option<Place>,
    },
    /// A VM writes it now; how it leaves it will be expected.
    InUse {
        /// Whether its start broke the expectation, which then stays in force.
        broken: bool,
    },
    /// Nobody knows how it must be: the next start is a finding until the operator accepts a digest.
    Unknown {
        /// Why.
        why: String,
    },
    /// Nothing: it is taken as it is when it is seen first.
    Nothing,
    /// The policy has no such image: the VM may not have it.
    Absence,
}

impl HostTree {
    /// The tree of a host with this state and policy.
    #[must_use]
    pub fn new(id: &HostId, state: &HostState, policy: Option<&Policy>) -> Self {
        let vms: Vec<VmTree> = state.tree.vms.iter().map(|(uuid, vm)| VmTree::new(*uuid, vm, policy)).collect();
        let lines = vms.iter().map(|vm| (vm.uuid.to_string(), vm.digest));
        Self { id: id.clone(), digest: over(lines), vms }
    }
}

impl VmTree {
    fn new(uuid: VmId, vm: &VmExpectation, policy: Option<&Policy>) -> Self {
        let rule = policy.and_then(|policy| policy.rule(&vm.name, uuid)).map(|(_, rule)| rule);
        let none = ImageExpectation::default();
        let listed = rule.into_iter().flat_map(|rule| rule.images.keys());
        let seen = vm.images.iter().map(|(slot, image)| (slot, &**image));
        // Those that were seen and those that the policy wants.
        let slots: BTreeMap<&String, &ImageExpectation> = listed.map(|slot| (slot, &none)).chain(seen).collect();
        let images: Vec<ImageTree> = (slots.into_iter())
            .map(|(slot, image)| {
                let listed = rule.map(|rule| rule.images.get(slot));
                let expected = Expected::of(image, listed);
                // What serializes to nothing but strings and numbers cannot fail.
                let json = serde_json::to_vec(&expected).unwrap_or_default();
                ImageTree {
                    slot: slot.clone(),
                    digest: sha256(&[&json]),
                    expected,
                    accepted: image.accepted.clone(),
                    started: image.started.clone(),
                    history: image.history.clone(),
                }
            })
            .collect();
        let digest = over(images.iter().map(|image| (image.slot.clone(), image.digest)));
        Self { uuid, name: vm.name.clone(), session: vm.session.as_ref().map(|s| s.session), digest, images }
    }
}

impl Expected {
    /// `listed` is none without a rule, and holds none where the rule does not name the image.
    fn of(image: &ImageExpectation, listed: Option<Option<&ImageRule>>) -> Self {
        match (&image.now, listed) {
            (_, Some(None)) => Self::Absence,
            (_, Some(Some(rule))) if !rule.continuity => Self::Policy { digests: rule.digests.clone() },
            (ImageStatus::New, Some(Some(rule))) if !rule.digests.is_empty() => {
                Self::Policy { digests: rule.digests.clone() }
            }
            (ImageStatus::New, _) => Self::Nothing,
            (ImageStatus::Left { digest, by }, _) => Self::Continuity { digest: *digest, by: by.clone() },
            (ImageStatus::InUse { broken, .. }, _) => Self::InUse { broken: broken.is_some() },
            (ImageStatus::Unknown { why }, _) => Self::Unknown { why: why.clone() },
        }
    }

    /// The word for where it comes from.
    #[must_use]
    pub fn word(&self) -> &'static str {
        match self {
            Self::Policy { .. } => "policy",
            Self::Continuity { .. } => "continuity",
            Self::InUse { .. } => "in-use",
            Self::Unknown { .. } => "unknown",
            Self::Nothing => "nothing",
            Self::Absence => "absence",
        }
    }
}

/// The root's digest over hosts.
#[must_use]
pub fn root(hosts: &[HostTree]) -> Sha256 {
    over(hosts.iter().map(|host| (host.id.to_string(), host.digest)))
}

fn over(lines: impl Iterator<Item = (String, Sha256)>) -> Sha256 {
    let mut lines: Vec<String> = lines.map(|(name, digest)| format!("{name} {digest}\n")).collect();
    lines.sort();
    sha256(&[lines.concat().as_bytes()])
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use onequote_evidence::event::StopCause;

    use super::*;
    use crate::appraise::testing::{POLICY, World, digest, image, vm_id};

    fn tree(world: &World) -> HostTree {
        let policy = Policy::parse(POLICY, "policy").unwrap();
        HostTree::new(&"host-1".parse().unwrap(), &world.state, Some(&policy))
    }

    #[test]
    fn each_image_says_whose_word_counts() {
        let mut world = World::with_two_vms();
        world.round();
        let running = tree(&world);
        let web = &running.vms[0];
        assert_eq!((web.uuid, web.name.as_str(), web.images.len()), (vm_id(1), "web", 2));
        assert_eq!(web.images[0].expected, Expected::InUse { broken: false });
        assert_eq!(web.images[1].expected, Expected::Policy { digests: vec![digest(6)] });
        let started = web.images[0].started.as_ref().unwrap();
        assert_eq!((started.origin.word(), started.digest), ("policy", digest(5)));

        world.stop(1, 1, StopCause::GuestShutdown, vec![image("disk0", 50, false)]);
        world.round();
        let stopped = tree(&world);
        let disk = &stopped.vms[0].images[0];
        let Expected::Continuity { digest: left, by: Some(by) } = &disk.expected else { panic!("{disk:?}") };
        assert_eq!((*left, by.event.as_str(), by.epoch), (digest(50), "vm-stop", 1));
        assert_eq!(by.record, world.records.len() as u64 - 1);
        let past: Vec<_> = disk.history.iter().map(|past| (past.digest, past.by.event.as_str())).collect();
        assert_eq!(past, [(digest(5), "vm-start"), (digest(50), "vm-stop")]);

        // A change below changes every node above it, and no other.
        assert_ne!(running.vms[0].digest, stopped.vms[0].digest);
        assert_eq!(running.vms[1].digest, stopped.vms[1].digest);
        assert_ne!(root(&[running]), root(&[stopped]));
    }

    #[test]
    fn what_the_policy_does_not_name_or_nobody_knows() {
        let mut world = World::with_two_vms();
        world.stop(1, 1, StopCause::GuestShutdown, vec![image("disk0", 5, false)]);
        world.start("web", 1, 3, vec![image("disk0", 5, false), image("usb0", 9, true)]);
        world.stop(1, 3, StopCause::Unwatched, vec![]);
        world.round();
        let images = &tree(&world).vms[0].images;
        let words: Vec<_> = images.iter().map(|i| (i.slot.as_str(), i.expected.word())).collect();
        assert_eq!(words, [("disk0", "unknown"), ("disk0/1", "policy"), ("usb0", "absence")]);
    }
}
