//! The wire formats of Kubernetes and its clients, and nothing of Throwline's own.
//!
//! A leaf: no crate of ours is imported here, so that the agent, the local proxy, the policy and the
//! demo cluster read the same bytes in the same way.

#![warn(missing_docs)]
#![warn(clippy::mod_module_files)]

pub mod audit;
pub mod discovery;
pub mod headers;
pub mod http1;
pub mod http2;
pub mod path;
pub mod percent;
pub mod request_info;
pub mod status;
pub mod stream;

pub use request_info::{ObjectRef, RequestInfo, RequestInfoError};
pub use status::Status;
