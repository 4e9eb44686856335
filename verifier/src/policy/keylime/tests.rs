//! Policies in the form that Keylime's tools write, whole and broken.

use std::{io::Write as _, process::Stdio};

use aws_lc_rs::{
    encoding::{AsDer as _, PublicKeyX509Der},
    rand::SystemRandom,
    signature::{ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair, KeyPair as _},
};
use serde_json::{Value, json};

use super::{excludes::translate, *};
use crate::policy::{Judgement, Policy};

fn key() -> (EcdsaKeyPair, SigningKey) {
    let pair = EcdsaKeyPair::generate(&ECDSA_P256_SHA256_ASN1_SIGNING).unwrap();
    let der: PublicKeyX509Der<'_> = pair.public_key().as_der().unwrap();
    let public = SigningKey::from_der(der.as_ref()).unwrap();
    (pair, public)
}

/// As `keylime-policy create runtime` writes it.
fn policy() -> Value {
    json!({
        "meta": { "version": 1, "generator": 3, "timestamp": "2026-05-04 12:00:00.000000" },
        "release": 0,
        "digests": {
            "/usr/bin/sh": ["11".repeat(32), "22".repeat(20)],
            "/usr/bin/\"odd\"": ["33".repeat(48)],
            "boot_aggregate": ["44".repeat(32)],
        },
        "excludes": ["/var/log/.*", "/tmp/", r"/home/[^/]+/\.cache", "boot_aggregate"],
        "keyrings": { ".ima": ["55".repeat(32)] },
        "ima": { "ignored_keyrings": [".platform"], "log_hash_alg": "sha1", "dm_policy": null },
        "ima-buf": { "kexec-cmdline": ["66".repeat(32)] },
        "verification-keys": "",
    })
}

fn import_plain(policy: &Value) -> Result<Import, KeylimeError> {
    import(&policy.to_string(), None, false, "list.toml")
}

/// What the lines mean in a rule of each kind.
fn load(import: &Import) -> Policy {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("list.toml"), &import.list).unwrap();
    let path = dir.path().join("policy.toml");
    std::fs::write(&path, format!("[host]\n{0}\n[[vm]]\nname = \"*\"\n{0}", import.rule)).unwrap();
    let (policy, _) = Policy::load(&path).unwrap_or_else(|e| panic!("{e}\n{}\n{}", import.rule, import.list));
    policy
}

#[test]
fn a_whole_policy() {
    let import = import_plain(&policy()).unwrap();
    assert_eq!(import.authenticity, Authenticity::Plain);
    assert!(import.notes[0].contains("ima_keys"), "{:?}", import.notes);
    let loaded = load(&import);
    for rule in [&loaded.host.ima, &loaded.vms[0].ima] {
        let allow = rule.allow.as_ref().unwrap();
        assert_eq!(allow.len(), 3);
        assert_eq!(allow.judge(b"/usr/bin/sh", "sha256", &[0x11; 32]), Judgement::Allowed);
        assert_eq!(allow.judge(b"/usr/bin/sh", "sha1", &[0x22; 20]), Judgement::Allowed);
        assert!(matches!(allow.judge(b"/usr/bin/sh", "sha256", &[0x33; 32]), Judgement::WrongDigest(_)));
        assert_eq!(allow.judge(b"/usr/bin/\"odd\"", "sha384", &[0x33; 48]), Judgement::Allowed);
        for (path, ignored) in [
            ("/var/log/x", true),
            ("/tmp/x", true),
            ("/x/tmp/", false),
            ("/home/me/.cache/x", true),
            ("/home/me/you/.cache", false),
            ("/home/me/xcache", false),
            ("boot_aggregate", true),
        ] {
            assert_eq!(rule.ignores(path), ignored, "{path}");
        }
        assert_eq!(rule.buffers["kexec-cmdline"][0].to_string(), format!("sha256:{}", "66".repeat(32)));
        assert_eq!(rule.keyrings[".ima"][0].to_string(), format!("sha256:{}", "55".repeat(32)));
        assert!(rule.ignored_keyrings.len() == 1 && rule.ignored_keyrings[0].fits(".platform"));
        assert!(rule.keys.is_empty());
    }
}

