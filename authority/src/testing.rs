//! What tests need.

use throwline_certs::enrol::Asker;

use crate::Subject;

/// The redeemer of a token for `subject`; each name is a separate cluster.
pub(crate) fn asker(subject: &Subject) -> Asker {
    match subject {
        Subject::Cluster(name) => Asker::Cluster {
            uid: format!("uid-of-{name}"),
        },
        Subject::User { .. } => Asker::User,
    }
}
