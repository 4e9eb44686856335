//! The programs of proxy and QEMU against the host's IMA list; what is done to that list.

use onequote_evidence::{
    event::{EventBody, ProxyStart},
    id::{Blob, Sha256},
    ima::{Aggregate, Entry},
};

use super::*;
use crate::policy::learn;

const PROXY: &str = "/usr/bin/onequote-proxy";

/// Where the QEMU of every VM here is.
const QEMU: &str = "/vm/qemu-binary";

/// The entry that comes first: over ten registers of zeros.
fn boot() -> Blob {
    let zeros = [[0; 32]; 10].concat();
    ima_entry_of("boot_aggregate", onequote_evidence::digest::sha256(&[&zeros]).as_bytes(), false)
}

/// Has the host measure so.
fn measures(world: &mut World, files: &[(&str, u8)]) {
    let entries: Vec<Blob> = files.iter().map(|(path, n)| ima_entry(path, *n)).collect();
    let list: Vec<Blob> = std::iter::once(boot()).chain(entries).collect();
    let mut aggregate = Aggregate::EMPTY;
    list.iter().for_each(|blob| aggregate.push(&Entry::parse(&blob.0, 20).unwrap()));
    world.pcrs.insert(10, aggregate.value);
    world.host_ima = list.into_iter().flat_map(|blob| blob.0).collect();
}

fn first_start(world: &World) -> ProxyStart {
    let EventBody::ProxyStart(start) = world.records[0].events().unwrap()[0].body.clone() else { panic!("a start") };
    start
}

/// A host without VMs that has a policy.
fn bare(policy: &str) -> World {
    let mut world = World::new();
    world.policy = Some(format!("[host]\n{policy}"));
    world
}

/// The proxy is started again, as this program.
fn restart(world: &mut World, path: &str, n: u8) {
    let start = ProxyStart { binary: Some(digest(n)), path: Some(path.into()), ..first_start(world) };
    world.log(12, None, start);
}

#[test]
fn programs_are_those_that_the_host_measured() {
    let mut world = World::with_two_vms();
    measures(&mut world, &[("/sbin/init", 1), (PROXY, 8), (QEMU, 0)]);
    let appraisal = world.round();
    assert!(appraisal.verdict.all_trusted(), "{:#?}", appraisal.verdict);

    measures(&mut world, &[("/sbin/init", 1), (QEMU, 0)]);
    let finding = only(&world.round()).clone();
    assert_eq!((finding.code, finding.item.as_str()), (Code::ProxyUnlisted, "proxy-start in record 0"));
    assert!(finding.actual.unwrap().starts_with(PROXY) && finding.expected.is_none());
    measures(&mut world, &[("/tmp/proxy", 8), (QEMU, 0)]);
    let finding = only(&world.round()).clone();
    assert_eq!(finding.code, Code::ProxyUnlisted);
    assert!(finding.expected.unwrap().contains("/tmp/proxy"));
    measures(&mut world, &[(PROXY, 9), (QEMU, 0)]);
    assert_eq!(host_codes(&world.round()), [Code::ProxyUnlisted, Code::ProxyReplaced]);

    measures(&mut world, &[(PROXY, 8), (QEMU, 1)]);
    let appraisal = world.round();
    assert_eq!(vm_codes(&appraisal, "web"), [Code::QemuUnlisted]);
    assert_eq!(vm_codes(&appraisal, "db"), [Code::QemuUnlisted]);
    assert_eq!(appraisal.verdict.host.state, State::Trusted);
    world.policy = Some(POLICY.replacen("[host]", "[host]\nunlisted_programs = \"allowed\"", 1));
    let appraisal = world.round();
    assert!(appraisal.verdict.all_trusted(), "{:#?}", appraisal.verdict);
    assert!(appraisal.verdict.skipped.iter().any(|skipped| skipped.check == "host-programs"));
}

