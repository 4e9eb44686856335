//! Three verifiers on one PostgreSQL database, behind one address: any of them does what one would do.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{thread, time::Duration};

use anyhow::{Context as _, Result, ensure};
use onequote_tests::lab::{Forwarder, Postgres, Replica, TpmCommand, TpmRelay, World};
use serde_json::Value;

const LIMIT: Duration = Duration::from_secs(90);

const ATTEST: &str = "POST /v1/hosts/lab-host/attest";
const SHOW: &str = "GET /v1/hosts/lab-host";

/// A world with its database and three verifiers, and a host that has joined through the address in front of them.
struct Site {
    // The order in which they end.
    replicas: Vec<Replica>,
    forwarder: Forwarder,
    postgres: Postgres,
}

impl Site {
    /// `period` is that of the verifiers, in seconds.
    fn start(world: &mut World, period: u32) -> Result<Self> {
        let postgres = Postgres::start_with(&["fsync=off"])?;
        world.use_database(postgres.database("onequote")?);
        world.verifier(&["init"])?.success()?;
        world.write_proxy_config()?;
        // Makes the authority, which all of them have.
        let first = world.token(&["--software-tpm"])?;
        let period = period.to_string();
        let replicas = ["first", "second", "third"];
        let replicas = replicas.map(|name| Replica::start(world, name, &["--period", &period]));
        let replicas: Vec<Replica> = replicas.into_iter().collect::<Result<_>>()?;
        let doors = replicas.iter().map(Replica::door).collect::<Result<Vec<_>>>()?;
        let forwarder = Forwarder::start(doors)?;
        world.join_at(forwarder.address(), &first)?;
        Ok(Self { replicas, forwarder, postgres })
    }

    /// One number from the database.
    fn count(&self, sql: &str) -> Result<u64> {
        let said = self.postgres.tool("psql", &["-At", "-d", "onequote", "-c", sql])?;
        said.trim().parse().with_context(|| said.clone())
    }
}

fn state(verdict: &Value) -> &str {
    verdict["host"]["state"].as_str().unwrap_or("none")
}

fn clock(verdict: &Value) -> u64 {
    verdict["quote"]["clock"].as_u64().unwrap_or(0)
}

/// Waits until a replica gives a trusted verdict: until it knows where the proxy is, or after something was away.
fn trusted_by(world: &mut World, replica: &Replica) -> Result<Value> {
    world.wait_until("a trusted verdict", LIMIT, |_| {
        let (status, verdict) = replica.ask(ATTEST)?;
        let found = &verdict["host"]["findings"];
        ensure!(status == 200 && state(&verdict) != "untrusted", "{status}: {found:#}");
        Ok((state(&verdict) == "trusted").then_some(verdict))
    })
}

#[test]
fn hosts_join_through_any_of_three_and_are_asked_by_one() {
    World::test(|world| {
        let mut site = Site::start(world, 1)?;
        // The same host again, through each of them by itself.
        for n in 0..site.replicas.len() {
            site.forwarder.lead_to(vec![site.replicas[n].door()?]);
            let token = world.token(&["--host", World::HOST, "--software-tpm"])?;
            world.join_at(site.forwarder.address(), &token).with_context(|| format!("replica {n}"))?;
        }
        let doors = site.replicas.iter().map(Replica::door).collect::<Result<Vec<_>>>()?;
        site.forwarder.lead_to(doors);
        ensure!(site.count("SELECT count(*) FROM audit WHERE what = 'join' AND result = 'ok'")? == 4);
        ensure!(site.count("SELECT sum(uses) FROM token")? == 0, "a token is left over");
        world.start_proxy()?;
        for replica in &site.replicas {
            world.wait_until("all to know of each other", LIMIT, |_| {
                Ok((replica.said("verifiers work on this database verifiers=3")? > 0).then_some(()))
            })?;
        }

        // One of them asks, and no other.
        let asked = |site: &Site| site.replicas.iter().map(|r| r.said(": attested host=")).collect::<Result<Vec<_>>>();
        let before = asked(&site)?;
        let now = world.wait_until("some rounds", LIMIT, |_| {
            let now = asked(&site)?;
            Ok((now.iter().zip(&before).map(|(now, before)| now - before).sum::<usize>() >= 6).then_some(now))
        })?;
        let busy: Vec<usize> = (0..3).filter(|&n| now[n] > before[n] + 1).collect();
        ensure!(busy.len() == 1, "{before:?}, then {now:?}");

        // It dies; another takes its hosts over.
        let mut dead = site.replicas.remove(busy[0]);
        dead.process().kill()?;
        let before = asked(&site)?;
        world.wait_until("another to take over", LIMIT, |_| {
            Ok(asked(&site)?.iter().zip(&before).any(|(now, before)| *now > before + 2).then_some(()))
        })?;
        // The proxy goes on through the same address.
        world.learn_policy()?;
        world.proxy()?.terminate()?;
        world.start_proxy()?;
        trusted_by(world, &site.replicas[1]).map(|_| ())
    });
}

