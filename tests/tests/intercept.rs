//! Intercepted monitors: several management tools at one QEMU through the real proxy, whose log the TPM holds.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use onequote_evidence::event::{CommandOutcome, Depth, EventBody, MonitorCommand};
use onequote_tests::lab::{Bare, Loss, Qmp, TpmCommand, TpmRelay, World, python_library, skip, wait};
use serde_json::{Value, json};

const LIMIT: Duration = Duration::from_secs(90);

/// Starts an intercepting proxy and a VM that it lets run.
fn start(world: &mut World, refuse: &str) -> Result<Bare> {
    world.settings().tables = format!("\n[intercept]\nrefuse = [{refuse}]\n");
    world.start_proxy_alone()?;
    let bare = world.start_bare("bare", &[])?;
    world.wait_running("bare")?;
    Ok(bare)
}

fn commands(world: &World) -> Result<Vec<MonitorCommand>> {
    let command = |event: onequote_evidence::event::Event| match event.body {
        EventBody::MonitorCommand(body) => Some(body),
        _ => None,
    };
    Ok(world.read_log()?.events()?.into_iter().filter_map(command).collect())
}

fn refused(qmp: &mut Qmp, command: &str, arguments: &Value, words: &[&str]) -> Result<()> {
    let error =
        qmp.execute(command, arguments).err().with_context(|| format!("{command} was not refused"))?.to_string();
    for word in words {
        ensure!(error.contains(word), "the error does not say {word:?}: {error}");
    }
    Ok(())
}

fn has_node(bare: &Bare, name: &str) -> Result<bool> {
    let nodes = bare.monitor()?.execute("query-named-block-nodes", &json!({"flat": true}))?;
    Ok(nodes.as_array().is_some_and(|nodes| nodes.iter().any(|node| node["node-name"] == name)))
}

fn node(name: &str, file: &str) -> Value {
    json!({"driver": "raw", "node-name": name, "read-only": true, "file": {"driver": "file", "filename": file}})
}

#[test]
fn a_disk_is_in_log_and_tpm_before_qemu_has_it() {
    World::test(|world| {
        let bare = start(world, "")?;
        fs::write(bare.folder().join("data.img"), vec![0x33; 128 * 1024])?;
        let folder = fs::metadata(world.intercepted("bare").parent().context("a folder")?)?;
        ensure!(folder.permissions().mode() & 0o777 == 0o700, "others can reach the monitors");
        let mut tool = world.tool("bare")?;
        refused(&mut tool, "blockdev-add", &node("gone", "gone.img"), &["gone.img", "not passed"])?;
        ensure!(!has_node(&bare, "gone")?, "QEMU has a node that could not be measured");
        tool.execute("blockdev-add", &node("data", "data.img"))?;
        let events = world.read_log()?.events()?;
        let EventBody::VmCreate(create) = &events.iter().find(|e| e.body.kind() == "vm-create").context("a VM")?.body
        else {
            panic!("a kind is its body");
        };
        ensure!(create.depth == Depth::Intercept, "depth {}", create.depth);
        let logged = commands(world)?;
        let outcomes: Vec<_> = logged.iter().map(|c| (c.command.as_str(), c.outcome)).collect();
        ensure!(
            outcomes == [("blockdev-add", CommandOutcome::Unmeasurable), ("blockdev-add", CommandOutcome::Forwarded)],
            "{outcomes:?}"
        );
        let measured =
            world.proxy_command(&["measure", &bare.folder().join("data.img").to_string_lossy()])?.success()?;
        let digest = logged[1].files.first().context("the file is measured")?.digest.to_string();
        let hex = digest.split_once(':').map_or(digest.as_str(), |(_, hex)| hex);
        ensure!(measured.output.contains(hex), "another digest than {}: {digest}", measured.output);
        ensure!(has_node(&bare, "data")?, "QEMU has no such node");
        world.wait_until("what the command did to be logged behind it", LIMIT, |world| {
            let kinds: Vec<_> = world.read_log()?.events()?.iter().map(|e| e.body.kind().to_owned()).collect();
            let (last, change) =
                (kinds.iter().rposition(|k| k == "monitor-command"), kinds.iter().position(|k| k == "config-change"));
            Ok(change.filter(|&change| last.is_some_and(|last| last < change)))
        })?;
        world.end_bound()
    });
}

