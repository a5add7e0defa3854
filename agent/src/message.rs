//! How the agent's messages to users begin.

use std::fmt::Display;

/// The message, with the name of this component before it. A user sees messages of the local proxy, the
/// relay, the agent and the API server in the same place.
pub(crate) fn from_agent(message: impl Display) -> String {
    format!("throwline agent: {message}")
}
