//! What rules say of measurement lists: signatures, buffers, keyrings, excludes.

use aws_lc_rs::{
    encoding::{AsDer as _, PublicKeyX509Der},
    rand::SystemRandom,
    rsa::KeySize,
    signature::{
        ECDSA_P256_SHA256_ASN1_SIGNING, ECDSA_P384_SHA384_ASN1_SIGNING, EcdsaKeyPair, KeyPair as _, RSA_PKCS1_SHA256,
        RSA_PKCS1_SHA512, RsaKeyPair,
    },
};
use onequote_evidence::{
    digest::HashAlg,
    id::Sha256,
    ima::{Entry, KeyId},
};

use super::{
    super::ima::{Judge, Judgements, RuleId},
    *,
};
use crate::policy::{Policy, SigningKey};

enum Key {
    Rsa(RsaKeyPair),
    Ec(EcdsaKeyPair, HashAlg),
}

impl Key {
    fn all() -> [Self; 3] {
        let ec = |algorithm, hash| Self::Ec(EcdsaKeyPair::generate(algorithm).unwrap(), hash);
        [
            Self::Rsa(RsaKeyPair::generate(KeySize::Rsa2048).unwrap()),
            ec(&ECDSA_P256_SHA256_ASN1_SIGNING, HashAlg::Sha256),
            ec(&ECDSA_P384_SHA384_ASN1_SIGNING, HashAlg::Sha384),
        ]
    }

    fn p256() -> Self {
        Self::Ec(EcdsaKeyPair::generate(&ECDSA_P256_SHA256_ASN1_SIGNING).unwrap(), HashAlg::Sha256)
    }

    fn public(&self) -> SigningKey {
        let der: PublicKeyX509Der<'_> = match self {
            Self::Rsa(key) => key.public_key().as_der().unwrap(),
            Self::Ec(key, _) => key.public_key().as_der().unwrap(),
        };
        SigningKey::from_der(der.as_ref()).unwrap()
    }

    fn hash(&self) -> HashAlg {
        match self {
            Self::Rsa(_) => HashAlg::Sha512,
            Self::Ec(_, hash) => *hash,
        }
    }

    fn raw(&self, message: &[u8]) -> Vec<u8> {
        match self {
            Self::Rsa(key) => {
                let mut out = vec![0; key.public_modulus_len()];
                key.sign(&RSA_PKCS1_SHA512, &SystemRandom::new(), message, &mut out).unwrap();
                out
            }
            Self::Ec(key, _) => key.sign(&SystemRandom::new(), message).unwrap().as_ref().to_vec(),
        }
    }

    /// The attribute with a signature of `content`.
    fn sign(&self, kind: u8, version: u8, content: &[u8]) -> Vec<u8> {
        let number = number(self.hash());
        let message = match version {
            2 => content.to_vec(),
            _ => [&[kind, number], self.hash().hash(content).as_slice()].concat(),
        };
        attribute(kind, version, number, self.public().ids()[0], &self.raw(&message))
    }
}

fn number(alg: HashAlg) -> u8 {
    match alg {
        HashAlg::Sha1 => 2,
        HashAlg::Sha256 => 4,
        HashAlg::Sha384 => 5,
        HashAlg::Sha512 => 6,
    }
}

fn attribute(kind: u8, version: u8, algorithm: u8, key: KeyId, signature: &[u8]) -> Vec<u8> {
    let size = (signature.len() as u16).to_be_bytes();
    [&[kind, version, algorithm], &key.0[..], &size, signature].concat()
}

fn block(bytes: &[u8]) -> Vec<u8> {
    [&(bytes.len() as u32).to_le_bytes(), bytes].concat()
}

/// An entry of a template whose third field is `last`.
fn entry(template: &str, alg: &str, digest: &[u8], path: &str, last: &[u8]) -> Vec<u8> {
    let data =
        [block(&[alg.as_bytes(), b":\0", digest].concat()), block(&[path.as_bytes(), b"\0"].concat()), block(last)];
    let data = data.concat();
    [&10_u32.to_le_bytes(), HashAlg::Sha1.hash(&data).as_slice(), &block(template.as_bytes()), &block(&data)].concat()
}

fn file(alg: HashAlg, path: &str, content: &[u8], signature: &[u8]) -> Vec<u8> {
    entry("ima-sig", alg.name(), &alg.hash(content), path, signature)
}

fn buffer(name: &str, content: &[u8]) -> Vec<u8> {
    entry("ima-buf", "sha256", &HashAlg::Sha256.hash(content), name, content)
}

