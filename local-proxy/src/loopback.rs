//! The loopback listener: its certificates, its connections, and the rejections that need no cluster.

mod rejection;
pub(crate) mod server;
pub(crate) mod tls;
