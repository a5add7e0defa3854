//! A dialer that is at a relay already wants another one.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use support::{dial_config, gone, pipe};
use throwline_tunnel::carrier::{self, AcceptConfig, AcceptError, Connection, DialError};

const AT: [&str; 2] = ["relay-1", "relay-2"];

/// A dial by a dialer with carriers to the relays of [`AT`], to a relay that sends this about itself.
async fn dial(
    instance: &str,
    relays: u32,
) -> (
    Result<Connection, DialError>,
    Result<Connection, AcceptError>,
) {
    let (near, far) = pipe(64 * 1024);
    let mut dialling = dial_config("http://localhost");
    dialling.avoid = AT.map(str::to_owned).to_vec();
    let accepting = AcceptConfig {
        relays,
        ..AcceptConfig::new(instance)
    };
    let (dialed, accepted) = tokio::join!(
        carrier::dial_over(near, &dialling),
        carrier::accept(far, accepting, |_, _| Ok(()))
    );
    (dialed, accepted.map(|(connection, _)| connection))
}

#[tokio::test]
async fn a_relay_that_is_held_is_declined_before_anything_is_proved() {
    // A set of three has another one; a relay that does not say may have.
    for relays in [3, 0] {
        let (dialed, accepted) = dial("relay-2", relays).await;
        let error = dialed.unwrap_err();
        assert!(
            matches!(&error, DialError::Unwanted(name) if name == "relay-2"),
            "{error}"
        );
        assert!(error.is_transient());
        let error = accepted.unwrap_err();
        assert!(matches!(error, AcceptError::Declined), "{error}");
    }
}

#[tokio::test]
async fn one_that_is_not_held_is_taken_and_says_its_name() {
    let (dialed, accepted) = dial("relay-3", 3).await;
    let dialed = dialed.unwrap();
    assert_eq!(
        (dialed.relay.instance.as_str(), dialed.relay.relays),
        ("relay-3", 3)
    );
    gone(dialed, accepted.unwrap()).await;
}

#[tokio::test]
async fn where_there_is_no_other_the_same_is_taken() {
    let (dialed, accepted) = dial("relay-1", 2).await;
    gone(dialed.unwrap(), accepted.unwrap()).await;
}

#[tokio::test]
async fn what_is_no_name_is_none() {
    let crafted = ["relay\u{1b}[31m".to_owned(), "x".repeat(64)];
    for crafted in crafted {
        let (dialed, accepted) = dial(&crafted, 3).await;
        let dialed = dialed.unwrap();
        assert_eq!(dialed.relay.instance, "");
        gone(dialed, accepted.unwrap()).await;
    }
}
