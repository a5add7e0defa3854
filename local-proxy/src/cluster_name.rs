//! Names of clusters, and the TLS server names made from them.

use throwline_certs::spiffe::check_cluster_name;

/// The TLS server names that our kubeconfig entries ask for are `NAME` with this behind it. Some
/// requests of kubectl (`get --raw`) leave out the path of the kubeconfig's server, but every
/// connection has a server name. `.internal` is reserved for private use.
pub(crate) const SERVER_NAME_SUFFIX: &str = ".throwline.internal";

/// The cluster that a TLS server name stands for.
pub(crate) fn from_server_name(server_name: &str) -> Option<&str> {
    server_name
        .strip_suffix(SERVER_NAME_SUFFIX)
        .filter(|name| is_cluster_name(name))
}

/// Whether a cluster can have this name.
pub(crate) fn is_cluster_name(name: &str) -> bool {
    check_cluster_name(name).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_our_server_names_stand_for_a_cluster() {
        assert_eq!(
            from_server_name("prod-eu.throwline.internal"),
            Some("prod-eu")
        );
        for name in [
            "localhost",
            ".throwline.internal",
            "a.b.throwline.internal",
            "A.throwline.internal",
        ] {
            assert_eq!(from_server_name(name), None, "{name}");
        }
    }
}