fn policy(host: &str) -> Policy {
    Policy::parse(&format!("[host]\n{host}"), "p.toml").unwrap()
}

fn with_keys(keys: &[&Key], more: &str) -> Policy {
    let keys: Vec<String> = keys.iter().map(|key| format!("\"\"\"{}\"\"\"", key.public().pem())).collect();
    policy(&format!("ima_keys = [{}]\n{more}", keys.join(", ")))
}

/// What is found of an entry.
fn found(policy: &Policy, raw: &[u8]) -> Option<Finding> {
    let entry = Entry::parse(raw, 20).unwrap();
    let own = Judge::new(&policy.host.ima).finding(&entry);
    // What is remembered is the same.
    let memory = Judgements::default();
    let judge = Judge::remembering(&policy.host.ima, RuleId { policy: policy.id, rule: 0 }, &memory);
    assert_eq!([judge.finding(&entry), judge.finding(&entry)], [own.clone(), own.clone()]);
    own
}

fn code(policy: &Policy, raw: &[u8]) -> Option<Code> {
    found(policy, raw).map(|finding| finding.code)
}

#[test]
fn a_file_with_a_good_signature_is_allowed() {
    for key in Key::all() {
        let policy = with_keys(&[&Key::p256(), &key], "");
        let alg = key.hash();
        for (kind, version) in [(3, 2), (3, 3), (6, 3)] {
            let signature = key.sign(kind, version, b"a program");
            assert_eq!(code(&policy, &file(alg, "/bin/a", b"a program", &signature)), None, "{kind} {version}");
            let other = found(&policy, &file(alg, "/bin/a", b"another one", &signature)).unwrap();
            assert_eq!(other.code, Code::ImaSignatureBad);
            let mut flipped = signature.clone();
            *flipped.last_mut().unwrap() ^= 1;
            assert_eq!(code(&policy, &file(alg, "/bin/a", b"a program", &flipped)), Some(Code::ImaSignatureBad));
        }
        // A signature of the file's bytes is none of its fs-verity digest, and the other way round.
        let typed = |kind: &str, signature: &[u8]| {
            let listed = format!("{kind}:{alg}");
            code(&policy, &entry("ima-sigv2", &listed, &alg.hash(b"a program"), "/bin/a", signature))
        };
        assert_eq!(typed("ima", &key.sign(3, 2, b"a program")), None);
        assert_eq!(typed("verity", &key.sign(6, 3, b"a program")), None);
        assert_eq!(typed("verity", &key.sign(3, 2, b"a program")), Some(Code::ImaSignatureBad));
        assert_eq!(typed("ima", &key.sign(6, 3, b"a program")), Some(Code::ImaSignatureBad));
        assert_eq!(typed("verity", &key.sign(3, 3, b"a program")), Some(Code::ImaSignatureBad));
    }
}

#[test]
fn signatures_that_do_not_count() {
    let (ours, theirs) = (Key::p256(), Key::p256());
    let policy = with_keys(&[&ours], "");
    let signed = |signature: &[u8]| code(&policy, &file(HashAlg::Sha256, "/bin/a", b"a program", signature));
    assert_eq!(signed(&ours.sign(3, 2, b"a program")), None);
    assert_eq!(signed(&theirs.sign(3, 2, b"a program")), Some(Code::ImaSignatureKey));
    assert_eq!(signed(b""), Some(Code::ImaUnknownFile));
    assert_eq!(signed(b"\x01digest"), Some(Code::ImaSignatureBad));
    // The other's signature under our key's name.
    let mut renamed = theirs.sign(3, 2, b"a program");
    renamed[3..7].copy_from_slice(&ours.public().ids()[0].0);
    assert_eq!(signed(&renamed), Some(Code::ImaSignatureBad));
    // The header says another algorithm than the digest has.
    let mut other = ours.sign(3, 2, b"a program");
    other[2] = number(HashAlg::Sha512);
    assert_eq!(signed(&other), Some(Code::ImaSignatureBad));
    // Portable signatures of EVM are over what no list has; that is said.
    let evm = ours.sign(5, 2, b"a program");
    let raw = file(HashAlg::Sha256, "/bin/a", b"a program", &evm);
    let entry = Entry::parse(&raw, 20).unwrap();
    let opinion = Judge::new(&policy.host.ima).judge(&entry, || Sha256::ZERO).unwrap();
    assert_eq!(opinion.finding.as_ref().unwrap().code, Code::ImaUnknownFile);
    assert!(opinion.unchecked.words().any(|what| what.contains("EVM")));
    assert!(opinion.unchecked.words().all(|what| !what.contains("modsig")));
}

