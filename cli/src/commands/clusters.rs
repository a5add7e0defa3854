//! `throwline clusters`.

use std::time::SystemTime;

use serde::Serialize;
use throwline_local_proxy::Store;
use throwline_tunnel::proto::messages::{ClusterInfo, Impersonation};

use crate::args::{self, Output};
use crate::commands::common::{outbound, state_dir};
use crate::output;

/// A cluster in the output of `-o json`. Scripts rely on these names.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Entry {
    name: String,
    connected: bool,
    /// RFC 3339; since when it is connected or not. Absent if it never was.
    since: Option<String>,
    kubernetes_version: String,
    agent_version: String,
    /// Between relay and agent; absent unless connected and measured.
    round_trip_micros: Option<u64>,
    /// Agents' connections to the relay.
    carriers: u32,
    /// constrained, legacy, both, unsupported or none; empty where it is not known.
    impersonation: &'static str,
    /// What is wrong, or what the ceiling leaves out, in words; empty if nothing is.
    message: String,
}

pub(super) async fn run(args: args::Clusters) -> anyhow::Result<()> {
    let store = Store::new(state_dir(args.state.state_dir)?);
    let outbound = outbound(args.outbound)?;
    let clusters = throwline_local_proxy::clusters(&store, &outbound).await?;
    match args.output {
        Output::Json => {
            let entries: Vec<Entry> = clusters.into_iter().map(Entry::from).collect();
            println!("{}", output::json(&entries)?);
        }
        Output::Table if clusters.is_empty() => {
            println!(
                "No cluster is enrolled yet. Beside the relay: throwline token create --cluster NAME"
            );
        }
        Output::Table => {
            let now = SystemTime::now();
            let rows: Vec<Vec<String>> = clusters.iter().map(|cluster| row(cluster, now)).collect();
            let headers = [
                "NAME",
                "STATE",
                "SINCE",
                "KUBERNETES",
                "AGENT",
                "ROUND TRIP",
                "IMPERSONATION",
                "MESSAGE",
            ];
            print!("{}", output::table(&headers, &rows));
        }
    }
    Ok(())
}

fn row(cluster: &ClusterInfo, now: SystemTime) -> Vec<String> {
    let state = match (cluster.connected, cluster.since_unix_ms) {
        (true, _) => "connected",
        (false, 0) => "never connected",
        (false, _) => "offline",
    };
    let since = match cluster.since_unix_ms {
        0 => String::new(),
        since => output::since(since, now)
            .map(output::age)
            .unwrap_or_default(),
    };
    vec![
        cluster.name.clone(),
        state.to_owned(),
        since,
        cluster.kubernetes_version.clone(),
        cluster.agent_version.clone(),
        if cluster.connected {
            output::round_trip(cluster.round_trip_us)
        } else {
            String::new()
        },
        impersonation(cluster).to_owned(),
        cluster.message.clone(),
    ]
}

/// How the cluster's agent may act for users; empty for what this version does not know.
fn impersonation(cluster: &ClusterInfo) -> &'static str {
    Impersonation::try_from(cluster.impersonation).map_or("", Impersonation::as_str)
}

impl From<ClusterInfo> for Entry {
    fn from(cluster: ClusterInfo) -> Self {
        let measured = cluster.connected && cluster.round_trip_us > 0;
        Self {
            since: output::rfc3339(cluster.since_unix_ms),
            round_trip_micros: measured.then_some(cluster.round_trip_us),
            impersonation: impersonation(&cluster),
            name: cluster.name,
            connected: cluster.connected,
            kubernetes_version: cluster.kubernetes_version,
            agent_version: cluster.agent_version,
            carriers: cluster.carriers,
            message: cluster.message,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_cluster_that_never_connected_says_so() {
        let cluster = ClusterInfo {
            name: "a".into(),
            ..ClusterInfo::default()
        };
        assert_eq!(
            row(&cluster, SystemTime::now())[1..3],
            ["never connected", ""]
        );
        assert_eq!(Entry::from(cluster).since, None);
    }

    #[test]
    fn what_an_agent_and_a_relay_say_cannot_steer_the_terminal() {
        let hostile = "v1\u{1b}[2J\u{1b}]52;c;eA==\u{7}\nprod   connected\u{202e}\u{9b}31m";
        let cluster = ClusterInfo {
            name: hostile.into(),
            kubernetes_version: hostile.into(),
            agent_version: hostile.into(),
            message: hostile.into(),
            ..ClusterInfo::default()
        };
        let rows = [row(&cluster, SystemTime::now())];
        let table = output::table(&["NAME", "STATE", "SINCE", "K", "A", "R", "M"], &rows);
        let json = output::json(&[Entry::from(cluster)]).unwrap();
        assert_eq!(table.lines().count(), 2, "{table}");
        for text in [table, json] {
            let text = text.replace('\n', "");
            let steers = |c: char| c.is_control() || c == '\u{202e}';
            assert!(!text.contains(steers), "{text:?}");
        }
    }

    #[test]
    fn an_offline_cluster_says_since_when_and_no_round_trip() {
        let mut cluster = ClusterInfo {
            name: "a".into(),
            since_unix_ms: 10_000,
            round_trip_us: 7,
            ..ClusterInfo::default()
        };
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(40);
        assert_eq!(row(&cluster, now)[1..6], ["offline", "30s", "", "", ""]);
        cluster.impersonation = Impersonation::Both.into();
        assert_eq!(row(&cluster, now)[6], "both");
        cluster.impersonation = 77;
        assert_eq!(row(&cluster, now)[6], "", "from the future");
        assert_eq!(
            Entry::from(cluster).since.as_deref(),
            Some("1970-01-01T00:00:10Z")
        );
    }
}
