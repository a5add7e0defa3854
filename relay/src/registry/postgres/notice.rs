//! Notices of relays to each other, through the database. Any role of the database can write one: it is
//! checked, an impossible one is dropped, and a valid one only names the rows to read. The tables
//! decide, and only the relays' role may write to them.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

/// The channel of LISTEN and NOTIFY.
pub(super) const CHANNEL: &str = "throwline_registry";
/// PostgreSQL's own limit is 8,000.
const MOST_BYTES: usize = 4_096;
/// An agent's name for its process is a UUID; this leaves room for others.
const MOST_INSTANCE: usize = 128;
const MOST_ADDRESS: usize = 300;

/// Microseconds since 1970 at which a relay's process began: with its instance, its identity.
pub(super) type Epoch = i64;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub(super) enum Notice {
    /// A relay has registered; its tunnels are in the table.
    Relay {
        relay: String,
        epoch: Epoch,
    },
    /// It has left, or was found dead.
    Gone {
        relay: String,
        epoch: Epoch,
    },
    Draining {
        relay: String,
        epoch: Epoch,
    },
    Up {
        relay: String,
        epoch: Epoch,
        #[serde(flatten)]
        row: Row,
    },
    Down {
        relay: String,
        epoch: Epoch,
        carrier: i64,
    },
}

/// One tunnel, as the table has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Row {
    /// Never used twice by one process.
    pub(super) carrier: i64,
    pub(super) cluster: String,
    pub(super) agent_instance: String,
    /// Milliseconds since 1970.
    pub(super) since: i64,
    /// The serial of the agent's certificate; empty if its relay does not state it.
    #[serde(default)]
    pub(super) certificate: String,
    /// Whether the agent has dialled the carrier for bulk.
    #[serde(default)]
    pub(super) bulk: bool,
}

impl Notice {
    pub(super) fn decode(text: &str) -> Option<Self> {
        if text.len() > MOST_BYTES {
            return None;
        }
        let notice: Self = serde_json::from_str(text).ok()?;
        let sound = is_instance(notice.relay().0)
            && match &notice {
                Self::Up { row, .. } => row.is_sound(),
                _ => true,
            };
        sound.then_some(notice)
    }

    pub(super) fn encode(&self) -> String {
        // Strings and numbers only: this cannot fail, and an empty notice is not heard.
        serde_json::to_string(self).unwrap_or_default()
    }

    pub(super) fn relay(&self) -> (&str, Epoch) {
        match self {
            Self::Relay { relay, epoch }
            | Self::Gone { relay, epoch }
            | Self::Draining { relay, epoch }
            | Self::Up { relay, epoch, .. }
            | Self::Down { relay, epoch, .. } => (relay, *epoch),
        }
    }
}

/// What several notices say together: what of the tables is to be read.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Heard {
    /// The heartbeats: a relay came, went or drains.
    pub(super) round: bool,
    /// All tunnels of relays that have registered.
    pub(super) registered: BTreeSet<(String, Epoch)>,
    /// Single tunnels, by relay and carrier.
    pub(super) tunnels: BTreeSet<(String, Epoch, i64)>,
}

impl Heard {
    /// Adds a notice, if it is one, and not of this relay itself.
    pub(super) fn add(&mut self, text: &str, own: &str) {
        let notice = match Notice::decode(text) {
            Some(notice) if notice.relay().0 != own => notice,
            Some(_) => return,
            None => {
                tracing::debug!("ignored a notice that is not one");
                return;
            }
        };
        match notice {
            Notice::Relay { relay, epoch } => {
                self.round = true;
                self.registered.insert((relay, epoch));
            }
            Notice::Gone { .. } | Notice::Draining { .. } => self.round = true,
            Notice::Up { relay, epoch, row } => {
                self.tunnels.insert((relay, epoch, row.carrier));
            }
            Notice::Down {
                relay,
                epoch,
                carrier,
            } => {
                self.tunnels.insert((relay, epoch, carrier));
            }
        }
    }
}

impl Row {
    pub(super) fn is_sound(&self) -> bool {
        throwline_certs::spiffe::check_cluster_name(&self.cluster).is_ok()
            && is_agent_instance(&self.agent_instance)
            && is_serial(&self.certificate)
            && self.since >= 0
    }
}

pub(super) fn is_instance(text: &str) -> bool {
    throwline_certs::spiffe::check_relay_instance(text).is_ok()
}

/// An agent chooses this itself; a NUL in it would be refused by the database each time.
pub(super) fn is_agent_instance(text: &str) -> bool {
    text.len() <= MOST_INSTANCE && !text.chars().any(char::is_control)
}

/// RFC 5280: 20 bytes at most; here in hexadecimal.
fn is_serial(text: &str) -> bool {
    text.len() <= 42 && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// `HOST:PORT`.
pub(super) fn is_address(text: &str) -> bool {
    let Some((host, port)) = text.rsplit_once(':') else {
        return false;
    };
    text.len() <= MOST_ADDRESS
        && !host.is_empty()
        && host
            .bytes()
            .all(|byte| byte.is_ascii_graphic() && byte != b'/' && byte != b'@')
        && port.parse::<u16>().is_ok_and(|port| port > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn up() -> Notice {
        Notice::Up {
            relay: "relay-a".into(),
            epoch: 7,
            row: Row {
                carrier: 1,
                cluster: "prod".into(),
                agent_instance: "x".into(),
                since: 5,
                certificate: "4f".into(),
                bulk: false,
            },
        }
    }

    #[test]
    fn what_is_told_is_understood() {
        let gone = Notice::Gone {
            relay: "relay-a".into(),
            epoch: 7,
        };
        for notice in [up(), gone] {
            assert_eq!(Notice::decode(&notice.encode()), Some(notice));
        }
    }

    #[test]
    fn notices_say_where_to_look() {
        let mut heard = Heard::default();
        for _ in 0..2 {
            heard.add(&up().encode(), "relay-b");
        }
        heard.add(&up().encode(), "relay-a");
        let tunnels = BTreeSet::from([("relay-a".to_owned(), 7, 1)]);
        assert_eq!((heard.round, &heard.tunnels), (false, &tunnels));
        let gone = Notice::Gone {
            relay: "relay-a".into(),
            epoch: 7,
        };
        heard.add(&gone.encode(), "relay-b");
        assert!(heard.round && heard.registered.is_empty());
    }

    #[test]
    fn nonsense_is_not_heard() {
        let good = up().encode();
        for bad in [
            String::new(),
            "null".into(),
            "{}".into(),
            good[..good.len() - 1].to_owned(),
            good.replace("prod", "PROD"),
            good.replace("relay-a", "../a"),
            good.replace("\"since\":5", "\"since\":-5"),
            good.replace("\"x\"", "\"\\u0000\""),
            good.replace("\"x\"", &format!("\"{}\"", "x".repeat(5_000))),
            good.replace("\"epoch\":7", "\"epoch\":7e99"),
            good.replace("\"up\"", "\"later\""),
        ] {
            assert_eq!(Notice::decode(&bad), None, "{bad}");
        }
    }

    #[test]
    fn an_address_has_a_host_and_a_port() {
        for good in ["10.0.0.1:8444", "[::1]:8444", "relay-1.relays:8444"] {
            assert!(is_address(good), "{good}");
        }
        for bad in [
            "",
            "a",
            ":1",
            "a:0",
            "a:65536",
            "a b:1",
            "http://a:1",
            "u@a:1",
            "a\n:1",
        ] {
            assert!(!is_address(bad), "{bad}");
        }
    }
}