#[test]
fn sha1_is_not_signed() {
    let Key::Rsa(rsa) = Key::all().into_iter().next().unwrap() else { panic!("the first is RSA") };
    let key = Key::Rsa(rsa);
    let policy = with_keys(&[&key], "");
    let Key::Rsa(rsa) = &key else { panic!("it is") };
    let mut raw = vec![0; 256];
    rsa.sign(&RSA_PKCS1_SHA256, &SystemRandom::new(), b"a program", &mut raw).unwrap();
    let signature = |alg| attribute(3, 2, number(alg), key.public().ids()[0], &raw);
    let one = |alg| code(&policy, &file(alg, "/bin/a", b"a program", &signature(alg)));
    assert_eq!(one(HashAlg::Sha256), None);
    let finding = found(&policy, &file(HashAlg::Sha1, "/bin/a", b"a program", &signature(HashAlg::Sha1))).unwrap();
    assert_eq!(finding.code, Code::ImaSignatureBad);
    assert!(finding.actual.unwrap().contains("SHA-1"));
}

#[test]
fn by_digest_or_by_signature_or_where_it_must_by_signature_alone() {
    let (ours, theirs) = (Key::p256(), Key::p256());
    let digest = |content: &[u8]| format!("sha256:{}", hex::encode(HashAlg::Sha256.hash(content)));
    let list = format!("[host.ima]\n\"/bin/listed\" = [\"{}\"]\n", digest(b"listed"));
    let lax = with_keys(&[&ours], &list);
    let strict = with_keys(&[&ours], &format!("ima_signed = [\"/bin/*\"]\n{list}"));
    let one = |policy: &Policy, path: &str, content: &[u8], key: Option<&Key>| {
        let signature = key.map(|key| key.sign(3, 2, content)).unwrap_or_default();
        code(policy, &file(HashAlg::Sha256, path, content, &signature))
    };
    assert_eq!(one(&lax, "/bin/listed", b"listed", None), None);
    assert_eq!(one(&lax, "/bin/listed", b"listed", Some(&theirs)), None);
    assert_eq!(one(&lax, "/bin/listed", b"newer", Some(&ours)), None);
    assert_eq!(one(&lax, "/bin/listed", b"newer", None), Some(Code::ImaWrongDigest));
    assert_eq!(one(&lax, "/bin/listed", b"newer", Some(&theirs)), Some(Code::ImaWrongDigest));
    assert_eq!(one(&lax, "/bin/other", b"other", Some(&theirs)), Some(Code::ImaSignatureKey));
    assert_eq!(one(&strict, "/bin/listed", b"listed", None), Some(Code::ImaSignatureMissing));
    assert_eq!(one(&strict, "/bin/listed", b"listed", Some(&theirs)), Some(Code::ImaSignatureKey));
    assert_eq!(one(&strict, "/bin/listed", b"listed", Some(&ours)), None);
    assert_eq!(one(&strict, "/bin/new", b"new", Some(&ours)), None);
    assert_eq!(one(&strict, "/etc/new", b"new", None), Some(Code::ImaUnknownFile));
}

#[test]
fn keys_may_be_given_another_id() {
    let key = Key::p256();
    let mut signature = key.sign(3, 2, b"a program");
    signature[3..7].copy_from_slice(&[0xde, 0xad, 0xbe, 0xef]);
    let raw = file(HashAlg::Sha256, "/bin/a", b"a program", &signature);
    assert_eq!(code(&with_keys(&[&key], ""), &raw), Some(Code::ImaSignatureKey));
    let table = format!("ima_keys = [{{ key = \"\"\"{}\"\"\", id = \"deadbeef\" }}]\n", key.public().pem());
    assert_eq!(code(&policy(&table), &raw), None);
    let wrong = Policy::parse(&format!("[host]\n{}", table.replace("deadbeef", "dead")), "p.toml").unwrap_err();
    assert!(wrong.to_string().contains("eight hexadecimal digits"), "{wrong}");
}

#[test]
fn fs_verity_digests_are_not_those_of_bytes() {
    let hex = "11".repeat(32);
    let one = |listed: &str, kind: &str| {
        let policy = policy(&format!("[host.ima]\n\"/bin/a\" = [\"{listed}:{hex}\"]\n"));
        let alg = format!("{kind}sha256");
        code(&policy, &entry("ima-sigv2", &alg, &[0x11; 32], "/bin/a", b""))
    };
    assert_eq!(one("sha256", "ima:"), None);
    assert_eq!(one("ima:sha256", "ima:"), None);
    assert_eq!(one("verity:sha256", "verity:"), None);
    assert_eq!(one("sha256", "verity:"), Some(Code::ImaWrongDigest));
    assert_eq!(one("verity:sha256", "ima:"), Some(Code::ImaWrongDigest));
}

