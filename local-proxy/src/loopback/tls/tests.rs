use std::fs;
use std::os::unix::fs::PermissionsExt as _;

use rustls::NamedGroup;

use super::*;

fn store() -> (tempfile::TempDir, Store) {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::new(dir.path().join("state"));
    (dir, store)
}

fn read(store: &Store, name: &str) -> String {
    store.read(name).unwrap().unwrap()
}

#[test]
fn everything_is_made_once_and_private() {
    let (_dir, store) = store();
    LoopbackTls::open(&store).unwrap();
    let before: Vec<_> = [CA, CA_KEY, CLIENT, CLIENT_KEY]
        .map(|n| read(&store, n))
        .into();
    for entry in fs::read_dir(store.dir()).unwrap() {
        let entry = entry.unwrap();
        let mode = entry.metadata().unwrap().permissions().mode() & 0o077;
        assert_eq!(mode, 0, "{:?}", entry.file_name());
    }
    LoopbackTls::open(&store).unwrap();
    let after: Vec<_> = [CA, CA_KEY, CLIENT, CLIENT_KEY]
        .map(|n| read(&store, n))
        .into();
    assert_eq!(before, after);
}

#[test]
fn what_is_damaged_missing_or_near_its_end_is_made_anew() {
    for (name, content) in [
        (CA, "nonsense"),
        (CA_KEY, ""),
        (CLIENT, "-----BEGIN CERTIFICATE-----\n-----END"),
        (CLIENT_KEY, "x"),
        (LIFE_FILE, "{}"),
        (LIFE_FILE, r#"{"not_after_unix":1}"#),
        (LIFE_FILE, r#"{"not_after_unix":18446744073709551615}"#),
    ] {
        let (_dir, store) = store();
        LoopbackTls::open(&store).unwrap();
        let old = read(&store, CLIENT_KEY);
        store.write(name, content.as_bytes()).unwrap();
        LoopbackTls::open(&store).unwrap();
        assert_ne!(old, read(&store, CLIENT_KEY), "{name} {content:?}");
    }
}

#[test]
fn keys_that_others_could_read_are_made_anew() {
    for name in [CA_KEY, CLIENT_KEY] {
        let (_dir, store) = store();
        LoopbackTls::open(&store).unwrap();
        let old = read(&store, CLIENT_KEY);
        fs::set_permissions(store.path(name), fs::Permissions::from_mode(0o644)).unwrap();
        LoopbackTls::open(&store).unwrap();
        assert_ne!(old, read(&store, CLIENT_KEY), "{name}");
        assert!(store.read_secret(name).unwrap().is_some());
    }
}

#[test]
fn many_that_start_together_agree_on_one_authority() {
    let (_dir, store) = store();
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| LoopbackTls::open(&store).unwrap());
        }
    });
    LoopbackTls::open(&store).unwrap();
}

#[test]
fn an_entry_names_absolute_files() {
    let entry = LoopbackTls::entry(&Store::new("relative"), "prod", 47611);
    assert_eq!(entry.server, "https://127.0.0.1:47611/clusters/prod");
    assert!(entry.client_key.is_absolute() && entry.certificate_authority.is_absolute());
}

/// kubectl offers X25519MLKEM768 first since Go 1.24; an old one still gets in.
#[tokio::test]
async fn the_key_exchange_is_as_good_as_the_client() {
    let (_dir, store) = store();
    let server = LoopbackTls::open(&store).unwrap().tls;
    let versions = rustls::ALL_VERSIONS;
    let without = |provider: &mut rustls::crypto::CryptoProvider| {
        let groups = &mut provider.kx_groups;
        groups.retain(|group| group.name() != NamedGroup::X25519MLKEM768);
    };
    for (is_new, expected) in [
        (true, NamedGroup::X25519MLKEM768),
        (false, NamedGroup::X25519),
    ] {
        let mut provider = Arc::unwrap_or_clone(throwline_certs::tls::provider());
        if !is_new {
            without(&mut provider);
        }
        let client = crate::testing::client_config_by(
            Arc::new(provider),
            &store,
            &store,
            &[b"h2"],
            true,
            versions,
        );
        let (near, far) = tokio::io::duplex(64 * 1024);
        let name = rustls::pki_types::ServerName::try_from("127.0.0.1").unwrap();
        let (near, far) = tokio::join!(
            tokio_rustls::TlsConnector::from(Arc::new(client)).connect(name, near),
            tokio_rustls::TlsAcceptor::from(Arc::clone(&server)).accept(far)
        );
        let (near, far) = (near.unwrap(), far.unwrap());
        for group in [
            near.get_ref().1.negotiated_key_exchange_group(),
            far.get_ref().1.negotiated_key_exchange_group(),
        ] {
            assert_eq!(group.map(|group| group.name()), Some(expected));
        }
    }
}