#[test]
fn rounds_of_one_host_by_three_verifiers_at_once_lose_nothing() {
    World::test(|world| {
        let relay = TpmRelay::start(world)?;
        let mut site = Site::start(world, 3600)?;
        world.start_proxy()?;
        world.wait_until("the host's address", LIMIT, |world| {
            let url = world.proxy_url()?;
            let hosts = world.verifier(&["hosts", "--json"])?.json()?;
            Ok((hosts[0]["url"] == url.as_str()).then_some(()))
        })?;
        world.learn_policy()?;

        // All at once: no verdict is wrong, and what is kept never goes back.
        let (before, mut last) = (site.count("SELECT version FROM host")?, 0);
        let kept = thread::scope(|scope| {
            let asking: Vec<_> = (site.replicas.iter())
                .map(|replica| scope.spawn(move || (0..8).map(|_| replica.ask(ATTEST)).collect::<Result<Vec<_>>>()))
                .collect();
            while asking.iter().any(|asking| !asking.is_finished()) {
                let (_, verdict) = site.replicas[0].ask(SHOW)?;
                ensure!(clock(&verdict) >= last, "a verdict of {} after one of {last}", clock(&verdict));
                last = clock(&verdict);
            }
            let mut kept = Vec::new();
            for verdicts in asking {
                for (status, verdict) in verdicts.join().expect("no panic")? {
                    // One that came too late four times says so, and nothing of the host.
                    ensure!(status == 200, "{status}: {verdict}");
                    ensure!(["trusted", "verifier-fault"].contains(&state(&verdict)), "{verdict:#}");
                    kept.extend((state(&verdict) == "trusted").then(|| clock(&verdict)));
                }
            }
            Ok(kept)
        })?;
        ensure!(kept.len() >= 8, "only {} of 24 rounds came through", kept.len());
        let newest = *kept.iter().max().context("no verdict")?;
        let (_, shown) = site.replicas[2].ask(SHOW)?;
        ensure!(clock(&shown) == newest, "{} is kept, {newest} was the newest", clock(&shown));
        let written = site.count("SELECT version FROM host")? - before;
        ensure!(written == kept.len() as u64, "{written} verdicts were written, {} were given", kept.len());

        // One is killed in the middle of a round: the round is lost, and nothing else.
        relay.delay(TpmCommand::QUOTE, Duration::from_secs(3));
        let challenges = "SELECT count(*) FROM nonce";
        let (before, version) = (site.count(challenges)?, site.count("SELECT version FROM host")?);
        let mut killed = site.replicas.remove(0);
        thread::scope(|scope| {
            let process = killed.process().id();
            let killed = &killed;
            let asking = scope.spawn(move || killed.ask(ATTEST));
            world.wait_until("its challenge", LIMIT, |_| Ok((site.count(challenges)? > before).then_some(())))?;
            nix::sys::signal::kill(nix::unistd::Pid::from_raw(process.try_into()?), nix::sys::signal::Signal::SIGKILL)?;
            let answer = asking.join().expect("no panic");
            ensure!(answer.is_err(), "it answered: {answer:?}");
            Ok(())
        })?;
        ensure!(site.count("SELECT version FROM host")? == version, "something of the round was written");
        relay.mend();
        let after = trusted_by(world, &site.replicas[0])?;
        ensure!(clock(&after) > newest);
        let checked = world.verifier(&["db", "check"])?.success()?;
        ensure!(checked.output.starts_with("PostgreSQL, form "), "{checked:?}");

        // The database goes and comes back.
        site.postgres.stop()?;
        let (status, verdict) = site.replicas[1].ask(ATTEST)?;
        ensure!((status, state(&verdict)) == (200, "verifier-fault"), "{status}: {verdict:#}");
        ensure!(site.replicas[0].ask(SHOW)?.0 == 503 && site.replicas[0].ask("GET /healthz")?.0 == 503);
        let told = world.verifier(&["hosts"])?;
        ensure!(told.code == 2 && told.errors.contains("the verifier's database failed"), "{told:?}");
        site.postgres.resume()?;
        for replica in &mut site.replicas {
            let back = trusted_by(world, replica)?;
            ensure!(clock(&back) > clock(&after), "an older quote");
            replica.process().check_alive()?;
        }
        Ok(())
    });
}
