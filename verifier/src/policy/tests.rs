//! Strictness, and what rules mean.

use onequote_evidence::{
    digest::{FileDigest, sha256},
    event::{GapReason, Role},
    id::Sha256,
};

use super::*;

const D1: &str = "sha256:1111111111111111111111111111111111111111111111111111111111111111";

fn error(text: &str) -> String {
    Policy::parse(text, "p.toml").unwrap_err().to_string()
}

#[test]
fn a_whole_policy() {
    let text = format!(
        r#"
[host]
registers = {{ "0" = "{zero}", "7" = ["{zero}"] }}
accept_gaps = ["proxy-down"]
[[vm]]
name = "web-?"
kernel = ["{D1}"]
kernel_cmdline = ["console=ttyS0"]
firmware = "any"
runtime = "required"
[vm.images]
disk0 = {{ continuity = true }}
"disk0/1" = {{ digests = ["{D1}"] }}
[vm.ima]
"/bin/sh" = ["{D1}"]
[[vm]]
uuid = "00000000-0000-0000-0000-000000000001"
"#,
        zero = Sha256::ZERO
    );
    let policy = Policy::parse(&text, "p.toml").unwrap();
    assert!(policy.host.accept_gaps.contains(&GapReason::ProxyDown));
    let id: VmId = "00000000-0000-0000-0000-000000000001".parse().unwrap();
    let other: VmId = "00000000-0000-0000-0000-000000000002".parse().unwrap();
    assert_eq!(policy.rule("web-1", id).unwrap().0, 0);
    assert_eq!(policy.rule("db", id).unwrap().0, 1);
    assert!(policy.rule("web-12", other).is_none());
    let rule = &policy.vms[0];
    assert_eq!(rule.allowed(Role::Firmware), &Allowed::Any);
    assert_eq!(rule.allowed(Role::Initrd), &Allowed::Digests(Vec::new()));
    let Allowed::Digests(lines) = rule.allowed(Role::KernelCmdline) else { panic!("a list") };
    assert_eq!(lines[0].digest, FileDigest::sha256(sha256(&[b"console=ttyS0"])));
    let ima = rule.ima.allow.as_ref().unwrap();
    assert_eq!(ima.judge(b"/bin/sh", "sha256", &[0x11; 32]), Judgement::Allowed);
    assert!(matches!(ima.judge(b"/bin/sh", "sha1", &[0x11; 20]), Judgement::WrongDigest(_)));
    assert_eq!(ima.judge(b"/tmp/sh", "sha256", &[0x11; 32]), Judgement::UnknownFile(Some(b"/bin/sh")));
}

#[test]
fn mistakes_are_told_with_their_place() {
    let e = error("[host]\nregistres = {}\n");
    assert!(e.contains("p.toml") && e.contains("registres") && e.contains("line 2"), "{e}");
    let e = error("[[vm]]\nname = \"a\"\nkernel = [\"sha256:12\"]\n");
    assert!(e.contains("sha256:12") && e.contains("line 3"), "{e}");
    assert!(error("[[vm]]\nkernel = \"any\"\n").contains("either name or uuid"));
    assert!(error("[host]\nregisters = { \"24\" = \"00\" }\n").contains("24"));
    assert!(error("[host]\npcr_vm = 13\n").contains("two registers"));
    assert!(error("[[vm]]\nname = \"a\"\nimages = { d = {} }\n").contains("continuity"));
    assert!(error("[[vm]]\nname = \"a\"\nruntime = \"maybe\"\n").contains("maybe"));
    assert!(error("[[vm]]\nname = \"a\"\n[vm.ima]\n\"/x\" = [\"zz\"]\n").contains("zz"));
}

#[test]
fn allow_lists_come_from_files_too() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("p.toml");
    std::fs::write(dir.path().join("web.toml"), format!("\"/bin/a\" = [\"{D1}\"]\n")).unwrap();
    std::fs::write(&path, "[[vm]]\nname = \"a\"\nima_file = \"web.toml\"\n").unwrap();
    let (policy, text) = Policy::load(&path).unwrap();
    assert_eq!(policy.vms[0].ima.allow.as_ref().unwrap().len(), 1);
    assert_eq!(Policy::parse(&text, "stored").unwrap().vms[0].ima.allow.as_ref().unwrap().len(), 1);
    let two = "[[vm]]\nname = \"a\"\nima_file = [\"web.toml\", \"more.toml\"]\n";
    let other = D1.replace('1', "2");
    std::fs::write(dir.path().join("more.toml"), format!("\"/bin/a\" = [\"{other}\"]\n\"/b\" = [\"{D1}\"]\n")).unwrap();
    std::fs::write(&path, two).unwrap();
    let list = Policy::load(&path).unwrap().0.vms.remove(0).ima.allow.unwrap();
    assert_eq!(list.len(), 2);
    for byte in [0x11, 0x22] {
        assert_eq!(list.judge(b"/bin/a", "sha256", &[byte; 32]), Judgement::Allowed);
    }
    std::fs::write(dir.path().join("web.toml"), "x = 1").unwrap();
    assert!(Policy::load(&path).unwrap_err().to_string().contains("web.toml"));
    std::fs::write(&path, "[[vm]]\nname = \"a\"\nima_file = \"none.toml\"\n").unwrap();
    assert!(Policy::load(&path).unwrap_err().to_string().contains("none.toml"));
}

#[test]
fn patterns() {
    for (pattern, text, fits) in [
        ("*", "", true),
        ("a*b", "ab", true),
        ("a*b", "axxbxb", true),
        ("a*b", "axxbx", false),
        ("?", "", false),
        ("/var/*", "/var/log/x", true),
        ("web", "web1", false),
    ] {
        assert_eq!(Pattern(pattern.into()).fits(text), fits, "{pattern} {text}");
    }
}

#[test]
fn keys_of_a_measurement_list_are_as_strict_as_all_others() {
    let e = error("[host]\nima_ignor = []\n");
    assert!(e.contains("`ima_ignor`") && e.contains("`ima_ignore`") && e.contains("line 2"), "{e}");
    let e = error("[[vm]]\nname = \"a\"\nima_signd = []\n");
    assert!(e.contains("`ima_signd`") && e.contains("line 3"), "{e}");
    let e = error("[[vm]]\nname = \"a\"\nima_ignore = []\nrunntime = \"required\"\n");
    assert!(e.contains("`runntime`") && e.contains("line 4"), "{e}");
    // A value that is wrong: its own line.
    let e = error("[host]\npcr_vm = 12\nima_ignore = 7\n");
    assert!(e.contains("line 3") && e.contains("7"), "{e}");
    let e = error("[host]\nima_exclude = [\"(\"]\n");
    assert!(e.contains("line 2") && e.contains("regular expression"), "{e}");
    assert!(error("[host]\nima_ignore = []\nima_ignore = []\n").contains("duplicate"));
    // Each key is the rule's, whichever stands first.
    let policy = Policy::parse("[host]\nima_ignore = [\"/a\"]\npcr_vm = 11\nima_signed = []\n", "p.toml").unwrap();
    assert!(policy.host.pcr_vm == 11 && policy.host.ima.ignores("/a"));
}
