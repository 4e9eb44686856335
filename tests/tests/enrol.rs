//! Hosts that join with a token: the way in, staying a member, and everybody who must not get in.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{fs, io::Read as _, path::PathBuf, process::Command, time::Duration};

use anyhow::{Context as _, Result, ensure};
use onequote_evidence::stream::Have;
use onequote_proxy::tpm::{EkKind, EsapiTpm};
use onequote_tests::lab::{Maker, Options, Process, Run, Tpm, Verdict, World, authority_certificates, wait};
use onequote_verifier::{client, enrol::Identity};

const LIMIT: Duration = Duration::from_secs(90);

/// Where hosts join in a test.
struct Door {
    /// The authority of its TPMs.
    authority: tempfile::TempDir,
    url: String,
}

/// Runs a test in a world whose TPM has certificates, and whose verifier has a door open, with these arguments more.
fn with_door(more: &[&str], test: impl FnOnce(&mut World, &Door) -> Result<()>) {
    let authority = tempfile::tempdir().unwrap();
    let options = Options { tpm_authority: Some(authority.path().to_owned()), ..Options::default() };
    World::test_with(options, |world| {
        world.verifier(&["init"])?.success()?;
        world.write_proxy_config()?;
        let url = open_door(world, &authority, "127.0.0.1:0", more)?;
        test(world, &Door { authority, url })
    });
}

/// Serves with the authority of software TPMs as roots.
fn open_door(world: &mut World, authority: &tempfile::TempDir, address: &str, more: &[&str]) -> Result<String> {
    let [root, issuer] = authority_certificates(authority.path()).map(|path| path.display().to_string());
    let mut arguments = vec!["--software-ek-roots", root.as_str(), "--ek-intermediates", &issuer];
    arguments.extend(more);
    world.start_door(address, &arguments)
}

fn join(world: &World, url: &str, token: &str) -> Result<Run> {
    let file = world.folder().join("token");
    fs::write(&file, format!("{token}\n"))?;
    world.proxy_command(&["join", url, "--token-file", &file.to_string_lossy(), "--name", "lab"])
}

/// What must be in the error of a command that is refused.
fn refused(run: &Run, code: &str) -> Result<()> {
    ensure!(run.code != 0, "{} was not refused", run.command);
    ensure!(run.errors.contains(code), "no {code} in: {}", run.errors);
    Ok(())
}

/// Waits until the verifier knows where the proxy is.
fn wait_known(world: &mut World) -> Result<()> {
    let url = world.proxy_url()?;
    world.wait_until("the verifier to know where the proxy is", LIMIT, |world| {
        let hosts = world.verifier(&["hosts", "--json"])?.json()?;
        Ok((hosts[0]["url"] == url.as_str()).then_some(()))
    })
}

#[test]
fn a_host_joins_and_is_attested_by_its_certificate() {
    with_door(&[], |world, Door { url, .. }| {
        let token = world.token(&["--host", World::HOST, "--software-tpm"])?;
        let joined = join(world, url, &token)?.success()?;
        ensure!(joined.output.contains("joined lab as lab-host") && joined.output.contains("SOFTWARE"), "{joined:?}");
        let shown = world.proxy_command(&["join", "--help"])?.output;
        ensure!(shown.contains("Everybody on this machine can read a command line"), "{shown}");
        world.start_proxy()?;
        wait_known(world)?;
        world.learn_policy()?;
        let verdict = world.verdict()?;
        verdict.host().is("trusted")?;
        let told = world.verifier(&["attest", World::HOST])?.output;
        ensure!(told.contains("SOFTWARE TPM: no root of trust"), "{told}");
        let hosts = world.verifier(&["hosts", "--json"])?.json()?;
        ensure!(hosts[0]["software_tpm"] == true && hosts[0]["joined"] == true, "{hosts}");
        let vouched = hosts[0]["vouched"].as_str().unwrap_or_default();
        ensure!(vouched.contains("swtpm") && vouched.contains("vouched for by"), "{vouched}");
        for (what, result) in [("token-create", "ok"), ("join", "ok")] {
            ensure!(world.audited(what, result)?, "{what} is not in the audit log");
        }
        let shown = world.verifier(&["audit"])?.output;
        ensure!(shown.contains("software TPM, "), "{shown}");

        // The certificate of a host is none of a verifier: it opens no proxy's door.
        let thief = Identity::load(&world.proxy_state().join("verifiers/lab"))?;
        let ca = fs::read_to_string(world.proxy_state().join("verifiers/lab/authority.pem"))?;
        let ca = pem(&ca)?;
        let (host, at) = (World::HOST.parse().map_err(anyhow::Error::msg)?, world.proxy_url()?);
        let target = client::Target { host: &host, url: &at, certificate: &ca };
        let nonce = onequote_evidence::id::Nonce::new(vec![7; 32]).context("a nonce")?;
        let nothing = Have::default();
        let asked = client::ask(target, &thief, &nonce, &nothing, Duration::from_secs(20));
        let asked = tokio::runtime::Runtime::new()?.block_on(asked);
        ensure!(matches!(asked, Err(client::AskError::Tls { .. } | client::AskError::Broken(_))), "{asked:?}");

        // The proxy starts again with what it has kept.
        world.proxy()?.terminate()?;
        world.start_proxy()?;
        wait_known(world)?;
        world.verdict()?.host().is("trusted")
    });
}