#[test]
fn a_program_that_was_replaced_or_has_spaces_is_still_that_program() {
    let mut world = bare("");
    measures(&mut world, &[("/opt/one_quote/proxy", 8)]);
    let start = first_start(&world);
    world.records.clear();
    let path = Some("/opt/one quote/proxy (deleted)".into());
    world.log(12, None, ProxyStart { path, ..start.clone() });
    assert_eq!(world.round().verdict.host.findings, []);
    world.records.clear();
    world.state = crate::appraise::state::HostState::default();
    world.log(12, None, ProxyStart { path: None, binary: None, ..start });
    assert_eq!(host_codes(&world.round()), [Code::ProxyUnlisted]);
}

#[test]
fn a_proxy_that_was_replaced() {
    let mut world = bare("");
    measures(&mut world, &[(PROXY, 8)]);
    assert_eq!(world.round().verdict.host.findings, []);
    // Somebody runs another program in its place; the log says nothing of it, or lies.
    measures(&mut world, &[(PROXY, 8), (PROXY, 9)]);
    let finding = only(&world.round()).clone();
    assert_eq!((finding.code, finding.item.as_str()), (Code::ProxyReplaced, PROXY));
    assert!(finding.actual.unwrap().contains("0909"));
    // The other program came first and is gone: good again, which the list does not show.
    measures(&mut world, &[(PROXY, 9), (PROXY, 8)]);
    assert_eq!(only(&world.round()).code, Code::ProxyReplaced);
    // The new program says so itself.
    restart(&mut world, PROXY, 9);
    let finding = only(&world.round()).clone();
    assert!(finding.code == Code::ProxyReplaced && finding.actual.unwrap().contains("0808"), "the first one now");
    // The operator wanted it.
    let both = |keys: &str| keys.replace("{8}", &"08".repeat(32)).replace("{9}", &"09".repeat(32));
    for policy in [
        "proxy = [\"sha256:{8}\", \"sha256:{9}\"]",
        "[host.ima]\n\"/usr/bin/onequote-proxy\" = [\"sha256:{8}\", \"{9}\"]",
    ] {
        world.policy = Some(format!("[host]\n{}", both(policy)));
        assert_eq!(world.round().verdict.host.findings, [], "{policy}");
    }
    world.policy = Some(format!("[host]\n{}", both("proxy = [\"sha256:{9}\"]")));
    assert_eq!(host_codes(&world.round()), [Code::ProxyBinary, Code::ProxyReplaced]);
    // The policy knows the old one only: then it is the new one that is found.
    world.policy = Some(format!("[host]\n{}", both("proxy = [\"sha256:{8}\"]")));
    let appraisal = world.round();
    assert_eq!(host_codes(&appraisal), [Code::ProxyBinary, Code::ProxyReplaced]);
    assert!(appraisal.verdict.host.findings[1].actual.as_ref().unwrap().contains("0909"));
    world.policy = Some(format!("[host]\n{}", both("[host.ima]\n\"/usr/bin/onequote-proxy\" = [\"sha256:{9}\"]")));
    assert_eq!(host_codes(&world.round()), [Code::ProxyReplaced, Code::ImaWrongDigest]);
}

#[test]
fn a_proxy_that_is_started_from_elsewhere() {
    let mut world = bare("");
    measures(&mut world, &[(PROXY, 8), ("/tmp/proxy", 9)]);
    restart(&mut world, "/tmp/proxy", 9);
    let finding = only(&world.round()).clone();
    assert_eq!((finding.code, finding.item.as_str()), (Code::ProxyReplaced, "proxy-start in record 0"));
    assert!(finding.actual.unwrap().contains("0808"));
}

#[test]
fn the_proxys_program_is_judged_without_a_list_too() {
    let mut world = bare(&format!("proxy = [\"sha256:{}\"]", "08".repeat(32)));
    assert_eq!(world.round().verdict.host.findings, []);
    world.policy = Some(world.policy.unwrap().replace("08", "09"));
    assert_eq!(only(&world.round()).code, Code::ProxyBinary);
    world.policy = None;
    let learned = learn::propose(&world.round().facts.unwrap());
    assert!(learned.contains(&format!("proxy = [\"sha256:{}\"] # {PROXY}", "08".repeat(32))), "{learned}");
}

