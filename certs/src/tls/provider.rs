//! The cryptography of all TLS of ours.

use rustls::{
    NamedGroup, SupportedCipherSuite,
    crypto::{CryptoProvider, aws_lc_rs, ring},
};
use std::sync::{Arc, OnceLock};

/// aws-lc-rs with X25519MLKEM768 and AES-128-GCM first.
///
/// The key exchange is post-quantum wherever the other end can do it: traffic recorded today cannot
/// be opened by a quantum computer later. The client sends a plain X25519 share beside the hybrid
/// one (draft-ietf-tls-ecdhe-mlkem, section 4.1), so that an end without ML-KEM costs no additional
/// round trip. AES-128-GCM is the fastest cipher where there is AES in hardware, and 128 bits are
/// plenty. On a processor that does two blocks of AES at once but not four, ring's AES-GCM, which
/// has code for it: twice as fast there.
pub fn provider() -> Arc<CryptoProvider> {
    static PROVIDER: OnceLock<Arc<CryptoProvider>> = OnceLock::new();
    let provider = PROVIDER.get_or_init(|| Arc::new(chosen(has_two_blocks_at_most())));
    Arc::clone(provider)
}

/// Makes [`provider`] what libraries take that ask for the process' default, as kube and sqlx do:
/// with two in the build rustls picks none by itself, and panics. A second call changes nothing.
pub fn provide_to_libraries() {
    let _ = Arc::unwrap_or_clone(provider()).install_default();
}

pub(super) fn chosen(is_aes_of_ring: bool) -> CryptoProvider {
    let mut provider = aws_lc_rs::default_provider();
    // By default rustls offers it last and without a share, so that no peer ever chooses it.
    provider
        .kx_groups
        .sort_by_key(|group| group.name() != NamedGroup::X25519MLKEM768);
    if is_aes_of_ring {
        for suite in &mut provider.cipher_suites {
            *suite = from_ring(*suite);
        }
    }
    provider
        .cipher_suites
        .sort_by_key(|suite| suite.suite() != rustls::CipherSuite::TLS13_AES_128_GCM_SHA256);
    provider
}

/// aws-lc has vector AES for AVX-512 only, which AMD's processors before Zen 4 and Intel's small
/// ones do not have.
fn has_two_blocks_at_most() -> bool {
    #[cfg(target_arch = "x86_64")]
    return is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("vaes")
        && is_x86_feature_detected!("vpclmulqdq")
        && !is_x86_feature_detected!("avx512f");
    #[cfg(not(target_arch = "x86_64"))]
    return false;
}

fn from_ring(suite: SupportedCipherSuite) -> SupportedCipherSuite {
    use rustls::CipherSuite::{TLS13_AES_128_GCM_SHA256, TLS13_AES_256_GCM_SHA384};
    match suite.suite() {
        TLS13_AES_128_GCM_SHA256 => ring::cipher_suite::TLS13_AES_128_GCM_SHA256,
        TLS13_AES_256_GCM_SHA384 => ring::cipher_suite::TLS13_AES_256_GCM_SHA384,
        _ => suite,
    }
}
