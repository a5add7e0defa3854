//! Stories of the relay, with real carriers over loopback.

#![expect(
    clippy::unwrap_used,
    reason = "a helper's surprise is a test's failure"
)]

mod baseline;
mod enrolment;
mod flood;
mod handshake;
mod harness;
mod lifetime;
mod limits;
mod origin;
mod peers;
mod raw;
mod renewals;
mod revocation;
mod routing;
