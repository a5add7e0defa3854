//! Decisions on requests, without I/O and without a clock: what is not passed in does not count.
//!
//! - [`decide`]: whether a subject may make a request, until when, and under which obligations.
//! - [`rules`]: what of a request's head may reach the API server, and as whom.
//! - [`system_names`]: the names reserved by Kubernetes, which users may not have.
//!
//! The relay calls it for each line, the agent for each request. Both deny what they cannot enforce:
//! see [`Decision::enforced_by`].

#![warn(missing_docs)]
#![warn(clippy::mod_module_files)]

mod decide;
mod decision;
pub mod rules;
pub mod system_names;

pub use decide::{Access, PolicySet, Request, Subject, decide};
pub use decision::{Decision, Denial, DenyCode, Obligation, Permit};
pub use system_names::{ReservedName, SystemNames};
