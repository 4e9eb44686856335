//! Files that QEMU's argument vector names and that QEMU does not tell about over QMP.
//!
//! Options are found by name, wherever they stand: QEMU's list of options that take no value is not known here for
//! every version, and taking a value for an option at worst measures a file too many or refuses a VM, while the other
//! way round would miss one. Option values have the syntax of QEMU's `QemuOpts`: `key=value` pairs between commas, a
//! comma doubled to stand for itself, the first key implied by some options; `-device` also takes JSON.
//! Configuration files (`-readconfig`) hold the same groups as `[group "id"]` and `key = "value"` lines.

use std::{
    collections::BTreeSet,
    ffi::OsStr,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
};

use serde_json::Value;

/// Where QEMU looks for a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lookup {
    /// At the path, from QEMU's working directory.
    Path,
    /// The same, and then in its data directories.
    DataDirs,
}

/// A file that an argument names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NamedFile {
    /// The option, for people: `-fw_cfg`.
    pub option: String,
    /// As it is named.
    pub name: PathBuf,
    /// Where QEMU looks for it.
    pub lookup: Lookup,
}

/// One option, or one group of a configuration file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Given {
    /// The option's name without hyphens, or the group's: `kernel`, `machine`, `chardev`.
    pub name: String,
    /// The value as it stands; empty for groups of configuration files.
    pub value: Vec<u8>,
    /// The value's pairs. A group's id is one of them.
    pub pairs: Vec<(String, Vec<u8>)>,
}

impl Given {
    /// The last value of a key, as text.
    #[must_use]
    pub fn get(&self, key: &str) -> Option<String> {
        let pair = self.pairs.iter().rev().find(|(k, _)| k == key);
        pair.map(|(_, value)| String::from_utf8_lossy(value).into_owned())
    }
}

/// What an argument vector says.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Arguments {
    /// Every option with what stands behind it, and every group of configuration files, in their order.
    pub given: Vec<Given>,
    /// Names of all options, with and without value.
    pub names: BTreeSet<String>,
    /// Files in the order of the arguments.
    pub files: Vec<NamedFile>,
    /// Configuration files among them, to be taken in by [`Arguments::add_config`].
    pub configs: Vec<PathBuf>,
    /// Data directories (`-L`), in order of search.
    pub data_dirs: Vec<PathBuf>,
}

impl Arguments {
    /// Reads an argument vector, the program's name first.
    #[must_use]
    pub fn parse<S: AsRef<OsStr>>(args: &[S]) -> Self {
        let mut found = Self::default();
        found.names.extend(args.iter().skip(1).filter_map(|arg| option_name(arg.as_ref())).map(str::to_owned));
        for pair in args.windows(2).skip(1) {
            let Some(name) = option_name(pair[0].as_ref()) else { continue };
            let value = pair[1].as_ref();
            let pairs = if value.as_bytes().starts_with(b"{") {
                json_pairs(value.as_bytes())
            } else {
                options(value.as_bytes(), implied_key(name))
            };
            found.given.push(Given { name: name.to_owned(), value: value.as_bytes().to_vec(), pairs: pairs.clone() });
            match name {
                "L" => found.data_dirs.push(value.into()),
                "readconfig" => {
                    found.add("-readconfig", value.as_bytes(), Lookup::Path);
                    found.configs.push(value.into());
                }
                "dtb" => found.add("-dtb", value.as_bytes(), Lookup::Path),
                _ => found.add_group(name, &pairs),
            }
        }
        found
    }

    /// Takes in a configuration file's text.
    pub fn add_config(&mut self, text: &[u8]) {
        let mut group = String::new();
        let mut pairs = Vec::new();
        for line in text.split(|&b| b == b'\n').map(<[u8]>::trim_ascii) {
            if let Some(head) = line.strip_prefix(b"[") {
                self.take_group(&group, &mut pairs);
                let end = head.iter().position(|b| b" ]\t".contains(b)).unwrap_or(head.len());
                group = String::from_utf8_lossy(&head[..end]).into_owned();
                if let Some(id) = head[end..].split(|&b| b == b'"').nth(1) {
                    pairs.push(("id".to_owned(), id.to_vec()));
                }
                if group == "acpi" {
                    "acpitable".clone_into(&mut group);
                }
            } else if !line.starts_with(b"#")
                && let Some(at) = line.iter().position(|&b| b == b'=')
            {
                let key = String::from_utf8_lossy(line[..at].trim_ascii()).into_owned();
                let value = line[at + 1..].trim_ascii();
                let value = value.strip_prefix(b"\"").unwrap_or(value);
                pairs.push((key, value.strip_suffix(b"\"").unwrap_or(value).to_vec()));
            }
        }
        self.take_group(&group, &mut pairs);
    }

