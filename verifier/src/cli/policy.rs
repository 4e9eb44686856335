//! Commands about policies.

use std::path::{Path, PathBuf};

use clap::Subcommand;

use onequote_evidence::{
    digest::{FileDigest, HashAlg},
    id::{HostId, VmId},
    tpm::Public,
};

use super::{
    commands::{CliError, Site, open, read_evidence, say, verifier, write},
    table,
};
use crate::{
    appraise::{Appraisal, Context, Facts, Received, Shared, appraise, freshness::Freshness, state::HostState},
    enrol,
    finding::{Class, Finding},
    policy::{
        Pattern, Policy, PolicyError, SigningKey, keylime, learn, read,
        tree::{self, Listing, Options},
    },
    result::Verdict,
    round::{Fault, Times},
    source::{Source, System},
    store::Store,
};

/// What to do with policies.
#[derive(Debug, Subcommand)]
pub enum PolicyCommand {
    /// Propose a policy from what a host measures now, or from saved evidence
    Learn {
        /// An enrolled host: it is asked, unless evidence is given
        host: Option<HostId>,
        /// Saved evidence
        #[arg(long, value_name = "FILE")]
        evidence: Option<PathBuf>,
        /// The attestation key that signed it, if the host is not enrolled
        #[arg(long, value_name = "FILE", requires = "evidence", conflicts_with = "host")]
        ak: Option<PathBuf>,
        /// Where to write; standard output unless given
        #[arg(short, long, value_name = "FILE")]
        output: Option<PathBuf>,
    },
    /// Make an allow list (for ima_file) from file trees, and print the lines that use it in a rule
    FromTree {
        /// Folders, tar archives, initramfs; mount images of file systems (mount -o loop,ro) and give the folder
        #[arg(required = true, value_name = "TREE")]
        trees: Vec<PathBuf>,
        /// Where to write the list
        #[arg(short, long, value_name = "FILE")]
        output: PathBuf,
        /// Where the trees are mounted in the running system; several times where a system sees them at several places
        #[arg(long, value_name = "PATH", default_value = "/")]
        at: Vec<String>,
        /// Pattern of paths in the running system to leave out: * stands for any characters, ? for one
        #[arg(long, value_name = "PATTERN")]
        skip: Vec<String>,
        /// Algorithm of the digests: the kernel's ima_hash=; several times for several
        #[arg(long, value_name = "NAME", default_value = "sha256")]
        hash: Vec<HashAlg>,
    },
    /// Take over a runtime policy of Keylime's: write its allow list, and print the lines that use it in a rule
    ImportKeylime {
        /// The policy, JSON, plain or in a DSSE envelope
        file: PathBuf,
        /// The key, or certificate, PEM, that it must be signed by
        #[arg(long, value_name = "PEM")]
        key: Option<PathBuf>,
        /// Take a signed policy without a look at its signature
        #[arg(long, conflicts_with = "key")]
        danger_unchecked_signature: bool,
        /// Where to write the list
        #[arg(short, long, value_name = "FILE")]
        output: PathBuf,
    },
    /// Put a policy in force for a host
    Set {
        /// The host
        host: HostId,
        /// The policy
        file: PathBuf,
    },
    /// Print the policy in force for a host
    Show {
        /// The host
        host: HostId,
    },
    /// Check a policy file without putting it in force
    Check {
        /// The policy
        file: PathBuf,
    },
    /// Accept that a disk image has this digest at the next start at which it is found, though its past is broken
    AcceptImage {
        /// The host
        host: HostId,
        /// The VM's UUID
        vm: VmId,
        /// The image's slot, as the finding names it
        slot: String,
        /// The digest, as the finding names it
        digest: FileDigest,
    },
}

