//! Building and running, step by step, with a summary.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use crate::licences;

use anyhow::{Context as _, Result, bail, ensure};

const SHIM_TARGET: &str = "x86_64-unknown-linux-gnu";

/// As in the lab (`tests/src/lab/assets.rs`), so that what is built here is used there.
const SHIM_FLAGS: &str = "-C target-feature=+crt-static -C link-arg=-Wl,-z,pack-relative-relocs";

/// The shim may not be larger.
const SHIM_LIMIT: u64 = 1_200_000;

/// Tests whose names begin so boot guests.
const BOOTS: &str = "vm_";

/// Builds everything and runs the demo, or another program of the lab.
pub(crate) fn play(program: &str, options: &[OsString]) -> Result<ExitCode> {
    build(false)?;
    let mut command = cargo("run");
    command.args(["--quiet", "--package", "onequote-tests", "--bin", program, "--"]).args(options);
    pass_on(&mut command)
}

/// Builds the shim and makes its Debian packages, in the target folder.
pub(crate) fn package() -> Result<()> {
    run(&mut shim())?;
    let target = target_folder()?;
    let folder = target.join("package");
    fs::create_dir_all(&folder)?;
    let mut build = Command::new("sh");
    build.arg(workspace().join("guest-shim/debian/build.sh"));
    build.arg(target.join(SHIM_TARGET).join("shim/onequote-shim")).arg(env!("CARGO_PKG_VERSION")).arg(&folder);
    run(&mut build)?;
    for item in fs::read_dir(&folder)? {
        println!("{}", item?.path().display());
    }
    Ok(())
}

/// Builds for speed and runs the benches.
pub(crate) fn bench(json: Option<&Path>, docs: Option<&Path>, short: bool, only: &[String]) -> Result<ExitCode> {
    build(true)?;
    let mut command = cargo("run");
    command.args(["--quiet", "--release", "--package", "onequote-tests", "--bin", "bench", "--"]);
    if let Some(file) = json {
        command.arg("--json").arg(std::path::absolute(file)?);
    }
    if let Some(folder) = docs {
        command.arg("--docs").arg(std::path::absolute(folder)?);
    }
    command.args(short.then_some("--short"));
    command.args(only.iter().flat_map(|part| ["--only", part]));
    pass_on(&mut command)
}

/// Fuzzes every parser with what the formats' examples give it to start from.
pub(crate) fn fuzz(seconds: u32) -> Result<ExitCode> {
    let folder = workspace().join("tests/fuzz");
    if !cargo("fuzz").arg("--version").output().is_ok_and(|output| output.status.success()) {
        run(cargo("install").args(["cargo-fuzz", "--locked"]))?;
    }
    run(cargo("run").args(["--quiet", "--example", "seeds", "--manifest-path"]).arg(folder.join("Cargo.toml")))?;
    let listed = cargo("fuzz").arg("list").arg("--fuzz-dir").arg(&folder).output()?;
    ensure!(listed.status.success(), "cannot list the fuzz targets");
    let mut summary = Summary::default();
    for target in String::from_utf8_lossy(&listed.stdout).lines() {
        let mut command = cargo("fuzz");
        command.args(["run", "--sanitizer", "none", "--fuzz-dir"]).arg(&folder).arg(target);
        command.args(["--".to_owned(), format!("-max_total_time={seconds}")]);
        summary.step(target, &mut command);
    }
    Ok(summary.finish())
}

fn build(release: bool) -> Result<()> {
    println!("building (a few minutes the first time)");
    let mut programs = cargo("build");
    programs.args(["--package", "onequote-proxy", "--package", "onequote-verifier"]);
    if release {
        programs.arg("--release");
    }
    run(&mut programs)?;
    run(&mut shim())
}

fn shim() -> Command {
    let mut shim = cargo("build");
    shim.args(["--package", "onequote-shim", "--profile", "shim", "--target", SHIM_TARGET])
        .env("RUSTFLAGS", SHIM_FLAGS);
    shim
}

