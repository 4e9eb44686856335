//! The numbers that the project promises, measured on this machine: `cargo xtask bench [--json FILE]`.
#![allow(clippy::print_stdout)]

mod appraisal;
mod fleet;
mod guests;
mod images;
mod looks;
mod numbers;
mod pushed;
mod rounds;
mod starts;
mod store;

use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context as _, Result};
use clap::Parser;
use onequote_tests::lab::monitor_double;

use crate::numbers::Numbers;

#[derive(Debug, Parser)]
#[command(about = "Measures the numbers that the project promises")]
struct Cli {
    /// Write the numbers to this file.
    #[arg(long)]
    json: Option<PathBuf>,
    /// Leave out what needs guests that really run.
    #[arg(long)]
    no_guests: bool,
    /// Only benches whose name contains this; can be given more than once.
    #[arg(long, value_name = "PART")]
    only: Vec<String>,
    /// Small fleets for a short time. The numbers say so in their names.
    #[arg(long)]
    short: bool,
    /// Write the pages that are made of numbers to this folder.
    #[arg(long, value_name = "DIR")]
    docs: Option<PathBuf>,
}

type Bench = fn(&mut Numbers) -> Result<()>;

/// Every bench by name, in the order in which they run.
const BENCHES: [(&str, Bench); 23] = [
    ("shim", shim_size),
    ("commands", rounds::commands),
    ("round-played", rounds::played),
    ("round-guests", rounds::real),
    ("pushed", pushed::execs),
    ("image-speed", images::speed),
    ("image-sparse", images::sparse),
    ("image-changed", images::changed),
    ("image-shared", images::shared),
    ("gate", starts::gate),
    ("looks", looks::cost),
    ("many-vms", starts::many),
    ("store", store::takes),
    ("entries-bound", guests::bound),
    ("entries-distinct", guests::distinct),
    ("appraise-first", appraisal::first),
    ("appraise-guests", appraisal::guests),
    ("appraise-steady", appraisal::steady),
    ("appraise-memory", appraisal::memory),
    ("report-bytes", fleet::bytes),
    ("fleet", fleet::sqlite),
    ("fleet-replicas", fleet::replicas),
    ("growth", fleet::growth),
];

/// Those that need guests that really run.
const GUESTS: [&str; 2] = ["round-guests", "pushed"];

fn main() -> Result<ExitCode> {
    if monitor_double::serve_if_double()? {
        return Ok(ExitCode::SUCCESS);
    }
    let cli = Cli::parse();
    if cfg!(debug_assertions) {
        eprintln!("bench: this is a debug build; `cargo xtask bench` measures a release build");
    }
    let mut numbers = Numbers { short: cli.short, docs: cli.docs.clone(), ..Numbers::default() };
    for (name, bench) in BENCHES {
        let wanted = cli.only.is_empty() || cli.only.iter().any(|part| name.contains(part.as_str()));
        if wanted && !(cli.no_guests && GUESTS.contains(&name)) {
            println!("-- {name}");
            bench(&mut numbers).with_context(|| format!("bench {name}"))?;
        }
    }
    if let Some(file) = &cli.json {
        fs::write(file, serde_json::to_vec_pretty(&numbers.list)?)
            .with_context(|| format!("writing {}", file.display()))?;
    }
    Ok(match numbers.list.iter().any(|number| number.holds == Some(false)) {
        false => ExitCode::SUCCESS,
        true => ExitCode::FAILURE,
    })
}

fn shim_size(numbers: &mut Numbers) -> Result<()> {
    let shim = &onequote_tests::lab::Assets::prepare()?.shim;
    numbers.below("shim, static", fs::metadata(shim)?.len() as f64, "bytes", 1_200_000.0);
    Ok(())
}
