//! Reading, sizes, and how urgent reading is.

use std::{
    fs::File,
    io,
    os::unix::fs::{FileExt, FileTypeExt},
};

use rustix::{
    fs::{Advice, SeekFrom, fadvise, seek},
    io::Errno,
};

use crate::VerityError;

/// Size in bytes of a regular file or a block device.
///
/// # Errors
/// [`VerityError::NotAFile`], or what the system says.
pub fn size_of(file: &File) -> Result<u64, VerityError> {
    let m = file.metadata()?;
    if m.is_file() {
        Ok(m.len())
    } else if m.file_type().is_block_device() {
        // The size in its inode is zero; its end is where the device ends.
        Ok(seek(file, SeekFrom::End(0)).map_err(io::Error::from)?)
    } else {
        Err(VerityError::NotAFile)
    }
}

/// Reads all of `buffer`.
pub(crate) fn read_all(file: &File, mut buffer: &mut [u8], mut at: u64) -> Result<(), VerityError> {
    while !buffer.is_empty() {
        match file.read_at(buffer, at) {
            Ok(0) => return Err(VerityError::Shrunk),
            Ok(n) => {
                buffer = &mut buffer[n..];
                at += n as u64;
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e.into()),
        }
    }
    Ok(())
}

/// Tells the kernel that the file is read from its start to its end. Advice: nothing depends on it.
pub(crate) fn will_be_read(file: &File) {
    let _ = fadvise(file, 0, None, Advice::Sequential);
}

/// Where data and holes are, as the file system says; everything is data where it does not say.
pub(crate) struct Extents<'a> {
    file: &'a File,
    size: u64,
    /// Whether the file system tells.
    told: bool,
    /// The last question, and its answer: data from the first to before the second.
    asked: u64,
    last: (u64, u64),
}

impl<'a> Extents<'a> {
    pub(crate) fn new(file: &'a File, size: u64) -> Self {
        Self { file, size, told: true, asked: 0, last: (0, 0) }
    }

    /// The first data that is not all before `at`: from where, and to before where. From the file's end if there is
    /// none.
    pub(crate) fn from(&mut self, at: u64) -> io::Result<(u64, u64)> {
        if !self.told {
            return Ok((at, self.size));
        }
        if at < self.asked || at >= self.last.1 {
            match self.ask(at)? {
                Some(extent) => (self.asked, self.last) = (at, extent),
                None => {
                    self.told = false;
                    return Ok((at, self.size));
                }
            }
        }
        Ok((self.last.0.max(at), self.last.1))
    }

    /// Nothing if the file system does not tell, or nonsense.
    fn ask(&self, at: u64) -> io::Result<Option<(u64, u64)>> {
        let data = match seek(self.file, SeekFrom::Data(at)) {
            Ok(data) => data,
            Err(Errno::NXIO) => return Ok(Some((self.size, self.size.saturating_add(1)))),
            Err(Errno::INVAL | Errno::OPNOTSUPP | Errno::NOSYS | Errno::SPIPE | Errno::NOTTY) => return Ok(None),
            Err(e) => return Err(e.into()),
        };
        if data >= self.size {
            return Ok(Some((self.size, self.size.saturating_add(1))));
        }
        match seek(self.file, SeekFrom::Hole(data)) {
            Ok(hole) if data >= at && hole > data => Ok(Some((data, hole.min(self.size)))),
            // Changed between the two, or a file system that does not know.
            Ok(_) | Err(Errno::NXIO | Errno::INVAL | Errno::OPNOTSUPP) => Ok(None),
            Err(e) => Err(e.into()),
        }
    }
}

/// Lets this thread's reads wait for everybody else's, where the disk's scheduler knows of priorities
/// (`ioprio_set(2)`, class idle).
///
/// # Errors
/// When the kernel does not let it.
pub fn idle_io() -> io::Result<()> {
    use nix::libc;
    /// `linux/ioprio.h`: `IOPRIO_WHO_PROCESS`, and `IOPRIO_CLASS_IDLE` above `IOPRIO_CLASS_SHIFT`.
    const WHO_PROCESS: libc::c_int = 1;
    const IDLE: libc::c_int = 3 << 13;
    #[expect(unsafe_code, reason = "there is no wrapper for ioprio_set")]
    // SAFETY: the call takes three numbers and no memory; 0 is the calling thread.
    let answer = unsafe { libc::syscall(libc::SYS_ioprio_set, WHO_PROCESS, 0, IDLE) };
    if answer == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
