//! `docs/formats.md` against the code: its examples, its tables of keys, its limits.
//!
//! An example is a code block with the info string `hex NAME`; what follows a `;` in a line is a comment. A table of
//! keys follows a heading with the kind's or type's name in backquotes; its rows begin with the key and the type. A
//! limit is a row of the table under `## Limits`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "formats_doc/examples.rs"]
mod examples;
mod samples;

use std::collections::BTreeMap;

use minicbor::{Decoder, Encode, data::Type};
use onequote_evidence::{
    cbor,
    digest::HashAlg,
    event::{
        CommandOutcome, CrashCause, Depth, EventBody, GapReason, HowRead, MAX_KIND, MemoryCheck, MigrationStatus,
        RefuseCause, Role, StopCause,
    },
    firmware::{self, FirmwareLog, Guid, Separator},
    guest_frame, id, ima, join, nonce_tree, pcr, record, report, statement, stream,
    tpm::{Attest, KeyParameters, Public, Signature},
};

const DOC: &str = include_str!("../../docs/formats.md");

/// The document's examples by name.
fn documented() -> BTreeMap<&'static str, Vec<u8>> {
    let mut found = BTreeMap::new();
    for block in DOC.split("\n```hex ").skip(1) {
        let (name, rest) = block.split_once('\n').unwrap();
        let (body, _) = rest.split_once("\n```").expect("an example ends");
        let digits: String = body.lines().flat_map(|line| line.split(';').next()).collect();
        let digits: String = digits.split_whitespace().collect();
        let bytes = hex::decode(&digits).unwrap_or_else(|e| panic!("example {name}: {e}"));
        assert!(found.insert(name, bytes).is_none(), "example {name} stands twice");
    }
    found
}

#[test]
fn every_example_is_what_the_code_writes() {
    let documented = documented();
    let written = examples::written();
    for (name, bytes) in &written {
        let found = documented.get(name).map(hex::encode);
        assert_eq!(found, Some(hex::encode(bytes)), "example {name}");
    }
    let read = ["attest", "signature", "public", "firmware-log"];
    let unknown: Vec<_> =
        documented.keys().filter(|name| !written.contains_key(*name) && !read.contains(name)).collect();
    assert!(unknown.is_empty(), "examples that nothing checks: {unknown:?}");
}

#[test]
fn the_tpm_structures_are_read() {
    let documented = documented();
    let attest = Attest::parse(&documented["attest"]).unwrap();
    assert_eq!(attest.extra_data, documented["qualifying-data"]);
    assert_eq!((attest.clock.clock, attest.clock.reset_count, attest.clock.restart_count), (0x1_0000, 4, 0));
    assert!(attest.clock.safe);
    assert_eq!(attest.selection.banks, [(0x000b, [10, 12, 13].into())]);
    let signature = Signature::parse(&documented["signature"]).unwrap();
    assert!(matches!(signature, Signature::Ecdsa { r, s, .. } if r.len() == 32 && s.len() == 31));
    let public = Public::parse(&documented["public"]).unwrap();
    assert_eq!(public.attributes.ak_defect(), None);
    assert!(matches!(public.key, KeyParameters::Ecc(point) if point.x == [1; 32] && point.y == [2; 32]));
}

#[test]
fn the_firmware_log_is_read() {
    let bytes = &documented()["firmware-log"];
    let log = FirmwareLog::parse(bytes).unwrap();
    let [header, variable, separator] = log.events() else { panic!("three events") };
    assert!(!header.is_extended());
    let read = variable.variable(HashAlg::Sha256).expect("its digest is that of its data");
    assert!(read.is(Guid::GLOBAL, "SecureBoot") && read.data == [1]);
    assert_eq!(separator.separator(HashAlg::Sha256), Some(Separator::Boot));
    assert_eq!((log.banks(), log.extended()), (&[HashAlg::Sha256][..], vec![7]));
}

#[test]
fn every_kind_has_its_table() {
    for body in samples::bodies(&mut samples::Gen(3)) {
        let bytes =
            cbor::encode(&onequote_evidence::event::Event { time: id::TimeMs(0), vm: None, body: body.clone() });
        // {0: kind, 1: time, 4: body}: up to the body it is five values.
        let mut d = Decoder::new(&bytes);
        d.map().unwrap();
        for _ in 0..5 {
            d.skip().unwrap();
        }
        check_table(body.kind(), &bytes[d.position()..]);
    }
    assert_eq!(DOC.matches("\n### Event `").count(), EventBody::KINDS.len(), "kinds that are not there");
}

#[test]
fn every_other_map_has_its_table() {
    for (name, bytes) in examples::maps() {
        check_table(name, &bytes);
    }
}

