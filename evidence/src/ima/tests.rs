//! Property and example tests of the list parser.

use proptest::prelude::*;

use super::*;

/// Builds an entry as the kernel lists it, with a right template hash.
pub(crate) fn listed(pcr: u32, name: &str, data: &[u8]) -> Vec<u8> {
    let hash = if name == "ima" {
        let mut padded = data[..20].to_vec();
        padded.extend_from_slice(&data[24..]);
        padded.resize(20 + 256, 0);
        HashAlg::Sha1.hash(&padded)
    } else {
        HashAlg::Sha1.hash(data)
    };
    let mut out = pcr.to_le_bytes().to_vec();
    out.extend_from_slice(&hash);
    out.extend_from_slice(&(name.len() as u32).to_le_bytes());
    out.extend_from_slice(name.as_bytes());
    if name != "ima" {
        out.extend_from_slice(&(data.len() as u32).to_le_bytes());
    }
    out.extend_from_slice(data);
    out
}

pub(crate) fn block(bytes: &[u8]) -> Vec<u8> {
    [&(bytes.len() as u32).to_le_bytes(), bytes].concat()
}

/// `d-ng`, or `d-ngv2` where `alg` has a kind before the algorithm.
pub(crate) fn d_ng(alg: &str, digest: &[u8]) -> Vec<u8> {
    block(&[alg.as_bytes(), b":\0", digest].concat())
}

pub(crate) fn ng_data(path: &str, digest: [u8; 32]) -> Vec<u8> {
    [d_ng("sha256", &digest), block(&[path.as_bytes(), b"\0"].concat())].concat()
}

/// An `ima-sig` entry without signature.
pub(crate) fn sig_entry(path: &str, digest: [u8; 32]) -> Vec<u8> {
    listed(10, "ima-sig", &[ng_data(path, digest), block(&[])].concat())
}

fn any_entry() -> impl Strategy<Value = Vec<u8>> {
    let path = "[a-zA-Z0-9/ ._-]{1,60}";
    prop_oneof![
        (path, any::<[u8; 32]>()).prop_map(|(p, d)| listed(10, "ima-ng", &ng_data(&p, d))),
        (path, any::<[u8; 32]>(), prop::collection::vec(any::<u8>(), 0..80)).prop_map(|(p, d, s)| listed(
            10,
            "ima-sig",
            &[ng_data(&p, d), block(&s)].concat()
        )),
        (path, any::<[u8; 32]>(), prop::collection::vec(any::<u8>(), 0..80)).prop_map(|(p, d, s)| listed(
            10,
            "ima-buf",
            &[ng_data(&p, d), block(&s)].concat()
        )),
        (path, any::<[u8; 32]>(), prop::collection::vec(any::<u8>(), 1..80)).prop_map(|(p, d, s)| {
            let modsig = block(&[b"sha256:\0".as_slice(), &d].concat());
            listed(10, "ima-modsig", &[ng_data(&p, d), block(&[]), modsig, block(&s)].concat())
        }),
        (path, any::<[u8; 32]>(), any::<bool>(), prop::collection::vec(any::<u8>(), 0..80)).prop_map(|(p, d, v, s)| {
            let kind = if v { "verity:sha256" } else { "ima:sha256" };
            listed(10, "ima-sigv2", &[d_ng(kind, &d), block(&[p.as_bytes(), b"\0"].concat()), block(&s)].concat())
        }),
        (path, any::<[u8; 20]>()).prop_map(|(p, d)| listed(10, "ima", &[d.as_slice(), &block(p.as_bytes())].concat())),
    ]
}

