//! Guests' lists at the real proxy: cut, restarted, rewound, reset.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::io::Write as _;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use onequote_evidence::event::{EventBody, GuestRewind};
use onequote_evidence::guest_frame::{GuestFrame, VERSION, to_wire};
use onequote_evidence::id::{Blob, BootId, Sha256};
use onequote_tests::lab::{Bare, Guest, Machine, Peer, ShimConnection, VmSpec, World, wait};
use serde_json::json;

const LIMIT: Duration = Duration::from_secs(120);

/// A VM that is let go, whose shim's part the test plays.
fn watched(world: &mut World, name: &str) -> Result<Bare> {
    let bare = world.start_bare(name, &[])?;
    world.wait_until("the VM to be let go", LIMIT, |world| {
        Ok((world.vm_status(name)?["stage"] == "watched" && wait::listens(&world.guest_socket(name))?).then_some(()))
    })?;
    Ok(bare)
}

/// Sends all of the guest's list and waits until it is logged.
fn send_all(world: &mut World, name: &str, guest: &Guest) -> Result<ShimConnection> {
    let mut connection = ShimConnection::open(&world.guest_socket(name))?;
    connection.begin(guest)?;
    connection.send_new(guest)?;
    wait_entries(world, name, guest.count())?;
    Ok(connection)
}

fn wait_entries(world: &mut World, name: &str, count: u64) -> Result<()> {
    world.wait_until("the guest's entries to be logged", LIMIT, |world| {
        Ok((world.vm_status(name)?["entries"] == count).then_some(()))
    })
}

fn wait_rewind(world: &mut World) -> Result<GuestRewind> {
    world.wait_until("guest-rewind in the log", LIMIT, |world| {
        let events = world.read_log()?.events()?;
        Ok(events.into_iter().find_map(|event| match event.body {
            EventBody::GuestRewind(body) => Some(body),
            _ => None,
        }))
    })
}

fn wait_closed(connection: &mut ShimConnection) -> Result<()> {
    wait::for_true("the host to close the connection", LIMIT, || {
        Ok(connection.hear(Duration::from_millis(50)).is_err())
    })
}

/// What must hold after a rewind of `name`: told with all its facts, nothing more taken, what came before kept, others
/// not touched.
fn check_rewound(world: &mut World, name: &str, guest: &Guest, claimed: (u64, Option<Sha256>)) -> Result<()> {
    let rewind = wait_rewind(world)?;
    let have = guest.aggregate(guest.count())?;
    ensure!((rewind.boot, rewind.count, rewind.aggregate) == (0, have.count, have.value), "{rewind:?}");
    ensure!(rewind.claimed_count == claimed.0 && claimed.1.is_none_or(|value| value == rewind.claimed), "{rewind:?}");
    let mut again = ShimConnection::open(&world.guest_socket(name))?;
    ensure!(again.hello(guest.boot_id, guest.count()).is_err(), "the proxy still listens to a guest that rewound");
    ensure!(world.proxy_export(name)? == guest.list(), "what came before the rewind is not kept as it was");

    let other = watched(world, "other")?;
    let mut honest = Guest::new(99);
    honest.grow(5)?;
    send_all(world, "other", &honest)?;
    ensure!(other.run_state()? == "running");
    ensure!(world.proxy()?.terminate()?.success());
    ensure!(world.bound_log()?.count("guest-rewind")? == 1);
    Ok(())
}

#[test]
fn another_past_of_the_same_length_is_a_rewind() {
    World::test(|world| {
        world.start_proxy_alone()?;
        let _bare = watched(world, "liar")?;
        let mut guest = Guest::new(1);
        guest.grow(10)?;
        drop(send_all(world, "liar", &guest)?);

        let mut forged = Guest::new(2);
        forged.grow(10)?;
        let claimed = forged.aggregate(10)?.value;
        let mut connection = ShimConnection::open(&world.guest_socket("liar"))?;
        ensure!(connection.hello(guest.boot_id, 10)? == guest.aggregate(10)?);
        connection.say(&GuestFrame::Resume { count: 10, aggregate: claimed })?;
        wait_closed(&mut connection)?;
        check_rewound(world, "liar", &guest, (10, Some(claimed)))
    });
}

#[test]
fn a_shorter_past_is_a_rewind() {
    World::test(|world| {
        world.start_proxy_alone()?;
        let _bare = watched(world, "liar")?;
        let mut guest = Guest::new(1);
        guest.grow(10)?;
        drop(send_all(world, "liar", &guest)?);

        let mut connection = ShimConnection::open(&world.guest_socket("liar"))?;
        connection.hello(guest.boot_id, 4)?;
        let shorter = guest.aggregate(4)?;
        connection.say(&GuestFrame::Resume { count: 4, aggregate: shorter.value })?;
        wait_closed(&mut connection)?;
        check_rewound(world, "liar", &guest, (4, Some(shorter.value)))
    });
}

#[test]
fn another_boot_without_a_reset_is_a_rewind() {
    World::test(|world| {
        world.start_proxy_alone()?;
        let _bare = watched(world, "liar")?;
        let mut guest = Guest::new(1);
        guest.grow(10)?;
        drop(send_all(world, "liar", &guest)?);

        let mut connection = ShimConnection::open(&world.guest_socket("liar"))?;
        ensure!(connection.hello(BootId([9; 16]), 0).is_err(), "a boot that QEMU knows nothing of is taken");
        check_rewound(world, "liar", &guest, (0, None))
    });
}

