//! The command line.
//!
//! Exit codes of `attest` and `verify`: 0 when host and VMs are all trusted, 1 when anything is not, 2 for a wrong
//! call or a fault of the verifier itself, 3 when the host could not be reached.

mod commands;
pub(crate) mod database;
mod enrol;
mod export;
mod firmware;
mod policy;
mod table;

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use clap::{Args, Parser, Subcommand};

use onequote_evidence::{
    digest::HashAlg,
    id::{HostId, Nonce},
};

pub use commands::{CliError, run};
pub use database::DatabaseCommand;
pub use enrol::{CreateToken, DoorArgs, TokenCommand};
pub use policy::PolicyCommand;

/// Appraises hosts and their VMs by one TPM quote.
#[derive(Debug, Parser)]
#[command(name = "onequote-verifier", version, about, max_term_width = 120)]
pub struct Cli {
    /// Folder with identity and database
    #[arg(long, global = true, default_value = "/var/lib/onequote-verifier")]
    pub state: PathBuf,

    /// A PostgreSQL database, postgres://USER@HOST/NAME, in place of the folder's SQLite file; for good in the folder's
    /// database.url
    #[arg(long, global = true, value_name = "URL")]
    pub database: Option<String>,

    /// What to do
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Make the verifier's identity; prints the certificate's path, which proxies must be given
    Init,
    /// Enrol a host, or with --replace give an enrolled one another key, certificate or URL
    Enrol(Enrol),
    /// Make tokens with which hosts join by themselves, at a running serve --enrol-listen
    #[command(subcommand)]
    Token(TokenCommand),
    /// Believe nothing of a host any more, and let its TPM not come back under another name
    Revoke {
        /// The host
        host: HostId,
    },
    /// End a host for good; its TPM may become another one
    Retire {
        /// The host
        host: HostId,
    },
    /// Show who joined, was refused, renewed, was withdrawn, and by whom
    Audit {
        /// The last this many lines
        #[arg(long, default_value_t = 1000)]
        last: u32,
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Forget a host, its policies and its state
    Remove {
        /// The host
        host: HostId,
    },
    /// List the enrolled hosts with their last verdicts
    Hosts {
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Ask a host for evidence and appraise it
    Attest {
        /// The host
        host: HostId,
        /// Print the verdict as JSON
        #[arg(long)]
        json: bool,
        /// Save the evidence, to be verified again later
        #[arg(long, value_name = "FILE")]
        save: Option<PathBuf>,
        /// Seconds to wait for the answer
        #[arg(long, default_value_t = 60)]
        timeout: u64,
    },
    /// Show what disk images are expected to be at their VMs' next starts, whose word that is, and what they were
    Expectations {
        /// The host; all hosts unless given
        host: Option<HostId>,
        /// Only the VM of this name or UUID
        #[arg(long, requires = "host")]
        vm: Option<String>,
        /// As JSON, with history
        #[arg(long)]
        json: bool,
    },
    /// Appraise saved evidence; nothing is asked and nothing is kept
    Verify(Verify),
    /// Show the events of a firmware event log in words, and the register values that they lead to
    FirmwareLog {
        /// The log (binary_bios_measurements), or saved evidence
        file: PathBuf,
        /// The bank whose digests are shown; sha256 unless the log has others only
        #[arg(long)]
        bank: Option<HashAlg>,
    },
    /// Propose, check and set policies
    #[command(subcommand)]
    Policy(PolicyCommand),
    /// Ask all enrolled hosts again and again, and show the verdicts as JSON over HTTP
    Serve(Serve),
    /// Look after the database
    #[command(subcommand)]
    Db(DatabaseCommand),
    /// List all finding codes with what they mean and what to do, as Markdown
    Codes,
}

/// Arguments of `serve`.
#[derive(Debug, Args)]
pub struct Serve {
    /// Where to listen; port 0 takes a free one. The address is written to STATE/serve.addr
    #[arg(long, default_value = "127.0.0.1:20306")]
    pub listen: SocketAddr,
    /// Seconds between two rounds of a host
    #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..))]
    pub period: u64,
    /// Seconds that a verdict holds; three periods unless given
    #[arg(long)]
    pub lifetime: Option<u64>,
    /// How long lines of the audit log are kept: 365d; for ever unless given
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
    pub keep_audit: Option<Duration>,
    /// Hosts that join
    #[command(flatten)]
    pub door: DoorArgs,
}

/// Arguments of `enrol`.
#[derive(Debug, Args)]
pub struct Enrol {
    /// The host's id, as in its proxy's configuration
    pub host: HostId,
    /// Its attestation key (TPM2B_PUBLIC): the proxy's init writes it as ak.pub
    #[arg(long, value_name = "FILE")]
    pub ak: PathBuf,
    /// Its proxy's certificate, PEM
    #[arg(long, value_name = "PEM")]
    pub certificate: PathBuf,
    /// Where its proxy listens: https://ADDRESS:PORT
    #[arg(long)]
    pub url: String,
    /// A policy to put in force
    #[arg(long, value_name = "FILE")]
    pub policy: Option<PathBuf>,
    /// The host's TPM is software: no root of trust, and every verdict will say so
    #[arg(long)]
    pub software_tpm: bool,
    /// Put this in place of what is enrolled; another key makes the verifier forget the host's state
    #[arg(long)]
    pub replace: bool,
}

/// Arguments of `verify`.
#[derive(Debug, Args)]
pub struct Verify {
    /// The saved evidence
    pub file: PathBuf,
    /// The host's attestation key (TPM2B_PUBLIC)
    #[arg(long, value_name = "FILE", required_unless_present = "host", conflicts_with = "host")]
    pub ak: Option<PathBuf>,
    /// Or an enrolled host, whose key and policy are taken
    #[arg(long)]
    pub host: Option<HostId>,
    /// The nonce that the evidence must answer, in hexadecimal; without it freshness is not proven
    #[arg(long)]
    pub nonce: Option<Nonce>,
    /// The policy to judge by
    #[arg(long, value_name = "FILE")]
    pub policy: Option<PathBuf>,
    /// Write attest structure, signature, key and qualifying data to this folder, for tpm2_checkquote and the like
    #[arg(long, value_name = "DIR")]
    pub export: Option<PathBuf>,
    /// Print the verdict as JSON
    #[arg(long)]
    pub json: bool,
}
