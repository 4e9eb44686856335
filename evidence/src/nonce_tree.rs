//! One quote for many challenges.
//!
//! ```text
//! leaf = SHA-256(00 ‖ nonce ‖ channel binding)        one a challenge, in the order of arrival
//! node = SHA-256(01 ‖ left ‖ right)                   a node without a partner moves up as it is
//! ```
//!
//! The root goes into the quote's qualifying data; each verifier gets the path from its own leaf. The leading bytes
//! keep leaves and nodes apart (as in RFC 9162 section 2.1.1), so no path of another length gives the same root.
//!
//! Nonce and binding stand in a leaf without a length between them. They are told apart by their sizes: a binding is
//! 32 bytes or missing, a nonce 16 to 32, so that the two together are longer than any nonce alone. Otherwise a
//! challenge without binding could be chosen so that its answer fits the challenge of another connection.

use minicbor::{Decode, Encode};

use crate::{
    digest::sha256,
    id::{Nonce, Sha256},
};

/// The longest path: a quote answers at most 2^20 challenges.
pub const MAX_PATH: usize = 20;

/// Size of a channel binding in bytes: the TLS exporter value of RFC 9266.
pub const BINDING_SIZE: usize = 32;

// A leaf with a binding is never as long as one without.
const _: () = assert!(Nonce::MIN + BINDING_SIZE > Nonce::MAX);

/// One step from a leaf to the root.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub struct Step {
    /// Whether `hash` stands to the left of where we come from.
    #[n(0)]
    pub from_left: bool,
    /// The partner's hash.
    #[n(1)]
    pub hash: Sha256,
}

/// The leaf of a challenge. `binding` is the TLS exporter value of the connection, [`BINDING_SIZE`] bytes; empty only
/// for offline use. Another size is the caller's mistake and can make two challenges one.
#[must_use]
pub fn leaf(nonce: &Nonce, binding: &[u8]) -> Sha256 {
    debug_assert!(binding.is_empty() || binding.len() == BINDING_SIZE, "a binding has 32 bytes or is empty");
    sha256(&[&[0], nonce.as_bytes(), binding])
}

/// The root over these leaves and, for each, its path. `None` without a leaf or with more than 2^[`MAX_PATH`].
#[must_use]
pub fn build(leaves: &[Sha256]) -> Option<(Sha256, Vec<Vec<Step>>)> {
    if leaves.is_empty() || leaves.len() > 1 << MAX_PATH {
        return None;
    }
    let mut paths = vec![Vec::new(); leaves.len()];
    // For each node of the level its hash and the range of leaves below it.
    let mut level: Vec<(Sha256, std::ops::Range<usize>)> =
        leaves.iter().enumerate().map(|(i, leaf)| (*leaf, i..i + 1)).collect();
    while level.len() > 1 {
        let mut above = Vec::with_capacity(level.len().div_ceil(2));
        for pair in level.chunks(2) {
            let [(left, left_range), (right, right_range)] = pair else {
                above.extend_from_slice(pair);
                continue;
            };
            for path in &mut paths[left_range.clone()] {
                path.push(Step { from_left: false, hash: *right });
            }
            for path in &mut paths[right_range.clone()] {
                path.push(Step { from_left: true, hash: *left });
            }
            above.push((node(left, right), left_range.start..right_range.end));
        }
        level = above;
    }
    Some((level[0].0, paths))
}

/// The root that a path leads to. `None` when the path is longer than [`MAX_PATH`].
#[must_use]
pub fn root(leaf: Sha256, path: &[Step]) -> Option<Sha256> {
    (path.len() <= MAX_PATH).then(|| {
        path.iter().fold(leaf, |hash, step| match step.from_left {
            true => node(&step.hash, &hash),
            false => node(&hash, &step.hash),
        })
    })
}

/// A quote's qualifying data: SHA-256(`"onequote.quote.v1"` ‖ root ‖ SHA-256(statement)).
#[must_use]
pub fn qualifying_data(root: &Sha256, statement: &[u8]) -> Sha256 {
    sha256(&[b"onequote.quote.v1", &root.0, &sha256(&[statement]).0])
}

fn node(left: &Sha256, right: &Sha256) -> Sha256 {
    sha256(&[&[1], &left.0, &right.0])
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn leaves(count: usize) -> Vec<Sha256> {
        (0..count).map(|i| leaf(&Nonce::new(vec![i as u8; 16]).unwrap(), &[i as u8; 32])).collect()
    }

    proptest! {
        #[test]
        fn every_path_leads_to_the_root(count in 1_usize..70) {
            let leaves = leaves(count);
            let (top, paths) = build(&leaves).unwrap();
            for (leaf, path) in leaves.iter().zip(&paths) {
                prop_assert_eq!(root(*leaf, path), Some(top));
                prop_assert!(path.len() <= 7);
            }
        }

        #[test]
        fn another_nonce_or_path_leads_elsewhere(count in 2_usize..70, i in any::<prop::sample::Index>(), at in any::<prop::sample::Index>()) {
            let leaves = leaves(count);
            let (top, paths) = build(&leaves).unwrap();
            let i = i.index(count);
            let foreign = leaf(&Nonce::new(vec![0xee; 16]).unwrap(), &[0; 32]);
            prop_assert_ne!(root(foreign, &paths[i]), Some(top));
            let mut path = paths[i].clone();
            let at = at.index(path.len());
            path[at].from_left ^= true;
            prop_assert_ne!(root(leaves[i], &path), Some(top));
            path.remove(at);
            prop_assert_ne!(root(leaves[i], &path), Some(top));
        }
    }

    #[test]
    fn bounds() {
        assert_eq!(build(&[]), None);
        let step = Step { from_left: true, hash: Sha256::ZERO };
        assert_eq!(root(Sha256::ZERO, &[step; MAX_PATH + 1]), None);
    }

    #[test]
    fn the_binding_is_part_of_the_leaf() {
        let nonce = Nonce::new(vec![1; 16]).unwrap();
        assert_ne!(leaf(&nonce, &[]), leaf(&nonce, &[2; 32]));
    }
}
