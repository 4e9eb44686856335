//! Whether who answers at a monitor is the process that is measured, and says what that process was started with.
//!
//! The kernel names the process that *listened* (`SO_PEERCRED`); it must also hold the other end of our connection. What
//! QEMU then says of its machine must be among what its arguments say: a process in between can say what it likes, and
//! `qom-set` changes these answers, though not the machine.

use onequote_evidence::id::VmId;

use super::{Arguments, Machine, MeasureError, MeasureErrorKind, VmMeter};

/// What QEMU said of itself when it was met: that it cannot change while it waits, or what a later look is held against.
#[derive(Debug, Clone, Default)]
pub struct Told {
    /// What its machine loads.
    pub machine: Machine,
    /// Its UUID, if it was given one.
    pub uuid: Option<VmId>,
    /// Its name; empty when it was given none.
    pub name: String,
    /// Whether its processors are x86.
    pub x86: bool,
}

impl VmMeter<'_> {
    /// Checks both.
    ///
    /// # Errors
    /// What does not fit.
    pub(super) fn must_be_who_it_seems(&self, given: &Arguments, told: &Told) -> Result<(), MeasureError> {
        let impostor = |what: String| MeasureError::of("monitor", MeasureErrorKind::Impostor(what));
        // Where the kernel does not tell, the log says so among the VM's other monitors.
        if let Ok(socket) = self.qmp.peer_socket()
            && !self.process.holds_socket(socket).map_err(|e| MeasureError::of("monitor", e))?
        {
            let pid = self.process.pid();
            return Err(impostor(format!("process {pid} made the socket, but does not hold the connection")));
        }
        told.contradiction(given).map_or(Ok(()), |what| Err(impostor(what)))
    }
}

impl Told {
    /// The first answer that is none of those that the arguments allow, in words. Where arguments give several, the last
    /// counts for QEMU; which one that is depends on its version.
    fn contradiction(&self, given: &Arguments) -> Option<String> {
        let names = given.given.iter().filter(|g| g.name == "name").filter_map(|g| g.get("guest")).collect();
        let machine = &self.machine;
        for (what, answer, allowed) in [
            ("kernel", &machine.kernel, given.of_machine("kernel", "kernel")),
            ("initrd", &machine.initrd, given.of_machine("initrd", "initrd")),
            ("append", &machine.append, given.of_machine("append", "append")),
            ("name", &self.name, names),
        ] {
            let fits = if allowed.is_empty() { answer.is_empty() } else { allowed.contains(answer) };
            if !fits {
                let allowed = if allowed.is_empty() { "nothing".to_owned() } else { format!("{allowed:?}") };
                return Some(format!("it says {answer:?} for {what}, its arguments say {allowed}"));
            }
        }
        let id = |text: &str| text.parse::<VmId>().ok().filter(|id| !id.0.is_nil());
        let uuids: Vec<_> = given.given.iter().filter(|g| g.name == "uuid").collect();
        let allowed: Vec<_> = uuids.iter().map(|g| id(&String::from_utf8_lossy(&g.value))).collect();
        let fits = if allowed.is_empty() { self.uuid.is_none() } else { allowed.contains(&self.uuid) };
        let words = || self.uuid.map_or_else(|| "nothing".to_owned(), |uuid| uuid.to_string());
        (!fits).then(|| format!("it says {} for uuid, which is not in its arguments", words()))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;

    const UUID: &str = "00112233-4455-6677-8899-aabbccddeeff";

    #[test]
    fn answers_must_be_among_the_arguments() {
        let args = ["qemu", "-kernel", "k,1", "-append", "a=b,c", "-name", "guest=vm,debug-threads=on", "-uuid", UUID];
        let given = Arguments::parse(&args);
        let machine = Machine { kernel: "k,1".to_owned(), append: "a=b,c".to_owned(), ..Machine::default() };
        let uuid = |text: &str| text.parse::<VmId>().ok();
        let good = Told { machine: machine.clone(), name: "vm".to_owned(), uuid: uuid(UUID), x86: true };
        assert_eq!(good.contradiction(&given), None);
        let found = |other: Told| other.contradiction(&given).unwrap();
        let with = |machine: Machine| Told { machine, ..good.clone() };
        assert!(found(with(Machine { kernel: "k".to_owned(), ..machine.clone() })).contains("kernel"));
        assert!(found(with(Machine { initrd: "i".to_owned(), ..machine.clone() })).contains("nothing"));
        assert!(found(with(Machine { append: String::new(), ..machine.clone() })).contains("append"));
        assert!(found(Told { name: "other".to_owned(), ..good.clone() }).contains("name"));
        assert!(found(Told { uuid: uuid(&UUID.replace('1', "2")), ..good.clone() }).contains("uuid"));
        assert!(found(Told { uuid: None, ..good }).contains("nothing for uuid"));

        let none = Arguments::parse(&["qemu", "-S"]);
        assert_eq!(Told::default().contradiction(&none), None);
        assert!(Told { uuid: uuid(UUID), ..Told::default() }.contradiction(&none).is_some());
        let nil = Arguments::parse(&["qemu", "-uuid", "00000000-0000-0000-0000-000000000000"]);
        assert_eq!(Told::default().contradiction(&nil), None);
    }

    #[test]
    fn the_machine_can_be_given_in_groups() {
        let mut given = Arguments::parse(&["qemu", "-M", "q35,kernel=k1", "-readconfig", "f"]);
        given.add_config(b"[machine]\n  initrd = \"i\"\n  append = \"a, b=c\"\n");
        let machine =
            Machine { kernel: "k1".into(), initrd: "i".into(), append: "a, b=c".into(), ..Machine::default() };
        assert_eq!(Told { machine, ..Told::default() }.contradiction(&given), None);
    }
}
