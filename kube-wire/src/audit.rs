//! Events of `audit.k8s.io/v1`, so that whatever reads a cluster's own audit reads ours too.

mod attributes;
mod event;

pub use attributes::AuditAttributes;
pub use event::{
    AuditUser, Empty, Event, ResponseStatus, Stage, request_uri, timestamp, user_agent,
};
