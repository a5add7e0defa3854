//! Which of two servers reads a request in the end: rules about headers differ.

/// The final reader of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reader {
    ApiServer,
    /// What is behind the `proxy` subresource. The API server passes its headers and its part of the
    /// path on as they are.
    Workload,
}
