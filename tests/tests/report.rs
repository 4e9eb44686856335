//! Hosts that report: by themselves, at a change, when asked over the connection that they hold; and what becomes of those
//! that fall silent.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{
    fs, io,
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use onequote_tests::lab::{Verdict, World, wait};
use serde_json::Value;

const LIMIT: Duration = Duration::from_secs(60);

/// A port through which connections go, until it is closed.
struct Forwarder {
    address: SocketAddr,
    closed: Arc<AtomicBool>,
    to: Arc<Mutex<Option<SocketAddr>>>,
    streams: Arc<Mutex<Vec<TcpStream>>>,
}

impl Forwarder {
    fn start() -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let forwarder = Self {
            address: listener.local_addr()?,
            closed: Arc::default(),
            to: Arc::default(),
            streams: Arc::default(),
        };
        let (closed, to) = (Arc::clone(&forwarder.closed), Arc::clone(&forwarder.to));
        let streams = Arc::clone(&forwarder.streams);
        thread::spawn(move || {
            for near in listener.incoming().map_while(Result::ok) {
                if closed.load(Ordering::SeqCst) {
                    return;
                }
                let far = to.lock().unwrap().and_then(|to| TcpStream::connect(to).ok());
                if let Some(far) = far {
                    streams.lock().unwrap().extend([near.try_clone().unwrap(), far.try_clone().unwrap()]);
                    for (mut from, mut to) in [(near.try_clone().unwrap(), far.try_clone().unwrap()), (far, near)] {
                        thread::spawn(move || {
                            let _ = io::copy(&mut from, &mut to);
                            let _ = to.shutdown(Shutdown::Both);
                        });
                    }
                }
            }
        });
        Ok(forwarder)
    }

    /// Whom it leads to.
    fn lead_to(&self, url: &str) -> Result<()> {
        *self.to.lock().unwrap() = Some(url.trim_start_matches("https://").parse()?);
        Ok(())
    }

    /// Nobody gets through any more.
    fn close(&self) {
        self.closed.store(true, Ordering::SeqCst);
        // Wakes the thread, which then gives the port up.
        let _ = TcpStream::connect(self.address);
        for stream in self.streams.lock().unwrap().drain(..) {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

/// A host that has joined a verifier with this period, and reports to it. Gives the door's URL.
fn joined(world: &mut World, period: u32, serve: &[&str], join: &[&str]) -> Result<String> {
    world.verifier(&["init"])?.success()?;
    world.write_proxy_config()?;
    let url = world.start_door_with(period, "127.0.0.1:0", serve)?;
    let token = world.token(&["--host", World::HOST, "--software-tpm"])?;
    let file = world.folder().join("token");
    fs::write(&file, format!("{token}\n"))?;
    let file = file.to_string_lossy();
    let mut command = vec!["join", url.as_str(), "--token-file", &file, "--name", "lab"];
    command.extend(join);
    world.proxy_command(&command)?.success()?;
    world.start_proxy()?;
    wait_reported(world, 0)?;
    Ok(url)
}

/// Waits until the proxy has had more than so many reports taken. Gives its words about them.
fn wait_reported(world: &mut World, before: u64) -> Result<Value> {
    world.wait_until("a report", LIMIT, |world| {
        let reports = world.proxy_status()?["reports"][0].take();
        Ok((reports["reports"].as_u64() > Some(before)).then_some(reports))
    })
}

/// Waits for a verdict that `serve` shows.
fn wait_served(world: &mut World, what: &str, mut fits: impl FnMut(&Verdict) -> bool) -> Result<Verdict> {
    world.wait_until(what, LIMIT, |world| Ok(Some(world.served_verdict()?).filter(&mut fits)))
}

#[test]
fn a_host_that_joined_reports_by_itself_at_a_change_and_when_asked() {
    World::test(|world| {
        // The period is too long for any of this.
        joined(world, 3600, &[], &[])?;
        let line = world.served_line()?;
        ensure!(line["way"] == "reported" && line["connected"] == true && line["contact"].is_u64(), "{line}");
        world.learn_policy()?;
        let verdict = world.ask_served()?;
        verdict.host().is("trusted")?;
        ensure!(verdict.field("way") == "reported", "it was asked by another way: {:?}", verdict.field("way"));
        let reports = wait_reported(world, 1)?;
        ensure!(reports["last"]["cause"] == "asked" && reports["last"]["state"] == "trusted", "{reports}");
        ensure!(reports["failure"].is_null() && reports["connected"].is_u64(), "{reports}");

        let bare = world.start_bare("web", &[])?;
        let verdict = wait_served(world, "a report of the new VM", |verdict| verdict.vm("web").state() != "none")?;
        ensure!(verdict.field("way") == "reported", "{:?}", verdict.field("way"));
        drop(bare);
        wait_served(world, "a report of the VM's end", |verdict| verdict.vm("web").state() == "none")?;
        let reports = wait_reported(world, 3)?;
        ensure!(reports["last"]["cause"] == "change", "{reports}");
        let (_, counts) = world.api("GET", "/v1/reports")?;
        ensure!(counts["connected"] == 1 && counts["taken"].as_u64() >= Some(4), "{counts}");
        let shown = world.proxy_command(&["status"])?.output;
        ensure!(shown.contains("reports to lab: connected"), "{shown}");
        Ok(())
    });
}

#[test]
fn reports_go_on_when_verifier_or_proxy_start_again() {
    World::test(|world| {
        let url = joined(world, 1, &[], &[])?;
        world.learn_policy()?;
        let bare = world.start_bare("web", &[])?;
        wait_served(world, "a report of the VM", |verdict| verdict.vm("web").state() != "none")?;
        let whole = wait_reported(world, 0)?["last"]["bytes"].as_u64().context("a size")?;
        let reports = world.proxy_status()?["reports"][0]["reports"].as_u64().unwrap_or_default();

        world.stop_serve()?;
        world.wait_until("the proxy to miss its verifier", LIMIT, |world| {
            Ok(world.proxy_status()?["reports"][0]["connected"].is_null().then_some(()))
        })?;
        world.start_door_with(1, url.trim_start_matches("https://"), &[])?;
        wait_reported(world, reports)?;

        // A proxy that knows of no statement asks what the verifier has, and need not send it again.
        world.proxy()?.terminate()?;
        world.start_proxy()?;
        let reports = wait_reported(world, 0)?;
        ensure!(reports["last"]["accepted"] == true, "{reports}");
        let steady = wait_reported(world, 3)?["last"]["bytes"].as_u64().context("a size")?;
        ensure!(steady < whole + 4096, "{steady} bytes now, {whole} at first");
        drop(bare);
        Ok(())
    });
}

#[test]
fn a_host_that_cannot_be_reached_is_asked_over_the_connection_that_it_holds() {
    World::test(|world| {
        let forwarder = Forwarder::start()?;
        let own = format!("https://{}", forwarder.address);
        joined(world, 3600, &[], &["--own-url", &own])?;
        forwarder.lead_to(&world.proxy_url()?)?;
        world.learn_policy()?;
        let asked = world.verdict()?;
        asked.host().is("trusted")?;
        ensure!(asked.field("way") == "asked", "{:?}", asked.field("way"));
        forwarder.close();
        world.verdict()?.host().shows("unreachable")?;
        let verdict = world.ask_served()?;
        verdict.host().is("trusted")?;
        ensure!(verdict.field("way") == "reported", "{:?}", verdict.field("way"));
        // Without the connection there is no way left.
        world.proxy()?.terminate()?;
        wait::for_true("the verifier to see the connection's end", LIMIT, || {
            Ok(world.served_line()?["connected"] == false)
        })?;
        world.ask_served()?.host().shows("unreachable")
    });
}

#[test]
fn a_silent_host_is_stale_and_then_unreachable_and_never_green() {
    World::test(|world| {
        joined(world, 1, &["--lifetime", "3"], &[])?;
        world.learn_policy()?;
        wait_served(world, "a green host", |verdict| verdict.host().state() == "trusted")?;
        world.proxy()?.kill()?;
        let mut states: Vec<String> = Vec::new();
        wait::for_true("the host to count as unreachable", LIMIT, || {
            let verdict = world.served_verdict()?;
            let state = verdict.host().state().to_owned();
            if state == "stale" {
                verdict.host().shows("verdict-expired")?;
            }
            if states.last() != Some(&state) {
                states.push(state);
            }
            Ok(states.last().is_some_and(|state| state == "unreachable"))
        })?;
        ensure!(states == ["trusted", "stale", "unreachable"], "{states:?}");
        // It comes back by itself.
        world.start_proxy()?;
        wait_served(world, "a green host", |verdict| verdict.host().state() == "trusted")?;
        Ok(())
    });
}

#[test]
fn reporting_can_be_switched_off_on_either_side() {
    World::test(|world| {
        let url = joined(world, 1, &[], &[])?;
        world.proxy()?.terminate()?;
        world.settings().tables = "\n[report]\nenabled = false\n".to_owned();
        world.start_proxy()?;
        ensure!(world.proxy_status()?["reports"] == serde_json::json!([]));
        let line = |world: &mut World, what: &str, way: &str| {
            let way = way.to_owned();
            world.wait_until(what, LIMIT, move |world| Ok((world.served_line()?["way"] == way.as_str()).then_some(())))
        };
        line(world, "the verifier to ask", "asked")?;

        world.proxy()?.terminate()?;
        world.settings().tables.clear();
        world.stop_serve()?;
        world.start_door_with(1, url.trim_start_matches("https://"), &["--no-reports"])?;
        world.start_proxy()?;
        world.wait_until("the proxy to see that nobody wants its reports", LIMIT, |world| {
            let failure = world.proxy_status()?["reports"][0]["failure"].take();
            Ok(failure.as_str().is_some_and(|why| why.contains("takes no reports")).then_some(()))
        })
    });
}
