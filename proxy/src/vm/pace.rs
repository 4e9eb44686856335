//! When VMs are looked at on the timer: spread over time, and bounded over all VMs.
//!
//! A look costs QEMU and the proxy a few milliseconds. With one VM a look every ten seconds is nothing, with a thousand it
//! must not come to be most of what the host does: so each look takes a place in one queue that lets a fixed number pass
//! each second, and the interval of each VM grows with their number.

use std::{
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

/// Gives out the moments of looks.
#[derive(Debug)]
pub(super) struct Pace {
    every: Duration,
    gap: Duration,
    free: Mutex<Option<Instant>>,
}

impl Pace {
    /// A look at each VM `every` so often, but no more than `per_second` looks at all of them.
    pub(super) fn new(every: Duration, per_second: u32) -> Self {
        Self { every, gap: Duration::from_secs(1) / per_second.max(1), free: Mutex::new(None) }
    }

    /// When the next look is due at a VM that was looked at now. Each moment is given to one VM only.
    pub(super) fn next(&self, now: Instant) -> Instant {
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        let due = now + self.every;
        let at = free.map_or(due, |free| free.max(due));
        *free = Some(at + self.gap);
        at
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    /// Looks at so many VMs, all begun at once, within so many seconds: by VM, and the most in any one second.
    fn looks(vms: u32, seconds: u64) -> (BTreeMap<u32, u32>, u32) {
        let pace = Pace::new(Duration::from_secs(10), 20);
        let start = Instant::now();
        let mut due: Vec<(Instant, u32)> = (0..vms).map(|vm| (pace.next(start), vm)).collect();
        let (mut by_vm, mut by_second) = (BTreeMap::new(), BTreeMap::<u64, u32>::new());
        loop {
            due.sort_unstable();
            let (at, vm) = due[0];
            if at > start + Duration::from_secs(seconds) {
                return (by_vm, by_second.into_values().max().unwrap_or(0));
            }
            *by_vm.entry(vm).or_default() += 1;
            *by_second.entry((at - start).as_secs()).or_default() += 1;
            due[0].0 = pace.next(at);
        }
    }

    #[test]
    fn one_vm_is_looked_at_every_interval() {
        assert_eq!(looks(1, 100), ([(0, 10)].into(), 1));
    }

    #[test]
    fn a_thousand_vms_share_what_one_host_can_bear() {
        let (by_vm, most) = looks(1000, 300);
        assert_eq!(most, 20);
        // The first look after ten seconds and up to fifty more, then one every fifty seconds.
        assert_eq!(by_vm.len(), 1000);
        assert!(by_vm.values().all(|n| (5..=6).contains(n)), "{by_vm:?}");
    }
}