    /// The values that the options `name` and the key `key` of `-machine` give, in order.
    #[must_use]
    pub fn of_machine(&self, name: &str, key: &str) -> Vec<String> {
        let value = |given: &Given| match given.name.as_str() {
            own if own == name && !given.value.is_empty() => Some(String::from_utf8_lossy(&given.value).into_owned()),
            "machine" | "M" => given.get(key),
            _ => None,
        };
        self.given.iter().filter_map(value).collect()
    }

    fn take_group(&mut self, group: &str, pairs: &mut Vec<(String, Vec<u8>)>) {
        let pairs = std::mem::take(pairs);
        self.add_group(group, &pairs);
        if !group.is_empty() {
            self.given.push(Given { name: group.to_owned(), value: Vec::new(), pairs });
        }
    }

    /// Takes in one group of options, of whatever source.
    fn add_group(&mut self, group: &str, pairs: &[(String, Vec<u8>)]) {
        let option = format!("-{group}");
        for (key, value) in pairs {
            match (group, key.as_str()) {
                ("fw_cfg", "file") | ("smbios", "file" | "path") | ("machine" | "M", "dtb") | ("plugin", "file") => {
                    self.add(&option, value, Lookup::Path);
                }
                ("acpitable", "file" | "data") => {
                    for part in value.split(|&b| b == b':') {
                        self.add(&option, part, Lookup::Path);
                    }
                }
                // The generic loader's file, the guest loader's kernel and initrd.
                ("device", "file" | "kernel" | "initrd") if is_loader(pairs) => self.add(&option, value, Lookup::Path),
                ("device" | "option-rom", "romfile") => self.add(&option, value, Lookup::DataDirs),
                _ => {}
            }
        }
    }

    fn add(&mut self, option: &str, name: &[u8], lookup: Lookup) {
        if !name.is_empty() {
            let name = PathBuf::from(OsStr::from_bytes(name));
            self.files.push(NamedFile { option: option.to_owned(), name, lookup });
        }
    }
}

/// The path from QEMU's working directory, without `.` parts.
pub(crate) fn absolute(dir: &Path, name: &Path) -> PathBuf {
    dir.join(name).components().collect()
}

/// Where a file lies that QEMU looks up in data directories: at the path, then in each directory.
/// `program` is QEMU's own path: its distribution's directories lie beside it.
pub(crate) fn in_data_dirs(dir: &Path, program: &Path, more: &[PathBuf], name: &Path) -> Option<PathBuf> {
    let prefix = program.parent().and_then(Path::parent).unwrap_or(Path::new("/"));
    let own = [
        "share/qemu",
        "share/seabios",
        "lib/ipxe/qemu",
        "share/qemu-kvm",
        "share/qemu-firmware",
        "share/ipxe/qemu",
        "share/seavgabios",
    ];
    let given = more.iter().map(|d| absolute(dir, &d.join(name)));
    let built_in = own.iter().map(|d| prefix.join(d).join(name));
    std::iter::once(absolute(dir, name)).chain(given).chain(built_in).find(|path| path.exists())
}

fn option_name(arg: &OsStr) -> Option<&str> {
    let arg = arg.to_str()?.strip_prefix('-')?;
    let name = arg.strip_prefix('-').unwrap_or(arg);
    (!name.is_empty()).then_some(name)
}

fn implied_key(option: &str) -> &'static str {
    match option {
        "device" => "driver",
        "fw_cfg" => "name",
        "option-rom" => "romfile",
        "plugin" => "file",
        "machine" | "M" => "type",
        "chardev" => "backend",
        "mon" => "chardev",
        "name" => "guest",
        "accel" => "accel",
        _ => "",
    }
}

/// The pairs of a value in JSON. Of one that is none there are none: QEMU does not start with it.
fn json_pairs(text: &[u8]) -> Vec<(String, Vec<u8>)> {
    let Ok(Value::Object(map)) = serde_json::from_slice(text) else { return Vec::new() };
    let pair = |(key, value): (String, Value)| value.as_str().map(|value| (key, value.as_bytes().to_vec()));
    map.into_iter().filter_map(pair).collect()
}

fn is_loader(pairs: &[(String, Vec<u8>)]) -> bool {
    let loaders: [&[u8]; 3] = [b"loader", b"generic-loader", b"guest-loader"];
    pairs.iter().any(|(k, v)| k == "driver" && loaders.contains(&v.as_slice()))
}

