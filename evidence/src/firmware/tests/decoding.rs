//! Variables, databases, boot entries, device paths, words.

use super::*;

const SHA256: HashAlg = HashAlg::Sha256;

fn described(builder: &Builder) -> Vec<String> {
    let log = builder.parse();
    log.events().iter().map(|event| log.describe(event, SHA256)).collect()
}

fn wide(text: &str) -> Vec<u8> {
    text.encode_utf16().flat_map(u16::to_le_bytes).collect()
}

/// One list with entries of the same size.
pub(crate) fn list(kind: Guid, entries: &[&[u8]]) -> Vec<u8> {
    let size = 16 + entries.first().map_or(0, |entry| entry.len());
    let total = 28 + size * entries.len();
    let mut out = kind.0.to_vec();
    out.extend([total as u32, 0, size as u32].map(u32::to_le_bytes).concat());
    for entry in entries {
        out.extend([7; 16]);
        out.extend(*entry);
    }
    out
}

const X509: Guid = Guid::from_fields(0xa5c0_59a1, 0x94e4, 0x4aa7, 0x87b5_ab15_5c2b_f072);
const IMAGE: Guid = Guid::from_fields(0xc1c4_1626, 0x504c, 0x4092, 0xaca9_41f9_3693_4328);

#[test]
fn meanings_are_by_digest() {
    let words = described(&usual());
    assert_eq!(
        words[1..],
        [
            "data 0000",
            "variable SecureBoot = 01",
            "separator",
            "\"Calling EFI Application from Boot Option\"",
            "separator",
            "says: \"short\"",
            "\"linux /vmlinuz quiet\" (says: grub_cmd)",
            "says: \"/vmlinuz\"",
            "\"Exit Boot Services Invocation\"",
        ]
    );
    // Other data than what was measured is what the log says, and no more.
    let secure = variable(Guid::GLOBAL, "SecureBoot", &[1]);
    let builder = Builder::new(&BANKS)
        .event(7, EventType::VARIABLE_DRIVER_CONFIG, &variable(Guid::GLOBAL, "SecureBoot", &[0]), &secure)
        .event(7, EventType::SEPARATOR, b"no separator", &[0; 4])
        .event(7, EventType::IPL, &[0xff; 4], b"no separator?")
        .event(8, EventType::IPL, b"grub_cmd: x", b"grub_cmd: x\0")
        .proven(12, EventType::IPL, &[wide("root=/dev/vda quiet"), vec![0, 0]].concat());
    let words = described(&builder);
    let said: String = hex::encode(&secure[..32]);
    assert_eq!(
        words[1..],
        [
            format!("says: {said}… ({} bytes)", secure.len()),
            "says: 00000000".to_owned(),
            "separator".to_owned(),
            "says: \"grub_cmd: x\"".to_owned(),
            "\"root=/dev/vda quiet\"".to_owned(),
        ]
    );
    let log = builder.parse();
    assert_eq!(log.events()[1].variable(SHA256), None);
    assert_eq!(log.events()[3].separator(SHA256), Some(Separator::Boot));
}

#[test]
fn variables_are_read_to_the_byte() {
    let bytes = variable(Guid::SHIM, "MokListRT", b"content");
    let read = Variable::parse(&bytes).unwrap();
    assert!(read.is(Guid::SHIM, "MokListRT") && !read.is(Guid::GLOBAL, "MokListRT") && !read.is(Guid::SHIM, "MokList"));
    assert_eq!((read.name().as_str(), read.data, read.to_bytes()), ("MokListRT", &b"content"[..], bytes.clone()));
    assert_eq!(read.guid.to_string(), "605dab50-e046-4300-abb6-3dd810dd8b23");
    for len in 0..bytes.len() {
        assert!(Variable::parse(&bytes[..len]).is_err());
    }
    assert!(Variable::parse(&[bytes, vec![0]].concat()).is_err());
    assert!(Variable::parse(&[[0xff; 16], [0xff; 16]].concat()).is_err());
}

#[test]
fn databases_are_read_list_by_list() {
    let content =
        [list(X509, &[b"certificate"]), list(IMAGE, &[&[1; 32], &[2; 32]]), list(Guid::SHIM, &[b"?"])].concat();
    let entries: Vec<Signature<'_>> = SignatureLists::new(&content).map(Result::unwrap).collect();
    let kinds: Vec<SignatureKind> = entries.iter().map(|entry| entry.kind).collect();
    use SignatureKind::{Certificate, ImageSha256, Other};
    assert_eq!(kinds, [Certificate, ImageSha256, ImageSha256, Other(Guid::SHIM)]);
    assert_eq!(entries[0].digest(), crate::digest::sha256(&[b"certificate"]));
    assert_eq!(entries[1].digest().0, [1; 32]);
    assert_eq!(entries[0].owner, Guid([7; 16]));
    // A list may be empty, and a database too.
    assert_eq!(SignatureLists::new(&list(IMAGE, &[])).count(), 0);
    assert_eq!(SignatureLists::new(&[]).count(), 0);
    for len in 1..content.len() {
        let read: Result<Vec<_>, _> = SignatureLists::new(&content[..len]).collect();
        let boundary = [28 + 27, 28 + 27 + 28 + 96].contains(&len);
        assert_eq!(read.is_ok(), boundary, "{len}");
    }
    for (at, byte) in [(24, 15), (24, 28), (20, 1), (16, 27), (16, 0)] {
        let mut wrong = list(X509, &[b"certificate"]);
        wrong[at] = byte;
        assert!(SignatureLists::new(&wrong).any(|entry| entry.is_err()), "{at} {byte}");
    }
}