/// Carries a policy command out.
pub(super) async fn run(state: &Site, command: PolicyCommand) -> Result<(), CliError> {
    match command {
        PolicyCommand::Learn { host, evidence, ak, output } => {
            let facts = match (host, evidence, ak) {
                (Some(host), None, _) => {
                    let round = verifier(state, Times::default()).await?.attest_for_facts(&host).await?;
                    round.facts.ok_or_else(|| not_whole(&round.verdict))?
                }
                (Some(host), Some(file), _) => {
                    let store = open(state).await?;
                    let host = store.host(&host).await?;
                    let key = |source| Fault::Key { host: host.enrolment.id.clone(), source };
                    let ak = Public::parse(&host.enrolment.ak).map_err(key)?;
                    let policy = store.policy(&host).await?;
                    let policy = policy.map(|(_, text)| Policy::parse(&text, "policy in force")).transpose()?;
                    learn_offline(&file, &ak, policy.as_ref())?
                }
                (None, Some(file), Some(ak)) => learn_offline(&file, &enrol::read_ak(&ak)?.1, None)?,
                _ => return Err(CliError::Usage("give a host, or --evidence with --ak".into())),
            };
            let text = learn::propose(&facts);
            match output {
                Some(path) => write(&path, text.as_bytes()),
                None => say(&text),
            }
        }
        PolicyCommand::FromTree { trees, output, at, skip, hash } => {
            let options = Options { at, skip: skip.into_iter().map(Pattern).collect(), algorithms: hash };
            from_tree(&trees, &output, &options)
        }
        PolicyCommand::ImportKeylime { file, key, danger_unchecked_signature, output } => {
            import_keylime(&file, key.as_deref(), danger_unchecked_signature, &output)
        }
        PolicyCommand::Set { host, file } => {
            let (_, text) = Policy::load(&file)?;
            let version = open(state).await?.set_policy(&host, &text, System.now()).await?;
            say(&format!("policy version {version} is in force for {host}\n"))
        }
        PolicyCommand::Show { host } => {
            let store = open(state).await?;
            match store.policy(&store.host(&host).await?).await? {
                Some((_, text)) => say(&text),
                None => Err(CliError::Usage(format!("no policy is in force for {host}"))),
            }
        }
        PolicyCommand::Check { file } => {
            let (policy, _) = Policy::load(&file)?;
            let files = |list: Option<&crate::policy::AllowList>| list.map_or(0, crate::policy::AllowList::len);
            let all: usize = policy.vms.iter().map(|vm| files(vm.ima.allow.as_ref())).sum();
            let (registers, rules) = (policy.host.registers.len(), policy.vms.len());
            let all = all + files(policy.host.ima.allow.as_ref());
            say(&format!("{}: {registers} registers, {rules} VM rules, {all} files\n", file.display()))
        }
        PolicyCommand::AcceptImage { host, vm, slot, digest } => {
            let store = open(state).await?;
            let kept = store.host(&host).await?;
            let mut state = kept.state;
            state.accept_image(vm, &slot, digest);
            if !store.put_state(&host, kept.version, &state).await? {
                return Err(Fault::Busy(host).into());
            }
            Ok(())
        }
    }
}

fn from_tree(trees: &[PathBuf], output: &Path, options: &Options) -> Result<(), CliError> {
    let mut listing = Listing::default();
    for tree in trees {
        listing.add(tree, options)?;
    }
    for path in listing.unsayable() {
        tracing::warn!(%path, "left out: its name is not UTF-8, and cannot be named in a policy");
    }
    if listing.is_empty() {
        return Err(CliError::Usage("there are no files".into()));
    }
    write(output, listing.toml(trees).as_bytes())?;
    tracing::info!(files = listing.len(), list = %output.display(), "written; lines for a rule follow");
    say(&tree::rule_lines(output))
}

fn import_keylime(file: &Path, key: Option<&Path>, unchecked: bool, output: &Path) -> Result<(), CliError> {
    let key = key.map(|path| {
        let fail = |source| PolicyError::Key { path: path.to_owned(), source };
        SigningKey::from_pem(&read(path)?).map_err(fail)
    });
    let (text, key) = (read(file)?, key.transpose()?);
    let import = keylime::import(&text, key.as_ref(), unchecked, &output.display().to_string());
    let import = import.map_err(|source| PolicyError::Keylime { path: file.to_owned(), source })?;
    for note in &import.notes {
        tracing::warn!("{note}");
    }
    write(output, import.list.as_bytes())?;
    tracing::info!(list = %output.display(), "written; lines for a rule follow");
    say(&import.rule)
}

fn learn_offline(file: &Path, ak: &Public, policy: Option<&Policy>) -> Result<Facts, CliError> {
    let received = Received::read(&read_evidence(file)?);
    let received = received.map_err(|finding| CliError::NotWhole(table::finding(&finding)))?;
    let context = Context {
        host: None,
        ak,
        software_tpm: false,
        freshness: &Freshness::Offline { nonce: None },
        state: &HostState::default(),
        policy: policy.map(|policy| (policy, 0)),
        now: System.now(),
        lifetime: 0,
        facts: true,
        shared: &Shared::default(),
    };
    let Appraisal { verdict, facts, .. } = appraise(&received, &context);
    facts.ok_or_else(|| not_whole(&verdict))
}

fn not_whole(verdict: &Verdict) -> CliError {
    let of = |f: &&Finding| matches!(f.code.class(), Class::Evidence | Class::Absence);
    let findings: Vec<String> = verdict.host.findings.iter().filter(of).map(table::finding).collect();
    CliError::NotWhole(findings.join("\n"))
}