#[test]
fn a_list_in_another_algorithm_is_said_not_to_be_compared() {
    let mut world = bare("");
    measures(&mut world, &[]);
    let appraisal = world.round();
    // The boot aggregate alone is in SHA-256, and is no program.
    assert_eq!(host_codes(&appraisal), [Code::ProxyUnlisted]);
    let block = |bytes: &[u8]| [&(bytes.len() as u32).to_le_bytes(), bytes].concat();
    let data = [block(&[b"sha1:\0", [7; 20].as_slice()].concat()), block(b"boot_aggregate\0")].concat();
    let hash = onequote_evidence::digest::HashAlg::Sha1.hash(&data);
    let entry = [&10_u32.to_le_bytes(), hash.as_slice(), &block(b"ima-ng"), &block(&data)].concat();
    let mut aggregate = Aggregate::EMPTY;
    aggregate.push(&Entry::parse(&entry, 20).unwrap());
    world.pcrs.insert(10, aggregate.value);
    world.host_ima = entry;
    let appraisal = world.round();
    assert_eq!(appraisal.verdict.host.findings, []);
    assert!(appraisal.verdict.skipped.iter().any(|skipped| skipped.check == "host-programs"));
}

#[test]
fn a_truncated_or_altered_list_does_not_replay() {
    let mut world = World::with_two_vms();
    let files = [("/sbin/init", 1), (PROXY, 8), (QEMU, 0), ("/tmp/evil", 66)];
    measures(&mut world, &files);
    let (whole, register) = (world.host_ima.clone(), world.pcrs[&10]);
    // Without its last entries, whole as it is.
    for kept in 0..files.len() {
        measures(&mut world, &files[..kept]);
        world.pcrs.insert(10, register);
        assert_eq!(only(&world.round()).code, Code::HostImaReplay, "{kept} entries");
    }
    // Entries left out, in another order, or with another path and a fresh template hash.
    for altered in [
        [files[0], files[1], files[2], files[2]].as_slice(),
        &[files[0], files[1], files[3], files[2]],
        &[files[1], files[2], files[3]],
        &[files[0], files[1], files[2], ("/bin/evil", 66)],
        &[files[0], files[1], files[2], ("/tmp/evil", 1)],
    ] {
        measures(&mut world, altered);
        world.pcrs.insert(10, register);
        assert_eq!(only(&world.round()).code, Code::HostImaReplay);
    }
    // Another entry's bytes under the register of the true list, with no list at all, and longer than the quote.
    world.host_ima.clear();
    assert_eq!(only(&world.round()).code, Code::HostImaMissing);
    world.host_ima = [whole.as_slice(), &ima_entry("/bin/later", 7).0].concat();
    assert!(world.round().verdict.all_trusted(), "a list may run ahead");
    world.pcrs.insert(10, Sha256([1; 32]));
    assert_eq!(only(&world.round()).code, Code::HostImaReplay);
}

#[test]
fn violations_and_entries_of_other_registers_replay() {
    let mut world = bare("unlisted_programs = \"allowed\"\n");
    let violation = ima_entry_of("/var/log/x", &[0; 32], true);
    let mut elsewhere = ima_entry("/dev/other", 5);
    elsewhere.0[0] = 11;
    let mut aggregate = Aggregate::EMPTY;
    for counted in [&boot(), &violation] {
        aggregate.push(&Entry::parse(&counted.0, 20).unwrap());
    }
    world.pcrs.insert(10, aggregate.value);
    world.host_ima = [boot(), elsewhere, violation].into_iter().flat_map(|blob| blob.0).collect();
    assert_eq!(world.round().verdict.host.findings, []);
    // A rule about files makes it a finding, also where the policy knows the file; ima_ignore takes it away.
    let list = format!("[host.ima]\n\"/var/log/x\" = [\"sha256:{}\"]\n", "00".repeat(32));
    world.policy = Some(format!("[host]\nunlisted_programs = \"allowed\"\n{list}"));
    assert_eq!(only(&world.round()).code, Code::ImaViolation);
    world.policy = Some(format!("[host]\nunlisted_programs = \"allowed\"\nima_ignore = [\"/var/log/*\"]\n{list}"));
    assert_eq!(world.round().verdict.host.findings, []);
}
