//! IMA lists: the entries are the list, and each can be replayed and read.
#![no_main]

use libfuzzer_sys::fuzz_target;
use onequote_evidence::{
    digest::HashAlg,
    ima::{Aggregate, Entry, FileSignature, ListReader},
};

// The first byte chooses the size of the template hash.
fuzz_target!(|data: &[u8]| {
    let Some((&choice, list)) = data.split_first() else { return };
    let hash_size = HashAlg::ALL[usize::from(choice) % HashAlg::ALL.len()].size();
    let mut reader = ListReader::new(list, hash_size);
    let mut whole = Vec::new();
    let mut aggregate = Aggregate::EMPTY;
    let mut by_digest = Aggregate::EMPTY;
    for entry in reader.by_ref().map_while(Result::ok) {
        assert_eq!(Entry::parse(entry.raw, hash_size), Ok(entry));
        whole.extend_from_slice(entry.raw);
        aggregate.push(&entry);
        by_digest.push_digest(&Aggregate::digest(&entry));
        for bank in HashAlg::ALL {
            assert_eq!(entry.extended(bank).len(), bank.size());
            assert_eq!(entry.padded_sha1(bank).len(), bank.size());
        }
        assert_eq!(entry.extended(HashAlg::Sha256), Aggregate::digest(&entry).0);
        let _ = entry.hash_matches();
        if let Ok(fields) = entry.fields() {
            assert!(!fields.path.contains(&0));
            assert!(!fields.path_lossy().chars().any(char::is_control));
            let _ = fields.buffer_matches();
            if let Ok(signature) = FileSignature::parse(fields.signature) {
                if let Some((alg, digest)) = signature.signed_digest(&fields) {
                    assert_eq!(digest.len(), alg.size());
                }
            }
        }
    }
    assert_eq!(aggregate, by_digest);
    assert_eq!(reader.offset(), whole.len());
    assert_eq!(list[..whole.len()], whole);
    assert!(reader.next().is_none());
});
