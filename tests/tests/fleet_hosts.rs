//! The simulator's hosts before a verifier's appraisal, without a network: what they say is true to the byte, whatever
//! their life was, and what attackers say is seen through.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{collections::BTreeMap, sync::Arc};

use onequote_evidence::{id::Nonce, stream::Have, tpm::Public};
use onequote_tests::{
    fleet::{Attack, Catalogue, Host, Surroundings, Truth, now},
    lab::Random,
};
use onequote_verifier::{
    appraise::{Appraisal, Context, Received, Shared, appraise, freshness::Freshness, state::HostState},
    policy::Policy,
    result::Verdict,
};

/// A verifier of one host.
struct Verifier {
    state: HostState,
    policy: Policy,
    nonces: u8,
}

impl Verifier {
    fn new(around: &Surroundings) -> Self {
        let policy = Policy::parse(&around.catalogue.policy(), "the fleet's policy").unwrap();
        Self { state: HostState::default(), policy, nonces: 0 }
    }

    async fn round(&mut self, host: &Host) -> Verdict {
        self.nonces += 1;
        let (nonce, binding) = (Nonce::new(vec![self.nonces; 32]).unwrap(), vec![7; 32]);
        let bytes = host.attest().unwrap().challenge(nonce.clone(), binding.clone(), Have::default()).await.unwrap();
        let bytes = bytes.bytes().await.unwrap();
        let received = Received::read(&bytes).unwrap();
        let ak = Public::parse(&host.chip.ak_public()).unwrap();
        let freshness = Freshness::Asked {
            nonce,
            binding,
            expires: onequote_evidence::id::TimeMs(now().0 + 60_000),
            unused: true,
            claimed_was_answered: false,
        };
        let context = Context {
            host: Some(&host.id),
            ak: &ak,
            software_tpm: true,
            freshness: &freshness,
            state: &self.state,
            policy: Some((&self.policy, 1)),
            now: now(),
            lifetime: 60_000,
            facts: false,
            shared: &Shared::default(),
        };
        let Appraisal { verdict, state, .. } = appraise(&received, &context);
        if let Some(state) = state {
            self.state = state;
        }
        verdict
    }
}

fn surroundings(folder: &std::path::Path) -> Arc<Surroundings> {
    Arc::new(Surroundings::new(Catalogue::new(100), folder).unwrap())
}

fn known(verdict: &Verdict) -> Truth {
    let quote = verdict.quote.as_ref().unwrap();
    let vms: BTreeMap<_, _> = verdict.vms.iter().map(|vm| (vm.uuid, (vm.session, vm.entries))).collect();
    Truth { epoch: quote.epoch.number, records: quote.records, vms }
}

#[tokio::test]
async fn an_honest_host_is_trusted_through_its_whole_life() {
    let folder = tempfile::tempdir().unwrap();
    let around = surroundings(folder.path());
    let mut host = Host::new("h1", Arc::clone(&around)).unwrap();
    let mut verifier = Verifier::new(&around);
    let mut random = Random::seeded(1);
    host.boot().unwrap();
    host.start_vms(10).await.unwrap();
    let check = |verdict: &Verdict, host: &Host| {
        assert!(verdict.all_trusted(), "{}", serde_json::to_string_pretty(verdict).unwrap());
        assert_eq!(known(verdict), host.truth().unwrap());
    };
    check(&verifier.round(&host).await, &host);
    for step in 0..4 {
        let vm = host.any_running(&mut random).unwrap();
        host.run_programs(vm, &[30 + step, 40, 50]).await.unwrap();
        check(&verifier.round(&host).await, &host);
        host.stop_vm(vm).await.unwrap();
        host.start_vms(2).await.unwrap();
        check(&verifier.round(&host).await, &host);
        host.restart_proxy().await.unwrap();
        check(&verifier.round(&host).await, &host);
    }
    host.stop_all().await.unwrap();
    check(&verifier.round(&host).await, &host);
    host.reboot().await.unwrap();
    host.start_vms(5).await.unwrap();
    check(&verifier.round(&host).await, &host);
}

/// Each on a host of its own that was honest before: evidence was taken of it with which the attack has to fit.
#[tokio::test]
async fn every_attack_gives_its_finding() {
    let folder = tempfile::tempdir().unwrap();
    let around = surroundings(folder.path());
    for (number, attack) in Attack::ALL.into_iter().enumerate() {
        let mut random = Random::seeded(number as u64);
        let mut host = Host::new(&format!("h{number}"), Arc::clone(&around)).unwrap();
        let mut verifier = Verifier::new(&around);
        host.boot().unwrap();
        host.start_vms(5).await.unwrap();
        attack.prepare(&mut host, &mut random).await.unwrap();
        let vm = host.any_running(&mut random).unwrap();
        host.run_programs(vm, &[30, 31]).await.unwrap();
        let before = verifier.round(&host).await;
        assert!(before.all_trusted(), "{attack:?}: {}", serde_json::to_string_pretty(&before).unwrap());
        attack.strike(&mut host, &mut random).await.unwrap();
        let verdict = verifier.round(&host).await;
        let shown = serde_json::to_string_pretty(&verdict).unwrap();
        assert!(!verdict.all_trusted(), "{attack:?}: {shown}");
        let found = attack.found_in(&verdict);
        assert!(found, "{attack:?} must give {}: {shown}", attack.code());
    }
}
