//! **Measuring images.** Everything is in the page cache and read several times, in turns with what it is compared with; the
//! median counts. What else the machine does meanwhile spoils wall-clock ratios, so its load is shown, and beside the
//! ratios those of CPU time, times the cores: what they would be on a machine that does nothing else.
//!
//! - `image-speed`: a file of 4 GiB of noise: `onequote_verity::measure` on all cores, `openssl dgst -sha256`, and
//!   `fsverity digest`, whose output must be the same.
//! - `image-sparse`: 1 GiB of data as 64 KiB pieces spread over 100 GiB, against the same bytes in one piece.
//! - `image-changed`: 1 % of 4 GiB changed, in 64 KiB pieces spread over it: from the saved tree, against all anew.
//! - `image-shared`: 100 measurements of one file at once, through the proxy's digester: how often it was read.

use std::{
    fs::{self, File},
    num::NonZeroUsize,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use anyhow::{Context as _, Result, ensure};
use onequote_evidence::digest::FileDigestAlg;
use onequote_proxy::measure::{Digester, MeasureLimits, Stamp, Wanted};
use onequote_verity::{Changed, Measured, Options, SavedTree, measure};

use crate::numbers::Numbers;

const GIB: u64 = 1 << 30;

/// What QEMU's dirty bitmaps and qcow2 count in, by default.
const CLUSTER: u64 = 64 * 1024;

const RUNS: usize = 5;

pub(crate) fn speed(numbers: &mut Numbers) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = noise(folder.path(), 4 * GIB)?;
    let file = File::open(&path)?;
    let (mut ours, mut openssl, mut fsverity) = (Vec::new(), Vec::new(), Vec::new());
    let (mut our_cpu, mut openssl_cpu, mut fsverity_cpu) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..RUNS {
        let start = cpu_time()?;
        let (time, measured) = timed(|| Ok(measure(&file, all_cores())?))?;
        ours.push(time);
        let after_ours = cpu_time()?;
        our_cpu.push(after_ours - start);
        openssl.push(timed(|| run("openssl", &["dgst", "-sha256"], &path))?.0);
        let after_openssl = cpu_time()?;
        openssl_cpu.push(after_openssl - after_ours);
        let (time, told) = timed(|| run("fsverity", &["digest", "--compact"], &path))?;
        fsverity.push(time);
        fsverity_cpu.push(cpu_time()? - after_openssl);
        ensure!(told.trim() == hex::encode(measured.digest), "fsverity says {told}");
    }
    let (ours, openssl, fsverity) = (median(ours), median(openssl), median(fsverity));
    numbers.known("4 GiB image, warm, all cores", ours, "s");
    numbers.at_least("times as fast as openssl dgst -sha256", openssl / ours, "x", 3.0);
    numbers.at_least("times as fast as fsverity digest", fsverity / ours, "x", 4.0);
    let (ours, cores) = (median(our_cpu), all_cores().threads.get() as f64);
    numbers.known("CPU time of 4 GiB", ours, "s");
    numbers.known("the first by CPU time and cores", cores * median(openssl_cpu) / ours, "x");
    numbers.known("the second by CPU time and cores", cores * median(fsverity_cpu) / ours, "x");
    load(numbers, "image-speed")
}

pub(crate) fn sparse(numbers: &mut Numbers) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let dense = File::open(noise(folder.path(), GIB)?)?;
    let sparse = File::options().read(true).write(true).create_new(true).open(folder.path().join("sparse"))?;
    sparse.set_len(100 * GIB)?;
    let mut piece = vec![0; usize::try_from(CLUSTER)?];
    for n in 0..GIB / CLUSTER {
        dense.read_exact_at(&mut piece, n * CLUSTER)?;
        sparse.write_all_at(&piece, n * 100 * CLUSTER)?;
    }
    sparse.sync_all()?;
    let (mut one, mut other) = (Vec::new(), Vec::new());
    for _ in 0..RUNS {
        one.push(timed(|| Ok(measure(&dense, all_cores())?))?.0);
        let (time, measured) = timed(|| Ok(measure(&sparse, all_cores())?))?;
        ensure!(measured.read == GIB, "{} bytes were read", measured.read);
        other.push(time);
    }
    let (one, other) = (median(one), median(other));
    numbers.known("1 GiB image, warm, all cores", one, "s");
    numbers.at_most("100 GiB with 1 GiB of data, times that", other / one, "x", 1.2);
    load(numbers, "image-sparse")
}