/// The bytes of a PEM file's first block.
fn pem(text: &str) -> Result<Vec<u8>> {
    let mut command = Command::new("openssl");
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("in");
    fs::write(&path, text)?;
    let output = command.args(["x509", "-outform", "der", "-in"]).arg(path).output()?;
    ensure!(output.status.success(), "openssl: {}", String::from_utf8_lossy(&output.stderr));
    Ok(output.stdout)
}

#[test]
fn a_proxy_that_runs_joins_and_lets_the_verifier_in_at_once() {
    with_door(&["--certificate-lifetime", "12s"], |world, Door { authority, url }| {
        world.start_proxy()?;
        let process = world.proxy()?.id();
        // Nobody is let in so far.
        let address = world.proxy_url()?.trim_start_matches("https://").to_owned();
        let mut early = std::net::TcpStream::connect(&address)?;
        ensure!(matches!(early.read(&mut [0; 1]), Ok(0) | Err(_)), "the door is open before anybody has joined");
        let refusal = join(world, url, &world.token(&["--software-tpm", "--host", "another"])?)?;
        refused(&refusal, "token-other-host")?;
        join(world, url, &world.token(&["--software-tpm"])?)?.success()?;
        wait_known(world)?;
        world.learn_policy()?;
        world.verdict()?.host().is("trusted")?;
        wait::for_true("a renewal", LIMIT, || world.audited("renew", "ok"))?;
        world.verdict()?.host().is("trusted")?;

        // Again, under another name: the verifier has taken back what it gave first.
        let (file, token) = (world.folder().join("token"), world.token(&["--software-tpm"])?);
        fs::write(&file, token)?;
        let again = world.proxy_command(&["join", url, "--token-file", &file.to_string_lossy(), "--name", "other"])?;
        again.success()?;
        world.verdict()?.host().is("trusted")?;
        let folders = world.proxy_state().join("verifiers");
        ensure!(folders.join("other").is_dir() && !folders.join("lab").exists(), "the old membership is still there");
        // A verifier with an authority of its own is let in beside the first.
        let second = Second::start(world, authority)?;
        let token = second.token()?;
        fs::write(&file, token)?;
        world
            .proxy_command(&["join", &second.url, "--token-file", &file.to_string_lossy(), "--name", "2"])?
            .success()?;
        wait::for_true("the second verifier's answer", LIMIT, || {
            let run = second.verifier(&["attest", World::HOST, "--json"])?;
            Ok(Verdict::of(&run).is_ok_and(|found| found.host().has("host-without-policy", "")))
        })?;
        world.verdict()?.host().is("trusted")?;
        ensure!(world.proxy()?.id() == process, "the proxy was started again");
        world.proxy()?.check_alive()?;
        // What was joined is there after a restart.
        world.proxy()?.terminate()?;
        world.start_proxy()?;
        wait_known(world)?;
        world.verdict()?.host().is("trusted")
    });
}

/// Another verifier.
struct Second {
    state: PathBuf,
    program: PathBuf,
    url: String,
    _serve: Process,
}

impl Second {
    fn start(world: &World, authority: &tempfile::TempDir) -> Result<Self> {
        let (state, program) = (world.folder().join("second"), world.assets().verifier.clone());
        run(Command::new(&program).arg("--state").arg(&state).arg("init"))?.success()?;
        let mut command = Command::new(&program);
        command.arg("--state").arg(&state);
        command.args(["serve", "--listen", "127.0.0.1:0", "--period", "3600", "--enrol-listen", "127.0.0.1:0"]);
        let [root, issuer] = authority_certificates(authority.path());
        command.arg("--software-ek-roots").arg(root).arg("--ek-intermediates").arg(issuer);
        let mut serve = Process::spawn("the second verifier", &command, &world.folder().join("log/second.log"), false)?;
        let file = state.join("enrol.addr");
        wait::for_true("the second verifier's door", LIMIT, || {
            serve.check_alive()?;
            Ok(fs::metadata(&file).is_ok_and(|data| data.len() > 0))
        })?;
        let url = format!("https://{}", fs::read_to_string(&file)?.trim());
        Ok(Self { state, program, url, _serve: serve })
    }