#[test]
fn another_boot_after_a_reset_is_a_list_of_its_own() {
    World::test(|world| {
        world.start_proxy_alone()?;
        let bare = watched(world, "guest")?;
        let mut first = Guest::new(1);
        first.grow(10)?;
        drop(send_all(world, "guest", &first)?);

        bare.monitor()?.execute("system_reset", &json!({}))?;
        world.wait_until("the reset in the log", LIMIT, |world| {
            // In the file first, then in the TPM, and only then does the proxy go by it.
            let log = world.read_log()?;
            let taken_in = world.proxy_status()?["log_len"] == log.records.len();
            Ok((log.count("vm-reset")? > 0 && taken_in).then_some(()))
        })?;
        let mut second = Guest::new(2);
        second.grow(3)?;
        drop(send_all(world, "guest", &second)?);
        ensure!(world.proxy_export("guest")? == second.list());
        let first_boot = world.proxy_export_boot("guest", 0)?;
        ensure!(first_boot == first.list(), "the list of the boot before is not kept");
        ensure!(world.proxy()?.terminate()?.success());
        ensure!(world.bound_log()?.count("guest-rewind")? == 0);
        Ok(())
    });
}

#[test]
fn connections_cut_in_the_middle_of_a_frame_leave_the_list_whole() {
    World::test(|world| {
        world.start_proxy_alone()?;
        let _bare = watched(world, "guest")?;
        let mut guest = Guest::new(1);
        guest.grow(10)?;
        drop(send_all(world, "guest", &guest)?);

        guest.grow(40)?;
        let have = guest.aggregate(10)?;
        let list = guest.list();
        let entries = Blob(list[list.len() / 5..].to_vec());
        let frame = to_wire(&GuestFrame::Entries { first: 10, entries });
        for cut in [1, 4, 5, 60, frame.len() / 2, frame.len() - 1] {
            let mut stream = UnixStream::connect(world.guest_socket("guest"))?;
            let (boot_id, hash_size) = (guest.boot_id, 20);
            stream.write_all(&to_wire(&GuestFrame::Hello { version: VERSION, boot_id, hash_size, count: 50 }))?;
            stream.write_all(&to_wire(&GuestFrame::Resume { count: have.count, aggregate: have.value }))?;
            stream.write_all(&frame[..cut])?;
        }
        // Entries that do not follow what is there end the connection and change nothing.
        let mut connection = ShimConnection::open(&world.guest_socket("guest"))?;
        ensure!(connection.begin(&guest)? == have, "cut frames left something");
        connection.say(&GuestFrame::Entries { first: 5, entries: Blob(list.clone()) })?;
        wait_closed(&mut connection)?;

        drop(send_all(world, "guest", &guest)?);
        ensure!(world.proxy_export("guest")? == list, "the list is not the guest's");
        ensure!(world.proxy()?.terminate()?.success());
        let log = world.bound_log()?;
        ensure!(log.count("guest-rewind")? == 0 && log.count("guest-overflow")? == 0);
        Ok(())
    });
}

#[test]
fn a_flooding_guest_hurts_nobody_else() {
    World::test(|world| {
        world.settings().guest = "max_entries = 2000\n".to_owned();
        world.start_proxy_alone()?;
        let (_flooder, _honest) = (watched(world, "flooder")?, watched(world, "honest")?);
        let flood = Peer::start(world.guest_socket("flooder"), Guest::new(1));
        flood.grow_steadily(500);
        let honest = Peer::start(world.guest_socket("honest"), Guest::new(2));
        world.wait_until("guest-overflow in the log", LIMIT, |world| {
            Ok((world.read_log()?.count("guest-overflow")? > 0).then_some(()))
        })?;
        honest.guest().grow(30)?;
        wait_entries(world, "honest", 30)?;
        honest.check()?;
        ensure!(world.vm_status("flooder")?["entries"].as_u64().is_some_and(|count| count <= 2000));
        Ok(())
    });
}

#[test]
fn vm_a_real_guests_list_is_whole_over_restarts_of_shim_and_proxy() {
    World::test(|world| {
        world.start_proxy_alone()?;
        world.add_vm(VmSpec::new("guest", Machine::Microvm))?.start()?;
        world.vm("guest")?.wait_ready()?;
        for round in 0..3 {
            let program = format!("/disk/bin/new-{round}");
            let vm = world.vm("guest")?;
            vm.write_program(&program, "exit 0")?;
            match round {
                // The shim dies and begins anew.
                0 => drop(vm.ask("shim restart")?),
                // The connection is cut in the middle, and the guest goes on while nobody listens.
                1 => {
                    world.proxy()?.kill()?;
                    world.vm("guest")?.run(&program)?;
                    world.start_proxy()?;
                }
                // Both.
                _ => {
                    world.proxy()?.terminate()?;
                    world.vm("guest")?.ask("shim restart")?;
                    world.start_proxy()?;
                }
            }
            world.vm("guest")?.run(&program)?;
            world.wait_until("the guest's whole list", LIMIT, |world| {
                let list = world.vm("guest")?.ima_list().context("the guest's own list")?;
                Ok((world.proxy_export("guest").unwrap_or_default() == list).then_some(()))
            })?;
        }
        ensure!(world.proxy()?.terminate()?.success());
        let log = world.bound_log()?;
        ensure!(log.count("guest-rewind")? == 0);
        Ok(())
    });
}