pub(crate) fn changed(numbers: &mut Numbers) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = noise(folder.path(), 4 * GIB)?;
    let file = File::options().read(true).write(true).open(&path)?;
    let tree = || File::options().read(true).write(true).create(true).truncate(true).open(folder.path().join("tree"));
    let piece = vec![0xa5; usize::try_from(CLUSTER)?];
    let (mut full, mut saving, mut updating) = (Vec::new(), Vec::new(), Vec::new());
    for run in 0..RUNS as u64 {
        let (time, _) = timed(|| Ok(measure(&file, all_cores())?))?;
        full.push(time);
        let tree = tree()?;
        let (time, known) = timed(|| Ok(measure(&file, Options { save: Some(&tree), ..all_cores() })?))?;
        saving.push(time);
        ensure!(known.saved, "the tree was not saved");
        let mut changes = Changed::default();
        for n in 0..4 * GIB / CLUSTER / 100 {
            let at = (n * 100 + run) * CLUSTER;
            file.write_all_at(&piece, at)?;
            changes.add(at..at + CLUSTER);
        }
        let update = || -> Result<Measured> {
            Ok(SavedTree::open(tree.try_clone()?)?.update(&file, &changes, &known.digest, all_cores())?)
        };
        let (time, now) = timed(update)?;
        updating.push(time);
        ensure!(now.digest == measure(&file, all_cores())?.digest, "the digests differ");
        ensure!(now.read <= 4 * GIB / 100, "{} bytes were read", now.read);
    }
    let (full, saving, updating) = (median(full), median(saving), median(updating));
    numbers.at_most("1 % of 4 GiB changed, part of a full one", 100.0 * updating / full, "%", 5.0);
    numbers.known("saving the tree, part of a full one", 100.0 * (saving / full - 1.0), "%");
    load(numbers, "image-changed")
}

pub(crate) fn shared(numbers: &mut Numbers) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = noise(folder.path(), GIB)?;
    // As old as an image is, so that its time of change tells something.
    let changed = fs::metadata(&path)?.modified()?;
    while SystemTime::now().duration_since(changed).unwrap_or_default() < Duration::from_secs(2) {
        std::thread::sleep(Duration::from_millis(50));
    }
    let digester = Digester::new(MeasureLimits::default());
    let before = read_so_far()?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let (time, ()) = timed(|| {
        runtime.block_on(async {
            let mut all = tokio::task::JoinSet::new();
            for _ in 0..100 {
                let file = Arc::new(File::open(&path)?);
                let stamp = Some(Stamp::from(&file.metadata()?));
                let digester = digester.clone();
                let wanted = Wanted { alg: FileDigestAlg::FsVerity, stamp, progress: None };
                all.spawn(async move { digester.digest(file, wanted).await });
            }
            let mut digests = Vec::new();
            while let Some(digest) = all.join_next().await {
                digests.push(digest??);
            }
            ensure!(digests.len() == 100 && digests.iter().all(|d| *d == digests[0]), "digests differ");
            Ok(())
        })
    })?;
    numbers.exactly("reads of 1 GiB that 100 VMs want", digester.files_read() as f64, "reads", 1.0);
    numbers.at_most("bytes read for them, in GiB", (read_so_far()? - before) as f64 / GIB as f64, "GiB", 1.01);
    numbers.known("until all 100 have it", time, "s");
    load(numbers, "image-shared")
}

fn all_cores() -> Options<'static> {
    let threads = std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN);
    Options { threads, ..Options::default() }
}

/// A file of noise, in the page cache.
fn noise(folder: &Path, size: u64) -> Result<PathBuf> {
    let path = folder.join("noise");
    let mut source = std::io::Read::take(File::open("/dev/urandom")?, size);
    let mut file = File::create(&path)?;
    let copied = std::io::copy(&mut source, &mut file).context("making the file; 5 GiB must be free in TMPDIR")?;
    ensure!(copied == size, "{copied} bytes of noise");
    // Nothing is to be written back while times are taken.
    file.sync_all()?;
    Ok(path)
}

fn timed<T>(work: impl FnOnce() -> Result<T>) -> Result<(f64, T)> {
    let begun = Instant::now();
    let done = work()?;
    Ok((begun.elapsed().as_secs_f64(), done))
}

fn run(program: &str, args: &[&str], file: &Path) -> Result<String> {
    let output = Command::new(program).args(args).arg(file).output().with_context(|| program.to_owned())?;
    ensure!(output.status.success(), "{program}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8(output.stdout)?)
}

/// What this process and its children that have ended have had of the processors, in seconds (`/proc/self/stat`).
fn cpu_time() -> Result<f64> {
    let stat = fs::read_to_string("/proc/self/stat")?;
    let fields = stat.rsplit(") ").next().context("/proc/self/stat")?.split(' ').skip(11).take(4);
    let ticks: Vec<u64> = fields.map(str::parse).collect::<Result<_, _>>()?;
    Ok(ticks.iter().sum::<u64>() as f64 / 100.0)
}

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

/// Bytes that this process has read, from files and others.
fn read_so_far() -> Result<u64> {
    let io = fs::read_to_string("/proc/self/io")?;
    let line = io.lines().find_map(|line| line.strip_prefix("rchar: ")).context("rchar in /proc/self/io")?;
    Ok(line.parse()?)
}

/// What the machine did besides: processes that wanted to run in the last minute.
fn load(numbers: &mut Numbers, bench: &str) -> Result<()> {
    let text = fs::read_to_string("/proc/loadavg")?;
    let load = text.split(' ').next().context("/proc/loadavg")?.parse()?;
    numbers.known(&format!("load of the machine in {bench}"), load, "processes");
    Ok(())
}
