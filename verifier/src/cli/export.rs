//! `verify --export`: the quote in files as other programs take them, so that nobody has to believe ours.

use std::{fmt::Write as _, path::Path};

use onequote_evidence::{
    id::{Nonce, Sha256},
    nonce_tree,
    stream::Head,
};

/// Files of the exported folder, with their content.
pub(super) fn files(head: &Head, ak: &[u8]) -> Option<[(&'static str, Vec<u8>); 4]> {
    let qualifying = qualifying_data(head)?;
    Some([
        ("quote.attest", head.attest.0.clone()),
        ("quote.signature", head.signature.0.clone()),
        ("ak.pub", ak.to_vec()),
        ("quote.qualifying", format!("{qualifying}\n").into_bytes()),
    ])
}

/// What the quote must have signed: computed from nonce, channel binding, path and statement, not read from it. None when
/// one of these has not the right form.
pub(super) fn qualifying_data(head: &Head) -> Option<Sha256> {
    let nonce = Nonce::new(head.nonce.0.clone())?;
    let root = nonce_tree::root(nonce_tree::leaf(&nonce, &head.binding.0), &head.path)?;
    Some(nonce_tree::qualifying_data(&root, &head.statement.0))
}

/// What people are told of it.
pub(super) fn words(folder: &Path, qualifying: &str) -> String {
    let mut text = format!("\nqualifying data  {qualifying}\nby tpm2-tools    tpm2_checkquote");
    for (option, file) in [("-u", "ak.pub"), ("-m", "quote.attest"), ("-s", "quote.signature")] {
        // Writing to a string does not fail.
        let _ = write!(text, " {option} {}", folder.join(file).display());
    }
    text + &format!(" -g sha256 -q {qualifying}\n")
}
