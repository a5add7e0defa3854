//! Two processes with one certificate: a state directory was copied, or a key was stolen.

use std::time::{Duration, SystemTime};

use super::route::Route;

/// An agent's carrier, as far as this matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Seen<'a> {
    instance: &'a str,
    certificate: &'a str,
    since: SystemTime,
}

/// The serial of a certificate that two of these agents' processes have, both for longer than `settled`:
/// so long, a process that was killed may still seem to be connected.
pub(crate) fn certificate_of_two(
    routes: &[Route],
    now: SystemTime,
    settled: Duration,
) -> Option<&str> {
    let seen = routes.iter().map(|route| Seen {
        instance: route.agent_instance(),
        certificate: route.certificate(),
        since: route.since(),
    });
    of_two(&seen.collect::<Vec<_>>(), now, settled)
}

fn of_two<'a>(seen: &[Seen<'a>], now: SystemTime, settled: Duration) -> Option<&'a str> {
    let counts = |seen: &&Seen<'a>| {
        let age = now.duration_since(seen.since).unwrap_or_default();
        age >= settled && !seen.instance.is_empty() && !seen.certificate.is_empty()
    };
    let mut held: Vec<&Seen<'a>> = seen.iter().filter(counts).collect();
    held.sort_unstable_by_key(|seen| (seen.certificate, seen.instance));
    held.windows(2).find_map(|pair| match pair {
        [one, other] if one.certificate == other.certificate && one.instance != other.instance => {
            Some(one.certificate)
        }
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const SETTLED: Duration = Duration::from_secs(120);

    fn at(seconds: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
    }

    fn seen<'a>(instance: &'a str, certificate: &'a str, since: u64) -> Seen<'a> {
        let since = at(since);
        Seen {
            instance,
            certificate,
            since,
        }
    }

    #[test]
    fn two_processes_with_one_certificate_are_found_once_both_have_stayed() {
        let all = [seen("a", "1", 0), seen("x", "2", 0), seen("b", "1", 100)];
        assert_eq!(of_two(&all, at(219), SETTLED), None);
        assert_eq!(of_two(&all, at(220), SETTLED), Some("1"));
    }

    #[test]
    fn replicas_and_the_two_carriers_of_one_process_are_no_double() {
        let replicas = [seen("a", "1", 0), seen("b", "2", 0)];
        assert_eq!(of_two(&replicas, at(999), SETTLED), None);
        let carriers = [seen("a", "1", 0), seen("a", "1", 50), seen("a", "2", 60)];
        assert_eq!(of_two(&carriers, at(999), SETTLED), None);
    }

    #[test]
    fn what_is_not_told_is_not_compared() {
        let all = [
            seen("a", "", 0),
            seen("b", "", 0),
            seen("", "1", 0),
            seen("c", "1", 0),
        ];
        assert_eq!(of_two(&all, at(999), SETTLED), None);
    }
}
