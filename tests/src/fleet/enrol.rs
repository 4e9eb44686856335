//! How hosts become members: by token, as hosts do, or in bulk.

use std::{sync::Arc, time::Duration};

use anyhow::{Context as _, Result, ensure};
use onequote_evidence::{
    id::{Blob, Sha256, TimeMs},
    join::JoinToken,
    tpm::{Public, StorageKey},
};
use onequote_proxy::{
    config::Config,
    join::{Details, JoinError, Membership, Wish, join_in_memory},
};
use onequote_verifier::{
    enrol::authority::Authority,
    source::System,
    store::{
        Database, Enrolment, Store as _,
        enrol::{EnrolStore as _, IssuedCertificate, Join, Token},
    },
};
use rcgen::PublicKeyData as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio::task::JoinSet;

use super::{Fleet, Member, Verifier, now};

/// How long a certificate holds, and a token.
const LIFETIME: Duration = Duration::from_secs(24 * 3600);

/// Where a verifier would reach the proxies: nobody listens there, the hosts report.
const NOBODY: &str = "https://127.0.0.1:9";

/// How often a host that the verifier has no time for tries again to join, after a tenth of a second each.
const ATTEMPTS: u32 = 600;

/// Hosts that are enrolled at a time.
const AT_ONCE: usize = 64;

impl Fleet {
    /// Writes all hosts into the verifier's database, with the fleet's policy and certificates of the verifier's
    /// authority: what joining leaves there, without the protocol. They report to `urls`, one host to the first, the next to the
    /// second, and so on.
    ///
    /// # Errors
    /// The database or the authority fails.
    pub async fn enrol_in_bulk(&self, verifier: &Verifier, database: Option<&str>, urls: &[String]) -> Result<()> {
        let store = match database {
            Some(address) => Database::connect(address).await?,
            None => Database::open(&verifier.state().join("verifier.sqlite")).await?,
        };
        let store = Arc::new(store);
        let authority = Arc::new(Authority::open(verifier.state(), Arc::new(System))?);
        let expires = TimeMs(now().0 + u64::try_from(LIFETIME.as_millis())?);
        let token = Token {
            id: "fleet".to_owned(),
            secret: Sha256::ZERO,
            host: None,
            replace: false,
            software_tpm: true,
            url: None,
            expires,
            uses: u32::try_from(self.members.len())?,
        };
        store.create_token(&token, now()).await?;
        let policy: Arc<str> = self.around.catalogue.policy().into();
        let mut tasks = JoinSet::new();
        for (member, url) in self.members.iter().zip(urls.iter().cycle()) {
            if tasks.len() >= AT_ONCE {
                tasks.join_next().await.context("there is a task")???;
            }
            let (member, store, authority) = (Arc::clone(member), Arc::clone(&store), Arc::clone(&authority));
            let (policy, url) = (Arc::clone(&policy), url.clone());
            tasks.spawn(async move { member.enrol(&store, &authority, &policy, &url).await });
        }
        while let Some(done) = tasks.join_next().await {
            done??;
        }
        Ok(())
    }
}

impl Fleet {
    /// All hosts join with this token by the true protocol: endorsement key, credential activation, proof. Then they get the
    /// fleet's policy.
    ///
    /// # Errors
    /// The verifier refuses one.
    pub async fn join(&self, verifier: &Verifier, url: &str) -> Result<()> {
        let uses = self.members.len().to_string();
        let made = verifier.run(&["token", "create", "--uses", &uses, "--software-tpm"])?.success()?;
        let token: JoinToken = made.output.trim().parse()?;
        let store = Database::open(&verifier.state().join("verifier.sqlite")).await?;
        let policy = self.around.catalogue.policy();
        for part in self.members.chunks(AT_ONCE) {
            let mut tasks = JoinSet::new();
            for member in part {
                let (member, url, token) = (Arc::clone(member), url.to_owned(), token.clone());
                tasks.spawn(async move { member.join(&url, token).await });
            }
            while let Some(done) = tasks.join_next().await {
                done??;
            }
            for member in part {
                store.set_policy(&member.id, &policy, now()).await?;
            }
        }
        Ok(())
    }
}

impl Member {
    async fn enrol(&self, store: &Database, authority: &Authority, policy: &str, url: &str) -> Result<()> {
        let (ak, ek) = {
            let host = self.host.lock().await;
            (host.chip.ak_public(), StorageKey::parse(&host.chip.ek_public())?.name())
        };
        let name = Public::parse(&ak)?.name();
        let key = rcgen::KeyPair::generate()?;
        let made = authority.certify(&self.id, key.der_bytes(), &name, LIFETIME)?;
        let host = Enrolment {
            id: self.id.clone(),
            url: NOBODY.to_owned(),
            ak: ak.to_vec(),
            certificate: authority.certificate().to_vec(),
            software_tpm: true,
        };
        let certificate = IssuedCertificate {
            serial: made.serial,
            host: self.id.clone(),
            ak: name.clone(),
            expires: made.expires,
            revoked: false,
        };
        let vouched = "the fleet simulator";
        let join = Join { token: "fleet", host: &host, ek: &ek, vouched, url_fixed: false, certificate: &certificate };
        let refused = store.join(&join, now()).await?;
        ensure!(refused.is_ok(), "{}: {refused:?}", self.id);
        store.set_policy(&self.id, policy, now()).await?;
        let details = Details {
            url: url.to_owned(),
            host: self.id.clone(),
            ak: Blob(name),
            own_url: None,
            received: now(),
            lifetime: u64::try_from(LIFETIME.as_millis())?,
        };
        self.enrolled(Membership::in_memory(
            "verifier",
            details,
            authority.certificate().clone(),
            CertificateDer::from(made.certificate),
            PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.serialize_der())),
        ));
        Ok(())
    }

    async fn join(&self, url: &str, token: JoinToken) -> Result<()> {
        let log = self.host.lock().await.log()?.clone();
        let config = format!("host_id = \"{}\"\n[tpm]\ntcti = \"device:/dev/null\"\n", self.id);
        let config: Config = toml::from_str(&config)?;
        let wish =
            Wish { url: url.to_owned(), token, name: Some("verifier".to_owned()), own_url: Some(NOBODY.to_owned()) };
        let mut attempts = 0;
        let joined = loop {
            match join_in_memory(&config, wish.clone(), log.clone(), now()).await {
                // So many at a time come from one address only here.
                Err(JoinError::Refused { code, .. }) if code == "busy" && attempts < ATTEMPTS => {
                    attempts += 1;
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
                other => break other,
            }
        };
        self.enrolled(joined.with_context(|| format!("{} cannot join", self.id))?);
        Ok(())
    }
}
