//! What is slow to make, kept in the user's cache folder.
//!
//! One entry is a folder `NAME-KEY` with files and, as `DIGESTS`, the SHA-256 of each. The key is a digest of all
//! that went into the entry. An entry is built in a folder beside its place and renamed, so it is there
//! whole or not at all; its digests are checked whenever it is used again, and a damaged entry is built
//! anew, with a message. A lock file for each name makes concurrent builders wait for the first.

use std::fs::{self, File};
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, Result, bail};
use nix::fcntl::{Flock, FlockArg};
use sha2::{Digest as _, Sha256};

const DIGESTS: &str = "DIGESTS";

/// Entries of one name beyond this many, unused for [`KEEP_TIME`], are removed when a new one is built.
const KEEP_ENTRIES: usize = 3;
const KEEP_TIME: Duration = Duration::from_secs(2 * 3600);

/// The cache folder.
pub(crate) struct Cache {
    folder: PathBuf,
}

impl Cache {
    /// `$XDG_CACHE_HOME/onequote`, or `~/.cache/onequote`.
    pub(crate) fn open() -> Result<Self> {
        let base = match std::env::var_os("XDG_CACHE_HOME").filter(|value| !value.is_empty()) {
            Some(folder) => PathBuf::from(folder),
            None => PathBuf::from(std::env::var_os("HOME").context("neither XDG_CACHE_HOME nor HOME is set")?)
                .join(".cache"),
        };
        Self::at(base.join("onequote"))
    }

    /// A cache in `folder`, which is made.
    pub(crate) fn at(folder: PathBuf) -> Result<Self> {
        fs::create_dir_all(&folder).with_context(|| format!("cannot make the cache folder {}", folder.display()))?;
        Ok(Self { folder })
    }

    /// The folder of entry `name` for `key`; `build` fills an empty folder when there is none or it is damaged.
    pub(crate) fn entry(&self, name: &str, key: &Key, build: impl FnOnce(&Path) -> Result<()>) -> Result<PathBuf> {
        let lock = File::create(self.folder.join(format!("{name}.lock")))?;
        let _lock = Flock::lock(lock, FlockArg::LockExclusive)
            .map_err(|(_, error)| error)
            .with_context(|| format!("cannot lock cache entry {name}"))?;
        let place = self.folder.join(format!("{name}-{}", key.hex()));
        if place.exists() {
            match check(&place) {
                Ok(()) => {
                    // The time of the last use, for `prune`.
                    File::open(place.join(DIGESTS))?.set_modified(SystemTime::now())?;
                    return Ok(place);
                }
                Err(error) => {
                    eprintln!("lab: cache entry {} is damaged ({error:#}): building it again", place.display());
                    fs::remove_dir_all(&place)?;
                }
            }
        }
        let draft = self.folder.join(format!("{name}.new"));
        if draft.exists() {
            fs::remove_dir_all(&draft)?;
        }
        fs::create_dir(&draft)?;
        build(&draft).with_context(|| format!("cannot build {name}"))?;
        seal(&draft)?;
        fs::rename(&draft, &place)?;
        self.prune(name, &place)?;
        Ok(place)
    }

    fn prune(&self, name: &str, except: &Path) -> Result<()> {
        let prefix = format!("{name}-");
        let mut others = Vec::new();
        for item in fs::read_dir(&self.folder)? {
            let path = item?.path();
            let file_name = path.file_name().unwrap_or_default().to_string_lossy();
            let is_entry = file_name
                .strip_prefix(&prefix)
                .is_some_and(|key| key.len() == Key::HEX && key.bytes().all(|b| b.is_ascii_hexdigit()));
            if is_entry && path != except {
                let used = fs::metadata(path.join(DIGESTS)).and_then(|data| data.modified());
                others.push((used.unwrap_or(SystemTime::UNIX_EPOCH), path));
            }
        }
        others.sort();
        others.reverse();
        for (used, path) in others.into_iter().skip(KEEP_ENTRIES) {
            if used.elapsed().is_ok_and(|age| age > KEEP_TIME) {
                fs::remove_dir_all(path)?;
            }
        }
        Ok(())
    }
}

/// What an entry was made from, digested.
#[derive(Clone)]
pub(crate) struct Key(Sha256);

impl Key {
    const HEX: usize = 20;

    /// `version` is that of the recipe: raise it when the recipe changes.
    pub(crate) fn new(version: u32) -> Self {
        Self(Sha256::new()).bytes(&version.to_le_bytes())
    }

    pub(crate) fn bytes(mut self, part: &[u8]) -> Self {
        self.0.update((part.len() as u64).to_le_bytes());
        self.0.update(part);
        self
    }

    pub(crate) fn text(self, part: &str) -> Self {
        self.bytes(part.as_bytes())
    }

    pub(crate) fn file(self, path: &Path) -> Result<Self> {
        let digest = file_digest(path)?;
        Ok(self.text(&digest))
    }

    fn hex(&self) -> String {
        let mut hex = hex::encode(self.0.clone().finalize());
        hex.truncate(Self::HEX);
        hex
    }
}

/// SHA-256 of a file, in hex.
pub(crate) fn file_digest(path: &Path) -> Result<String> {
    let mut file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    let mut digest = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        let count = file.read(&mut buffer)?;
        if count == 0 {
            return Ok(hex::encode(digest.finalize()));
        }
        digest.update(&buffer[..count]);
    }
}

fn seal(folder: &Path) -> Result<()> {
    let mut lines = String::new();
    for path in files(folder)? {
        let name = path.strip_prefix(folder)?;
        lines += &format!("{}  {}\n", file_digest(&path)?, name.display());
    }
    fs::write(folder.join(DIGESTS), lines)?;
    Ok(())
}

fn check(folder: &Path) -> Result<()> {
    let lines = fs::read_to_string(folder.join(DIGESTS)).context("no list of digests")?;
    for line in lines.lines() {
        let (digest, name) = line.split_once("  ").context("a list of digests that cannot be read")?;
        if file_digest(&folder.join(name))? != digest {
            bail!("{name} has changed");
        }
    }
    Ok(())
}

/// All regular files below `folder`, sorted.
fn files(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for item in fs::read_dir(folder)? {
        let item = item?;
        if item.file_type()?.is_dir() {
            found.extend(files(&item.path())?);
        } else if item.file_name() != DIGESTS {
            found.push(item.path());
        }
    }
    found.sort();
    Ok(found)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_is_built_once_and_again_only_when_damaged() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::at(folder.path().join("cache")).unwrap();
        let key = Key::new(1).text("input");
        let mut builds = 0;
        let mut make = || {
            cache
                .entry("thing", &key, |place| {
                    builds += 1;
                    fs::create_dir(place.join("sub"))?;
                    Ok(fs::write(place.join("sub/file"), "content")?)
                })
                .unwrap()
        };
        let place = make();
        assert_eq!(place, make());
        fs::write(place.join("sub/file"), "other").unwrap();
        assert_eq!(place, make());
        assert_eq!(fs::read(place.join("sub/file")).unwrap(), b"content");
        fs::remove_file(place.join("sub/file")).unwrap();
        make();
        assert_eq!(builds, 3);
    }

    #[test]
    fn another_input_is_another_entry_and_a_failed_build_leaves_none() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::at(folder.path().to_owned()).unwrap();
        let fail = cache.entry("thing", &Key::new(1), |_| bail!("no"));
        assert!(fail.is_err());
        let one = cache.entry("thing", &Key::new(1), |_| Ok(())).unwrap();
        let two = cache.entry("thing", &Key::new(2), |_| Ok(())).unwrap();
        assert_ne!(one, two);
    }
}
