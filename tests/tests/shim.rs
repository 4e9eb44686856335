//! The shim in a real guest, against a host played by the test.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::io::{Read as _, Write as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Result, bail, ensure};
use onequote_evidence::guest_frame::{DEFAULT_PORT, GuestFrame, HostFrame, body_len, to_wire};
use onequote_evidence::ima::{Aggregate, ListReader, SHA1_HASH_SIZE};
use onequote_tests::lab::{Machine, Vm, VmSpec, World, skip, wait};

/// The host's end of the vsock of one VM, and the list it got so far.
struct Host {
    listener: UnixListener,
    list: Vec<u8>,
}

impl Host {
    fn listen(vm: &Vm) -> Result<Self> {
        let mut path: PathBuf = vm.vsock_path();
        path.as_mut_os_string().push(format!("_{DEFAULT_PORT}"));
        let listener = UnixListener::bind(path)?;
        listener.set_nonblocking(true)?;
        Ok(Self { listener, list: Vec::new() })
    }

    fn aggregate(&self) -> Result<Aggregate> {
        let mut aggregate = Aggregate::EMPTY;
        for entry in ListReader::new(&self.list, SHA1_HASH_SIZE) {
            aggregate.push(&entry?);
        }
        Ok(aggregate)
    }

    /// Takes the next connection up to `Resume`.
    fn accept(&self, have: Aggregate) -> Result<(UnixStream, Aggregate)> {
        let mut stream = wait::until("the shim to connect", Duration::from_secs(40), || {
            Ok(self.listener.accept().ok().map(|(stream, _)| stream))
        })?;
        stream.set_nonblocking(false)?;
        stream.set_read_timeout(Some(Duration::from_secs(20)))?;
        let GuestFrame::Hello { hash_size: 20, .. } = hear(&mut stream)? else {
            bail!("the first frame is no hello");
        };
        say(&mut stream, &HostFrame::Have { count: have.count, aggregate: have.value })?;
        let GuestFrame::Resume { count, aggregate } = hear(&mut stream)? else {
            bail!("the second frame is no resume");
        };
        Ok((stream, Aggregate { count, value: aggregate }))
    }

    /// Collects until the guest says that it has sent all.
    fn collect(&mut self, stream: &mut UnixStream) -> Result<()> {
        say(stream, &HostFrame::Collect { id: 5 })?;
        loop {
            match hear(stream)? {
                GuestFrame::Entries { first, entries } => {
                    ensure!(first == self.aggregate()?.count, "a gap or an overlap at {first}");
                    self.list.extend(entries.0);
                }
                GuestFrame::Collected { id: 5, count } => {
                    ensure!(count == self.aggregate()?.count);
                    return Ok(());
                }
                GuestFrame::Heartbeat { .. } => {}
                other => bail!("unexpected {other:?}"),
            }
        }
    }
}

fn say(stream: &mut UnixStream, frame: &HostFrame) -> Result<()> {
    Ok(stream.write_all(&to_wire(frame))?)
}

fn hear(stream: &mut UnixStream) -> Result<GuestFrame> {
    let mut prefix = [0; 4];
    stream.read_exact(&mut prefix)?;
    let mut body = vec![0; body_len(prefix)?];
    stream.read_exact(&mut body)?;
    Ok(GuestFrame::parse(&body)?)
}

#[test]
fn vm_shim_gives_the_guests_list_whole_over_cuts_and_restarts() {
    World::test(|world| {
        // The host's kernel has no place for a second listener beside a proxy's; nor is one needed.
        if world.assets().kernel_vsock() {
            skip("the shim's own test", "this machine uses the kernel's vsock");
            return Ok(());
        }
        let vm = world.add_vm(VmSpec::new("guest", Machine::Microvm))?;
        let mut host = Host::listen(vm)?;
        vm.start()?;
        vm.release()?;
        vm.wait_ready()?;

        let (mut stream, resumed) = host.accept(Aggregate::EMPTY)?;
        assert_eq!(resumed, Aggregate::EMPTY);
        host.collect(&mut stream)?;
        let text = String::from_utf8_lossy(&host.list).into_owned();
        assert!(text.contains("/onequote-shim") && text.contains("/disk/boot.d/30-service"));

        // A program that runs is told without being asked.
        vm.write_program("/disk/bin/new", "exit 0")?;
        vm.run("/disk/bin/new")?;
        loop {
            if let GuestFrame::Entries { entries, .. } = hear(&mut stream)? {
                host.list.extend(entries.0);
            }
            if String::from_utf8_lossy(&host.list).contains("/disk/bin/new") {
                break;
            }
        }

        // A cut connection and a shim that died: it goes on behind what the host has, as nobody.
        drop(stream);
        let (stream, resumed) = host.accept(host.aggregate()?)?;
        assert_eq!(resumed, host.aggregate()?);
        vm.ask("shim restart")?;
        vm.run("/disk/bin/backup")?;
        drop(stream);
        let (mut stream, resumed) = host.accept(host.aggregate()?)?;
        assert_eq!(resumed, host.aggregate()?);
        host.collect(&mut stream)?;
        assert_eq!(host.list, vm.ima_list()?);
        let processes = vm.ask("sh grep -E '^(Uid|CapEff|NoNewPrivs|VmRSS)' /proc/$($B pidof onequote-shim)/status")?;
        eprintln!("{}", processes.output);
        assert!(processes.output.contains("65534") && processes.output.contains("CapEff:\t0000000000000000"));

        // A host that claims what this guest never did is told the guest's own past.
        drop(stream);
        let claimed = Aggregate { count: 2, value: host.aggregate()?.value };
        let (mut stream, resumed) = host.accept(claimed)?;
        assert_eq!(resumed.count, 2);
        assert_ne!(resumed.value, claimed.value);
        assert_eq!(stream.read(&mut [0; 1])?, 0);
        let said = vm.ask("dmesg")?.output;
        assert!(said.contains("onequote-shim: the host has 2 entries which are not"), "{said}");
        Ok(())
    });
}
