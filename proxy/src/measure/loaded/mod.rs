//! What was really loaded: guest memory, before the guest runs, against the files that were measured.
//!
//! A path says what a file holds now, not what QEMU read. While a VM waits in `prelaunch` its memory shows that for
//!
//! - firmware (`-bios` or the machine's default; x86 machines have it right below 4 GiB, QEMU `hw/i386/x86.c`,
//!   `x86_bios_rom_init`),
//! - files of the generic loader (`-device loader,file=…`), raw and ELF (QEMU `hw/core/generic-loader.c`),
//! - a kernel that is an ELF file and starts over PVH: its segments (QEMU `hw/i386/x86.c`, `load_elfboot`).
//!
//! An initial RAM disk is not copied before the guest asks for it, but QEMU has it mapped: `/proc/PID/maps` must show
//! the file that was measured. A bzImage, a multiboot kernel and whatever else the guest fetches through fw_cfg lies in
//! QEMU's own memory, where it cannot be found: such parts are [`MemoryCheck::Hidden`]. So are kernel and firmware of
//! machines that are not x86, whose places in memory are not known here.
//!
//! After the comparison the file must still be older than its QEMU, so that it was not written in between.

mod elf;
mod mapped;
mod memory;

use std::{fs::File, io, os::unix::fs::FileExt, path::Path, sync::Arc};

use onequote_evidence::event::{Component, MemoryCheck, Role};
use serde_json::Value;

use self::{
    elf::{ElfError, Segment},
    memory::{Compared, Memory},
};
use super::{
    Arguments, Lookup, MeasureError, MeasureErrorKind, NamedFile, Told, VmMeter,
    args::{absolute, in_data_dirs},
    vm::{Part, text_component},
};
use crate::qmp::QmpError;

/// Just below this address x86 machines have their firmware.
const FIRMWARE_END: u64 = 1 << 32;

/// How much of a kernel QEMU searches for a multiboot header (QEMU `hw/i386/multiboot.c`).
const HEAD: usize = 8192;

/// Where a file's bytes must be in memory.
pub(super) enum Place {
    /// The whole file is loaded at one address.
    At(u64),
    /// Its ELF segments are loaded.
    Segments(Vec<Segment>),
    /// They cannot be found yet.
    Hidden,
}

