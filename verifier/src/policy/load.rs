//! Reading policies: strict, with the place of every mistake.

use std::path::{Path, PathBuf};

use onequote_evidence::{digest::sha256, pcr::PCR_COUNT};

use super::{AllowList, ImaRule, KeyEntry, Policy, SigningKey, keylime::KeylimeError, keys::KeyError};

/// The longest policy or allow-list file in bytes.
const MAX_FILE: u64 = 256 * 1024 * 1024;

/// A policy that cannot be put in force.
#[derive(Debug, thiserror::Error)]
pub enum PolicyError {
    /// It cannot be read.
    #[error("cannot read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// It is not TOML, or has unknown or wrong keys.
    #[error("{path}: {message}")]
    Toml {
        /// The file.
        path: PathBuf,
        /// Line, column, key and what is wrong.
        message: String,
    },
    /// A key that it names cannot be used.
    #[error("{path}")]
    Key {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: KeyError,
    },
    /// A Keylime policy that cannot be taken over.
    #[error("{path}")]
    Keylime {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: KeylimeError,
    },
    /// It contradicts itself.
    #[error("{path}: {rule}: {why}")]
    Rule {
        /// The file.
        path: PathBuf,
        /// Which rule.
        rule: String,
        /// What is wrong and what to write.
        why: &'static str,
    },
}

impl Policy {
    /// Reads a policy file and the files that it names.
    ///
    /// # Errors
    /// [`PolicyError`].
    pub fn load(path: &Path) -> Result<(Self, String), PolicyError> {
        let text = read(path)?;
        let (policy, text) = Self::parse_with_files(&text, path)?;
        Ok((policy, text))
    }

    /// Reads a policy that names no other file: as the store holds it.
    ///
    /// # Errors
    /// [`PolicyError`].
    pub fn parse(text: &str, name: &str) -> Result<Self, PolicyError> {
        let mut policy: Self = toml::from_str(text).map_err(|e| located(Path::new(name), &e))?;
        policy.id = sha256(&[text.as_bytes()]);
        policy.check(Path::new(name))?;
        if policy.names_files() {
            let why = "they name other files: take the files' content in under ima, and PEM texts in ima_keys";
            return Err(PolicyError::Rule { path: name.into(), rule: "ima_file or ima_keys".into(), why });
        }
        Ok(policy)
    }

    /// Reads a policy and takes its `ima_file`s in: the second value is a text that needs no other file.
    fn parse_with_files(text: &str, path: &Path) -> Result<(Self, String), PolicyError> {
        let mut policy: Self = toml::from_str(text).map_err(|e| located(path, &e))?;
        policy.id = sha256(&[text.as_bytes()]);
        policy.check(path)?;
        let folder = path.parent().unwrap_or(Path::new("."));
        let mut table: toml::Table = toml::from_str(text).map_err(|e| located(path, &e))?;
        if let Some(host) = table.get_mut("host").and_then(toml::Value::as_table_mut) {
            take_in(host, folder)?;
        }
        for vm in table.get_mut("vm").and_then(toml::Value::as_array_mut).into_iter().flatten() {
            if let Some(vm) = vm.as_table_mut() {
                take_in(vm, folder)?;
            }
        }
        if !policy.names_files() {
            return Ok((policy, text.to_owned()));
        }
        let whole = table.to_string();
        Ok((Self::parse(&whole, &path.display().to_string())?, whole))
    }

    fn names_files(&self) -> bool {
        let files = |ima: &ImaRule| ima.files.is_some() || ima.keys.iter().any(|key| key.key().is_none());
        files(&self.host.ima) || self.vms.iter().any(|vm| files(&vm.ima))
    }