/// Splits `a,b=c,,d` into pairs; the first piece without `=` gets the implied key, later ones the value `on`.
fn options(text: &[u8], implied: &str) -> Vec<(String, Vec<u8>)> {
    let mut pieces = vec![Vec::new()];
    let mut rest = text.iter().copied().peekable();
    while let Some(byte) = rest.next() {
        if byte == b',' && rest.next_if_eq(&b',').is_none() {
            pieces.push(Vec::new());
        } else if let Some(last) = pieces.last_mut() {
            last.push(byte);
        }
    }
    let pair = |(n, piece): (usize, Vec<u8>)| match piece.iter().position(|&b| b == b'=') {
        Some(at) => (String::from_utf8_lossy(&piece[..at]).into_owned(), piece[at + 1..].to_vec()),
        None if n == 0 => (implied.to_owned(), piece),
        None => (String::from_utf8_lossy(&piece).into_owned(), b"on".to_vec()),
    };
    pieces.into_iter().enumerate().map(pair).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;

    fn names(found: &Arguments) -> Vec<(&str, &str)> {
        found.files.iter().map(|f| (f.option.as_str(), f.name.to_str().unwrap())).collect()
    }

    #[test]
    fn finds_every_option_that_names_a_file() {
        let found = Arguments::parse(&[
            "qemu",
            "-readconfig",
            "a.cfg",
            "-fw_cfg",
            "name=opt/x,file=fw,,1",
            "-fw_cfg",
            "opt/y,string=file",
            "--device",
            "loader,file=blob,addr=0x1000",
            "-device",
            r#"{"driver":"loader","file":"j"}"#,
            "-device",
            "virtio-net-pci,romfile=rom.bin",
            "-device",
            "virtio-blk-pci,file=no",
            "-acpitable",
            "file=t1:t2",
            "-smbios",
            "file=s1",
            "-smbios",
            "type=11,path=s2",
            "-dtb",
            "d",
            "-L",
            "dir",
            "-option-rom",
            "o.rom",
            "-machine",
            "virt,dtb=m.dtb",
            "-plugin",
            "p.so,arg=1",
            "-kernel",
            "k",
        ]);
        assert_eq!(
            names(&found),
            [
                ("-readconfig", "a.cfg"),
                ("-fw_cfg", "fw,1"),
                ("-device", "blob"),
                ("-device", "j"),
                ("-device", "rom.bin"),
                ("-acpitable", "t1"),
                ("-acpitable", "t2"),
                ("-smbios", "s1"),
                ("-smbios", "s2"),
                ("-dtb", "d"),
                ("-option-rom", "o.rom"),
                ("-machine", "m.dtb"),
                ("-plugin", "p.so"),
            ]
        );
        assert_eq!(found.data_dirs, [PathBuf::from("dir")]);
        assert_eq!(found.configs, [PathBuf::from("a.cfg")]);
    }

    #[test]
    fn finds_them_in_configuration_files() {
        let mut found = Arguments::default();
        found.add_config(
            b"# comment\n[device \"l\"]\n  driver = \"loader\"\n  file = \"blob\"\n\n[fw_cfg]\nname=\"opt/x\"\nfile = \"fw\"\n\
              [drive \"d\"]\nfile = \"disk\"\n[acpi]\nfile = \"t\"\n[device]\nromfile=\"r\"",
        );
        assert_eq!(names(&found), [("-device", "blob"), ("-fw_cfg", "fw"), ("-acpitable", "t"), ("-device", "r")]);
    }

    #[test]
    fn looks_where_qemu_looks() {
        let dir = tempfile::tempdir().unwrap();
        let at = |p: &str| dir.path().join(p);
        for d in ["cwd", "L", "usr/bin", "usr/share/qemu"] {
            std::fs::create_dir_all(at(d)).unwrap();
        }
        let find = |name: &str| in_data_dirs(&at("cwd"), &at("usr/bin/qemu"), &[at("L")], Path::new(name));
        assert_eq!(find("bios"), None);
        std::fs::write(at("usr/share/qemu/bios"), "").unwrap();
        assert_eq!(find("bios"), Some(at("usr/share/qemu/bios")));
        std::fs::write(at("L/bios"), "").unwrap();
        assert_eq!(find("bios"), Some(at("L/bios")));
        std::fs::write(at("cwd/bios"), "").unwrap();
        assert_eq!(find("bios"), Some(at("cwd/bios")));
        assert_eq!(find("./bios"), Some(at("cwd/bios")));
    }
}