#[test]
fn what_the_tpm_does_not_hold_does_not_reach_qemu() {
    World::test(|world| {
        let relay = TpmRelay::start(world)?;
        let bare = start(world, "")?;
        fs::write(bare.folder().join("data.img"), vec![0x33; 64 * 1024])?;
        let mut tool = world.tool("bare")?;
        relay.lose(TpmCommand::PCR_EXTEND, Loss::Before);
        refused(&mut tool, "blockdev-add", &node("data", "data.img"), &["not passed", "log"])?;
        ensure!(!has_node(&bare, "data")?, "QEMU has what the TPM has not");
        refused(&mut tool, "stop", &json!({}), &["not passed"])?;
        ensure!(bare.run_state()? == "running", "the VM was stopped");
        relay.mend();
        world.wait_until("commands to pass again", LIMIT, |_| Ok(tool.execute("stop", &json!({})).ok()))?;
        ensure!(bare.run_state()? != "running", "the command did not arrive");
        tool.execute("blockdev-add", &node("data", "data.img"))?;
        ensure!(has_node(&bare, "data")?, "QEMU has no such node");
        world.end_bound()
    });
}

#[test]
fn two_tools_share_one_qemu_and_one_may_die() {
    World::test(|world| {
        let _bare = start(world, "")?;
        let mut first = world.tool("bare")?;
        let mut lines = Raw::connect(world)?;
        let mut dying = Raw::connect(world)?;
        lines.say(r#"{"execute": "qmp_capabilities", "arguments": {"enable": ["oob"]}, "id": "libvirt-1"}"#)?;
        ensure!(lines.line()? == json!({"return": {}, "id": "libvirt-1"}), "negotiation");
        dying.say("GET / HTTP/1.1\n{\"execute\": \"qmp_cap")?;
        ensure!(dying.line()?["error"]["class"] == "GenericError", "rubbish is answered");
        drop(dying);
        first.execute("stop", &json!({}))?;
        ensure!(lines.line()?["event"] == "STOP", "an event for both");
        lines.say(r#"{"exec-oob": "migrate-pause", "id": {"n": [1, null]}}"#)?;
        let answer = lines.line()?;
        ensure!(answer["id"] == json!({"n": [1, null]}) && answer["error"]["class"] == "GenericError", "{answer}");
        drop(first);
        lines.say(r#"{'execute': 'cont', 'id': 2.5}"#)?;
        let (one, two) = (lines.line()?, lines.line()?);
        ensure!(
            [&one, &two].iter().any(|l| l["id"] == 2.5) && [&one, &two].iter().any(|l| l["event"] == "RESUME"),
            "{one} {two}"
        );
        let names: Vec<_> = commands(world)?.into_iter().map(|c| c.command).collect();
        ensure!(names == ["stop", "migrate-pause", "cont"], "{names:?}");
        world.end_bound()
    });
}

#[test]
fn a_tool_that_does_not_read_holds_up_neither_others_nor_the_log() {
    World::test(|world| {
        let bare = start(world, "")?;
        let mut slow = Raw::connect(world)?;
        slow.say(r#"{"execute": "qmp_capabilities"}"#)?;
        let mut good = world.tool("bare")?;
        // Past the proxy, which would slow them down, come more events than sockets and queues hold.
        let mut own = bare.monitor()?;
        for n in 0..=10_000 {
            own.execute(if n % 2 == 0 { "stop" } else { "cont" }, &json!({}))?;
            if n % 50 == 0 {
                good.execute("query-status", &json!({}))?;
            }
        }
        let log = world.folder().join("log/proxy.log");
        wait::for_true("the slow tool to be ended", LIMIT, || {
            Ok(fs::read_to_string(&log)?.contains("it does not read its events"))
        })?;
        good.execute("query-status", &json!({}))?;
        world.end_bound()
    });
}

#[test]
fn forbidden_commands_are_refused_counted_and_logged() {
    World::test(|world| {
        let bare = start(world, "\"human-monitor-command\", \"snapshot-*\"")?;
        let mut tool = world.tool("bare")?;
        refused(&mut tool, "human-monitor-command", &json!({"command-line": "stop"}), &["configuration refuses"])?;
        refused(
            &mut tool,
            "snapshot-save",
            &json!({"job-id": "j", "tag": "t", "vmstate": "v", "devices": []}),
            &["snapshot-"],
        )?;
        ensure!(bare.run_state()? == "running", "the VM was stopped");
        let monitor = world.vm_status("bare")?["monitor"].clone();
        ensure!(monitor["refused"] == 2 && monitor["clients"] == 1 && monitor["commands"] == 0, "{monitor}");
        let shown = world.proxy_command(&["status"])?.success()?.output;
        ensure!(shown.contains("bare.sock") && shown.contains("refused 2"), "{shown}");
        let logged = commands(world)?;
        ensure!(logged[0].arguments == r#"{"command-line":"stop"}"# && logged.len() == 2, "{logged:?}");
        ensure!(logged.iter().all(|c| c.outcome == CommandOutcome::Refused), "{logged:?}");
        world.end_bound()
    });
}

#[test]
fn nobody_lets_a_vm_run_that_the_gate_keeps_stopped() {
    World::test(|world| {
        let references = world.folder().join("references.toml");
        fs::write(&references, "[[vm]]\nname = \"other\"\n")?;
        world.settings().enforce = Some(references);
        world.settings().tables = "\n[intercept]\n".to_owned();
        world.start_proxy_alone()?;
        let bare = world.start_bare("bare", &[])?;
        world.wait_until("the VM to be refused", LIMIT, |world| {
            Ok((world.vm_status("bare")?["stage"] == "refused").then_some(()))
        })?;
        let mut tool = world.tool("bare")?;
        for (command, arguments) in [("cont", json!({})), ("human-monitor-command", json!({"command-line": "c"}))] {
            refused(&mut tool, command, &arguments, &["not let run"])?;
        }
        ensure!(bare.run_state()? == "prelaunch", "it runs");
        tool.execute("quit", &json!({}))?;
        world.wait_gone("bare")?;
        wait::for_true("the socket to go", LIMIT, || Ok(!world.intercepted("bare").exists()))?;
        world.end_bound()
    });
}

#[test]
fn tools_find_their_socket_again_after_a_restart_of_the_proxy() {
    World::test(|world| {
        let _bare = start(world, "")?;
        let mut tool = world.tool("bare")?;
        ensure!(world.proxy()?.terminate()?.success(), "the proxy does not end well");
        ensure!(tool.execute("query-status", &json!({})).is_err(), "nobody is there");
        world.start_proxy()?;
        let mut tool = world.tool("bare")?;
        tool.execute("stop", &json!({}))?;
        ensure!(commands(world)?.len() == 1, "the command is logged");
        // It was intercepted from its start on; what could have been missed is a gap, and measured again.
        let (depth, gap) = depth_and_gap(world)?;
        ensure!(depth == "intercept" && !gap.contains("not served"), "{depth}: {gap}");
        // Whoever stops intercepting says so.
        ensure!(world.proxy()?.terminate()?.success(), "the proxy does not end well");
        world.settings().tables.clear();
        world.start_proxy()?;
        world.wait_until("the VM to be watched again", LIMIT, |world| {
            Ok((world.vm_status("bare")?["stage"] == "watched").then_some(()))
        })?;
        let (depth, gap) = depth_and_gap(world)?;
        ensure!(depth == "intercept" && gap.contains("not served to tools any more"), "{depth}: {gap}");
        world.end_bound()
    });
}

/// The depth that is shown for the VM, and the last gap that is logged of it.
fn depth_and_gap(world: &World) -> Result<(String, String)> {
    let depth = world.vm_status("bare")?["depth"].as_str().unwrap_or_default().to_owned();
    let gap = |event: onequote_evidence::event::Event| match event.body {
        EventBody::LogGap(gap) if event.vm.is_some() => Some(gap.detail),
        _ => None,
    };
    Ok((depth, world.read_log()?.events()?.into_iter().filter_map(gap).next_back().context("no gap")?))
}

#[test]
fn a_monitor_that_is_lost_is_found_again_and_served_again() {
    World::test(|world| {
        let bare = start(world, "")?;
        let mut tool = world.tool("bare")?;
        // QEMU closes the connection that the proxy holds, and listens on.
        let mut other = bare.monitor()?;
        let all = other.execute("query-chardev", &json!({}))?;
        let held = |chardev: &&Value| chardev["filename"].as_str().is_some_and(|name| name.contains("bare.qmp"));
        let label =
            all.as_array().into_iter().flatten().find(held).context("no monitor of the proxy")?["label"].clone();
        other.execute("yank", &json!({"instances": [{"type": "chardev", "id": label}]}))?;
        world.wait_until("the gap and what was measured again", LIMIT, |world| {
            let kinds: Vec<_> = world.read_log()?.events()?.iter().map(|e| e.body.kind().to_owned()).collect();
            let gap = kinds.iter().position(|kind| kind == "log-gap");
            Ok(gap.filter(|&at| kinds[at..].iter().any(|kind| kind == "vm-attach")))
        })?;
        ensure!(tool.execute("query-status", &json!({})).is_err(), "a tool does not notice");
        let (depth, gap) = depth_and_gap(world)?;
        ensure!(depth == "intercept" && gap.contains("measured again when its monitor is back"), "{depth}: {gap}");
        let mut tool = world.tool("bare")?;
        tool.execute("stop", &json!({}))?;
        ensure!(commands(world)?.len() == 1, "the command is logged");
        world.end_bound()
    });
}

/// The peer that tools are written against.
#[test]
fn the_library_of_qemus_developers_works_unchanged() {
    World::test(|world| {
        let library = match python_library() {
            Ok(library) => library,
            Err(error) => {
                skip("QEMU's own client library", &format!("it cannot be had: {error:#}"));
                return Ok(());
            }
        };
        let bare = start(world, "")?;
        fs::write(bare.folder().join("data.img"), vec![0x44; 64 * 1024])?;
        wait::for_true("the intercepted monitor", LIMIT, || wait::listens(&world.intercepted("bare")))?;
        let done = Command::new("python3")
            .arg("-c")
            .arg(include_str!("intercept/client.py"))
            .arg(world.intercepted("bare"))
            .env("PYTHONPATH", library)
            .output()?;
        let said = String::from_utf8_lossy(&done.stderr).into_owned();
        ensure!(done.status.success(), "{said}");
        ensure!(has_node(&bare, "data")?, "{said}");
        let logged: Vec<_> = commands(world)?.into_iter().map(|c| (c.command, c.outcome)).collect();
        let want = [
            ("stop", CommandOutcome::Forwarded),
            ("cont", CommandOutcome::Forwarded),
            ("blockdev-add", CommandOutcome::Unmeasurable),
            ("blockdev-add", CommandOutcome::Forwarded),
            ("migrate-pause", CommandOutcome::Forwarded),
            ("getfd", CommandOutcome::Forwarded),
        ];
        ensure!(logged == want.map(|(name, outcome)| (name.to_owned(), outcome)), "{logged:?}");
        world.end_bound()
    });
}

/// A client that says what it likes.
struct Raw(BufReader<UnixStream>);

impl Raw {
    fn connect(world: &World) -> Result<Self> {
        let socket = world.intercepted("bare");
        wait::for_true("the intercepted monitor", LIMIT, || wait::listens(&socket))?;
        let stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(LIMIT))?;
        let mut raw = Self(BufReader::new(stream));
        ensure!(raw.line()?["QMP"]["capabilities"] == json!(["oob"]), "QEMU's greeting");
        Ok(raw)
    }

    fn say(&mut self, text: &str) -> Result<()> {
        Ok(self.0.get_mut().write_all(format!("{text}\r\n").as_bytes())?)
    }

    fn line(&mut self) -> Result<Value> {
        let mut line = String::new();
        ensure!(self.0.read_line(&mut line)? > 0, "the connection was closed");
        Ok(serde_json::from_str(&line)?)
    }
}