#[test]
fn boot_entries_and_device_paths_in_words() {
    let mut path = vec![2, 1, 12, 0, 0xd0, 0x41, 0x03, 0x0a, 0, 0, 0, 0];
    path.extend([1, 1, 6, 0, 2, 3]);
    path.extend([4, 1, 42, 0, 1, 0, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0, 0x10, 0, 0, 0, 0, 0, 0]);
    path.extend(Guid::SHIM.0);
    path.extend([2, 2]);
    let file = [wide("\\EFI\\a"), vec![0, 0]].concat();
    path.extend([4, 4, 4 + file.len() as u8, 0]);
    path.extend(&file);
    path.extend([0x7f, 0xff, 4, 0]);
    let words = "PciRoot(0x0)/Pci(0x3,0x2)/HD(1,GPT,605dab50-e046-4300-abb6-3dd810dd8b23,0x800,0x1000)/\\EFI\\a";
    assert_eq!(DevicePath(&path).to_string(), words);
    // What cannot be read is shown as it is.
    assert_eq!(DevicePath(&[9, 9, 6, 0, 1, 2, 1, 1, 3, 0]).to_string(), "Path(9,9,0102)/?01010300");
    assert_eq!(DevicePath(&[]).to_string(), "");

    let mut entry = [&1_u32.to_le_bytes()[..], &(path.len() as u16).to_le_bytes(), &wide("Debian"), &[0, 0]].concat();
    entry.extend(&path);
    entry.extend(b"options");
    let option = LoadOption::parse(&entry).unwrap();
    assert_eq!((option.attributes, option.options), (1, &b"options"[..]));
    let boot = variable(Guid::GLOBAL, "Boot0001", &entry);
    let order = variable(Guid::GLOBAL, "BootOrder", &[1, 0, 0xfe, 0xca]);
    let load = [
        &0x1000_u64.to_le_bytes()[..],
        &77_u64.to_le_bytes(),
        &0_u64.to_le_bytes(),
        &(path.len() as u64).to_le_bytes(),
        &path,
    ]
    .concat();
    let db = variable(Guid::IMAGE_SECURITY, "db", &list(IMAGE, &[&[1; 32][..]; 5]));
    let builder = Builder::new(&BANKS)
        .event(1, EventType::VARIABLE_BOOT, &entry, &boot)
        .proven(1, EventType::VARIABLE_BOOT, &boot)
        .event(1, EventType::VARIABLE_BOOT, &[1, 0, 0xfe, 0xca], &order)
        .event(4, EventType::BOOT_SERVICES_APPLICATION, b"image", &load)
        .event(9, EventType::EVENT_TAG, b"initrd", b"\x99\x8a\x44\x8f\x0d\0\0\0Linux initrd\0")
        .proven(7, EventType::VARIABLE_DRIVER_CONFIG, &db);
    let shown = described(&builder);
    let one = hex::encode([1; 32]);
    assert_eq!(
        shown[1..],
        [
            format!("variable, says: Boot0001 = \"Debian\" {words}"),
            format!("variable Boot0001 = \"Debian\" {words}"),
            "variable, says: BootOrder = 0001,CAFE".to_owned(),
            format!("says: image {words}"),
            "says: \"Linux initrd\" (tag 0x8f448a99)".to_owned(),
            format!("variable db = image {one}, image {one}, image {one}, image {one}, and 1 more"),
        ]
    );
}

#[test]
fn words_cannot_rewrite_the_screen() {
    let builder = Builder::new(&BANKS)
        .proven(8, EventType::IPL, "a\u{1b}[2J\u{202e}b".as_bytes())
        .event(8, EventType::IPL, "ls \u{1b}\n".as_bytes(), "grub_cmd: ls \u{1b}\n\0".as_bytes())
        .event(9, EventType::IPL, b"f", "\u{202e}b".as_bytes());
    for text in described(&builder) {
        assert!(!text.chars().any(|c| c.is_control() || c == '\u{202e}'), "{text:?}");
    }
}

#[test]
fn a_pointer_may_have_four_bytes() {
    let mut builder = Builder::new(&BANKS);
    builder.bytes[32 + 16 + 7] = 1;
    let load = [&1_u64.to_le_bytes()[..], &[7, 0, 0, 0], &[0; 4], &[4, 0, 0, 0], &[0x7f, 0xff, 4, 0]].concat();
    let builder = builder.event(4, EventType::BOOT_SERVICES_APPLICATION, b"image", &load);
    let log = builder.parse();
    let Claim::Image(image) = log.claim(&log.events()[1]) else { panic!("an image") };
    assert_eq!((image.location, image.length), (1, 7));
}
