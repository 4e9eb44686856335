//! `cargo xtask demo | nested | test | bench | fuzz | package`: sets up what is missing, builds, then does it.
//!
//! This program needs nothing but cargo and a C linker to build: what the rest of the workspace needs (the TSS,
//! QEMU, a software TPM, …) is looked for here, and as root on Debian installed. Once it is there, nothing needs root.
#![allow(clippy::print_stdout)]

mod licences;
mod setup;
mod steps;

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

#[derive(Debug, Parser)]
#[command(name = "cargo xtask", about = "Sets up what is missing, builds, then does it")]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Three VMs, one quote, two attacks. Further options go to the demo: see `cargo xtask demo --help`.
    #[command(disable_help_flag = true)]
    Demo {
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        options: Vec<OsString>,
    },
    /// A host that is itself a VM, with UEFI firmware, TPM, IMA and VMs of its own, attested from outside. Further options go
    /// to it: see `cargo xtask nested --help`.
    #[command(disable_help_flag = true)]
    Nested {
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        options: Vec<OsString>,
    },
    /// Builds the shim's Debian packages.
    Package,
    /// Format, lints, unit tests, end-to-end tests on real QEMU.
    Test {
        /// Leave out the tests that boot VMs.
        #[arg(long)]
        quick: bool,
    },
    /// Measures the numbers that the project promises.
    Bench {
        /// Write the numbers to this file.
        #[arg(long)]
        json: Option<PathBuf>,
        /// Only benches whose name contains this; can be given more than once
        #[arg(long, value_name = "PART")]
        only: Vec<String>,
        /// Small fleets for a short time; their numbers say so
        #[arg(long)]
        short: bool,
        /// Write the pages that are made of numbers (growth.md, growth.svg) to this folder
        #[arg(long, value_name = "DIR")]
        docs: Option<PathBuf>,
    },
    /// Fuzzes every parser, each for a while.
    Fuzz {
        /// Seconds for each parser.
        #[arg(long, default_value_t = 30)]
        seconds: u32,
    },
    /// Only looks for what is needed and installs or names what is missing.
    Setup,
}

fn main() -> Result<ExitCode> {
    let cli = Cli::parse();
    match cli.task {
        Task::Setup => setup::ensure()?,
        Task::Demo { options } => {
            setup::ensure()?;
            return steps::play("demo", &options);
        }
        Task::Nested { options } => {
            setup::ensure()?;
            return steps::play("nested", &options);
        }
        Task::Package => {
            setup::ensure()?;
            steps::package()?;
        }
        Task::Test { quick } => {
            setup::ensure()?;
            return steps::test(quick);
        }
        Task::Fuzz { seconds } => return steps::fuzz(seconds),
        Task::Bench { json, only, short, docs } => {
            setup::ensure()?;
            return steps::bench(json.as_deref(), docs.as_deref(), short, &only);
        }
    }
    Ok(ExitCode::SUCCESS)
}