proptest! {
    #[test]
    fn round_trip(entries in prop::collection::vec(any_entry(), 0..20)) {
        let list = entries.concat();
        let read: Vec<_> = ListReader::new(&list, 20).collect::<Result<_, _>>().unwrap();
        prop_assert_eq!(read.len(), entries.len());
        for (entry, bytes) in read.iter().zip(&entries) {
            prop_assert_eq!(entry.raw, bytes.as_slice());
            prop_assert!(entry.hash_matches());
            prop_assert!(entry.fields().is_ok());
        }
    }

    #[test]
    fn truncation_is_told_apart(entry in any_entry(), cut in any::<prop::sample::Index>()) {
        let cut = cut.index(entry.len());
        let err = Entry::parse(&entry[..cut], 20).unwrap_err();
        prop_assert!(err.is_truncated(), "{err}");
        let list = [entry.as_slice(), &entry[..cut]].concat();
        let mut reader = ListReader::new(&list, 20);
        reader.next().unwrap().unwrap();
        if cut > 0 {
            prop_assert!(reader.next().unwrap().unwrap_err().is_truncated());
        }
        prop_assert_eq!(reader.offset(), entry.len());
        prop_assert!(reader.next().is_none());
    }

    #[test]
    fn any_change_changes_the_aggregate_or_is_refused(
        entry in any_entry(), at in any::<prop::sample::Index>(), bit in 0_u8..8,
    ) {
        let mut changed = entry.clone();
        let at = at.index(entry.len());
        changed[at] ^= 1 << bit;
        let before = Entry::parse(&entry, 20).unwrap();
        if let Ok(after) = Entry::parse(&changed, 20) {
            let same = Aggregate::digest(&before) == Aggregate::digest(&after);
            // The register's number and the template's name and listed hash are not part of what is extended; the
            // last is checked against the data, the first two by whoever expects them.
            prop_assert!(!same || after.pcr != before.pcr || after.name != before.name || !after.hash_matches()
                || after.data == before.data);
        }
    }

    #[test]
    fn rubbish_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..400), size in 0_usize..70) {
        for entry in ListReader::new(&bytes, size).flatten() {
            let _ = entry.fields();
            let _ = entry.extended(HashAlg::Sha512);
            let _ = Aggregate::digest(&entry);
        }
    }
}

#[test]
fn legacy_layouts() {
    let digest = [7; 20];
    let plain = listed(10, "ima", &[digest.as_slice(), &block(b"/bin/sh")].concat());
    let entry = Entry::parse(&plain, 20).unwrap();
    assert!(entry.hash_matches());
    let fields = entry.fields().unwrap();
    assert_eq!((fields.digest_alg, fields.digest, fields.path), ("sha1", digest.as_slice(), b"/bin/sh".as_slice()));

    // The same entry from a writer that counts the NUL: same path, same digest.
    let mut counted = plain[..4 + 20 + 4 + 3].to_vec();
    counted.extend_from_slice(&digest);
    counted.extend_from_slice(&block(b"/bin/sh\0"));
    let entry = Entry::parse(&counted, 20).unwrap();
    assert!(entry.hash_matches());
    assert_eq!(entry.fields().unwrap().path, b"/bin/sh");
}

#[test]
fn violations_extend_all_ones() {
    let mut bytes = sig_entry("/etc/changed", [0; 32]);
    bytes[4..24].fill(0);
    let entry = Entry::parse(&bytes, 20).unwrap();
    assert!(entry.is_violation());
    assert_eq!(entry.extended(HashAlg::Sha1), [0xff; 20]);
    assert_eq!(entry.extended(HashAlg::Sha256), [0xff; 32]);
    assert_eq!(Aggregate::digest(&entry).0, [0xff; 32]);
}

#[test]
fn bank_sized_template_hash() {
    let data = ng_data("/bin/ls", [3; 32]);
    let mut bytes = 10_u32.to_le_bytes().to_vec();
    bytes.extend_from_slice(&HashAlg::Sha256.hash(&data));
    bytes.extend_from_slice(&block(b"ima-ng"));
    bytes.extend_from_slice(&block(&data));
    assert!(Entry::parse(&bytes, 32).unwrap().hash_matches());
    assert!(Entry::parse(&bytes, 20).is_err());
}

#[test]
fn old_kernels_pad_sha1() {
    let bytes = sig_entry("/bin/ls", [3; 32]);
    let entry = Entry::parse(&bytes, 20).unwrap();
    let padded = entry.padded_sha1(HashAlg::Sha256);
    assert_eq!(padded[..20], *entry.template_hash);
    assert_eq!(padded[20..], [0; 12]);
}

#[test]
fn an_oversized_length_is_refused_before_it_is_believed() {
    let mut bytes = 10_u32.to_le_bytes().to_vec();
    bytes.extend_from_slice(&[1; 20]);
    bytes.extend_from_slice(&block(b"ima-ng"));
    bytes.extend_from_slice(&u32::MAX.to_le_bytes());
    let err = Entry::parse(&bytes, 20).unwrap_err();
    assert_eq!(err.kind, MalformedKind::TooLarge { limit: MAX_DATA });
}