#[test]
fn buffers() {
    let cmdline = b"root=/dev/vda ro";
    let digest = hex::encode(HashAlg::Sha256.hash(cmdline));
    let empty = policy("[host.ima]\n");
    let finding = found(&empty, &buffer("kexec-cmdline", cmdline)).unwrap();
    assert_eq!(finding.code, Code::ImaBufferUnknown);
    assert!(finding.actual.unwrap().contains("root=/dev/vda ro"));
    for content in ["root=/dev/vda ro", &format!("sha256:{digest}")] {
        let known = policy(&format!("[host.ima_buf]\nkexec-cmdline = [\"{content}\"]\n"));
        assert_eq!(code(&known, &buffer("kexec-cmdline", cmdline)), None);
        let other = found(&known, &buffer("kexec-cmdline", b"root=/dev/vdb ro")).unwrap();
        assert_eq!(other.code, Code::ImaBufferDigest);
        assert!(other.expected.unwrap().contains(content));
        assert_eq!(code(&known, &buffer("selinux-state", b"x")), Some(Code::ImaBufferUnknown));
        // Files are another matter, of which this rule says nothing.
        assert_eq!(code(&known, &file(HashAlg::Sha256, "/bin/a", b"a", b"")), None);
    }
    // Listed in another algorithm than the policy's digest has.
    let sha512 = entry("ima-buf", "sha512", &HashAlg::Sha512.hash(cmdline), "kexec-cmdline", cmdline);
    assert_eq!(code(&policy(&format!("[host.ima_buf]\nkexec-cmdline = [\"sha256:{digest}\"]\n")), &sha512), None);
    // Nothing is said of lists.
    assert_eq!(code(&policy(""), &buffer("kexec-cmdline", cmdline)), None);
    let why = Policy::parse("[host.ima_buf]\nkexec-cmdline = [\"sha256:12\"]\n", "p.toml").unwrap_err().to_string();
    assert!(why.contains("sha256:12"), "{why}");
}

#[test]
fn a_buffer_that_is_not_what_was_hashed() {
    let lie = entry("ima-buf", "sha256", &HashAlg::Sha256.hash(b"root=/dev/vda"), "kexec-cmdline", b"root=/dev/vdb");
    // Also where nothing is said of buffers, or not to be judged.
    for rule in ["", "ima_ignore = [\"kexec-*\"]\n", "[host.ima_buf]\nkexec-cmdline = [\"root=/dev/vdb\"]\n"] {
        assert_eq!(code(&policy(rule), &lie), Some(Code::ImaMalformed), "{rule}");
    }
    // A digest that cannot be computed here.
    let other = entry("ima-buf", "sm3-256", &[1; 32], "kexec-cmdline", b"x");
    assert_eq!(code(&policy(""), &other), Some(Code::ImaMalformed));
    // A file listed under the template of buffers, whose data have the same layout.
    let ignored = policy("ima_ignored_keyrings = [\"*\"]\n[host.ima]\n");
    let renamed = |signature: &[u8]| {
        let raw = file(HashAlg::Sha256, "/tmp/evil", b"evil", signature);
        [&raw[..28], b"ima-buf", &raw[35..]].concat()
    };
    assert_eq!(code(&ignored, &renamed(b"")), Some(Code::ImaMalformed));
    assert_eq!(code(&ignored, &renamed(b"evil")), Some(Code::ImaBufferUnknown));
    // And a buffer under that of files.
    let raw = buffer("kexec-cmdline", b"root=/dev/vdb");
    let renamed = [&raw[..28], b"ima-sig", &raw[35..]].concat();
    assert_eq!(code(&ignored, &renamed), Some(Code::ImaUnknownFile));
}

#[test]
fn keyrings() {
    let digest = hex::encode(HashAlg::Sha256.hash(b"a certificate"));
    let rule = format!("[host.ima_keyrings]\n\".ima\" = [\"sha256:{digest}\"]\n");
    let known = policy(&rule);
    assert_eq!(code(&known, &buffer(".ima", b"a certificate")), None);
    assert_eq!(code(&known, &buffer(".ima", b"another")), Some(Code::ImaKey));
    assert_eq!(code(&known, &buffer(".platform", b"a certificate")), Some(Code::ImaKey));
    let some = policy(&format!("ima_ignored_keyrings = [\".platform\"]\n{rule}"));
    assert_eq!(code(&some, &buffer(".platform", b"anything")), None);
    assert_eq!(code(&some, &buffer(".ima", b"another")), Some(Code::ImaKey));
    let all = policy("ima_ignored_keyrings = [\"*\"]\n[host.ima]\n");
    assert_eq!(code(&all, &buffer(".ima", b"another")), None);
    assert_eq!(code(&all, &buffer("_evm", b"another")), None);
    // All keyrings, not all buffers.
    assert_eq!(code(&all, &buffer("kexec-cmdline", b"x")), Some(Code::ImaBufferUnknown));
}

