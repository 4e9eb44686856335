//! The templates of our two keys. Both are primary keys: seed and template determine the key.

use tss_esapi::{
    abstraction::{AsymmetricAlgorithmSelection, DefaultKey, ek},
    attributes::ObjectAttributesBuilder,
    interface_types::{
        algorithm::{HashingAlgorithm, PublicAlgorithm},
        ecc::EccCurve,
    },
    structures::{
        EccPoint, EccScheme, HashScheme, KeyDerivationFunctionScheme, PublicBuilder, PublicEccParametersBuilder,
        SymmetricDefinitionObject,
    },
    tss2_esys::TPM2B_PUBLIC,
};

/// The endorsement key for P-256 with the low-range template L-2 (TCG EK Credential Profile 2.5, B.3.4).
pub(super) fn endorsement_key() -> tss_esapi::Result<TPM2B_PUBLIC> {
    let algorithm = AsymmetricAlgorithmSelection::Ecc(EccCurve::NistP256);
    ek::create_ek_public_from_default_template_2(algorithm, DefaultKey)?.try_into()
}

/// The attestation key: P-256, restricted to signing what the TPM itself made, ECDSA with SHA-256.
///
/// `noDA`: its empty password needs no protection against guessing, and without the flag a lock-out that another
/// program caused would stop quotes. Changing anything here changes every host's key.
pub(super) fn attestation_key() -> tss_esapi::Result<TPM2B_PUBLIC> {
    let attributes = ObjectAttributesBuilder::new()
        .with_fixed_tpm(true)
        .with_fixed_parent(true)
        .with_sensitive_data_origin(true)
        .with_user_with_auth(true)
        .with_no_da(true)
        .with_restricted(true)
        .with_sign_encrypt(true)
        .build()?;
    let parameters = PublicEccParametersBuilder::new()
        .with_symmetric(SymmetricDefinitionObject::Null)
        .with_ecc_scheme(EccScheme::EcDsa(HashScheme::new(HashingAlgorithm::Sha256)))
        .with_curve(EccCurve::NistP256)
        .with_key_derivation_function_scheme(KeyDerivationFunctionScheme::Null)
        .with_is_signing_key(true)
        .with_is_decryption_key(false)
        .with_restricted(true)
        .build()?;
    PublicBuilder::new()
        .with_public_algorithm(PublicAlgorithm::Ecc)
        .with_name_hashing_algorithm(HashingAlgorithm::Sha256)
        .with_object_attributes(attributes)
        .with_ecc_parameters(parameters)
        .with_ecc_unique_identifier(EccPoint::default())
        .build()?
        .try_into()
}
