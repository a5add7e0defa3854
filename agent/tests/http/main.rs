//! The agent's HTTP, as stories: a user on one end of a pipe, an API server with TLS on the
//! other side of the agent.

#![expect(
    clippy::unwrap_used,
    reason = "a test fails by panicking, its helpers too"
)]

mod answers;
mod compatibility;
mod fair;
mod policy;
mod requests;
mod support;
mod upgrades;
