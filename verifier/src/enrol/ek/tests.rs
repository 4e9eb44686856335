//! Chains made by hand, each with one thing that is not as it should be.

use aws_lc_rs::{agreement, rsa::KeySize};
use onequote_evidence::tpm::{Curve, StorageKey};
use rcgen::{
    BasicConstraints, CertificateParams, CustomExtension, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, PublicKeyData, SerialNumber, SignatureAlgorithm,
};

use super::{super::testing, *};

const NOW: TimeMs = TimeMs(1_800_000_000_000);

/// A key of somebody else, to be certified.
struct Theirs(Vec<u8>, &'static SignatureAlgorithm);

impl PublicKeyData for Theirs {
    fn der_bytes(&self) -> &[u8] {
        &self.0
    }

    fn algorithm(&self) -> &'static SignatureAlgorithm {
        self.1
    }
}

fn named(name: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    params.not_before = rcgen::date_time_ymd(2020, 1, 1);
    params.not_after = rcgen::date_time_ymd(2050, 1, 1);
    params
}

fn authority(name: &str, path: Option<u8>) -> CertificateParams {
    let mut params = named(name);
    let constraints = path.map_or(BasicConstraints::Unconstrained, BasicConstraints::Constrained);
    params.is_ca = IsCa::Ca(constraints);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    params
}

fn leaf() -> CertificateParams {
    let mut params = named("");
    params.key_usages = vec![KeyUsagePurpose::KeyAgreement];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::Other(vec![2, 23, 133, 8, 1])];
    params.serial_number = Some(SerialNumber::from_slice(&[0x7f; 20]));
    params
}

struct Pki {
    middle: Issuer<'static, KeyPair>,
    root_der: Vec<u8>,
    middle_der: Vec<u8>,
    ek: StorageKey,
    point: Vec<u8>,
}

impl Pki {
    fn new() -> Self {
        Self::with(authority("a middle", Some(0)))
    }

    fn with(middle: CertificateParams) -> Self {
        let (root_key, middle_key) = (KeyPair::generate().unwrap(), KeyPair::generate().unwrap());
        let root_der = authority("a root", None).self_signed(&root_key).unwrap().der().to_vec();
        let root = Issuer::new(authority("a root", None), root_key);
        let middle_der = middle.signed_by(&middle_key, &root).unwrap().der().to_vec();
        let middle = Issuer::new(middle, middle_key);
        let key = agreement::PrivateKey::generate(&agreement::ECDH_P256).unwrap();
        let point = key.compute_public_key().unwrap().as_ref().to_vec();
        let ek = StorageKey::parse(&testing::ecc_ek(Curve::P256, &point[1..])).unwrap();
        Self { middle, root_der, middle_der, ek, point }
    }

    fn leaf(&self, params: &CertificateParams) -> Vec<u8> {
        let key = Theirs(self.point.clone(), &rcgen::PKCS_ECDSA_P256_SHA256);
        params.signed_by(&key, &self.middle).unwrap().der().to_vec()
    }

    fn roots(&self) -> Roots {
        let anchors = vec![(Kind::Device, Certificate::parse(&self.root_der).unwrap())];
        Roots { anchors, intermediates: Vec::new() }
    }

    fn check(&self, leaf: &[u8]) -> Result<Vouched, EkError> {
        self.roots().check(&self.ek, Some(leaf), std::slice::from_ref(&self.middle_der), NOW)
    }
}

#[test]
fn a_chain_to_a_root() {
    let pki = Pki::new();
    let leaf = pki.leaf(&leaf());
    let vouched = pki.check(&leaf).unwrap();
    assert_eq!((vouched.root.as_str(), vouched.software), ("a root", false));
    let e = pki.roots().check(&pki.ek, Some(&leaf), &[], NOW).unwrap_err();
    assert!(matches!(&e, EkError::Untrusted { issuer, .. } if issuer == "a middle"), "{e}");
    let mut roots = pki.roots();
    roots.intermediates.push(Certificate::parse(&pki.middle_der).unwrap());
    roots.check(&pki.ek, Some(&leaf), &[], NOW).unwrap();
    let middle = vec![(Kind::Software, Certificate::parse(&pki.middle_der).unwrap())];
    let roots = Roots { anchors: middle, intermediates: Vec::new() };
    assert!(roots.check(&pki.ek, Some(&leaf), &[], NOW).unwrap().software, "an anchor need not be self-signed");
    assert_eq!(pki.roots().check(&pki.ek, None, &[], NOW), Err(EkError::Missing));
    let none = Roots::default().check(&pki.ek, Some(&leaf), std::slice::from_ref(&pki.middle_der), NOW);
    assert!(matches!(none, Err(EkError::Untrusted { .. })));
    let many = vec![pki.middle_der.clone(); MAX_CHAIN + 1];
    assert_eq!(pki.roots().check(&pki.ek, Some(&leaf), &many, NOW), Err(EkError::TooMany));
}