#[test]
fn violations_of_kernels_that_list_too_few_zeros() {
    // Named after the default algorithm, but 20 bytes long.
    let data = [block(&[b"sha256:\0".as_slice(), &[0; 20]].concat()), block(b"/etc/changed\0"), block(&[])].concat();
    let mut bytes = listed(10, "ima-sig", &data);
    bytes[4..24].fill(0);
    let entry = Entry::parse(&bytes, 20).unwrap();
    assert!(entry.is_violation() && entry.hash_matches());
    let fields = entry.fields().unwrap();
    assert_eq!((fields.digest_alg, fields.digest), ("sha256", [0; 20].as_slice()));
    // Any other digest of another size stays refused.
    let data = [block(&[b"sha256:\0".as_slice(), &[1; 20]].concat()), block(b"/x\0"), block(&[])].concat();
    assert!(Entry::parse(&listed(10, "ima-sig", &data), 20).unwrap().fields().is_err());
}

#[test]
fn a_path_cannot_rewrite_the_screen() {
    let bytes = sig_entry("/tmp/\u{1b}[2Ja\nb\u{9b}c é", [1; 32]);
    let path = Entry::parse(&bytes, 20).unwrap().fields().unwrap().path_lossy();
    assert_eq!(path, "/tmp/\\u{1b}[2Ja\\nb\\u{9b}c é");
}

#[test]
fn a_legacy_path_of_256_bytes_is_none() {
    let listed = |path: &[u8]| [&10_u32.to_le_bytes()[..], &[1; 20], &block(b"ima"), &[2; 20], &block(path)].concat();
    assert!(Entry::parse(&listed(&[b'a'; 255]), 20).is_ok());
    assert!(Entry::parse(&listed(&[&[b'a'; 255][..], &[0]].concat()), 20).is_ok());
    assert!(Entry::parse(&listed(&[b'a'; 256]), 20).is_err());
}

#[test]
fn the_shortest_entry() {
    let bytes = listed(0, "x", &[]);
    assert_eq!(bytes.len(), MIN_ENTRY);
    assert!(Entry::parse(&bytes, 20).unwrap().hash_matches());
}

#[test]
fn an_entry_put_together_by_hand_is_no_panic() {
    let entry = Entry { pcr: 10, template_hash: &[1; 20], name: b"ima", data: &[1, 2], raw: &[] };
    assert!(!entry.hash_matches());
    assert!(entry.fields().is_err());
}

#[test]
fn digests_tell_their_kind() {
    let fields = |name: &str, alg: &str| {
        let data = [d_ng(alg, &[5; 32]), block(b"/bin/a\0")].concat();
        let bytes = listed(10, name, &data);
        Entry::parse(&bytes, 20).unwrap().fields().map(|fields| (fields.digest_kind, fields.digest.len()))
    };
    assert_eq!(fields("ima-ngv2", "ima:sha256"), Ok((DigestKind::File, 32)));
    assert_eq!(fields("ima-ngv2", "verity:sha256"), Ok((DigestKind::Verity, 32)));
    // The name is not extended: what the data say counts.
    assert_eq!(fields("ima-ng", "verity:sha256"), Ok((DigestKind::Verity, 32)));
    assert_eq!(fields("ima-ng", "sha256"), Ok((DigestKind::Untold, 32)));
    for wrong in ["veritas:sha256", "ima:ima:sha256", "ima:", ":sha256", "verity:sha512"] {
        assert!(fields("ima-ngv2", wrong).is_err(), "{wrong}");
    }
}

#[test]
fn a_buffer_is_held_against_its_digest() {
    let read = |name: &str, alg: HashAlg, digest: &[u8], buffer: &[u8]| {
        let bytes = listed(10, name, &[d_ng(alg.name(), digest), block(b"kexec-cmdline\0"), block(buffer)].concat());
        Entry::parse(&bytes, 20).unwrap().fields().unwrap().buffer_matches()
    };
    let text = b"root=/dev/vda";
    assert_eq!(read("ima-buf", HashAlg::Sha256, &HashAlg::Sha256.hash(text), text), Some(true));
    assert_eq!(read("ima-buf", HashAlg::Sha1, &HashAlg::Sha1.hash(text), text), Some(true));
    assert_eq!(read("ima-buf", HashAlg::Sha256, &HashAlg::Sha256.hash(text), b"root=/dev/vdb"), Some(false));
    assert_eq!(read("ima-sig", HashAlg::Sha256, &HashAlg::Sha256.hash(text), text), None);
}

#[test]
fn metadata_of_evm_is_passed_over() {
    let data =
        [ng_data("/bin/a", [5; 32]), block(&[5, 2]), [block(b"x"), block(&[]), block(&[0; 9])].concat().repeat(2)];
    let bytes = listed(10, "evm-sig", &data.concat());
    let fields = Entry::parse(&bytes, 20).unwrap().fields().unwrap();
    assert_eq!((fields.path, fields.signature), (&b"/bin/a"[..], &[5, 2][..]));
}