#[test]
fn an_empty_policy_allows_nothing() {
    let mut empty = policy();
    for part in ["digests", "keyrings", "ima-buf"] {
        empty[part] = json!({});
    }
    empty["excludes"] = json!([]);
    empty["ima"]["ignored_keyrings"] = json!(["*"]);
    let loaded = load(&import_plain(&empty).unwrap());
    let rule = &loaded.host.ima;
    assert!(rule.judges_files() && rule.allow.as_ref().unwrap().is_empty() && !rule.ignores("/tmp/x"));
    assert!(rule.ignored_keyrings[0].fits(".anything"));
}

#[test]
fn keys_come_with_their_ids() {
    let (_, own) = key();
    let (_, other) = key();
    let encode = |key: &SigningKey| key.pem().lines().filter(|line| !line.starts_with('-')).collect::<String>();
    let own_id = u32::from_be_bytes(own.ids()[0].0);
    let ring = json!({ "meta": { "version": 1 }, "keyids": [own_id, 0xdead_beef_u32], "pubkeys": [encode(&own), encode(&other)] });
    // As a text, and as a text of a text, which Keylime's database has.
    for text in [ring.to_string(), Value::String(ring.to_string()).to_string()] {
        let mut policy = policy();
        policy["verification-keys"] = json!(text);
        let loaded = load(&import_plain(&policy).unwrap());
        let keys: Vec<&SigningKey> = loaded.host.ima.keys.iter().filter_map(|entry| entry.key()).collect();
        assert_eq!(keys[0], &own);
        assert_eq!(keys[1].ids().iter().map(ToString::to_string).nth(1).unwrap(), "deadbeef");
        assert_eq!(keys[1].pem(), other.pem());
    }
    let mut wrong = policy();
    wrong["verification-keys"] = json!(json!({ "keyids": [], "pubkeys": ["AAAA"] }).to_string());
    assert!(matches!(import_plain(&wrong), Err(KeylimeError::Key { index: 0, .. })));
}

#[test]
fn what_is_not_taken_over_is_refused_by_name() {
    let refused = |change: &dyn Fn(&mut Value)| {
        let mut policy = policy();
        change(&mut policy);
        import_plain(&policy).unwrap_err().to_string()
    };
    for (change, word) in [
        (&(|p: &mut Value| p["ima"]["dm_policy"] = json!({ "version": 1 })) as &dyn Fn(&mut Value), "dm_policy"),
        (&|p| p["meta"]["version"] = json!(2), "meta.version"),
        (&|p| p["ima"]["log_hash_alg"] = json!("md5"), "log_hash_alg"),
        (&|p| p["ima"]["ignored_keyrings"] = json!([".i*"]), "ignored_keyrings"),
        (&|p| p["new-part"] = json!(1), "new-part"),
        (&|p| p["ima"]["new-part"] = json!(1), "new-part"),
        (&|p| p["digests"]["/bin/a"] = json!(["11".repeat(28)]), "/bin/a"),
        (&|p| p["digests"]["/bin/a"] = json!(["AA".repeat(32)]), "/bin/a"),
        (&|p| p["digests"]["/bin/a"] = json!([]), "/bin/a"),
        (&|p| p["keyrings"][".ima"] = json!(["zz"]), ".ima"),
        (&|p| p["excludes"] = json!(["/ok", "(?!/usr)"]), "(?!/usr)"),
        (&|p| p["excludes"] = json!([""]), "everything"),
        (
            &|p| {
                p.as_object_mut().unwrap().remove("excludes");
            },
            "excludes",
        ),
        (
            &|p| {
                p["ima"].as_object_mut().unwrap().remove("dm_policy");
            },
            "dm_policy",
        ),
    ] {
        let why = refused(change);
        assert!(why.contains(word), "{word}: {why}");
    }
    assert!(matches!(import("[", None, false, "l"), Err(KeylimeError::Json(_))));
}