#[test]
fn somebody_elses_root_of_the_same_name() {
    let (pki, other) = (Pki::new(), Pki::new());
    let leaf = pki.leaf(&leaf());
    let e = other.roots().check(&pki.ek, Some(&leaf), std::slice::from_ref(&pki.middle_der), NOW).unwrap_err();
    assert!(matches!(e, EkError::Signature { .. }), "{e}");
    let e = pki.roots().check(&pki.ek, Some(&leaf), &[other.middle_der], NOW).unwrap_err();
    assert!(matches!(e, EkError::Signature { .. }), "{e}");
    let mut changed = leaf.clone();
    *changed.last_mut().unwrap() ^= 1;
    assert!(pki.check(&changed).is_err());
}

#[test]
fn a_certificate_for_another_key() {
    let (pki, other) = (Pki::new(), Pki::new());
    let e = pki.roots().check(&other.ek, Some(&pki.leaf(&leaf())), std::slice::from_ref(&pki.middle_der), NOW);
    assert_eq!(e, Err(EkError::OtherKey));
}

#[test]
fn out_of_its_time() {
    let pki = Pki::new();
    let mut old = leaf();
    old.not_after = rcgen::date_time_ymd(2021, 1, 1);
    assert!(matches!(pki.check(&pki.leaf(&old)), Err(EkError::Time { .. })));
    let mut middle = authority("a middle", None);
    middle.not_after = rcgen::date_time_ymd(2021, 1, 1);
    let pki = Pki::with(middle);
    assert!(matches!(pki.check(&pki.leaf(&leaf())), Err(EkError::Time { .. })));
    let mut for_ever = leaf();
    for_ever.not_after = rcgen::date_time_ymd(9999, 12, 31);
    let pki = Pki::new();
    pki.check(&pki.leaf(&for_ever)).unwrap();
}

#[test]
fn usages() {
    let pki = Pki::new();
    let change = |change: fn(&mut CertificateParams)| {
        let mut params = leaf();
        change(&mut params);
        pki.check(&pki.leaf(&params))
    };
    change(|p| p.extended_key_usages.clear()).unwrap();
    change(|p| p.key_usages.clear()).unwrap();
    let other = [
        change(|p| p.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth]),
        change(|p| p.key_usages = vec![KeyUsagePurpose::DigitalSignature]),
        change(|p| p.key_usages.push(KeyUsagePurpose::KeyCertSign)),
        change(|p| p.is_ca = IsCa::Ca(BasicConstraints::Unconstrained)),
    ];
    for refused in other {
        assert!(matches!(refused, Err(EkError::Usage { .. })), "{refused:?}");
    }
    let mut no_authority = authority("a middle", None);
    no_authority.is_ca = IsCa::ExplicitNoCa;
    let mut no_signer = authority("a middle", None);
    no_signer.key_usages = vec![KeyUsagePurpose::CrlSign];
    let mut other_use = authority("a middle", None);
    other_use.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    for middle in [no_authority, no_signer, other_use] {
        let pki = Pki::with(middle);
        let refused = pki.check(&pki.leaf(&leaf()));
        assert!(matches!(refused, Err(EkError::Usage { .. })), "{refused:?}");
    }
}

#[test]
fn an_authority_under_one_that_allows_none() {
    let pki = Pki::new();
    let key = KeyPair::generate().unwrap();
    let below = authority("below", None);
    let below_der = below.signed_by(&key, &pki.middle).unwrap().der().to_vec();
    let below = Issuer::new(below, key);
    let theirs = Theirs(pki.point.clone(), &rcgen::PKCS_ECDSA_P256_SHA256);
    let leaf = leaf().signed_by(&theirs, &below).unwrap().der().to_vec();
    let refused = pki.roots().check(&pki.ek, Some(&leaf), &[below_der, pki.middle_der.clone()], NOW);
    assert!(matches!(refused, Err(EkError::Usage { .. })), "{refused:?}");
}

