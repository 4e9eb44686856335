//! Whether who answers at a monitor is the process that is measured, and says what that process was started with.
//!
//! The kernel names the process that *listened* (`SO_PEERCRED`); it must also hold the other end of our connection. What
//! QEMU then says of its machine must be among what its arguments say: a process in between can say what it likes, and
//! `qom-set` changes these answers, though not the machine.

use onequote_evidence::id::VmId;
use serde_json::{Value, json};

use super::{Arguments, Machine, MeasureError, MeasureErrorKind, VmMeter};

impl VmMeter<'_> {
    /// Checks both, and gives what QEMU said of its machine.
    ///
    /// # Errors
    /// What does not fit.
    pub(super) async fn must_be_who_it_seems(&self, given: &Arguments) -> Result<Machine, MeasureError> {
        let impostor = |what: String| MeasureError::of("monitor", MeasureErrorKind::Impostor(what));
        // Where the kernel does not tell, the log says so among the VM's other monitors.
        if let Ok(socket) = self.qmp.peer_socket()
            && !self.process.holds_socket(socket).map_err(|e| MeasureError::of("monitor", e))?
        {
            let pid = self.process.pid();
            return Err(impostor(format!("process {pid} made the socket, but does not hold the connection")));
        }
        let ask = |e| MeasureError::of("monitor", MeasureErrorKind::Qmp(e));
        let uuid = self.qmp.execute(qapi::qmp::query_uuid {});
        let name = self.qmp.call::<Value>("query-name", json!({}));
        let (machine, uuid, name) = tokio::try_join!(Machine::ask(self.qmp), uuid, name).map_err(ask)?;
        let answers = Answers {
            kernel: machine.kernel.clone(),
            initrd: machine.initrd.clone(),
            append: machine.append.clone(),
            uuid: uuid.UUID,
            name: name["name"].as_str().unwrap_or_default().to_owned(),
        };
        answers.contradiction(given).map_or(Ok(machine), |what| Err(impostor(what)))
    }
}

/// What QEMU says that its arguments say, too. Empty is nothing.
#[derive(Debug, Clone, Default)]
struct Answers {
    kernel: String,
    initrd: String,
    append: String,
    uuid: String,
    name: String,
}

impl Answers {
    /// The first answer that is none of those that the arguments allow, in words. Where arguments give several, the last
    /// counts for QEMU; which one that is depends on its version.
    fn contradiction(&self, given: &Arguments) -> Option<String> {
        let names = given.given.iter().filter(|g| g.name == "name").filter_map(|g| g.get("guest")).collect();
        for (what, answer, allowed) in [
            ("kernel", &self.kernel, given.of_machine("kernel", "kernel")),
            ("initrd", &self.initrd, given.of_machine("initrd", "initrd")),
            ("append", &self.append, given.of_machine("append", "append")),
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
        let answer = id(&self.uuid);
        let fits = if allowed.is_empty() { answer.is_none() } else { allowed.contains(&answer) };
        (!fits).then(|| format!("it says {:?} for uuid, which is not in its arguments", self.uuid))
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
        let good = Answers {
            kernel: "k,1".to_owned(),
            append: "a=b,c".to_owned(),
            name: "vm".to_owned(),
            uuid: UUID.to_uppercase(),
            initrd: String::new(),
        };
        assert_eq!(good.contradiction(&given), None);
        let found = |other: Answers| other.contradiction(&given).unwrap();
        assert!(found(Answers { kernel: "k".to_owned(), ..good.clone() }).contains("kernel"));
        assert!(found(Answers { initrd: "i".to_owned(), ..good.clone() }).contains("nothing"));
        assert!(found(Answers { append: String::new(), ..good.clone() }).contains("append"));
        assert!(found(Answers { name: "other".to_owned(), ..good.clone() }).contains("name"));
        assert!(found(Answers { uuid: UUID.replace('1', "2"), ..good.clone() }).contains("uuid"));
        assert!(found(Answers { uuid: String::new(), ..good }).contains("uuid"));

        let none = Arguments::parse(&["qemu", "-S"]);
        let nil = Answers { uuid: "00000000-0000-0000-0000-000000000000".to_owned(), ..Answers::default() };
        assert_eq!(nil.contradiction(&none), None);
        assert!(Answers { uuid: UUID.to_owned(), ..nil }.contradiction(&none).is_some());
    }

    #[test]
    fn the_machine_can_be_given_in_groups() {
        let mut given = Arguments::parse(&["qemu", "-M", "q35,kernel=k1", "-readconfig", "f"]);
        given.add_config(b"[machine]\n  initrd = \"i\"\n  append = \"a, b=c\"\n");
        let answers =
            Answers { kernel: "k1".into(), initrd: "i".into(), append: "a, b=c".into(), ..Answers::default() };
        assert_eq!(answers.contradiction(&given), None);
    }
}
