//! Saved trees: as good as a full measurement, or an error.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::{fs::File, os::unix::fs::FileExt};

use common::{BLOCK, content, definition, noise, sparse, threads};
use onequote_verity::{CHUNK, Changed, Measured, Options, SavedTree, TreeError, measure};
use proptest::prelude::*;

/// Measures and keeps the tree.
fn save(file: &File) -> (Measured, File) {
    let tree = tempfile::tempfile().unwrap();
    let measured = measure(file, Options { save: Some(&tree), ..threads() }).unwrap();
    assert!(measured.saved);
    (measured, tree)
}

fn update(tree: &File, file: &File, changed: &Changed, known: &Measured) -> Result<Measured, TreeError> {
    SavedTree::open(tree.try_clone().unwrap())?.update(file, changed, &known.digest, threads())
}

fn changed(ranges: &[(u64, usize)]) -> Changed {
    let mut changed = Changed::default();
    ranges.iter().for_each(|&(at, len)| changed.add(at..at + len as u64));
    changed
}

/// Sizes with holes and data of every kind.
fn files() -> Vec<(u64, Vec<(u64, usize)>)> {
    vec![
        (0, vec![]),
        (1, vec![(0, 1)]),
        (4096, vec![(0, 4096)]),
        (4097, vec![(0, 4097)]),
        (CHUNK, vec![(0, 524_288)]),
        (CHUNK + 1, vec![(3 * BLOCK, 5000)]),
        (200 * CHUNK + 77, vec![]),
        (200 * CHUNK + 77, vec![(0, 600_000), (130 * CHUNK, 4_000_000), (200 * CHUNK, 77)]),
        (130 * CHUNK, vec![(129 * CHUNK, 524_288)]),
    ]
}

#[test]
fn without_a_change_nothing_is_read() {
    for (size, data) in files() {
        let file = sparse(size, &data);
        let (known, tree) = save(&file);
        let now = update(&tree, &file, &Changed::default(), &known).unwrap();
        assert_eq!((now.digest, now.size, now.read), (known.digest, size, 0), "{size} {data:?}");
    }
}

#[test]
fn what_changed_is_read_and_nothing_else() {
    for (size, data) in files() {
        for at in [0, 1, BLOCK - 1, CHUNK - 2, 64 * CHUNK, 150 * CHUNK + 3, size.saturating_sub(5)] {
            let len = usize::try_from(size.saturating_sub(at).min(3 * BLOCK)).unwrap();
            let file = sparse(size, &data);
            let (known, tree) = save(&file);
            file.write_all_at(&noise(99, len), at).unwrap();
            let now = update(&tree, &file, &changed(&[(at, len)]), &known).unwrap();
            assert_eq!(now.digest, definition(&content(&file)), "{size} {data:?}, changed at {at}");
            assert!(now.read <= len as u64 + 2 * BLOCK, "{} read", now.read);
        }
    }
}

#[test]
fn a_file_that_grew_is_read_where_it_grew() {
    for (size, data) in files() {
        for more in [1, 4095, 4096, CHUNK, 70 * CHUNK + 1] {
            let file = sparse(size, &data);
            let (known, tree) = save(&file);
            file.set_len(size + more).unwrap();
            file.write_all_at(b"new end", (size + more).saturating_sub(7).max(size)).unwrap();
            let now = update(&tree, &file, &Changed::default(), &known).unwrap();
            assert_eq!(now.digest, definition(&content(&file)), "{size} {data:?} and {more}");
        }
    }
}

#[test]
fn a_file_that_shrank_or_grew_much_is_for_a_full_measurement() {
    let file = sparse(3 * CHUNK, &[(0, 5000)]);
    let (known, tree) = save(&file);
    for size in [0, 3 * CHUNK - 1, 8 << 30] {
        file.set_len(size).unwrap();
        let e = update(&tree, &file, &Changed::default(), &known).unwrap_err();
        assert!(matches!(e, TreeError::Resized), "{e}");
    }
}

/// Every way to change a saved tree, also one that would hide a change of the image, is found.
#[test]
fn a_tampered_tree_gives_no_digest() {
    let file = sparse(130 * CHUNK + 100, &[(0, 600_000), (129 * CHUNK, 9000)]);
    let (known, tree) = save(&file);
    let good = content(&tree);
    for at in [0, 15, 16, 20, 24, 4095, 4096, 4096 + 31, 2 * 4096 + 32 * 17, 131 * 4096 + 5, good.len() - 1] {
        tree.write_all_at(&[good[at] ^ 1], at as u64).unwrap();
        let e = update(&tree, &file, &Changed::default(), &known).unwrap_err();
        assert!(!matches!(e, TreeError::Verity(_)), "byte {at}: {e}");
        tree.write_all_at(&good[at..=at], at as u64).unwrap();
    }
    update(&tree, &file, &Changed::default(), &known).unwrap();
    // Longer or shorter.
    for len in [0, 4095, good.len() as u64 - 1, good.len() as u64 + 4096] {
        tree.set_len(len).unwrap();
        assert!(matches!(update(&tree, &file, &Changed::default(), &known), Err(TreeError::Form)), "{len}");
        tree.set_len(good.len() as u64).unwrap();
        tree.write_all_at(&good, 0).unwrap();
    }
    // The tree of what the image is now, and the digest of what it was.
    file.write_all_at(b"evil", 4096).unwrap();
    let (_, other) = save(&file);
    let e = update(&other, &file, &Changed::default(), &known).unwrap_err();
    assert!(matches!(e, TreeError::Mismatch), "{e}");
}

/// Blocks that are said to have changed are read: what the tree says of them counts for nothing.
#[test]
fn zeros_and_data_may_change_places() {
    let file = sparse(140 * CHUNK, &[(CHUNK, 524_288)]);
    let (known, tree) = save(&file);
    file.write_all_at(&vec![0; 524_288], CHUNK).unwrap();
    file.write_all_at(&noise(1, 524_288), 100 * CHUNK).unwrap();
    let ranges = changed(&[(CHUNK, 524_288), (100 * CHUNK, 524_288)]);
    let now = update(&tree, &file, &ranges, &known).unwrap();
    assert_eq!(now.digest, definition(&content(&file)));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_changes_give_the_digest_of_a_full_measurement(
        size in 1_u64..3 * CHUNK,
        writes in prop::collection::vec((0_u64..3 * CHUNK, 1_usize..20_000), 0..6),
    ) {
        let file = sparse(size, &[(0, 9000)]);
        let (known, tree) = save(&file);
        for &(at, len) in &writes {
            file.write_all_at(&noise(at, len), at).unwrap();
        }
        let now = update(&tree, &file, &changed(&writes), &known).unwrap();
        prop_assert_eq!(now.digest, definition(&content(&file)));
    }

    #[test]
    fn ranges_cover_what_was_added_and_no_more(
        ranges in prop::collection::vec((0_u64..100, 0_usize..5), 0..20),
    ) {
        let mut all = Changed::default();
        let mut blocks = std::collections::BTreeSet::new();
        for (start, len) in ranges {
            all.add(start * BLOCK..(start + len as u64) * BLOCK);
            blocks.extend(start..start + len as u64);
        }
        prop_assert_eq!(all.bytes(), blocks.len() as u64 * BLOCK);
    }
}