/// Every check, with a summary at the end.
pub(crate) fn test(quick: bool) -> Result<ExitCode> {
    let skips = std::env::temp_dir().join(format!("onequote-skips-{}", std::process::id()));
    let mut summary = Summary::default();

    let mut format = cargo("fmt");
    format.args(["--all", "--check"]);
    summary.step("format", &mut format);

    let mut lints = cargo("clippy");
    lints.args(["--workspace", "--all-targets", "--", "-D", "warnings"]);
    summary.step("lints", &mut lints);

    summary.check("licences", || licences::check(&mut cargo("metadata")));

    let mut programs = cargo("build");
    programs.args(["--package", "onequote-proxy", "--package", "onequote-verifier"]);
    summary.step("build: proxy, verifier", &mut programs);
    summary.step("build: shim", &mut shim());
    summary.check("shim's size", shim_size);

    let mut units = cargo("test");
    units.args(["--workspace", "--exclude", "onequote-tests"]).env("ONEQUOTE_SKIPS", &skips);
    summary.step("unit tests", &mut units);

    match if quick { boot_tests() } else { Ok(Vec::new()) } {
        Ok(left_out) => {
            // Programs were just built: the lab need not ask cargo again.
            let mut lab = cargo("test");
            lab.args(["--package", "onequote-tests", "--no-fail-fast"])
                .env("ONEQUOTE_BUILT", "1")
                .env("ONEQUOTE_SKIPS", &skips);
            if !left_out.is_empty() {
                lab.args(["--", "--exact"]).args(left_out.iter().flat_map(|name| ["--skip", name]));
                let names = left_out.join(", ");
                summary.notes.push(format!("--quick left out {} tests that boot guests: {names}", left_out.len()));
            }
            summary.step("end-to-end tests", &mut lab);
        }
        Err(error) => summary.check("end-to-end tests", || Err(error)),
    }

    if let Ok(lines) = fs::read_to_string(&skips) {
        summary.notes.extend(lines.lines().map(str::to_owned));
        fs::remove_file(skips)?;
    }
    Ok(summary.finish())
}

fn shim_size() -> Result<String> {
    let file = target_folder()?.join(SHIM_TARGET).join("shim/onequote-shim");
    let size = fs::metadata(&file).with_context(|| format!("no {}", file.display()))?.len();
    ensure!(size <= SHIM_LIMIT, "the shim has {size} bytes, {SHIM_LIMIT} at most are wanted");
    Ok(format!("{size} bytes"))
}

/// Names of the tests that boot guests. Builds the tests if they are not built yet.
fn boot_tests() -> Result<Vec<String>> {
    let output = cargo("test").args(["--quiet", "--package", "onequote-tests", "--", "--list"]).output()?;
    ensure!(output.status.success(), "cannot list the tests");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let names = text.lines().filter_map(|line| line.strip_suffix(": test"));
    let boots = |name: &&str| name.rsplit("::").next().is_some_and(|own| own.starts_with(BOOTS));
    Ok(names.filter(boots).map(str::to_owned).collect())
}

/// What was done and how it went.
#[derive(Default)]
struct Summary {
    lines: Vec<(bool, String)>,
    notes: Vec<String>,
}

impl Summary {
    fn step(&mut self, name: &str, command: &mut Command) {
        println!("\n==== {name}");
        let start = Instant::now();
        let outcome = run(command);
        self.note(name, start.elapsed(), outcome.map(|()| String::new()));
    }

    fn check(&mut self, name: &str, check: impl FnOnce() -> Result<String>) {
        let start = Instant::now();
        let outcome = check();
        self.note(name, start.elapsed(), outcome);
    }

    fn note(&mut self, name: &str, time: Duration, outcome: Result<String>) {
        let (good, text) = match outcome {
            Ok(text) => (true, text),
            Err(error) => (false, format!("{error:#}")),
        };
        self.lines.push((good, format!("{name:<24} {:>6.1} s  {text}", time.as_secs_f32())));
    }

    fn finish(self) -> ExitCode {
        println!("\n==== summary");
        for (good, line) in &self.lines {
            println!("{}  {line}", if *good { "ok    " } else { "FAILED" });
        }
        for note in &self.notes {
            println!("note    {note}");
        }
        match self.lines.iter().all(|(good, _)| *good) {
            true => ExitCode::SUCCESS,
            false => ExitCode::FAILURE,
        }
    }
}

fn cargo(word: &str) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.arg(word).current_dir(workspace());
    command
}

fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// The folder of this program's profile is in it.
fn target_folder() -> Result<PathBuf> {
    let own = std::env::current_exe()?;
    own.ancestors().nth(2).map(Path::to_owned).context("this program is in no target folder")
}

fn run(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| format!("cannot start {:?}", command.get_program()))?;
    match status.success() {
        true => Ok(()),
        false => bail!("ended with {status}"),
    }
}

/// Runs a program whose exit code is ours.
fn pass_on(command: &mut Command) -> Result<ExitCode> {
    let status = command
        .env("ONEQUOTE_BUILT", "1")
        .status()
        .with_context(|| format!("cannot start {:?}", command.get_program()))?;
    Ok(ExitCode::from(status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(1)))
}
