//! What passes the user's link, as its interface counts it.

use std::time::{Duration, Instant};

use anyhow::{Context, bail};

use super::network::NARROW;

/// Between two looks at the counters.
const LOOK: Duration = Duration::from_millis(250);
/// Bytes in between that are no bulk: pings of idle connections, their acknowledgements.
const IDLE: u64 = 4_096;

/// Waits until no bulk passes any more, of which buffers on the way may hold seconds.
///
/// # Errors
/// It still does after `limit`.
pub(super) async fn ends(limit: Duration) -> anyhow::Result<()> {
    let end = Instant::now() + limit;
    let mut last = bytes()?;
    loop {
        tokio::time::sleep(LOOK).await;
        let now = bytes()?;
        if now - last < IDLE {
            return Ok(());
        }
        if Instant::now() > end {
            bail!("bulk still passes the link {limit:?} after its end");
        }
        last = now;
    }
}

/// Received and sent so far, in the namespace of this process.
fn bytes() -> anyhow::Result<u64> {
    let file = "/proc/net/dev";
    let text = std::fs::read_to_string(file).context(file)?;
    counted(&text, NARROW).with_context(|| format!("{file} has no interface {NARROW}"))
}

fn counted(text: &str, interface: &str) -> Option<u64> {
    let fields = text.lines().find_map(|line| {
        let (name, fields) = line.split_once(':')?;
        (name.trim() == interface).then_some(fields)
    })?;
    let mut fields = fields.split_whitespace();
    let received: u64 = fields.next()?.parse().ok()?;
    let sent: u64 = fields.nth(7)?.parse().ok()?;
    Some(received + sent)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_counters_of_an_interface_are_its_own() {
        let text = "Inter-|   Receive    |  Transmit\n face |bytes packets errs drop fifo frame compressed multicast|bytes packets\n    \
                    lo:     100       1    0    0    0     0          0         0      100       1    0    0    0     0       0          0\n\
                    narrow: 7000      10   0    0    0     0          0         0      300       5    0    0    0     0       0          0\n";
        assert_eq!(counted(text, "narrow"), Some(7300));
        assert_eq!(counted(text, "wide"), None);
    }
}
