use super::*;
use crate::{CheckError, ExpectedPeer, Kind, TrustDomain, testing::World};
use proptest::prelude::*;
use std::time::{SystemTime, UNIX_EPOCH};

async fn signed(world: &World, list: &Revocations) -> SignedRevocations {
    world.authority.sign_revocations(list)
}

#[tokio::test]
async fn a_list_is_read_only_with_the_authoritys_signature() {
    let (world, other) = (World::new().await, World::new().await);
    let list = Revocations::new(7)
        .identity(Kind::User, "dana", 1_000)
        .identity(Kind::Cluster, "prod", 2_000)
        .serial("0a1b");
    let good = signed(&world, &list).await;
    assert_eq!(good.verify(world.authority.roots()), Ok(list));
    assert_eq!(
        good.verify(other.authority.roots()),
        Err(ListError::BadSignature)
    );
    for at in 0..good.list.len() {
        let mut changed = good.clone();
        changed.list[at] ^= 1;
        let result = changed.verify(world.authority.roots());
        assert_eq!(result, Err(ListError::BadSignature), "{at}");
    }
    let huge = SignedRevocations {
        list: vec![b' '; MAX_LIST + 1],
        ..good.clone()
    };
    assert_eq!(huge.verify(world.authority.roots()), Err(ListError::TooBig));

    let dir = tempfile::tempdir().unwrap();
    assert_eq!(SignedRevocations::load(dir.path()).unwrap(), None);
    good.save(dir.path()).unwrap();
    assert_eq!(SignedRevocations::load(dir.path()).unwrap(), Some(good));
}

#[tokio::test]
async fn an_identity_is_revoked_up_to_a_time_and_its_later_certificates_count() {
    let world = World::new().await;
    let dana = world.user("dana").await;
    let validator = Validator::new(
        world.authority.roots().clone(),
        world.authority.trust_domain().clone(),
    );
    let begins = dana.as_peer().not_before.duration_since(UNIX_EPOCH);
    let begins = begins.unwrap().as_secs();
    let check = || validator.check(dana.chain(), ExpectedPeer::SESSION_USER, SystemTime::now());
    assert!(validator.replace_revocations(Revocations::new(1).identity(
        Kind::User,
        "dana",
        begins - 1
    )));
    assert!(check().is_ok());
    assert!(validator.replace_revocations(Revocations::new(2).identity(
        Kind::User,
        "dana",
        begins
    )));
    assert!(matches!(check(), Err(CheckError::Revoked { .. })));
    // Another identity of the same name is another.
    assert!(validator.replace_revocations(Revocations::new(3).identity(
        Kind::Cluster,
        "dana",
        begins
    )));
    assert!(check().is_ok());
    // Versions never go back, and one does not come twice.
    assert!(!validator.replace_revocations(Revocations::new(3)));
    assert!(!validator.replace_revocations(Revocations::new(2)));
    assert_eq!(validator.revocations().version(), 3);
}

#[tokio::test]
async fn of_lists_from_several_relays_the_newest_counts_here_and_after_a_restart() {
    let (world, other) = (World::new().await, World::new().await);
    let list = |version, name: &str| Revocations::new(version).identity(Kind::User, name, 1_000);
    let dir = tempfile::tempdir().unwrap();
    let keeper = || {
        let (roots, domain) = (world.authority.roots(), world.authority.trust_domain());
        let keeper = Keeper::new(Validator::new(roots.clone(), domain.clone()), dir.path());
        keeper.load();
        keeper
    };
    let first = keeper();
    assert_eq!(first.version(), 0);
    let newest = list(7, "dana");
    let taken = first.take(signed(&world, &newest).await).await;
    assert_eq!(taken, Ok(7));
    // Withheld for long, or recorded long ago; and one of another authority.
    let taken = first.take(signed(&world, &list(6, "kim")).await).await;
    assert_eq!(taken, Ok(6));
    let foreign = first.take(signed(&other, &list(8, "kim")).await).await;
    assert_eq!(foreign, Err(ListError::BadSignature));
    assert_eq!(*first.validator().revocations(), newest);
    assert_eq!(*keeper().validator().revocations(), newest);

    // The largest that the authority makes is there after a restart, too.
    let mut large = Revocations::new(9);
    for serial in 0..50_000_u64 {
        large = large.serial(&format!("{serial:032x}"));
    }
    let taken = first.take(signed(&world, &large).await).await;
    assert_eq!(taken, Ok(9));
    assert_eq!(*keeper().validator().revocations(), large);
}

#[test]
fn a_serial_is_read_as_people_write_it() {
    assert_eq!(parse_serial("0A:1b").unwrap(), "0a1b");
    for bad in ["", "xyz", "0a 1b", "prod"] {
        assert!(parse_serial(bad).is_err(), "{bad}");
    }
}

proptest! {
    #[test]
    fn nothing_panics(bytes in any::<Vec<u8>>(), text in "\\PC*") {
        let domain: TrustDomain = "d".parse().unwrap();
        let _ = read(&bytes, &domain);
        let _ = read(text.as_bytes(), &domain);
        let _ = SignedRevocations::from_text(&text);
        let _ = parse_serial(&text);
    }
}
