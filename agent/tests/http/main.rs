//! The agent's HTTP, told as stories: a user on one end of a pipe, an API server with TLS on the
//! other side of the agent.

mod answers;
mod requests;
mod support;
mod upgrades;
