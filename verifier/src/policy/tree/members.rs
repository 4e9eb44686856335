//! The members of an archive, and what they become when they are unpacked.

use std::collections::HashMap;

use super::{FileHash, Files};

/// Links that are followed for one path: as many as the kernel follows (`MAXSYMLINKS`).
const MAX_LINKS: usize = 40;

/// The longest path of a member in bytes (`PATH_MAX`).
const MAX_PATH: usize = 4096;

/// What stands under a name.
#[derive(Debug, Clone)]
enum Member {
    File(Vec<FileHash>),
    HardLink(Vec<u8>),
    SymbolicLink(Vec<u8>),
    Other,
}

/// Members by name; a later one replaces an earlier one, as in unpacking.
#[derive(Debug, Default)]
pub(super) struct Members {
    by_name: HashMap<Vec<u8>, Member>,
}

impl Members {
    pub(super) fn file(&mut self, name: &[u8], hashes: Vec<FileHash>) -> Result<(), String> {
        self.put(name, Member::File(hashes))
    }

    pub(super) fn hard_link(&mut self, name: &[u8], target: &[u8]) -> Result<(), String> {
        self.put(name, Member::HardLink(target.to_vec()))
    }

    pub(super) fn symbolic_link(&mut self, name: &[u8], target: &[u8]) -> Result<(), String> {
        self.put(name, Member::SymbolicLink(target.to_vec()))
    }

    /// A folder, a device or the like.
    pub(super) fn other(&mut self, name: &[u8]) -> Result<(), String> {
        self.put(name, Member::Other)
    }

    fn put(&mut self, name: &[u8], member: Member) -> Result<(), String> {
        self.by_name.insert(clean(name)?, member);
        Ok(())
    }

    /// The files by their real paths.
    pub(super) fn files(self) -> Result<Files, String> {
        let mut files = Files::new();
        for (name, member) in &self.by_name {
            if let Member::File(hashes) = member {
                files.insert(self.real(name)?, hashes.clone());
            }
        }
        for (name, member) in &self.by_name {
            let Member::HardLink(target) = member else { continue };
            let mut target = self.real(&clean(target)?)?;
            // A link may be to a link.
            for _ in 0..MAX_LINKS {
                match self.by_name.get(&target) {
                    Some(Member::HardLink(next)) => target = self.real(&clean(next)?)?,
                    _ => break,
                }
            }
            match files.get(&target).cloned() {
                Some(hashes) => files.insert(self.real(name)?, hashes),
                // A hard link to a symbolic link, or to a device.
                None if self.by_name.contains_key(&target) => continue,
                None => return Err(format!("{} is a hard link to what is not there", String::from_utf8_lossy(name))),
            };
        }
        Ok(files)
    }

    /// A member's path with the links of its folders followed. Its own last part stays as it is.
    fn real(&self, name: &[u8]) -> Result<Vec<u8>, String> {
        let mut left: Vec<Vec<u8>> = name.split(|&byte| byte == b'/').rev().map(<[u8]>::to_vec).collect();
        let mut real: Vec<u8> = Vec::new();
        let mut links = 0;
        while let Some(part) = left.pop() {
            match part.as_slice() {
                b"" | b"." => continue,
                b".." => {
                    let parent = real.iter().rposition(|&byte| byte == b'/').unwrap_or(0);
                    real.truncate(parent);
                    continue;
                }
                _ => {}
            }
            let before = real.len();
            if before > 0 {
                real.push(b'/');
            }
            real.extend_from_slice(&part);
            if left.is_empty() {
                break;
            }
            if let Some(Member::SymbolicLink(target)) = self.by_name.get(&real) {
                links += 1;
                if links > MAX_LINKS {
                    return Err(format!("{} has too many symbolic links on its way", String::from_utf8_lossy(name)));
                }
                real.truncate(if target.starts_with(b"/") { 0 } else { before });
                left.extend(target.split(|&byte| byte == b'/').rev().map(<[u8]>::to_vec));
            }
        }
        Ok(real)
    }
}

/// A member's name without a leading slash or dot.
fn clean(name: &[u8]) -> Result<Vec<u8>, String> {
    let shown = || String::from_utf8_lossy(name);
    if name.len() > MAX_PATH {
        return Err("a member's path is too long".to_owned());
    }
    let parts: Vec<&[u8]> = name.split(|&byte| byte == b'/').filter(|part| !matches!(*part, b"" | b".")).collect();
    if parts.contains(&&b".."[..]) || name.contains(&0) {
        return Err(format!("{:?} is not a path that a member can have", shown()));
    }
    Ok(parts.join(&b'/'))
}