    fn verifier(&self, arguments: &[&str]) -> Result<Run> {
        run(Command::new(&self.program).arg("--state").arg(&self.state).args(arguments))
    }

    fn token(&self) -> Result<String> {
        Ok(self.verifier(&["token", "create", "--software-tpm"])?.success()?.output.trim().to_owned())
    }
}

#[test]
fn certificates_are_renewed_and_a_verifier_may_be_away() {
    with_door(&["--certificate-lifetime", "12s"], |world, Door { authority, url }| {
        let token = world.token(&["--software-tpm"])?;
        join(world, url, &token)?.success()?;
        let identity = world.proxy_state().join("verifiers/lab/identity.pem");
        let first = fs::read(&identity)?;
        world.start_proxy()?;
        wait_known(world)?;
        world.learn_policy()?;
        let renewed = |world: &mut World| {
            let before = world.audit()?.iter().filter(|e| e["what"] == "renew" && e["result"] == "ok").count();
            world.wait_until("a renewal", LIMIT, |world| {
                let log = world.audit()?;
                let now = log.iter().filter(|e| e["what"] == "renew" && e["result"] == "ok").count();
                Ok((now > before).then_some(()))
            })
        };
        renewed(world)?;
        wait::for_true("the certificate to be kept", LIMIT, || Ok(fs::read(&identity)? != first))?;
        world.verdict()?.host().is("trusted")?;

        let address = url.trim_start_matches("https://").to_owned();
        world.stop_serve()?;
        world.wait_until("the proxy to miss its verifier", LIMIT, |world| {
            let log = fs::read_to_string(world.folder().join("log/proxy.log"))?;
            Ok(log.contains("the membership could not be kept up").then_some(()))
        })?;
        open_door(world, authority, &address, &["--certificate-lifetime", "60s"])?;
        renewed(world)?;
        world.verdict()?.host().is("trusted")?;

        // Revoked: not asked any more, nothing is renewed, and it does not come back by itself.
        world.verifier(&["revoke", World::HOST])?.success()?;
        world.verdict()?.host().is_untrusted_for("host-withdrawn", "")?;
        let token = world.token(&["--software-tpm"])?;
        world.proxy()?.terminate()?;
        refused(&join(world, url, &token)?, "host-withdrawn")?;
        world.start_proxy()?;
        world.wait_until("the proxy to be refused", LIMIT, |world| {
            Ok(world.audited("here", "host-withdrawn")?.then_some(()))
        })?;
        world.proxy()?.terminate()?;
        let token = world.token(&["--software-tpm", "--replace", World::HOST])?;
        join(world, url, &token)?.success()?;
        world.start_proxy()?;
        wait_known(world)?;
        world.verdict()?.host().is("trusted")?;
        world.verifier(&["retire", World::HOST])?.success()?;
        world.verdict()?.host().is_untrusted_for("host-withdrawn", "")?;
        for what in ["revoke", "retire"] {
            ensure!(world.audited(what, "ok")?, "{what} is not in the audit log");
        }
        Ok(())
    });
}

/// Another host beside the world's: a TPM and a proxy's configuration.
struct Other {
    folder: PathBuf,
    tpm: Tpm,
}

impl Other {
    fn new(world: &World, authority: &tempfile::TempDir, name: &str) -> Result<Self> {
        let folder = world.folder().join(name);
        let tpm = Tpm::start_certified(&folder.join("tpm"), authority.path(), false, false)?;
        Ok(Self { folder, tpm })
    }

    fn configure(&self, id: &str, tpm: &str) -> Result<()> {
        let state = self.folder.join("proxy");
        let text = format!(
            "host_id = {id:?}\nstate_dir = {state:?}\nrun_dir = {:?}\nlisten = \"127.0.0.1:0\"\n\
             [tpm]\ntcti = {:?}\n{tpm}[guest]\nvsock = false\n",
            self.folder.join("run"),
            self.tpm.tcti()
        );
        Ok(fs::write(self.folder.join("proxy.toml"), text)?)
    }