#[test]
fn extensions_of_vendors() {
    let pki = Pki::new();
    let with = |id: &[u64], value: &[u8]| {
        let mut params = leaf();
        let mut extension = CustomExtension::from_oid_content(id, value.to_vec());
        extension.set_criticality(true);
        params.custom_extensions.push(extension);
        pki.check(&pki.leaf(&params))
    };
    with(&[2, 5, 29, 9], &[0x30, 0]).unwrap();
    let unknown = with(&[2, 5, 29, 99], &[0x30, 0]).unwrap_err();
    assert!(
        matches!(&unknown, EkError::Form { source: X509Error::Critical(id), .. } if id == "2.5.29.99"),
        "{unknown}"
    );
    // subjectAltName with a directory name of one relative name with manufacturer, model and version.
    let attribute = |last: u8, text: &str| {
        let value = [&[0x0c, text.len() as u8][..], text.as_bytes()].concat();
        let body = [&[0x06, 5, 0x67, 0x81, 0x05, 2, last][..], &value].concat();
        let sequence = [&[0x30, body.len() as u8][..], &body].concat();
        [&[0x31, sequence.len() as u8][..], &sequence].concat()
    };
    let names = [attribute(1, "id:49465800"), attribute(2, "SLB 9670"), attribute(3, "id:0707")].concat();
    let name = [&[0x30, names.len() as u8][..], &names].concat();
    let directory = [&[0xa4, name.len() as u8][..], &name].concat();
    let san = [&[0x30, directory.len() as u8][..], &directory].concat();
    let vouched = with(&[2, 5, 29, 17], &san).unwrap();
    assert_eq!((vouched.model.words().as_str(), vouched.software), ("id:49465800 SLB 9670 id:0707", false));
    let swtpm = [attribute(1, "id:00001014"), attribute(2, "swtpm")].concat();
    let name = [&[0x30, swtpm.len() as u8][..], &swtpm].concat();
    let directory = [&[0xa4, name.len() as u8][..], &name].concat();
    let san = [&[0x30, directory.len() as u8][..], &directory].concat();
    assert!(with(&[2, 5, 29, 17], &san).unwrap().software, "under a device's root, too");
}

#[test]
fn rsa_keys_in_odd_encodings() {
    let private = aws_lc_rs::rsa::PrivateDecryptingKey::generate(KeySize::Rsa2048).unwrap();
    let modulus = testing::rsa_modulus(&private.public_key());
    let ek = StorageKey::parse(&testing::rsa_ek(&modulus)).unwrap();
    let pki = Pki::new();
    let certify = |zero: &[u8]| {
        let number = [&[0x02, 0x82, 1, zero.len() as u8][..], zero, &modulus, &[2, 3, 1, 0, 1]].concat();
        let size = (number.len() as u16).to_be_bytes();
        let key = Theirs([&[0x30, 0x82][..], &size, &number].concat(), &rcgen::PKCS_RSA_SHA256);
        let mut params = leaf();
        params.key_usages = vec![KeyUsagePurpose::KeyEncipherment];
        params.signed_by(&key, &pki.middle).unwrap().der().to_vec()
    };
    let usual = certify(&[0]);
    let check = |leaf: &[u8]| pki.roots().check(&ek, Some(leaf), std::slice::from_ref(&pki.middle_der), NOW);
    check(&usual).unwrap();
    // Without the zero byte in front the modulus is a negative number.
    check(&certify(&[])).unwrap();
    // The kind `id-RSAES-OAEP` instead of `rsaEncryption`: the same key.
    let kind = [0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 1, 1, 1];
    let at = usual.windows(9).position(|window| window == kind).unwrap();
    let mut oaep = usual.clone();
    oaep[at + 8] = 7;
    assert!(Certificate::parse(&oaep).unwrap().is_for(&ek.key));
    oaep[at + 8] = 9;
    assert!(!Certificate::parse(&oaep).unwrap().is_for(&ek.key));
}

#[test]
fn folders_of_roots() {
    let dir = tempfile::tempdir().unwrap();
    let pki = Pki::new();
    let write = |name: &str, bytes: &[u8]| std::fs::write(dir.path().join(name), bytes).unwrap();
    write("root.der", &pki.root_der);
    write("README", b"not one");
    let folder = [dir.path().to_owned()];
    assert_eq!(Roots::load(&folder, &[], &[]).unwrap().len(), 1);
    write("bad.pem", b"not one");
    let e = Roots::load(&folder, &[], &[]).unwrap_err().to_string();
    assert!(e.contains("bad.pem"), "{e}");
    let e = Roots::load(&[dir.path().join("none")], &[], &[]).unwrap_err().to_string();
    assert!(e.contains("none"), "{e}");
}

#[test]
fn rubbish_never_panics() {
    let pki = Pki::new();
    let whole = pki.leaf(&leaf());
    for at in 0..whole.len() {
        assert!(Certificate::parse(&whole[..at]).is_err());
        let mut changed = whole.clone();
        for bit in [0, 3, 7] {
            changed[at] = whole[at] ^ (1 << bit);
            let _ = pki.check(&changed).map(|_| panic!("a changed certificate is believed"));
        }
    }
    assert!(Certificate::parse(&[whole, vec![0]].concat()).is_err());
}
