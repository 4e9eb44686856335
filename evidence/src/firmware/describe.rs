//! Events in words.

use crate::digest::{HashAlg, sha256};

use super::{
    Claim, Event, Guid, LoadOption, Meaning, Separator, Signature, SignatureKind, SignatureLists, Variable, wide_text,
};

/// The most bytes of data that are shown.
const SHOWN: usize = 32;

/// What the digest proves; behind *says:* what the log says without proof.
pub(super) fn describe(event: &Event<'_>, bank: HashAlg, wide_pointers: bool) -> String {
    match event.meaning(bank) {
        Meaning::Separator(Separator::Boot) => "separator".to_owned(),
        Meaning::Separator(Separator::Error) => "separator after an error".to_owned(),
        Meaning::Variable(variable) => format!("variable {}", with_content(&variable)),
        Meaning::Content(variable) => format!("variable, says: {}", with_content(&variable)),
        Meaning::Command { word, text } => format!("{} (says: {word})", quoted(text)),
        Meaning::Text(text) => quoted(text),
        Meaning::Wide(text) => quoted(&wide_text(text)),
        Meaning::Data(data) => format!("data {}", bytes(data)),
        Meaning::Digest | Meaning::Nothing => format!("says: {}", claimed(&event.claim(wide_pointers))),
    }
}

fn claimed(claim: &Claim<'_>) -> String {
    match claim {
        Claim::Image(image) if image.path.0.is_empty() => format!("image of {} bytes from memory", image.length),
        Claim::Image(image) => format!("image {}", image.path),
        Claim::Label(label) => quoted(label),
        Claim::WideLabel(label) => quoted(&wide_text(label)),
        Claim::Tagged(id, text) => format!("{} (tag {id:#x})", quoted(text)),
        Claim::Data(data) => bytes(data),
    }
}

fn with_content(variable: &Variable<'_>) -> String {
    let name = variable.name();
    let databases =
        [(Guid::GLOBAL, "PK"), (Guid::GLOBAL, "KEK"), (Guid::IMAGE_SECURITY, "db"), (Guid::IMAGE_SECURITY, "dbx")];
    let content = if databases.iter().any(|(guid, name)| variable.is(*guid, name)) {
        database(variable.data)
    } else if variable.is(Guid::GLOBAL, "BootOrder") {
        let entry = |unit: &[u8]| format!("{:04X}", u16::from_le_bytes([unit[0], unit[1]]));
        variable.data.chunks_exact(2).map(entry).collect::<Vec<_>>().join(",")
    } else if variable.guid == Guid::GLOBAL && is_boot_entry(&name) {
        match LoadOption::parse(variable.data) {
            Ok(option) => format!("{} {}", quoted(&wide_text(option.description)), option.path),
            Err(_) => bytes(variable.data),
        }
    } else {
        bytes(variable.data)
    };
    match variable.guid {
        Guid::GLOBAL | Guid::IMAGE_SECURITY => format!("{name} = {content}"),
        guid => format!("{name} of {guid} = {content}"),
    }
}

fn is_boot_entry(name: &str) -> bool {
    name.strip_prefix("Boot").is_some_and(|n| n.len() == 4 && n.bytes().all(|c| c.is_ascii_hexdigit()))
}

/// One entry by itself, owner and certificate (DER): what allowed an image to run.
fn authority(content: &[u8]) -> String {
    match content.split_at_checked(16) {
        Some((_, certificate)) if certificate.starts_with(&[0x30, 0x82]) => {
            format!("by certificate {}", sha256(&[certificate]))
        }
        _ => bytes(content),
    }
}

/// How many entries of which kind, and the first ones.
fn database(content: &[u8]) -> String {
    let entries: Result<Vec<Signature<'_>>, _> = SignatureLists::new(content).collect();
    let Ok(entries) = entries else { return authority(content) };
    let kind = |signature: &Signature<'_>| match signature.kind {
        SignatureKind::Certificate => "certificate",
        SignatureKind::ImageSha256 => "image",
        SignatureKind::CertificateSha256 => "certificate digest",
        SignatureKind::Other(_) => "other",
    };
    let first: Vec<String> =
        entries.iter().take(4).map(|entry| format!("{} {}", kind(entry), entry.digest())).collect();
    let rest = entries.len().saturating_sub(first.len());
    match (entries.len(), rest) {
        (0, _) => "empty".to_owned(),
        (_, 0) => first.join(", "),
        _ => format!("{}, and {rest} more", first.join(", ")),
    }
}

fn quoted(text: &str) -> String {
    format!("\"{}\"", text.escape_debug())
}

fn bytes(data: &[u8]) -> String {
    match data.split_at_checked(SHOWN) {
        Some((first, rest)) if !rest.is_empty() => format!("{}… ({} bytes)", hex::encode(first), data.len()),
        _ if data.is_empty() => "empty".to_owned(),
        _ => hex::encode(data),
    }
}