    fn command(&self, world: &World, arguments: &[&str]) -> Command {
        let mut command = Command::new(&world.assets().proxy);
        command.arg("--config").arg(self.folder.join("proxy.toml")).args(arguments);
        command
    }

    fn join(&self, world: &World, id: &str, url: &str, token: &str) -> Result<Run> {
        self.join_with(world, id, url, token, "")
    }

    /// With these lines more about its TPM.
    fn join_with(&self, world: &World, id: &str, url: &str, token: &str, tpm: &str) -> Result<Run> {
        self.configure(id, tpm)?;
        run(&mut self.command(world, &["join", url, "--token", token, "--name", "lab"]))
    }
}

fn run(command: &mut Command) -> Result<Run> {
    let output = command.output()?;
    Ok(Run {
        command: format!("{command:?}"),
        code: output.status.code().unwrap_or(-1),
        output: String::from_utf8_lossy(&output.stdout).into_owned(),
        errors: String::from_utf8_lossy(&output.stderr).into_owned(),
    })
}

#[test]
fn tokens_that_do_not_count_and_tpms_that_are_not_wanted() {
    with_door(&[], |world, Door { authority, url }| {
        refused(&join(world, url, &world.token(&[])?)?, "software-tpm")?;
        refused(&join(world, url, &world.token(&["--software-tpm", "--ttl", "1ms"])?)?, "token-expired")?;
        refused(&join(world, url, &world.token(&["--software-tpm", "--host", "another"])?)?, "token-other-host")?;
        let token = world.token(&["--software-tpm"])?;
        let (head, tail) = token.split_at(30);
        let wrong = format!("{head}{}{}", if tail.starts_with('0') { '1' } else { '0' }, &tail[1..]);
        refused(&join(world, url, &wrong)?, "token-unknown")?;
        refused(&join(world, url, "oq1.rubbish")?, "not a token")?;
        // The pin of another verifier: nothing is sent to this one.
        let (front, _) = token.rsplit_once('.').context("a token")?;
        let asked = world.audit()?.len();
        refused(
            &join(world, url, &format!("{front}.{}", "00".repeat(32)))?,
            "not the verifier that the token is from",
        )?;
        ensure!(world.audit()?.len() == asked, "something was sent");

        join(world, url, &token)?.success()?;
        refused(&join(world, url, &token)?, "token-used")?;
        let other = Other::new(world, authority, "other")?;
        refused(&other.join(world, "host-2", url, &token)?, "token-used")?;
        // Two hosts cannot share an id, and one TPM is one host.
        let token = world.token(&["--software-tpm"])?;
        refused(&other.join(world, World::HOST, url, &token)?, "id-other-ek")?;
        other.join(world, "host-2", url, &token)?.success()?;
        let token = world.token(&["--software-tpm"])?;
        refused(&other.join(world, "host-3", url, &token)?, "ek-in-use")?;
        other.join(world, "host-2", url, &token)?.success()?;
        for result in [
            "software-tpm",
            "token-expired",
            "token-other-host",
            "token-unknown",
            "token-used",
            "id-other-ek",
            "ek-in-use",
            "ok",
        ] {
            ensure!(world.audited("join", result)?, "{result} is not in the audit log");
        }
        // Without the roots nobody vouches for this TPM; without a certificate the token may do.
        world.stop_serve()?;
        let url = &world.start_door("127.0.0.1:0", &[])?;
        let token = world.token(&["--software-tpm", "--replace", "host-2"])?;
        refused(&other.join(world, "host-2", url, &token)?, "ek-certificate")?;
        let bare = Tpm::start(&world.folder().join("bare"), false, false)?;
        let bare = Other { folder: world.folder().join("bare"), tpm: bare };
        let token = world.token(&["--uses", "2"])?;
        refused(&bare.join(world, "host-4", url, &token)?, "software-tpm")?;
        let token = world.token(&["--software-tpm"])?;
        bare.join(world, "host-4", url, &token)?.success()?;
        let refusal = world.verifier(&["serve", "--fetch-intermediates"])?;
        refused(&refusal, "fetching intermediates is not built")
    });
}

