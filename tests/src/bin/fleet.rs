//! A fleet of simulated hosts against a verifier: `cargo run --release -p onequote-tests --bin fleet -- --hosts 1000`.
#![allow(clippy::print_stdout)]

use std::{path::PathBuf, process::ExitCode, time::Duration};

use anyhow::{Context as _, Result};
use clap::Parser;
use onequote_tests::fleet::{Outcome, Plan, Trial, raise_descriptors};

#[derive(Debug, Parser)]
#[command(about = "Simulates a fleet of hosts and measures what it costs a verifier", max_term_width = 120)]
struct Cli {
    /// Hosts; each holds one connection
    #[arg(long, default_value_t = 1000)]
    hosts: usize,
    /// VMs on each host
    #[arg(long, default_value_t = 10)]
    vms: usize,
    /// Seconds between two reports of a host
    #[arg(long, default_value_t = 60)]
    period: u64,
    /// Minutes of life after the first reports
    #[arg(long, default_value_t = 1.0)]
    minutes: f64,
    /// Seconds between two things that happen on a host, in the mean
    #[arg(long, default_value_t = 60.0)]
    every: f64,
    /// Only by the period: changes are not reported at once
    #[arg(long)]
    no_push: bool,
    /// A PostgreSQL database; the verifier's own SQLite unless given
    #[arg(long, value_name = "URL")]
    database: Option<String>,
    /// Verifiers on that database
    #[arg(long, default_value_t = 1)]
    replicas: usize,
    /// One host in so many is an attacker; 0 for none
    #[arg(long, default_value_t = 0)]
    attackers: usize,
    /// What everything that happens follows from
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Write the numbers to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

fn main() -> Result<ExitCode> {
    let cli = Cli::parse();
    if cfg!(debug_assertions) {
        eprintln!("fleet: this is a debug build; its numbers say little");
    }
    raise_descriptors(cli.hosts)?;
    let trial = Trial {
        plan: Plan { hosts: cli.hosts, vms: cli.vms, programs: 1000, attackers: cli.attackers, seed: cli.seed },
        period: Duration::from_secs(cli.period.max(1)),
        time: Duration::from_secs_f64(cli.minutes * 60.0),
        every: Duration::from_secs_f64(cli.every),
        push: !cli.no_push,
        database: cli.database,
        replicas: cli.replicas,
    };
    let folder = tempfile::tempdir()?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let outcome = runtime.block_on(trial.run(folder.path(), |text| eprintln!("fleet: {text}")))?;
    show(&outcome);
    if let Some(file) = &cli.json {
        std::fs::write(file, serde_json::to_vec_pretty(&outcome)?)
            .with_context(|| format!("writing {}", file.display()))?;
    }
    Ok(if outcome.wrong.is_empty() && outcome.lost == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn show(outcome: &Outcome) {
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    let share = 100.0 / outcome.seconds.max(0.001);
    println!("{} hosts with {} VMs each", outcome.hosts, outcome.vms);
    println!(
        "first reports     all accepted after {:.1} s; verifier's processor {:.1} s; {:.0} bytes each",
        outcome.first_seconds, outcome.first_cpu, outcome.first_bytes
    );
    println!(
        "reports           {} in {:.0} s ({:.0}/s), {} sent away, {} lost; {} things happened",
        outcome.taken,
        outcome.seconds,
        outcome.taken as f64 / outcome.seconds.max(0.001),
        outcome.later,
        outcome.lost,
        outcome.happened
    );
    println!(
        "report to verdict median {:.1} ms, p99 {:.1} ms, longest {:.1} ms",
        outcome.steady.median, outcome.steady.p99, outcome.steady.longest
    );
    println!(
        "bytes             {:.0} a report; whole evidence {:.0}; whole lists and logs {:.0}",
        outcome.steady_bytes, outcome.whole_bytes, outcome.list_bytes
    );
    println!(
        "processor         verifier {:.1} % of a core, simulator {:.1} %",
        outcome.verifier_cpu * share,
        outcome.simulator_cpu * share
    );
    println!(
        "memory            verifier {:.0} MiB, simulator {:.0} MiB; database {:.0} MiB",
        mib(outcome.verifier_memory),
        mib(outcome.simulator_memory),
        mib(outcome.database_bytes)
    );
    println!("attackers         {}, all found unless named below", outcome.attackers);
    for wrong in &outcome.wrong {
        println!("WRONG             {wrong}");
    }
}
