//! Saved trees: one that was changed is refused, and never gives another digest.
#![no_main]

use std::fs::File;
use std::io::{Read as _, Seek as _, Write as _};
use std::num::NonZeroUsize;

use libfuzzer_sys::fuzz_target;
use onequote_verity::{Changed, Options, SavedTree, measure};

/// The file's bytes: a few blocks, and an end that is none.
const SIZE: usize = 9000;

// The first byte says whether the rest stands for the tree or is mixed into the true one.
fuzz_target!(|data: &[u8]| {
    let Some((&choice, data)) = data.split_first() else { return };
    let mut file = tempfile::tempfile().expect("a file");
    file.write_all(&[7; SIZE]).expect("room");
    let tree = tempfile::tempfile().expect("a file");
    let options = || Options { threads: NonZeroUsize::MIN, ..Options::default() };
    let known = measure(&file, Options { save: Some(&tree), ..options() }).expect("a digest");
    let forged = match choice % 2 {
        0 => data.to_vec(),
        _ => mixed(tree, data),
    };
    let mut tree = tempfile::tempfile().expect("a file");
    tree.write_all(&forged).expect("room");
    let Ok(tree) = SavedTree::open(tree) else { return };
    if let Ok(now) = tree.update(&file, &Changed::default(), &known.digest, options()) {
        assert_eq!(now.digest, known.digest);
    }
});

/// The tree with some of its bytes changed: two bytes of data for the place, one for the change.
fn mixed(mut tree: File, data: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    tree.rewind().expect("a file");
    tree.read_to_end(&mut bytes).expect("a file");
    for change in data.chunks_exact(3) {
        let at = usize::from(u16::from_le_bytes([change[0], change[1]])) % bytes.len();
        bytes[at] ^= change[2];
    }
    bytes
}