fn envelope(policy: &Value, pair: &EcdsaKeyPair) -> Value {
    let (kind, payload) = ("application/vnd.keylime+json", policy.to_string());
    let message = format!("DSSEv1 {} {kind} {} {payload}", kind.len(), payload.len());
    let signature = pair.sign(&SystemRandom::new(), message.as_bytes()).unwrap();
    json!({
        "payload": STANDARD.encode(&payload),
        "payloadType": kind,
        "signatures": [{ "keyid": "a hint", "sig": STANDARD.encode(signature.as_ref()) }],
    })
}

#[test]
fn signed_policies() {
    let ((pair, public), (_, other)) = (key(), key());
    let signed = envelope(&policy(), &pair);
    let open = |envelope: &Value, key: Option<&SigningKey>, unchecked| {
        import(&envelope.to_string(), key, unchecked, "list.toml")
    };
    let import = open(&signed, Some(&public), false).unwrap();
    assert_eq!(import.authenticity, Authenticity::Signed);
    assert_eq!(load(&import).host.ima.allow.unwrap().len(), 3);
    assert!(matches!(open(&signed, None, false), Err(KeylimeError::NoKey)));
    assert!(matches!(open(&signed, Some(&other), false), Err(KeylimeError::Signature)));
    // With a key there is nothing to wave through.
    assert!(matches!(open(&signed, Some(&other), true), Err(KeylimeError::Signature)));
    let unchecked = open(&signed, None, true).unwrap();
    assert_eq!(unchecked.authenticity, Authenticity::Unchecked);
    assert!(unchecked.rule.contains("not checked") && unchecked.notes[0].contains("not checked"));
    // Another policy under the same signature; another type; no signature; a second one beside it.
    let mut changed = policy();
    changed["digests"]["/tmp/evil"] = json!(["77".repeat(32)]);
    let mut forged = signed.clone();
    forged["payload"] = json!(STANDARD.encode(changed.to_string()));
    assert!(matches!(open(&forged, Some(&public), false), Err(KeylimeError::Signature)));
    let mut typed = signed.clone();
    typed["payloadType"] = json!("application/vnd.in-toto+json");
    assert!(matches!(open(&typed, Some(&public), false), Err(KeylimeError::PayloadType { .. })));
    let mut bare = signed.clone();
    bare["signatures"] = json!([]);
    assert!(matches!(open(&bare, Some(&public), false), Err(KeylimeError::Signature)));
    let mut two = signed.clone();
    two["signatures"].as_array_mut().unwrap().insert(0, json!({ "sig": STANDARD.encode(b"of somebody else") }));
    assert!(open(&two, Some(&public), false).is_ok());
    assert!(matches!(open(&policy(), Some(&public), false), Err(KeylimeError::NotSigned)));
}

#[test]
fn a_certificate_is_a_key_too() {
    let pair = rcgen::KeyPair::generate().unwrap();
    let certificate = rcgen::CertificateParams::new(vec!["dsse".into()]).unwrap().self_signed(&pair).unwrap();
    let signer = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, &pair.serialize_der()).unwrap();
    let key = SigningKey::from_pem(&certificate.pem()).unwrap();
    let signed = envelope(&policy(), &signer).to_string();
    assert_eq!(import(&signed, Some(&key), false, "l").unwrap().authenticity, Authenticity::Signed);
}

#[test]
fn expressions_that_mean_the_same() {
    for (expression, translated) in [
        ("/var/log/.*", "/var/log/.*"),
        ("a{,3}b{2}c{1,}d{x", "a{0,3}b{2}c{1,}d\\{x"),
        (r"\<a\>\/\-", r"<a>/\-"),
        ("(a|b)(?P<n>c)(?#comment)*", "(?:a|b)(?:c)*"),
        ("[a&&b]", r"[\x{61}\x{26}\x{26}\x{62}]"),
        ("[]^-]", r"[\x{5D}\x{5E}\x{2D}]"),
        (r"[^\d\n-z]", r"[^\d\x{A}-\x{7A}]"),
        (r"\101\x41\u0041", "AAA"),
        (r"a\Z", r"a\z"),
        (r"\w+?", r"[\p{L}\p{N}_]+?"),
    ] {
        assert_eq!(translate(expression).as_deref(), Ok(translated), "{expression}");
    }
}

