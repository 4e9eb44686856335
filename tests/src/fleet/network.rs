//! A second network on this machine, with a cable that can be pulled: a network name space and a pair of virtual Ethernet
//! devices. Needs root.

use std::{fs::File, path::PathBuf, process::Command};

use anyhow::{Context as _, Result, ensure};
use nix::sched::{CloneFlags, setns};
use tokio::runtime::Runtime;

/// The network. It goes with this value.
pub struct Network {
    name: String,
    number: u32,
}

impl Network {
    /// A network of its own.
    ///
    /// # Errors
    /// Not root, or no name spaces here.
    pub fn new() -> Result<Self> {
        let number = std::process::id();
        let network = Self { name: format!("oq-{number}"), number };
        network.ip(&["netns", "add", &network.name])?;
        let (here, there) = (network.device(), format!("oqt{number}"));
        network.ip(&["link", "add", &here, "type", "veth", "peer", "name", &there, "netns", &network.name])?;
        network.ip(&["address", "add", &format!("{}/30", network.host()), "dev", &here])?;
        network.ip(&["link", "set", &here, "up"])?;
        let inside = ["netns", "exec", network.name.as_str(), "ip"];
        for command in [
            ["address", "add", &format!("{}/30", network.address(2)), "dev", &there].as_slice(),
            &["link", "set", &there, "up"],
        ] {
            network.ip(&[&inside, command].concat())?;
        }
        Ok(network)
    }

    /// This machine's address in it. Of 198.18.0.0/15, which is for tests of network devices (RFC 2544).
    #[must_use]
    pub fn host(&self) -> String {
        self.address(1)
    }

    /// Pulls the cable, or puts it back.
    ///
    /// # Errors
    /// `ip` fails.
    pub fn cable(&self, plugged: bool) -> Result<()> {
        self.ip(&["link", "set", &self.device(), if plugged { "up" } else { "down" }])
    }

    /// A runtime whose threads are in that network.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn runtime(&self) -> Result<Runtime> {
        let path = PathBuf::from("/run/netns").join(&self.name);
        let space = File::open(&path).with_context(|| format!("opening {}", path.display()))?;
        let enter = move || {
            // A thread that stays outside is noticed: it reaches nobody at that address.
            if let Err(e) = setns(&space, CloneFlags::CLONE_NEWNET) {
                eprintln!("a thread cannot enter the network: {e}");
            }
        };
        Ok(tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().on_thread_start(enter).build()?)
    }

    fn device(&self) -> String {
        format!("oqh{}", self.number)
    }

    fn address(&self, host: u32) -> String {
        format!("198.18.{}.{}", self.number % 256, self.number / 256 % 63 * 4 + host)
    }

    fn ip(&self, arguments: &[&str]) -> Result<()> {
        let done = Command::new("ip").args(arguments).output().context("running ip")?;
        ensure!(done.status.success(), "ip {arguments:?}: {}", String::from_utf8_lossy(&done.stderr));
        Ok(())
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        let _ = self.ip(&["link", "delete", &self.device()]);
        let _ = self.ip(&["netns", "delete", &self.name]);
    }
}
