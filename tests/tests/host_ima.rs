//! A host with IMA: its list is kept by a double of its kernel, that extends a real (software) TPM.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use onequote_evidence::digest::HashAlg;
use onequote_tests::lab::{Verdict, World};

/// What the kernel does: append to the list, then extend the register in every bank.
struct Kernel {
    list: PathBuf,
    tcti: String,
    /// Where each entry ends.
    ends: Vec<u64>,
}

impl Kernel {
    fn boot(world: &World) -> Result<Self> {
        let mut kernel = Self { list: world.folder().join("measurements"), tcti: world.tcti(), ends: Vec::new() };
        // Nothing was extended before.
        kernel.list("boot_aggregate", &HashAlg::Sha256.hash(&[0; 320]))?;
        Ok(kernel)
    }

    /// A file is executed that was not listed before.
    fn measure(&mut self, path: &Path) -> Result<()> {
        let digest = HashAlg::Sha256.hash(&fs::read(path)?);
        self.list(&path.to_string_lossy(), &digest)
    }

    fn list(&mut self, name: &str, digest: &[u8]) -> Result<()> {
        let block = |bytes: &[u8]| [&(bytes.len() as u32).to_le_bytes(), bytes].concat();
        let data = [block(&[b"sha256:\0", digest].concat()), block(&[name.as_bytes(), b"\0"].concat()), block(b"")];
        let data = data.concat();
        let hash = |alg: HashAlg| alg.hash(&data);
        let entry = [&10_u32.to_le_bytes(), hash(HashAlg::Sha1).as_slice(), &block(b"ima-sig"), &block(&data)].concat();
        let mut file = fs::File::options().create(true).append(true).open(&self.list)?;
        file.write_all(&entry)?;
        self.ends.push(file.metadata()?.len());
        let banks: Vec<String> = HashAlg::ALL.iter().map(|alg| format!("{alg}={}", hex::encode(hash(*alg)))).collect();
        let status = Command::new("tpm2_pcrextend")
            .arg(format!("10:{}", banks.join(",")))
            .env("TPM2TOOLS_TCTI", &self.tcti)
            .status()
            .context("tpm2-tools")?;
        ensure!(status.success(), "tpm2_pcrextend ended with {status}");
        Ok(())
    }
}

/// A host whose proxy is a program of its own, measured as the kernel would.
fn host(world: &mut World) -> Result<(Kernel, PathBuf)> {
    let program = world.folder().join("onequote-proxy");
    fs::copy(&world.assets().proxy, &program)?;
    let mut kernel = Kernel::boot(world)?;
    kernel.measure(&program)?;
    world.settings().program = Some(program.clone());
    world.settings().tables = format!("\n[host]\nima_list = {:?}\n", kernel.list);
    world.start_enrolled()?;
    Ok((kernel, program))
}

/// Puts another program in the place of this one, which may be running.
fn replace(program: &Path, with: &[u8]) -> Result<()> {
    let new = program.with_extension("new");
    fs::write(&new, with)?;
    fs::set_permissions(&new, fs::metadata(program)?.permissions())?;
    Ok(fs::rename(new, program)?)
}

fn restart(world: &mut World) -> Result<Verdict> {
    world.proxy()?.terminate()?;
    world.start_proxy()?;
    world.enrol_again()?;
    world.verdict()
}

#[test]
fn a_proxy_that_was_replaced_is_found_and_stays_found() {
    World::test(|world| {
        let (mut kernel, program) = host(world)?;
        world.learn_policy()?;
        world.verdict()?.host().is("trusted")?;
        restart(world)?.host().is("trusted")?;
        let good = fs::read(&program)?;
        // What is behind an ELF file's end changes nothing but the digest.
        replace(&program, &[good.as_slice(), b"another program"].concat())?;
        // The one that runs is still the good one.
        world.verdict()?.host().is("trusted")?;
        kernel.measure(&program)?;
        let found = restart(world)?;
        for code in ["proxy-binary", "proxy-replaced", "ima-wrong-digest"] {
            found.host().is_untrusted_for(code, "")?;
        }
        // The good one comes back; the kernel lists nothing new for it.
        replace(&program, &good)?;
        restart(world)?.host().is_untrusted_for("proxy-replaced", "")
    });
}

#[test]
fn a_proxy_that_the_kernel_did_not_measure_is_found() {
    World::test(|world| {
        let (_kernel, program) = host(world)?;
        world.learn_policy()?;
        let good = fs::read(&program)?;
        replace(&program, &[good.as_slice(), b"another program"].concat())?;
        // It hides from the list, but names itself; or else the log is another's word.
        restart(world)?.host().is_untrusted_for("proxy-unlisted", "")
    });
}

#[test]
fn a_hosts_list_that_was_cut_or_altered_does_not_explain_the_register() {
    World::test(|world| {
        let (kernel, _) = host(world)?;
        world.learn_policy()?;
        world.verdict()?.host().is("trusted")?;
        let whole = fs::read(&kernel.list)?;
        fs::write(&kernel.list, &whole[..usize::try_from(kernel.ends[0])?])?;
        world.verdict()?.host().is_untrusted_for("host-ima-replay", "")?;
        let mut altered = whole.clone();
        let last = altered.len() - 10;
        altered[last] ^= 1;
        fs::write(&kernel.list, &altered)?;
        world.verdict()?.host().is_untrusted_for("host-ima-replay", "")?;
        fs::write(&kernel.list, b"")?;
        world.verdict()?.host().is_untrusted_for("host-ima-missing", "")?;
        fs::write(&kernel.list, &whole)?;
        world.verdict()?.host().is("trusted")
    });
}
