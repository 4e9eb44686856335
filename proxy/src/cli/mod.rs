//! The command line: what people ask of the proxy, and what it prints.

mod log;
mod printable;
mod status;
mod vms;

use std::{io, path::PathBuf};

use clap::{Parser, Subcommand};

use crate::measure::Algorithms;

pub use log::print_log;
pub use status::{export_ima, print_status, release};
pub use vms::{End, VmCommandError, delete_vm, end_vm, list_vms, retry_vm};

/// Measures the VMs of a QEMU host into its TPM and answers verifiers with one quote for all of them.
#[derive(Debug, Parser)]
#[command(name = "onequote-proxy", version, arg_required_else_help = true)]
pub struct Cli {
    /// Configuration file.
    #[arg(long, global = true, default_value = "/etc/onequote/proxy.toml")]
    pub config: PathBuf,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Makes the host's identity and attestation key; writes certificate.pem and ak.pub for the verifier.
    Init,
    /// Joins a verifier with a token of its `token create`. The verifier is let in at once if the proxy runs.
    Join {
        /// Where the verifier's `serve --enrol-listen` is: https://ADDRESS:PORT.
        url: String,
        /// A file with the token; `-` for standard input.
        #[arg(long, value_name = "FILE", required_unless_present = "token", conflicts_with = "token")]
        token_file: Option<PathBuf>,
        /// The token itself; `-` for standard input. Everybody on this machine can read a command line: only for trying
        /// things out.
        #[arg(long)]
        token: Option<String>,
        /// The verifier's name in our log; its address when absent.
        #[arg(long)]
        name: Option<String>,
        /// Where verifiers reach this proxy: https://ADDRESS:PORT. When absent, the address that the verifier sees, and the
        /// port of `listen`.
        #[arg(long, value_name = "URL")]
        own_url: Option<String>,
    },
    /// Watches VMs, measures, answers verifiers; until it is told to end.
    Run,
    /// Starts a VM that the running proxy measures before it runs: by its description, or by QEMU's arguments.
    Launch {
        /// The VM's name; that of the description or `-name` of the arguments when absent.
        #[arg(long)]
        name: Option<String>,
        /// Print the command line, as a shell reads it, instead of running it.
        #[arg(long)]
        dry_run: bool,
        /// The VM's description, TOML.
        #[arg(value_name = "FILE.toml", required_unless_present = "qemu", conflicts_with = "qemu")]
        file: Option<PathBuf>,
        /// QEMU and its arguments.
        #[arg(last = true)]
        qemu: Vec<std::ffi::OsString>,
    },
    /// Prints the digests of files, as reference values: of disk images that with fs-verity counts, of all other files
    /// SHA-256.
    Measure {
        /// Which digests.
        #[arg(long, value_enum, default_value = "all")]
        algorithm: Algorithms,
        /// Print JSON.
        #[arg(long)]
        json: bool,
        /// Files.
        #[arg(required = true)]
        files: Vec<PathBuf>,
    },
    /// Lists the VMs that the running proxy manages.
    List {
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Asks a VM's guest to power down, and waits until the VM has ended and that is logged.
    Stop {
        /// The VM's name or UUID.
        vm: String,
        /// How many seconds to wait; 0 not to wait.
        #[arg(long, default_value_t = 90)]
        timeout: u64,
    },
    /// Ends a VM's QEMU without asking its guest.
    Kill {
        /// The VM's name or UUID.
        vm: String,
        /// How many seconds to wait for its end to be logged; 0 not to wait.
        #[arg(long, default_value_t = 90)]
        timeout: u64,
    },
    /// Looks again at a VM that was not let run, and lets it run if nothing is wrong with it any more.
    Retry {
        /// The VM's name or UUID.
        vm: String,
    },
    /// Says in the log that a VM which has ended will not come back, with the digests of the images that it could write.
    Delete {
        /// The VM's name or UUID.
        vm: String,
    },
    /// Shows what the running proxy watches.
    Status {
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Keeps the log no longer for a verifier that does not ask any more; when it asks again, the log is kept for it again.
    Release {
        /// The verifier's name, as `status` shows it.
        verifier: String,
    },
    /// Shows the measurement log, or prints it as CEL-JSON.
    Log {
        /// Print CEL-JSON.
        #[arg(long)]
        json: bool,
        /// Another epoch than the newest.
        #[arg(long)]
        epoch: Option<u64>,
    },
    /// Writes a guest's IMA list, as logged, in the kernel's binary format to standard output.
    ExportIma {
        /// The VM's name or UUID.
        vm: String,
        /// Which boot of the QEMU process, from 0; the last one when absent.
        #[arg(long)]
        boot: Option<u32>,
    },
}

/// Writing to standard output failed, or a pipe was closed, which is no error.
///
/// # Errors
/// Every other error.
pub fn ignore_closed_pipe(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(e) if e.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        other => other,
    }
}
