//! A Debian system of one's own: made from packages by mmdebstrap, as an ext4 image.
//!
//! The same suite as this machine's, so that programs which are built here run there. Works as root, and without root where
//! the kernel lets users have name spaces.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};

use crate::lab::cache::{Cache, Key};
use crate::lab::command;

/// Nobody reads these in a lab, and each of them is copied and hashed.
const LEFT_OUT: [&str; 3] = ["/usr/share/doc/*", "/usr/share/man/*", "/usr/share/locale/*"];

/// Passed to the scripts below: the tree.
const FINISH: &str = r#"
set -eu
tree=$1 out=$2
# Known before the first boot: a system that is new to itself writes and runs other things.
echo 6f6e6571756f746500000000006c6162 >"$tree/etc/machine-id"
: >"$tree/etc/resolv.conf"
rm -rf "$tree/var/lib/apt/lists" "$tree/var/cache/apt" "$tree/var/log/apt" "$tree/var/log/dpkg.log"
mkdir -p "$tree/var/cache/apt/archives/partial" "$tree/var/lib/apt/lists/partial"
rm -f "$tree"/vmlinuz* "$tree"/initrd.img*
for file in "$tree"/boot/vmlinuz-*; do cp "$file" "$out/vmlinuz"; done
for file in "$tree"/boot/initrd.img-*; do if [ -e "$file" ]; then mv "$file" "$out/initrd"; fi; done
chroot "$tree" dpkg-query -W -f '${Package} ${Version}\n' >"$out/packages"
"#;

/// What a Debian system is made of.
pub(crate) struct Recipe {
    /// Name of the cache entry.
    pub(crate) name: &'static str,
    /// Its packages; what they need and what no Debian is without comes along.
    pub(crate) packages: Vec<String>,
    /// A folder whose content is put over the tree after the packages.
    pub(crate) overlay: Option<PathBuf>,
    /// What else is to be done, by a shell with the tree as `$1` and the cache entry's folder as `$2`.
    pub(crate) script: String,
    /// Size of the image, in words of mke2fs.
    pub(crate) size: &'static str,
}

/// A Debian system: `root.img` (ext4), `vmlinuz`, `initrd` and `packages` (names and versions).
#[derive(Debug, Clone)]
pub(crate) struct Debian {
    folder: PathBuf,
}

impl Debian {
    /// From the cache, or built: about a minute, and it says so.
    pub(crate) fn prepare(cache: &Cache, recipe: &Recipe) -> Result<Self> {
        let suite = suite()?;
        let mut key = Key::new(1).text(&suite).text(&recipe.script).text(recipe.size).text(FINISH);
        // mmdebstrap installs what apt would install: so the versions of all of it are asked of apt.
        for line in versions(&recipe.packages)? {
            key = key.text(&line);
        }
        if let Some(overlay) = &recipe.overlay {
            for file in files(overlay)? {
                key = key.text(&file.strip_prefix(overlay)?.to_string_lossy()).file(&file)?;
            }
        }
        let folder = cache.entry(recipe.name, &key, |folder| build(folder, &suite, recipe))?;
        Ok(Self { folder })
    }

    /// The root file system.
    pub(crate) fn root(&self) -> PathBuf {
        self.folder.join("root.img")
    }

    /// Its initramfs, made by its own initramfs-tools.
    pub(crate) fn initrd(&self) -> PathBuf {
        self.folder.join("initrd")
    }

    /// Names and versions of its packages, one a line.
    pub(crate) fn packages(&self) -> Result<String> {
        Ok(fs::read_to_string(self.folder.join("packages"))?)
    }
}

fn build(folder: &Path, suite: &str, recipe: &Recipe) -> Result<()> {
    eprintln!("lab: making {} of Debian packages (about a minute, then kept)", recipe.name);
    let start = Instant::now();
    let script = folder.join("script");
    fs::write(&script, &recipe.script)?;
    let mut make = command::program("mmdebstrap");
    make.args(["--quiet", "--format=null", "--variant=minbase", "--aptopt=Apt::Install-Recommends \"false\""]);
    make.arg(format!("--include={}", recipe.packages.join(",")));
    make.args(LEFT_OUT.iter().map(|path| format!("--dpkgopt=path-exclude={path}")));
    let out = folder.to_string_lossy();
    // Hooks see the tree with its owners, also where the builder is not root.
    let mut hook = |words: String| {
        make.arg(format!("--customize-hook={words}"));
    };
    if let Some(overlay) = &recipe.overlay {
        hook(format!("cp -r --preserve=mode,links {}/. \"$1\"", overlay.display()));
    }
    hook(format!("sh {out}/script \"$1\" {out}"));
    fs::write(folder.join("finish"), FINISH)?;
    hook(format!("sh {out}/finish \"$1\" {out}"));
    // Seen by itself: /proc, /sys and devices are mounted in the tree while hooks run.
    hook(format!("mkdir {out}/tree && mount --bind \"$1\" {out}/tree"));
    hook(format!("mke2fs -q -F -t ext4 -d {out}/tree {out}/root.img {}", recipe.size));
    hook(format!("umount {out}/tree && rmdir {out}/tree"));
    command::output(make.args([suite, "/dev/null"])).context("mmdebstrap")?;
    for file in ["script", "finish"] {
        fs::remove_file(folder.join(file))?;
    }
    eprintln!("lab: {} made in {:.0} s", recipe.name, start.elapsed().as_secs_f32());
    Ok(())
}

/// This machine's suite.
fn suite() -> Result<String> {
    let release = fs::read_to_string("/etc/os-release")?;
    let suite = release.lines().find_map(|line| line.strip_prefix("VERSION_CODENAME="));
    Ok(suite.context("/etc/os-release names no suite: is this Debian?")?.trim_matches('"').to_owned())
}

/// What an empty system would get, as apt says: `Inst NAME (VERSION …)`.
fn versions(packages: &[String]) -> Result<Vec<String>> {
    let mut ask = Command::new("apt-get");
    ask.env("LC_ALL", "C").args(["--simulate", "-qq", "--no-install-recommends"]);
    ask.args(["-o", "Dir::State::status=/dev/null", "install", "base-files"]).args(packages);
    let said = command::text(&mut ask).context("are the package lists there? Run `apt-get update` as root")?;
    let mut lines: Vec<String> =
        said.lines().filter_map(|line| line.strip_prefix("Inst ")).map(str::to_owned).collect();
    ensure!(!lines.is_empty(), "apt names no package that would be installed: {said}");
    lines.sort();
    Ok(lines)
}

fn files(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for item in fs::read_dir(folder).with_context(|| format!("no folder {}", folder.display()))? {
        let item = item?;
        match item.file_type()?.is_dir() {
            true => found.extend(files(&item.path())?),
            false => found.push(item.path()),
        }
    }
    found.sort();
    Ok(found)
}