#[test]
fn excludes_begin_where_the_path_begins() {
    let excluded = |expression: &str, path: &str| {
        let rule = format!("ima_exclude = ['''{expression}''', '''/never''']\n[host.ima]\n");
        code(&policy(&rule), &file(HashAlg::Sha256, path, b"x", b"")).is_none()
    };
    assert!(excluded("/var/log", "/var/log/syslog") && excluded("/var/log", "/var/logger"));
    assert!(!excluded("/log", "/var/log/syslog"));
    assert!(excluded(".*/log", "/var/log/syslog"));
    assert!(excluded("/a$", "/a") && !excluded("/a$", "/ab"));
    // An alternative does not leave the anchor behind.
    assert!(!excluded("/x|log", "/var/log") && excluded("/x|/var", "/var/log"));
    let why = Policy::parse("[host]\nima_exclude = [\"/a\", \"b)|(c\"]\n", "p.toml").unwrap_err().to_string();
    assert!(why.contains("b)|(c"), "{why}");
}

#[test]
fn signatures_are_wanted_without_a_key() {
    for text in ["[host]\nima_signed = [\"/*\"]\n", "[[vm]]\nname = \"a\"\nima_signed = [\"/*\"]\n"] {
        assert!(Policy::parse(text, "p.toml").unwrap_err().to_string().contains("ima_keys"));
    }
}

#[test]
fn guests_lists_too() {
    let key = Key::p256();
    let mut world = World::with_two_vms();
    let signed = file(HashAlg::Sha256, "/opt/new", b"new", &key.sign(3, 2, b"new"));
    world.entries(1, 1, &[onequote_evidence::id::Blob(signed)]);
    assert_eq!(vm_codes(&world.round(), "web"), [Code::ImaUnknownFile]);
    let keys = format!("ima_keys = ['''{}''']\nruntime =", key.public().pem());
    world.policy = Some(POLICY.replacen("runtime =", &keys, 1));
    let appraisal = world.round();
    assert!(appraisal.verdict.all_trusted(), "{:#?}", appraisal.verdict.vms);
    let modsig = [
        block(b"sha256:\0\x22\x22\x22\x22\x22\x22\x22\x22\x22\x22\x22\x22\x22\x22\x22\x22\x22\x22\x22\x22\x22\x22\x22\x22\x22\x22\x22\x22\x22\x22\x22\x22"),
        block(b"/lib/modules/a.ko\0"),
        block(b""),
        block(&[b"sha256:\0".as_slice(), &[3; 32]].concat()),
        block(b"a PKCS #7 signature"),
    ]
    .concat();
    let raw = [&10_u32.to_le_bytes(), HashAlg::Sha1.hash(&modsig).as_slice(), &block(b"ima-modsig"), &block(&modsig)]
        .concat();
    world.entries(1, 1, &[onequote_evidence::id::Blob(raw)]);
    let appraisal = world.round();
    assert_eq!(vm_codes(&appraisal, "web"), [Code::ImaUnknownFile]);
    let said = appraisal.verdict.skipped.iter().any(|s| s.check == "guest-ima" && s.reason.contains("ima-modsig"));
    assert!(said, "{:#?}", appraisal.verdict.skipped);
}

#[test]
fn buffers_and_keys_are_learned_as_such() {
    let mut world = World::with_two_vms();
    let entries = [buffer("kexec-cmdline", b"root=/dev/vda"), buffer(".ima", b"a certificate")];
    world.entries(1, 1, &entries.map(onequote_evidence::id::Blob));
    assert_eq!(vm_codes(&world.round(), "web"), [Code::ImaBufferUnknown, Code::ImaKey]);
    let facts = world.round().facts.unwrap();
    let text = crate::policy::learn::propose(&facts);
    assert!(text.contains("[vm.ima_buf]\n\"kexec-cmdline\"") && text.contains("[vm.ima_keyrings]\n\".ima\""), "{text}");
    world.policy = Some(text);
    assert!(world.round().verdict.all_trusted());
}