impl VmMeter<'_> {
    /// What QEMU's machine loads, as it says itself: kernel, initrd, command line, firmware.
    pub(super) async fn loaded(&self, given: &Arguments, told: &Told) -> Result<Vec<Component>, MeasureError> {
        let dir = self.working_dir()?;
        let Told { machine, x86, .. } = told;
        let x86 = *x86;
        let mut components = Vec::new();
        let mut mapped = x86;
        if !machine.kernel.is_empty() {
            let part = self.by_path(Role::Kernel, &absolute(&dir, Path::new(&machine.kernel))).await?;
            let place = if x86 { self.kernel_place(&part)? } else { KernelPlace::Hidden };
            // A multiboot kernel's modules are read, not mapped, and there can be several.
            mapped &= !matches!(place, KernelPlace::Multiboot);
            components.push(self.compared(part, place.into()).await?);
        }
        if !machine.initrd.is_empty() {
            let part = self.by_path(Role::Initrd, &absolute(&dir, Path::new(&machine.initrd))).await?;
            if mapped {
                self.must_be_mapped(&part)?;
            }
            components.push(self.compared(part, Place::Hidden).await?);
        }
        if !machine.kernel.is_empty() || !machine.append.is_empty() {
            components.push(text_component(Role::KernelCmdline, machine.append.as_bytes(), &machine.append));
        }
        if let Some(name) = machine.firmware_file() {
            let role = Role::Firmware;
            let name = Path::new(name);
            let path = in_data_dirs(&dir, &self.program()?, &given.data_dirs, name)
                .ok_or_else(|| MeasureError::new(role.word(), name, MeasureErrorKind::NotFound))?;
            let part = self.by_path(role, &path).await?;
            let place = FIRMWARE_END.checked_sub(part.component.size).filter(|_| x86).map_or(Place::Hidden, Place::At);
            components.push(self.compared(part, place).await?);
        }
        Ok(components)
    }

    /// A file that an argument names, with what memory says of it, if it goes there at all.
    pub(super) async fn named(&self, part: Part, named: &NamedFile) -> Result<Component, MeasureError> {
        match (named.option.as_str(), named.lookup) {
            ("-readconfig" | "-plugin", _) => Ok(part.component),
            ("-device", Lookup::Path) => {
                let mut component = part.component.clone();
                for place in self.loader_places(&part, named).await? {
                    component = self.compared(part.clone(), place).await?;
                }
                Ok(component)
            }
            _ => self.compared(part, Place::Hidden).await,
        }
    }

    /// The part with what memory says of it. While the guest may run it says nothing.
    pub(super) async fn compared(&self, mut part: Part, place: Place) -> Result<Component, MeasureError> {
        if self.hot {
            return Ok(part.component);
        }
        let fail = |kind: MeasureErrorKind| {
            MeasureError::new(part.component.role.word(), Path::new(&part.component.path), kind)
        };
        let segments = match place {
            Place::Hidden => {
                part.component.memory = Some(MemoryCheck::Hidden);
                return Ok(part.component);
            }
            Place::At(address) => vec![Segment { offset: 0, size: part.component.size, address }],
            Place::Segments(segments) => segments,
        };
        let memory = Memory::open(self.qmp, self.process).map_err(fail)?;
        for Segment { offset, size, address } in segments {
            match memory.compare(&part.file, offset, size, address).await.map_err(fail)? {
                Compared::Equal => {}
                Compared::DiffersAt(at) | Compared::NoneAt(at) => {
                    return Err(fail(MeasureErrorKind::LoadedDiffers(at)));
                }
            }
        }
        // What was compared is what was measured: nobody has written it since.
        self.must_be_older(&part).map_err(fail)?;
        part.component.memory = Some(MemoryCheck::Equal);
        Ok(part.component)
    }

    /// The initrd that was measured must be the one that QEMU has mapped.
    fn must_be_mapped(&self, part: &Part) -> Result<(), MeasureError> {
        let path = Path::new(&part.component.path);
        let fail = |kind: MeasureErrorKind| MeasureError::new(part.component.role.word(), path, kind);
        if self.hot || part.component.size == 0 {
            return Ok(());
        }
        let maps = self.process.maps().map_err(|e| fail(e.into()))?;
        let file = part.file.metadata().map_err(|e| fail(e.into()))?;
        if mapped::maps(&maps, path, &file) { Ok(()) } else { Err(fail(MeasureErrorKind::NotMapped)) }
    }

    fn kernel_place(&self, part: &Part) -> Result<KernelPlace, MeasureError> {
        let path = Path::new(&part.component.path);
        let fail = |e: io::Error| MeasureError::new(part.component.role.word(), path, e);
        let head = head(&part.file).map_err(fail)?;
        // In the order in which QEMU looks (`x86_load_linux`).
        if head.get(0x202..0x206) == Some(b"HdrS") {
            return Ok(KernelPlace::Hidden);
        }
        if is_multiboot(&head) {
            return Ok(KernelPlace::Multiboot);
        }
        Ok(match segments(&part.file, part.component.size).map_err(fail)? {
            Some(segments) => KernelPlace::Segments(segments),
            None => KernelPlace::Hidden,
        })
    }

    /// Where the generic loaders that have this file put it. QEMU tells over QOM, whatever way they were given.
    async fn loader_places(&self, part: &Part, named: &NamedFile) -> Result<Vec<Place>, MeasureError> {
        let path = Path::new(&part.component.path);
        let fail = |kind: MeasureErrorKind| MeasureError::new(part.component.role.word(), path, kind);
        let ask = |e: QmpError| fail(e.into());
        let dir = self.working_dir()?;
        let mut places = Vec::new();
        for folder in ["/machine/peripheral", "/machine/peripheral-anon"] {
            let list = self.qmp.execute(qapi::qmp::qom_list { path: folder.to_owned() }).await.map_err(ask)?;
            for child in list.into_iter().filter(|child| child.type_ == "child<loader>") {
                let device = format!("{folder}/{}", child.name);
                let file = self.property(&device, "file").await.map_err(ask)?;
                if file.as_str().is_none_or(|file| absolute(&dir, Path::new(file)) != absolute(&dir, &named.name)) {
                    continue;
                }
                let address = self.property(&device, "addr").await.map_err(ask)?;
                let raw = self.property(&device, "force-raw").await.map_err(ask)?;
                let address = address.as_u64().ok_or_else(|| {
                    fail(MeasureErrorKind::Unsupported("QEMU does not tell where it is loaded".to_owned()))
                })?;
                places.push(loader_place(part, address, raw.as_bool() == Some(true)).map_err(|e| fail(e.into()))?);
            }
        }
        if places.is_empty() {
            // The guest loader of other machines, which hands parts to a hypervisor.
            places.push(Place::Hidden);
        }
        Ok(places)
    }

    async fn property(&self, device: &str, property: &str) -> Result<Value, QmpError> {
        let get = qapi::qmp::qom_get { path: device.to_owned(), property: property.to_owned() };
        self.qmp.execute(get).await
    }
}

