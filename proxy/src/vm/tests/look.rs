//! What a look at a VM costs.

use super::world::*;
use crate::vm::facts::Facts;

/// Commands of one look, all given at once. Their number is in `docs/architecture.md`.
const COMMANDS: u64 = 16;

fn qemu(world: &World) -> tokio::process::Child {
    world.file("disk.raw", vec![1; 1 << 20]);
    let disks =
        ["-drive", "file=disk.raw,format=raw,if=virtio,id=root", "-device", "ide-cd,id=cd", "-netdev", "user,id=n"];
    world.qemu_elsewhere("b.qmp", &[&["-M", "q35"][..], &disks].concat())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_look_is_sixteen_commands() {
    let world = World::new();
    let _qemu = qemu(&world);
    let monitor = world.monitor("b.qmp").await;
    let (facts, _) = Facts::ask(&monitor).await.unwrap();
    let given = monitor.commands();
    let (again, _) = facts.again(&monitor).await.unwrap();
    assert_eq!(monitor.commands() - given, COMMANDS);
    assert_eq!(again, facts);
    assert_eq!(again.netdevs, ["n:user"]);
    assert_eq!(again.drives.values().map(|d| d.slot.as_str()).collect::<Vec<_>>(), ["cd"]);
    // A file behind memory is asked for once.
    let path = world.path("memory");
    let object = serde_json::json!({"qom-type": "memory-backend-file", "id": "m", "size": 1 << 20, "mem-path": path});
    monitor.call::<serde_json::Value>("object-add", object).await.unwrap();
    let (with_object, _) = again.again(&monitor).await.unwrap();
    assert!(with_object.objects.contains(&format!("m:memory-backend-file {}", path.display())));
    let given = monitor.commands();
    assert_eq!(with_object.again(&monitor).await.unwrap().0, with_object);
    assert_eq!(monitor.commands() - given, COMMANDS);
}

/// Commands from the monitor's greeting to `cont`, both included: each costs QEMU some 0.4 ms, whoever waits for them.
/// Their number is in `docs/architecture.md`.
const START_COMMANDS: usize = 33;

#[tokio::test(flavor = "multi_thread")]
async fn a_start_is_thirty_three_commands() {
    let world = World::new();
    world.file("disk.raw", vec![1; 1 << 20]);
    world.file("firmware", vec![0xf4; 64 * 1024]);
    let disk = ["-M", "q35", "-S", "-bios", "firmware", "-drive", "file=disk.raw,format=raw,if=virtio,id=root"];
    let trace = ["-trace", "handle_qmp_command", "-D", "trace"];
    let _qemu = world.qemu("one", &[&disk[..], &trace].concat());
    world.log.wait_kind("vm-resume").await;
    let trace = std::fs::read_to_string(world.path("trace")).unwrap();
    let commands: Vec<&str> = trace.lines().filter_map(|line| Some(line.split_once(" req: ")?.1)).collect();
    let cont = commands.iter().position(|command| command.contains("\"cont\"")).unwrap();
    assert_eq!(cont + 1, START_COMMANDS, "{:#?}", &commands[..=cont]);
}
