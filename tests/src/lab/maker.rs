//! A maker of TPMs: a root of its own, and certificates for endorsement keys.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::Result;

use super::command::output;

/// What an endorsement key's certificate says (TCG EK Credential Profile, section 3.2): maker, model and version of the TPM,
/// and what the key is for.
const EXTENSIONS: &str = "basicConstraints = critical,CA:FALSE
keyUsage = critical,USAGE
extendedKeyUsage = 2.23.133.8.1
subjectAltName = critical,dirName:tpm
[tpm]
1.2.23.133.2.1 = id:4F4E4551
1.2.23.133.2.2 = proof
1.2.23.133.2.3 = id:00010002
";

/// One maker.
#[derive(Debug)]
pub struct Maker {
    folder: PathBuf,
}

impl Maker {
    /// Makes its root.
    ///
    /// # Errors
    /// openssl is missing.
    pub fn new(folder: &Path) -> Result<Self> {
        fs::create_dir_all(folder)?;
        let new = ["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "30"];
        let maker = Self { folder: folder.to_owned() };
        maker.openssl(&new, &["-keyout", "key.pem", "-out", "root.pem", "-subj", "/CN=a maker of TPMs"])?;
        Ok(maker)
    }

    /// The file of its root.
    #[must_use]
    pub fn root(&self) -> PathBuf {
        self.folder.join("root.pem")
    }

    /// Certifies an endorsement key, given as `TPM2B_PUBLIC`. Gives the certificate's file, PEM.
    ///
    /// # Errors
    /// openssl or tpm2-tools are missing.
    pub fn certify(&self, public: &[u8], rsa: bool) -> Result<PathBuf> {
        let path = |name: &str| self.folder.join(name);
        fs::write(path("ek.pub"), public)?;
        let mut print = Command::new("tpm2_print");
        print.args(["-t", "TPM2B_PUBLIC", "-f", "pem"]).arg(path("ek.pub"));
        fs::write(path("ek.pem"), output(&mut print)?)?;
        let usage = if rsa { "keyEncipherment" } else { "keyAgreement" };
        fs::write(path("extensions"), EXTENSIONS.replace("USAGE", usage))?;
        // The request's own key is of no consequence.
        let request = ["req", "-new", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"];
        self.openssl(&request, &["-keyout", "other.pem", "-out", "request.pem", "-subj", "/"])?;
        let sign = ["x509", "-req", "-in", "request.pem", "-force_pubkey", "ek.pem", "-CA", "root.pem"];
        let how = ["-CAkey", "key.pem", "-CAcreateserial", "-days", "30", "-extfile", "extensions", "-out", "ek.crt"];
        self.openssl(&sign, &how)?;
        Ok(path("ek.crt"))
    }

    /// As [`Self::certify`], DER.
    ///
    /// # Errors
    /// As [`Self::certify`].
    pub fn certify_der(&self, public: &[u8], rsa: bool) -> Result<Vec<u8>> {
        let pem = self.certify(public, rsa)?;
        self.openssl(&["x509", "-outform", "der"], &["-in", &pem.display().to_string(), "-out", "ek.der"])?;
        Ok(fs::read(self.folder.join("ek.der"))?)
    }

    fn openssl(&self, what: &[&str], how: &[&str]) -> Result<()> {
        let mut command = Command::new("openssl");
        command.args(what).args(how).current_dir(&self.folder);
        output(&mut command).map(|_| ())
    }
}
