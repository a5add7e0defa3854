//! One request: its cluster, its way to the agent and back, and its errors.

pub(crate) mod body;
pub(crate) mod goaway;
mod plain;
pub(crate) mod proxy;
mod retry;
pub(crate) mod route;
mod serve;
pub(crate) mod stream_error;
mod upgrade;
