//! What a log says of an event without proof: for people, and to name things in findings.

use crate::{Malformed, reader::Reader};

use super::{DevicePath, Event, EventType, MAX_LOG, meaning::text, variable};

/// What an event's type and data say. Nothing of it is covered by the digest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Claim<'a> {
    /// An image that was loaded.
    Image(ImageLoad<'a>),
    /// A name: a file that GRUB read, a section that systemd-stub measured.
    Label(&'a str),
    /// The same in UTF-16, without its NUL.
    WideLabel(&'a [u8]),
    /// A tagged event, with its name: Linux' EFI stub measures its command line and initial RAM disk so.
    Tagged(u32, &'a str),
    /// Data of no known form.
    Data(&'a [u8]),
}

/// `UEFI_IMAGE_LOAD_EVENT` (PFP section 10.2.3): where the image lay, and where it came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ImageLoad<'a> {
    /// Address in memory.
    pub location: u64,
    /// Bytes in memory.
    pub length: u64,
    /// Where it was loaded from; empty when it was in memory already.
    pub path: DevicePath<'a>,
}

impl<'a> ImageLoad<'a> {
    fn parse(data: &'a [u8], wide: bool) -> Result<Self, Malformed> {
        let mut r = Reader::new("image load event", data);
        let location = r.u64_le()?;
        let mut pointer = || if wide { r.u64_le() } else { r.u32_le().map(u64::from) };
        let (length, _link_time, path) = (pointer()?, pointer()?, pointer()?);
        let path = usize::try_from(path).ok().filter(|&path| path <= MAX_LOG);
        let Some(path) = path else { return Err(r.invalid("length of the device path")) };
        let path = DevicePath(r.take(path)?);
        r.end()?;
        Ok(Self { location, length, path })
    }
}

impl<'a> Event<'a> {
    pub(super) fn claim(&self, wide_pointers: bool) -> Claim<'a> {
        let image =
            [EventType::BOOT_SERVICES_APPLICATION, EventType::BOOT_SERVICES_DRIVER, EventType::RUNTIME_SERVICES_DRIVER];
        if image.contains(&self.kind)
            && let Ok(image) = ImageLoad::parse(self.data, wide_pointers)
        {
            return Claim::Image(image);
        }
        if self.kind == EventType::EVENT_TAG
            && let Some((id, text)) = tagged(self.data)
        {
            return Claim::Tagged(id, text);
        }
        match (text(self.data), variable::wide(self.data)) {
            (Some(text), _) => Claim::Label(text),
            (_, Some(wide)) => Claim::WideLabel(wide),
            _ => Claim::Data(self.data),
        }
    }
}

/// `TCG_PCClientTaggedEvent` (PFP section 10.4.2.1) with text in it.
fn tagged(data: &[u8]) -> Option<(u32, &str)> {
    let mut r = Reader::new("tagged event", data);
    let (id, text_len) = (r.u32_le().ok()?, r.u32_le().ok()?);
    let content = r.take(usize::try_from(text_len).ok()?).ok()?;
    text(content).map(|text| (id, text))
}
