//! Where guests connect: AF_VSOCK for the kernel's vhost-vsock, one Unix socket a VM for vhost-user back ends.
//!
//! The host names the VM: a connection over AF_VSOCK is the VM whose QEMU has that CID, a connection over a Unix
//! socket is the VM whose back end was given that socket. What the guest says of itself does not count.

use std::{
    collections::HashMap,
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use onequote_evidence::event::VmRef;
use tokio::{net::UnixListener, task::JoinHandle};
use tokio_vsock::{VMADDR_CID_ANY, VsockAddr, VsockListener};

use super::{protocol, room::Room};
use crate::rate::{Kind, limited};

/// Who the VM at the other end is. Answers from the live registry, so that a CID or name that was another VM's
/// before is never taken for it.
pub trait VmDirectory: Send + Sync + 'static {
    /// The running VM of that name.
    fn by_name(&self, name: &str) -> Option<VmRef>;
    /// The running VM whose QEMU has that CID.
    fn by_cid(&self, cid: u32) -> Option<VmRef>;
}

/// Listens for guests.
pub struct Listeners {
    room: Arc<Room>,
    directory: Arc<dyn VmDirectory>,
    folder: PathBuf,
    port: u32,
    unix: HashMap<String, JoinHandle<()>>,
}

impl Listeners {
    /// Will listen on `port`, and on Unix sockets `NAME.vsock_PORT` in `folder`.
    #[must_use]
    pub fn new(room: Arc<Room>, directory: Arc<dyn VmDirectory>, folder: PathBuf, port: u32) -> Self {
        Self { room, directory, folder, port, unix: HashMap::new() }
    }

    /// Listens on AF_VSOCK for all VMs with a kernel vhost-vsock device.
    ///
    /// # Errors
    /// When the kernel has no vsock or the port is taken.
    pub fn listen_vsock(&self) -> io::Result<JoinHandle<()>> {
        let listener = VsockListener::bind(VsockAddr::new(VMADDR_CID_ANY, self.port))?;
        let (room, directory) = (Arc::clone(&self.room), Arc::clone(&self.directory));
        Ok(tokio::spawn(async move {
            loop {
                match listener.accept().await {
                    Ok((stream, peer)) => match directory.by_cid(peer.cid()) {
                        Some(vm) => connection(&room, vm, stream),
                        None => {
                            let cid = peer.cid();
                            limited!(
                                Kind::GuestTurnedAway,
                                info,
                                cid,
                                "a connection from a CID that no managed VM has"
                            );
                        }
                    },
                    Err(e) => accept_failed(&e).await,
                }
            }
        }))
    }

    /// Listens on the VM's own Unix socket. Call it before the VM runs, and again for each new session.
    ///
    /// # Errors
    /// When the socket cannot be made; the message names it.
    pub fn listen_unix(&mut self, name: &str) -> io::Result<()> {
        if self.unix.get(name).is_some_and(|task| !task.is_finished()) {
            return Ok(());
        }
        let path = socket_path(&self.folder, name, self.port);
        let named = |e: io::Error| io::Error::new(e.kind(), format!("{}: {e}", path.display()));
        match std::fs::remove_file(&path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(named(e)),
            _ => {}
        }
        let listener = UnixListener::bind(&path).map_err(named)?;
        let (room, directory, owned) = (Arc::clone(&self.room), Arc::clone(&self.directory), name.to_owned());
        let task = tokio::spawn(async move {
            loop {
                match listener.accept().await {
                    Ok((stream, _)) => match directory.by_name(&owned) {
                        Some(vm) => connection(&room, vm, stream),
                        None => {
                            limited!(
                                Kind::GuestTurnedAway,
                                info,
                                vm = owned,
                                "a connection for a VM that does not run"
                            );
                        }
                    },
                    Err(e) => accept_failed(&e).await,
                }
            }
        });
        self.unix.insert(name.to_owned(), task);
        Ok(())
    }

    /// The VM's socket file is gone with it.
    pub fn stop_unix(&mut self, name: &str) {
        if let Some(task) = self.unix.remove(name) {
            task.abort();
            let _ = std::fs::remove_file(socket_path(&self.folder, name, self.port));
        }
    }
}

/// The Unix socket at which a vhost-user back end with the `uds-path` `NAME.vsock` delivers connections to `port`.
#[must_use]
pub fn socket_path(folder: &Path, name: &str, port: u32) -> PathBuf {
    folder.join(format!("{name}.vsock_{port}"))
}

fn connection<S>(room: &Arc<Room>, vm: VmRef, stream: S)
where
    S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static,
{
    let Some(place) = room.admit(vm) else {
        return limited!(Kind::GuestTurnedAway, warn, vm = %vm.vm, "a guest has too many connections; one more is closed");
    };
    let room = Arc::clone(room);
    tokio::spawn(async move {
        let why = protocol::serve(&room, vm, stream).await;
        drop(place);
        limited!(Kind::GuestConnection, info, vm = %vm.vm, "guest: {why}");
    });
}

/// Out of descriptors, most likely: waiting is all that helps.
async fn accept_failed(e: &io::Error) {
    limited!(Kind::Accept, warn, "cannot accept a guest's connection: {e}");
    tokio::time::sleep(Duration::from_millis(200)).await;
}
