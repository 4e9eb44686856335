//! What other people's tools say of our evidence: tpm2-tools of the quote, ima-evm-utils of a guest's list.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use onequote_evidence::ima::{Aggregate, ListReader, SHA1_HASH_SIZE};
use onequote_evidence::statement::Statement;
use onequote_evidence::stream::{self, Evidence};
use onequote_tests::lab::{Guest, Machine, Peer, VmSpec, World};

const LIMIT: Duration = Duration::from_secs(120);

/// Runs a program. Its exit code is success or not, its words are both outputs together.
fn run(program: &str, arguments: &[&str]) -> Result<(bool, String)> {
    let output = Command::new(program).args(arguments).output().with_context(|| format!("{program} is missing"))?;
    let words = [output.stdout, output.stderr].concat();
    Ok((output.status.success(), String::from_utf8_lossy(&words).into_owned()))
}

fn check_quote(folder: &Path, qualifying: &str) -> Result<(bool, String)> {
    let file = |name: &str| folder.join(name).display().to_string();
    let (key, attest, signature) = (file("ak.pub"), file("quote.attest"), file("quote.signature"));
    run("tpm2_checkquote", &["-u", &key, "-m", &attest, "-s", &signature, "-g", "sha256", "-q", qualifying])
}

#[test]
fn tpm2_tools_accept_our_quote_with_the_data_that_we_print() {
    World::test(|world| {
        world.start_enrolled()?;
        let _bare = world.start_bare("bare", &[])?;
        let peer = Peer::start(world.guest_socket("bare"), Guest::new(8));
        peer.grow_at_collect(7);
        world.wait_until("the guest", LIMIT, |_| Ok((peer.connections() > 0).then_some(())))?;

        let saved = world.folder().join("evidence");
        world.verifier(&["attest", World::HOST, "--save", &saved.to_string_lossy()])?;
        ensure!(saved.exists(), "no evidence was saved");
        let key = world.proxy_state().join("ak.pub");
        let folder = world.folder().join("export");
        let verified = world.verifier(&[
            "verify",
            &saved.to_string_lossy(),
            "--ak",
            &key.to_string_lossy(),
            "--export",
            &folder.to_string_lossy(),
        ])?;
        let printed = verified.output.lines().find_map(|line| line.strip_prefix("qualifying data")).map(str::trim);
        let printed = printed.with_context(|| format!("no qualifying data in {verified:?}"))?;
        ensure!(fs::read_to_string(folder.join("quote.qualifying"))?.trim() == printed);

        let (good, words) = check_quote(&folder, printed)?;
        ensure!(good, "tpm2_checkquote refuses our quote: {words}");

        // It does look at it.
        let mut other = printed.to_owned();
        other.replace_range(0..1, if printed.starts_with('0') { "1" } else { "0" });
        let (good, words) = check_quote(&folder, &other)?;
        ensure!(!good, "tpm2_checkquote takes any qualifying data: {words}");
        let mut attest = fs::read(folder.join("quote.attest"))?;
        *attest.last_mut().context("an empty attest structure")? ^= 1;
        fs::write(folder.join("quote.attest"), attest)?;
        let (good, words) = check_quote(&folder, printed)?;
        ensure!(!good, "tpm2_checkquote takes any attest structure: {words}");
        Ok(())
    });
}

#[test]
fn vm_evmctl_replays_an_exported_list_to_our_virtual_pcr_10() {
    World::test(|world| {
        world.start_enrolled()?;
        let vm = world.add_vm(VmSpec::new("guest", Machine::Microvm))?;
        vm.start()?;
        vm.wait_ready()?;
        vm.write_program("/disk/bin/new", "exit 0")?;
        vm.run("/disk/bin/new")?;
        world.wait_until("the new program's entry", LIMIT, |world| {
            let list = world.proxy_export("guest").unwrap_or_default();
            Ok(String::from_utf8_lossy(&list).contains("/disk/bin/new").then_some(()))
        })?;

        let saved = world.folder().join("evidence");
        world.verifier(&["attest", World::HOST, "--save", &saved.to_string_lossy()])?;
        let evidence = Evidence::parse(&stream::expand(&fs::read(&saved)?, stream::MAX_EXPANDED)?)?;
        let statement = Statement::parse(&evidence.head.statement.0)?;
        let vm = statement.vms.first().context("no VM in the statement")?;
        let boot = vm.boots.last().context("no boot of the guest in the statement")?;

        // The guest runs on and may have added to its list: what the statement speaks of are the first entries.
        let mut list = world.proxy_export("guest")?;
        let mut reader = ListReader::new(&list, SHA1_HASH_SIZE);
        let mut own = Aggregate::EMPTY;
        for entry in reader.by_ref().take(usize::try_from(boot.count)?) {
            own.push(&entry?);
        }
        let end = reader.offset();
        list.truncate(end);
        ensure!(own.value == boot.aggregate, "the exported list is not the stated one");
        let file = world.folder().join("guest.ima");
        fs::write(&file, list)?;

        let (good, words) = evmctl(&file, &boot.aggregate.to_string())?;
        ensure!(good, "evmctl comes to another value than {}: {words}", boot.aggregate);
        let result = format!("PCRAgg  10: {}", boot.aggregate);
        let reached = format!("PCR-10: succeed at entry {}\n", boot.count);
        ensure!(
            words.contains(&result) && words.contains(&reached),
            "evmctl does not say {result}, {reached}: {words}"
        );
        eprintln!("{} entries: evmctl and we come to {}", boot.count, boot.aggregate);
        let (good, words) = evmctl(&file, &"ab".repeat(32))?;
        ensure!(!good, "evmctl takes any value: {words}");
        Ok(())
    });
}

/// Lets evmctl replay a list and compare with a value for PCR 10 of the SHA-256 bank.
fn evmctl(list: &Path, value: &str) -> Result<(bool, String)> {
    let registers = list.with_extension("pcrs");
    let lines: String = (0..24)
        .map(|pcr| match pcr {
            10 => format!("PCR-10: {value}\n"),
            _ => format!("PCR-{pcr:02}: {}\n", "00".repeat(32)),
        })
        .collect();
    fs::write(&registers, lines)?;
    let registers = format!("sha256,{}", registers.display());
    run("evmctl", &["-v", "ima_measurement", "--pcrs", &registers, "--verify-bank=sha256", &list.display().to_string()])
}