#[test]
fn a_copied_state_folder_is_worth_nothing_on_another_host() {
    with_door(&["--certificate-lifetime", "12s"], |world, Door { authority, url }| {
        join(world, url, &world.token(&["--software-tpm"])?)?.success()?;
        world.start_proxy()?;
        wait_known(world)?;
        world.learn_policy()?;
        world.proxy()?.terminate()?;

        let other = Other::new(world, authority, "other")?;
        let copied = Command::new("cp").arg("-a").arg(world.proxy_state()).arg(other.folder.join("proxy")).status()?;
        ensure!(copied.success(), "cp failed");
        let state = other.folder.join("proxy");
        fs::remove_dir_all(state.join("log"))?;
        fs::remove_file(state.join("listen.addr"))?;
        other.configure(World::HOST, "")?;
        refused(&run(&mut other.command(world, &["run"]))?, "another TPM")?;

        // With the check out of the way: the other TPM's attestation key stands where that of the host was.
        run(&mut other.command(world, &["init"]))?.success()?;
        let ak = onequote_evidence::tpm::Public::parse(&fs::read(state.join("ak.pub"))?)?;
        let details = state.join("verifiers/lab/membership.json");
        let mut json: serde_json::Value = serde_json::from_slice(&fs::read(&details)?)?;
        json["ak"] = onequote_evidence::id::Blob(ak.name()).to_string().into();
        fs::write(&details, serde_json::to_vec(&json)?)?;
        let log = world.folder().join("log/other.log");
        let mut impostor = Process::spawn("the other proxy", &other.command(world, &["run"]), &log, false)?;
        let address = state.join("listen.addr");
        wait::for_true("the other proxy to listen", LIMIT, || {
            impostor.check_alive()?;
            Ok(fs::metadata(&address).is_ok_and(|data| data.len() > 0))
        })?;
        let at = format!("https://{}", fs::read_to_string(&address)?.trim());
        // With the key that was copied it can say where it is, and the evidence is that of another TPM.
        wait::for_true("the verifier to be led to the other proxy", LIMIT, || {
            let hosts = world.verifier(&["hosts", "--json"])?.json()?;
            Ok(hosts[0]["url"] == at.as_str())
        })?;
        world.verdict()?.host().is_untrusted_for("signature-invalid", "")?;
        // Nothing that the other TPM signs renews the certificate.
        wait::for_true("the renewal to be refused", LIMIT, || world.audited("renew", "quote-wrong"))?;
        ensure!(!world.audited("renew", "ok")?, "the certificate was renewed");
        Ok(())
    });
}

#[test]
fn a_certificate_from_a_file_vouches_for_a_tpm_that_has_none() {
    World::test(|world| {
        world.verifier(&["init"])?.success()?;
        let maker = Maker::new(&world.folder().join("maker"))?;
        let root = maker.root().display().to_string();
        let bare = Tpm::start(&world.folder().join("bare"), false, false)?;
        let ek = EsapiTpm::open(&bare.tcti())?.endorsement(Some(EkKind::EccP256), None)?;
        let other = Tpm::start(&world.folder().join("other"), false, false)?;
        let stranger = EsapiTpm::open(&other.tcti())?.endorsement(Some(EkKind::EccP256), None)?;
        let bare = Other { folder: world.folder().join("bare"), tpm: bare };
        let url = world.start_door("127.0.0.1:0", &["--ek-roots", &root])?;
        // No token for software TPMs: somebody must vouch for this one.
        let token = world.token(&[])?;
        refused(&bare.join(world, "host-1", &url, &token)?, "software-tpm")?;
        let certified =
            |public: &[u8]| -> Result<String> { Ok(format!("ek_certificate = {:?}\n", maker.certify(public, false)?)) };
        let of_another = certified(&stranger.public)?;
        let shown = bare.join_with(world, "host-1", &url, &token, &of_another)?;
        refused(&shown, "no key of this TPM has the public value that is in the certificate")?;
        let own = certified(&ek.public)?;
        bare.join_with(world, "host-1", &url, &token, &own)?.success()?;
        let hosts = world.verifier(&["hosts", "--json"])?.json()?;
        let vouched = hosts[0]["vouched"].as_str().context("nobody vouches")?;
        ensure!(hosts[0]["software_tpm"] == false && vouched.contains("a maker of TPMs"), "{hosts}");
        Ok(())
    });
}

#[test]
fn an_rsa_attestation_key_at_a_persistent_handle_is_attested() {
    World::test(|world| {
        world.settings().tpm = "ak = \"rsa-2048\"\nak_handle = 0x81010010\n".to_owned();
        world.start_enrolled()?;
        world.learn_policy()?;
        world.verdict()?.host().is("trusted")?;
        world.proxy()?.terminate()?;
        world.start_proxy()?;
        world.enrol_again()?;
        world.verdict()?.host().is("trusted")
    });
}