/// Where a kernel is once QEMU has read it.
enum KernelPlace {
    Segments(Vec<Segment>),
    Multiboot,
    Hidden,
}

impl From<KernelPlace> for Place {
    fn from(place: KernelPlace) -> Self {
        match place {
            KernelPlace::Segments(segments) => Self::Segments(segments),
            KernelPlace::Multiboot | KernelPlace::Hidden => Self::Hidden,
        }
    }
}

/// Where one generic loader puts its file: ELF segments go where they ask for, everything else to the address, except
/// for two packed formats.
fn loader_place(part: &Part, address: u64, raw: bool) -> io::Result<Place> {
    const UIMAGE: &[u8] = b"\x27\x05\x19\x56";
    let head = head(&part.file)?;
    if raw {
        return Ok(Place::At(address));
    }
    if elf::is_elf(&head) {
        return Ok(segments(&part.file, part.component.size)?.map_or(Place::Hidden, Place::Segments));
    }
    let packed = head.starts_with(UIMAGE) || head.starts_with(b":");
    Ok(if packed { Place::Hidden } else { Place::At(address) })
}

/// The ELF segments of a file; none if it is no ELF file that QEMU would take.
fn segments(file: &File, size: u64) -> io::Result<Option<Vec<Segment>>> {
    /// Either is the end of it.
    enum Stop {
        Elf,
        Io(io::Error),
    }
    impl From<ElfError> for Stop {
        fn from(_: ElfError) -> Self {
            Self::Elf
        }
    }
    match elf::segments(size, |at, size| read(file, at, size).map_err(Stop::Io)) {
        Ok(segments) => Ok(Some(segments)),
        Err(Stop::Elf) => Ok(None),
        Err(Stop::Io(e)) => Err(e),
    }
}

fn head(file: &Arc<File>) -> io::Result<Vec<u8>> {
    read(file, 0, HEAD)
}

/// As many bytes from `at` on as there are, at most `size`.
fn read(file: &File, at: u64, size: usize) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; size];
    let mut done = 0;
    while done < size {
        match file.read_at(&mut bytes[done..], at.saturating_add(done as u64)) {
            Ok(0) => break,
            Ok(n) => done += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    bytes.truncate(done);
    Ok(bytes)
}

/// Whether there is a multiboot header (Multiboot 0.6.96, 3.1.1): magic, flags and a checksum that makes their sum 0.
fn is_multiboot(head: &[u8]) -> bool {
    const MAGIC: u32 = 0x1bad_b002;
    let word = |at: usize| head.get(at..at + 4).and_then(|b| b.first_chunk()).map_or(0, |b| u32::from_le_bytes(*b));
    (0..head.len().saturating_sub(12))
        .step_by(4)
        .any(|at| word(at) == MAGIC && MAGIC.wrapping_add(word(at + 4)).wrapping_add(word(at + 8)) == 0)
}

/// Reads an ELF file's segments, as fuzzing does.
///
/// # Panics
/// When a segment lies outside of the file or of the address space.
#[cfg(fuzzing)]
pub fn fuzz_elf(file: &[u8]) {
    let size = file.len() as u64;
    let read = |at: u64, len: usize| {
        assert!(len <= 256 * 64);
        let at = usize::try_from(at).unwrap_or(usize::MAX).min(file.len());
        Ok::<_, ElfError>(file[at..].iter().take(len).copied().collect())
    };
    for segment in elf::segments(size, read).unwrap_or_default() {
        assert!(segment.offset + segment.size <= size && segment.address.checked_add(segment.size).is_some());
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;

    #[test]
    fn multiboot_headers() {
        let mut head = vec![0; 8192];
        assert!(!is_multiboot(&head));
        head[4096..4108].copy_from_slice(&[0x02, 0xb0, 0xad, 0x1b, 3, 0, 0, 0, 0xfb, 0x4f, 0x52, 0xe4]);
        assert!(is_multiboot(&head));
        head[4100] = 4;
        assert!(!is_multiboot(&head));
        assert!(!is_multiboot(&[]));
    }
}