#[test]
fn expressions_that_are_refused() {
    for (expression, word) in [
        ("(?=a)", "look-ahead"),
        ("(?!a)", "look-ahead"),
        ("(?<=a)", "look-behind"),
        ("(?<!a)", "look-behind"),
        (r"(a)\1", "back-reference"),
        (r"(a)\18", "back-reference"),
        ("(?P<n>a)(?P=n)", "back-reference"),
        ("(?i)a", "flags"),
        ("(?i:a)", "flags"),
        ("(a)?(?(1)b|c)", "condition"),
        ("(?>a)", "atomic"),
        ("a*+", "possessive"),
        (r"\ba", "word boundary"),
        ("a**", "repeats a repeat"),
        ("*.log", "repeats nothing"),
        ("(a", "not closed"),
        ("a)", "not opened"),
        ("[a", "not closed"),
        ("[z-a]", "wrong way round"),
        (r"\Q", "not known"),
        ("a\\", "backslash"),
        ("", "everything"),
        ("a{2,1}", "repetition"),
    ] {
        let why = translate(expression).unwrap_err();
        assert!(why.contains(word), "{expression}: {why}");
    }
}

/// Asks Python what each expression means for each path; none without Python.
fn python(cases: &[(String, String)]) -> Option<Vec<Option<bool>>> {
    const PROGRAM: &str = "import json,re,sys,warnings\nwarnings.simplefilter('ignore')\nout=[]\n\
        for e,p in json.load(sys.stdin):\n try: out.append(bool(re.compile('('+e+')').match(p)))\n \
        except (re.error,OverflowError): out.append(None)\njson.dump(out,sys.stdout)\n";
    let mut command = std::process::Command::new("python3");
    let child = command.args(["-c", PROGRAM]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
    let Ok(mut child) = child else {
        eprintln!("skipped: python3 is not installed");
        return None;
    };
    child.stdin.take().unwrap().write_all(&serde_json::to_vec(cases).unwrap()).unwrap();
    let output = child.wait_with_output().unwrap();
    Some(serde_json::from_slice(&output.stdout).unwrap())
}

#[test]
fn what_is_translated_means_what_it_means_in_python() {
    // A run over 20,000 of them is how this was checked once; without optimisation that takes minutes. Pieces that are often a whole expression, and often meet where they mean something together.
    const PIECES: [&str; 58] = [
        "/", "a", "b", "é", "_", "1", " ", ".", "*", "+", "?", "{", "}", "{1}", "{1,2}", "{,2}", "{,}", "(", ")",
        "(?:", "(?P<n>", "(?#x)", "|", "^", "$", "[", "]", "[^", "-", "&&", "~~", "--", "[[", "[a-b]", "[^/]+",
        "[\\w]", "[\\D]", "\\", "\\d", "\\D", "\\s", "\\S", "\\w", "\\W", "\\.", "\\/", "\\<", "\\-", "\\A", "\\Z",
        "\\x61", "\\141", "\\0", "\\n", "\\b", "\\1", ",", "#",
    ];
    const PATHS: [&str; 12] =
        ["", "/", "/a/b", "ab", "aab/1", "a b", "é_1", "a{1}", "[a]-b", "/never", "b&&~~--", "\\<a>.#,"];
    let mut seed = 7_u64;
    let mut random = |n: usize| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (seed >> 33) as usize % n
    };
    let mut cases = Vec::new();
    for _ in 0..1_500 {
        let expression: String = (0..=random(6)).map(|_| PIECES[random(PIECES.len())]).collect();
        cases.push((expression, PATHS[random(PATHS.len())].to_owned()));
    }
    let Some(answers) = python(&cases) else { return };
    let (mut compared, mut fits) = (0, 0);
    for ((expression, path), answer) in cases.iter().zip(answers) {
        let Ok(translated) = translate(expression) else { continue };
        let answer = answer.unwrap_or_else(|| panic!("{expression:?} is none in Python, but became {translated:?}"));
        let ours = regex::Regex::new(&format!("^(?:{translated})")).unwrap().is_match(path);
        assert_eq!(ours, answer, "{expression:?} became {translated:?}, on {path:?}");
        compared += 1;
        fits += usize::from(answer);
    }
    assert!(compared > 300 && fits > 40, "{compared} compared, {fits} fit");
}