    fn check(&self, path: &Path) -> Result<(), PolicyError> {
        let fail = |rule: String, why| Err(PolicyError::Rule { path: path.to_owned(), rule, why });
        let host = &self.host;
        if host.pcr_vm == host.pcr_guest || host.pcr_vm >= PCR_COUNT || host.pcr_guest >= PCR_COUNT {
            return fail("host".into(), "pcr_vm and pcr_guest must be two registers below 24");
        }
        if let Some(firmware) = &host.firmware {
            if let Some((name, _)) = firmware.databases().into_iter().find(|(_, rule)| rule.is_empty()) {
                return fail(format!("host.firmware, {name}"), "give content, include, exclude or only");
            }
            if firmware.kernel.as_ref().is_some_and(Vec::is_empty) {
                return fail("host.firmware, kernel".into(), "an empty list allows no boot; leave it out not to judge");
            }
        }
        let without_keys = |rule: &ImaRule| !rule.signed.is_empty() && rule.keys.is_empty();
        let why = "ima_signed wants signatures: name the keys in ima_keys";
        if without_keys(&host.ima) {
            return fail("host".into(), why);
        }
        for (i, vm) in self.vms.iter().enumerate() {
            let rule = format!("vm rule {}", i + 1);
            if without_keys(&vm.ima) {
                return fail(rule, why);
            }
            if vm.name.is_some() == vm.uuid.is_some() {
                return fail(rule, "give either name or uuid");
            }
            for (slot, image) in &vm.images {
                if image.digests.is_empty() && !image.continuity {
                    return fail(format!("{rule}, image {slot}"), "give digests, or continuity = true");
                }
            }
        }
        Ok(())
    }
}

/// Replaces the names of files in `ima_keys` by the files' content.
fn take_keys_in(rule: &mut toml::Table, folder: &Path) -> Result<(), PolicyError> {
    for entry in rule.get_mut("ima_keys").and_then(toml::Value::as_array_mut).into_iter().flatten() {
        let text = match entry {
            toml::Value::String(text) => text,
            toml::Value::Table(table) => match table.get_mut("key") {
                Some(toml::Value::String(text)) => text,
                _ => continue,
            },
            _ => continue,
        };
        if KeyEntry::is_pem(text) {
            continue;
        }
        let path = folder.join(&*text);
        let pem = read(&path)?;
        SigningKey::from_pem(&pem).map_err(|source| PolicyError::Key { path, source })?;
        *text = pem;
    }
    Ok(())
}

/// Replaces `ima_file` by the files' content under `ima`.
fn take_in(rule: &mut toml::Table, folder: &Path) -> Result<(), PolicyError> {
    take_keys_in(rule, folder)?;
    let names = match rule.remove("ima_file") {
        Some(toml::Value::String(name)) => vec![name],
        Some(toml::Value::Array(names)) => names.iter().filter_map(|name| Some(name.as_str()?.to_owned())).collect(),
        _ => return Ok(()),
    };
    for name in names {
        take_in_file(rule, &folder.join(name))?;
    }
    Ok(())
}

fn take_in_file(rule: &mut toml::Table, path: &Path) -> Result<(), PolicyError> {
    let text = read(path)?;
    // Read as an allow list first, so that a mistake is told with that file's name and line.
    let _: AllowList = toml::from_str(&text).map_err(|e| located(path, &e))?;
    let more: toml::Table = toml::from_str(&text).map_err(|e| located(path, &e))?;
    let ima = rule.entry("ima").or_insert_with(|| toml::Value::Table(toml::Table::new()));
    for (file, digests) in more {
        let Some(ima) = ima.as_table_mut() else { continue };
        match (ima.get_mut(&file).and_then(toml::Value::as_array_mut), digests) {
            (Some(there), toml::Value::Array(new)) => there.extend(new),
            (_, digests) => {
                ima.insert(file, digests);
            }
        }
    }
    Ok(())
}

/// Reads a text of bounded size.
///
/// # Errors
/// [`PolicyError::Read`].
pub fn read(path: &Path) -> Result<String, PolicyError> {
    let fail = |source| PolicyError::Read { path: path.to_owned(), source };
    let size = std::fs::metadata(path).map_err(fail)?.len();
    if size > MAX_FILE {
        return Err(fail(std::io::Error::other(format!("larger than {MAX_FILE} bytes"))));
    }
    std::fs::read_to_string(path).map_err(fail)
}

fn located(path: &Path, e: &toml::de::Error) -> PolicyError {
    PolicyError::Toml { path: path.to_owned(), message: e.to_string().trim_end().to_owned() }
}
