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

/// Arguments of QEMU that name files in as many ways.
const ARGUMENTS: [(&str, &[&str]); 4] = [
    ("drive", &["-drive", "file=a,,b.raw,format=raw,if=none,id=d", "-device", "virtio-blk-pci,drive=d"]),
    ("blockdev", &["-blockdev", "{\"driver\":\"file\",\"filename\":\"x\",\"node-name\":\"n\"}"]),
    ("loader", &["-device", "loader,file=blob,addr=0x1000", "-fw_cfg", "name=opt/x,file=y", "-L", "/share"]),
    ("object", &["-object", "memory-backend-file,id=m,mem-path=/m,size=1M", "-kernel", "k", "-append", "a b"]),
];

/// What clients say at a monitor.
const COMMANDS: [&str; 5] = [
    "{\"execute\": \"qmp_capabilities\", \"arguments\": {\"enable\": [\"oob\"]}}",
    "{'execute': 'human-monitor-command', 'arguments': {'command-line': 'info \\'x\\''}, 'id': [1, null]}",
    "{\"exec-oob\": \"migrate-pause\", \"id\": {\"a\": 1.5e300}}",
    "{\"execute\": \"blockdev-add\", \"arguments\": {\"driver\": \"file\", \"filename\": \"/x\"}} {}",
    "[1, 2] \u{ff} {\"execute\"",
];

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
            "report-hello" => ("report_frame", [&[0], &bytes[4..]].concat()),
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
    for name in ["q35", "microvm", "uefi"] {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../qemu-configs");
        let read = |ending: &str| fs::read(folder.join(format!("{name}.{ending}"))).expect("a configuration");
        write("description", name, &read("toml"));
        write("arguments", name, &[b"-readconfig\0x\0\0", read("cfg").as_slice()].concat());
    }
    for (name, words) in ARGUMENTS {
        write("arguments", name, words.join("\0").as_bytes());
    }
    for (number, line) in COMMANDS.iter().enumerate() {
        write("monitor_command", &number.to_string(), format!("\x07{line}\n").as_bytes());
    }
    write("description", "tcg", b"memory = \"64M\"\naccelerator = \"tcg\"\nkernel = \"exe\"\n[[disk]]\npath = \"exe\"\nformat = \"raw\"\n");
    write("elf", "own", &own_program());
    write("saved_tree", "mixed", &[1, 0, 0, 1]);
}

/// The beginning of this program, which is an ELF file.
fn own_program() -> Vec<u8> {
    let mut program = fs::read("/proc/self/exe").expect("this program");
    program.truncate(4096);
    program
}

fn write(target: &str, name: &str, bytes: &[u8]) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(target);
    fs::create_dir_all(&folder).expect("a folder for the corpus");
    fs::write(folder.join(name), bytes).expect("a file of the corpus");
}
