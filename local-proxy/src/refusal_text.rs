//! The texts of refusals by the relay and the agent, and of lines that ended.

use std::time::{Duration, SystemTime};

use throwline_ops::time::rfc3339;
use throwline_tunnel::line::LineError;
use throwline_tunnel::proto::line::ResetCode;
use throwline_tunnel::proto::messages::{Refusal, RefusalCode};
use throwline_tunnel::proto::origin;

use crate::text::one_line;

/// Names the cluster, its state and the remedy. A relay's own text, which begins with
/// [`origin::RELAY`], takes the place of ours where it has all of that.
pub(crate) fn refusal_message(cluster: &str, refusal: &Refusal, now: SystemTime) -> String {
    let code = refusal.code();
    let text = match code {
        RefusalCode::UnknownCluster => format!(
            "there is no cluster {cluster} at this relay; 'throwline clusters' shows those you can reach"
        ),
        RefusalCode::NeverConnected => format!(
            "cluster {cluster} is known, but its agent has never connected; start 'throwline agent' in it"
        ),
        RefusalCode::Offline => match since(refusal, now) {
            Some(since) => {
                format!("cluster {cluster} is offline since {since}: its agent is not connected")
            }
            None => format!("cluster {cluster} is offline: its agent is not connected"),
        },
        RefusalCode::InstanceGone => format!(
            "the agent of cluster {cluster} was restarted or replaced, and what ran through the old one has ended; run the command again"
        ),
        RefusalCode::NotAllowed => {
            format!("you may not reach cluster {cluster}; ask an administrator for access")
        }
        RefusalCode::Revoked => format!(
            "cluster {cluster} was revoked; its agent must be enrolled again with a new token"
        ),
        RefusalCode::Limit => format!("a limit was reached on the way to cluster {cluster}"),
        RefusalCode::Draining => {
            format!("the relay is restarting; try cluster {cluster} again in a moment")
        }
        RefusalCode::Version | RefusalCode::Unsupported => {
            format!(
                "this throwline and the one at cluster {cluster} or its relay do not understand each other; update the older"
            )
        }
        RefusalCode::Timeout => format!("the agent of cluster {cluster} did not answer in time"),
        RefusalCode::Unauthenticated => {
            "the relay no longer accepts your identity; run 'throwline login' with a new token"
                .to_owned()
        }
        RefusalCode::BadRequest => format!("the request for cluster {cluster} was not understood"),
        RefusalCode::Internal | RefusalCode::Unspecified => {
            format!(
                "cluster {cluster} cannot be reached because of a fault at the relay or the agent"
            )
        }
    };
    // The peer's message is shown only where it is more specific than the code.
    let adds = matches!(
        code,
        RefusalCode::NotAllowed
            | RefusalCode::Limit
            | RefusalCode::Version
            | RefusalCode::Unsupported
            | RefusalCode::BadRequest
            | RefusalCode::Internal
            | RefusalCode::Unspecified
    );
    if !adds || refusal.message.is_empty() {
        return text;
    }
    let message = one_line(&refusal.message);
    let is_complete = matches!(
        code,
        RefusalCode::NotAllowed | RefusalCode::Limit | RefusalCode::Internal
    );
    if is_complete && message.starts_with(origin::RELAY) {
        return message;
    }
    format!("{text} ({})", origin::without(&message))
}

/// Why what ran over a line has ended with it, and the remedy.
pub(crate) fn line_end_message(cluster: &str, error: &LineError) -> String {
    let why = match error {
        LineError::Expired { after, why } => {
            return format!(
                "the connection to cluster {cluster} was lost for longer than {} s (--detached-life) and was given up; run the command again ({why})",
                after.as_secs()
            );
        }
        LineError::Gone(why) => why.clone(),
        LineError::Reset { code, .. } => match code {
            ResetCode::Stopped => {
                "its agent was stopped, as by a restart or an update; run the command again"
            }
            ResetCode::Expired => {
                "your certificate has expired and was not renewed; run 'throwline login' with a new token"
            }
            _ => "its agent, or the API server behind it, broke it off; run the command again",
        }
        .to_owned(),
        other => format!("{other}; run the command again"),
    };
    format!("the connection to cluster {cluster} has ended: {why}")
}

fn since(refusal: &Refusal, now: SystemTime) -> Option<String> {
    let since = Duration::from_millis(refusal.since_unix_ms);
    if since.is_zero() {
        return None;
    }
    let at = SystemTime::UNIX_EPOCH.checked_add(since)?;
    // The relay's clock may be ahead of ours: then no age is shown.
    let age = now.duration_since(at).ok()?.as_secs();
    let age = match age {
        0..60 => format!("{age} s"),
        60..3600 => format!("{} min", age / 60),
        3600..172_800 => format!("{} h", age / 3600),
        _ => format!("{} days", age / 86_400),
    };
    Some(format!("{} ({age} ago)", rfc3339(at)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_relays_text_takes_the_place_of_ours_where_it_is_complete() {
        let shown = |code, message: &str| {
            refusal_message("prod", &Refusal::new(code, message), SystemTime::now())
        };
        let relays = "throwline relay: this relay is full";
        assert_eq!(shown(RefusalCode::Limit, relays), relays);
        assert_eq!(
            shown(RefusalCode::Limit, "throwline agent: it is full"),
            "a limit was reached on the way to cluster prod (it is full)"
        );
        assert_eq!(
            shown(RefusalCode::BadRequest, relays),
            "the request for cluster prod was not understood (this relay is full)"
        );
    }

    #[test]
    fn offline_says_since_when_and_for_how_long() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000);
        let refusal = Refusal {
            code: RefusalCode::Offline.into(),
            message: String::new(),
            retry_after_ms: 0,
            since_unix_ms: 1_799_992_800_000,
        };
        assert_eq!(
            refusal_message("prod-eu", &refusal, now),
            "cluster prod-eu is offline since 2027-01-15T06:00:00Z (2 h ago): its agent is not connected"
        );
        let unknown = Refusal {
            since_unix_ms: 0,
            ..refusal.clone()
        };
        assert_eq!(
            refusal_message("prod-eu", &unknown, now),
            "cluster prod-eu is offline: its agent is not connected"
        );
        let absurd = Refusal {
            since_unix_ms: u64::MAX,
            ..refusal
        };
        assert!(!refusal_message("prod-eu", &absurd, now).contains("since"));
    }
}
