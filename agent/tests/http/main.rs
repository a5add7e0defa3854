//! The agent's HTTP, told as stories: a user on one end of a pipe, an API server with TLS on the
//! other side of the agent.

#![expect(
    clippy::unwrap_used,
    reason = "a test fails by panicking, its helpers too"
)]

mod answers;
mod requests;
mod support;
mod upgrades;