/// Compares a table of keys with a value that has all of them.
fn check_table(name: &str, value: &[u8]) {
    let heading = [format!("\n### Event `{name}`\n"), format!("\n### `{name}`\n")];
    let start = heading.iter().find_map(|h| DOC.find(h).map(|at| at + h.len()));
    let section = &DOC[start.unwrap_or_else(|| panic!("no heading for {name}"))..];
    let section = section.split("\n#").next().unwrap();
    let rows: Vec<(u8, &str)> = section
        .lines()
        .filter_map(|line| {
            let mut cells = line.strip_prefix("| ")?.split(" | ");
            Some((cells.next()?.parse().ok()?, cells.next()?))
        })
        .collect();
    let mut d = Decoder::new(value);
    let keys = d.map().unwrap().unwrap();
    assert_eq!(rows.len() as u64, keys, "rows of {name}");
    for (key, form) in rows {
        assert_eq!(d.u8().unwrap(), key, "keys of {name}");
        let found = match d.datatype().unwrap() {
            Type::U8 | Type::U16 | Type::U32 | Type::U64 => "uint".to_owned(),
            Type::Bool => "bool".to_owned(),
            Type::String => "text".to_owned(),
            Type::Bytes => format!("bytes({})", d.probe().bytes().unwrap().len()),
            Type::Array => "array".to_owned(),
            Type::Map => "map".to_owned(),
            other => panic!("{name} {key}: {other}"),
        };
        let word = form.split([' ', ',', ':']).next().unwrap();
        let fits = word == found || (word == "bytes" && found.starts_with("bytes("));
        assert!(fits, "{name} key {key}: documented as {form}, is {found}");
        d.skip().unwrap();
    }
}

#[test]
fn every_word_has_its_row() {
    fn rows<T: for<'b> minicbor::Decode<'b, ()> + Encode<()>>(title: &str, word: fn(T) -> &'static str) {
        let section = DOC.split(&format!("\n**{title}**")).nth(1).unwrap_or_else(|| panic!("no words for {title}"));
        let section = section.split("\n**").next().unwrap().split("\n#").next().unwrap();
        let known: Vec<T> = (0_u8..24).map_while(|n| cbor::decode("word", &[n], 1).ok()).collect();
        for (n, value) in known.into_iter().enumerate() {
            let row = format!("| {n} | `{}` |", word(value));
            assert!(section.contains(&row), "{title}: {row}");
        }
    }
    rows("Depth", Depth::word);
    rows("Role", Role::word);
    rows("Stop cause", StopCause::word);
    rows("How read", HowRead::word);
    rows("Gap reason", GapReason::word);
    rows("Memory check", MemoryCheck::word);
    rows("Refuse cause", RefuseCause::word);
    rows("Crash cause", CrashCause::word);
    rows("Migration status", MigrationStatus::word);
    rows("Command outcome", CommandOutcome::word);
}

#[test]
fn limits() {
    let limits = [
        ("cbor::MAX_DEPTH", cbor::MAX_DEPTH),
        ("event::MAX_KIND", MAX_KIND),
        ("firmware::MAX_LOG", firmware::MAX_LOG),
        ("guest_frame::MAX_FRAME", guest_frame::MAX_FRAME),
        ("guest_frame::ENTRIES_TARGET", guest_frame::ENTRIES_TARGET),
        ("id::Nonce::MIN", id::Nonce::MIN),
        ("id::Nonce::MAX", id::Nonce::MAX),
        ("ima::MAX_NAME", ima::MAX_NAME),
        ("ima::MAX_SIGNATURE", ima::MAX_SIGNATURE),
        ("ima::MAX_DATA", ima::MAX_DATA),
        ("ima::MIN_ENTRY", ima::MIN_ENTRY),
        ("ima::MAX_ENTRY", ima::MAX_ENTRY),
        ("join::MAX_MESSAGE", join::MAX_MESSAGE),
        ("join::SECRET_SIZE", join::SECRET_SIZE),
        ("nonce_tree::MAX_PATH", nonce_tree::MAX_PATH),
        ("nonce_tree::BINDING_SIZE", nonce_tree::BINDING_SIZE),
        ("pcr::MAX_REGISTERS", pcr::MAX_REGISTERS),
        ("record::MAX_CONTENT", record::MAX_CONTENT),
        ("record::MAX_RECORD", record::MAX_RECORD),
        ("record::MAX_EVENTS", record::MAX_EVENTS),
        ("report::MAX_CHUNK", report::MAX_CHUNK),
        ("report::EAGER", report::EAGER as usize),
        ("report::MAX_REPORT", report::MAX_REPORT as usize),
        ("report::MAX_PROXY_FRAME", report::MAX_PROXY_FRAME),
        ("report::MAX_VERIFIER_FRAME", report::MAX_VERIFIER_FRAME),
        ("report::MAX_TEXT", report::MAX_TEXT),
        ("statement::MAX_STATEMENT", statement::MAX_STATEMENT),
        ("stream::MAX_ANSWER_ITEM", stream::MAX_ANSWER_ITEM),
        ("stream::MAX_EXPANDED", stream::MAX_EXPANDED),
        ("stream::MAX_ITEM", stream::MAX_ITEM),
        ("stream::MAX_KNOWN_GUESTS", stream::MAX_KNOWN_GUESTS),
        ("stream::MAX_ITEMS", stream::MAX_ITEMS as usize),
        ("stream::PIECE_TARGET", stream::PIECE_TARGET),
    ];
    let section = DOC.split("\n## Limits\n").nth(1).expect("a section of limits").split("\n## ").next().unwrap();
    for (name, value) in limits {
        let row = section.lines().find(|line| line.starts_with(&format!("| `{name}` |")));
        let cells: Vec<_> = row.unwrap_or_else(|| panic!("{name} is missing")).split(" | ").collect();
        assert_eq!(cells[1].replace(',', ""), value.to_string(), "{name}");
    }
    assert_eq!(section.lines().filter(|line| line.starts_with("| `")).count(), limits.len(), "unknown limits");
}
