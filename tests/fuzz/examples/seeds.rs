//! Writes a first corpus: the examples of `docs/formats.md` and a record of every kind of event.
//!
//! `cargo run --manifest-path tests/fuzz/Cargo.toml --example seeds` writes to `tests/fuzz/corpus/TARGET/`.

#[path = "../../../evidence/tests/samples/mod.rs"]
mod samples;

use std::{fs, path::Path};

use onequote_evidence::{
    digest::HashAlg,
    event::{Event, EventBody},
    id::TimeMs,
    record::Record,
    stream,
};

const DOC: &str = include_str!("../../../docs/formats.md");

fn main() {
    for block in DOC.split("\n```hex ").skip(1) {
        let (name, rest) = block.split_once('\n').expect("an example has a name");
        let body = rest.split("\n```").next().unwrap_or_default();
        let digits: String = body.lines().flat_map(|line| line.split(';').next()).collect();
        let bytes = hex::decode(digits.split_whitespace().collect::<String>()).expect("hexadecimal");
        let (target, bytes) = match name {
            "ima-ng" | "ima-legacy" | "ima-violation" => ("ima", [&[0], bytes.as_slice()].concat()),
            "ima-signature" => ("ima_signature", bytes),
            "hello" | "resume" | "entries" | "heartbeat" | "collected" => ("guest_frame", bytes[4..].to_vec()),
            "have" | "collect" => ("host_frame", bytes[4..].to_vec()),
            "attest" | "signature" | "public" | "statement" => (name, bytes),
            "firmware-log" => ("firmware", bytes),
            "record" => ("record", bytes),
            "stream" => {
                let packed = stream::compress(&bytes).expect("memory");
                write("stream", "packed", &[&[1], packed.as_slice()].concat());
                ("stream", [&[0], bytes.as_slice()].concat())
            }
            _ => continue,
        };
        write(target, name, &bytes);
    }
    let event = |body: EventBody| Event { time: TimeMs(1), vm: None, body };
    let mut log = Vec::new();
    for (i, body) in samples::bodies(&mut samples::Gen(1)).into_iter().enumerate() {
        let record = Record::new(0, 12, &[HashAlg::Sha256], &[event(body.clone())]);
        write("record", body.kind(), &record.to_bytes());
        log.extend(Record::new(i as u64, 12, &[HashAlg::Sha256], &[event(body)]).to_bytes());
    }
    write("record", "log", &log);
}

fn write(target: &str, name: &str, bytes: &[u8]) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(target);
    fs::create_dir_all(&folder).expect("a folder for the corpus");
    fs::write(folder.join(name), bytes).expect("a file of the corpus");
}
