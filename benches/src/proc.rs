//! The kernel's figures about processes, with all that they have started.

use std::collections::{HashMap, HashSet};

use anyhow::Context;
use throwline_e2e::process::{proc_field, status_field};

/// The process and its living descendants.
pub(crate) fn family(root: u32) -> Vec<u32> {
    let mut children: HashMap<u32, Vec<u32>> = HashMap::new();
    for entry in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
        let name = entry.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        // It may have ended meanwhile.
        let parent = stat(pid).and_then(|fields| fields.get(1)?.parse().ok());
        if let Some(parent) = parent {
            children.entry(parent).or_default().push(pid);
        }
    }
    let mut all = vec![root];
    let mut next = 0;
    while let Some(pid) = all.get(next).copied() {
        all.extend(children.remove(&pid).unwrap_or_default());
        next += 1;
    }
    all
}

/// CPU seconds, user and system, of a process so far and of those of its children that have
/// ended. In ticks of 10 ms.
pub(crate) fn cpu_seconds(pid: u32) -> f64 {
    // utime, stime, cutime, cstime, counted from the state behind the name.
    let ticks = stat(pid).map_or(0.0, |fields| {
        let at = |place: usize| {
            fields
                .get(place)
                .and_then(|field| field.parse::<f64>().ok())
        };
        (11..=14).filter_map(at).sum()
    });
    ticks / 100.0
}

/// Resident memory now, in KiB.
pub(crate) fn resident_kib(pid: u32) -> f64 {
    status(pid, "VmRSS:")
}

/// Resident memory now, in KiB, of which a page that several processes share counts for each by its
/// share. Without the right to read that, all of it counts.
pub(crate) fn proportional_kib(pid: u32) -> f64 {
    let share = proc_field(pid, "smaps_rollup", "Pss:");
    share.map_or_else(|_| resident_kib(pid), |kib| kib as f64)
}

/// TCP ports of IPv4 that some process listens on.
pub(crate) fn listening_ports() -> anyhow::Result<HashSet<u16>> {
    let file = "/proc/self/net/tcp";
    let table = std::fs::read_to_string(file).context(file)?;
    Ok(listeners(&table).collect())
}

/// Lines are `number: address:port address:port state`, all but the number hexadecimal.
fn listeners(table: &str) -> impl Iterator<Item = u16> {
    const LISTEN: &str = "0A";
    table.lines().filter_map(|line| {
        let mut fields = line.split_whitespace();
        let (local, state) = (fields.nth(1)?, fields.nth(1)?);
        let (_, port) = local.split_once(':')?;
        let port = u16::from_str_radix(port, 16).ok()?;
        (state == LISTEN).then_some(port)
    })
}

/// The most resident memory since [`forget_peak`], in KiB.
pub(crate) fn peak_kib(pid: u32) -> f64 {
    status(pid, "VmHWM:")
}

/// Resets the peak. Without the right to, it is that of the whole life.
pub(crate) fn forget_peak(pid: u32) {
    let _ = std::fs::write(format!("/proc/{pid}/clear_refs"), "5");
}

/// The fields of `/proc/PID/stat` from the state on; the name before it may hold anything.
fn stat(pid: u32) -> Option<Vec<String>> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, rest) = text.rsplit_once(')')?;
    Some(rest.split_whitespace().map(str::to_owned).collect())
}

fn status(pid: u32, field: &str) -> f64 {
    // It may have ended meanwhile.
    status_field(pid, field).map_or(0.0, |kib| kib as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_is_there() {
        let pid = std::process::id();
        assert!(family(pid).contains(&pid));
        assert!(resident_kib(pid) > 0.0);
        assert!(peak_kib(pid) >= resident_kib(pid) / 2.0);
        assert!(cpu_seconds(pid) >= 0.0);
        assert_eq!(family(u32::MAX), [u32::MAX]);
        let proportional = proportional_kib(pid);
        assert!(proportional > 0.0 && proportional <= peak_kib(pid) * 1.1);
    }

    #[test]
    fn a_port_listens_while_its_listener_lives() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        assert!(listening_ports().unwrap().contains(&port));
    }

    #[test]
    fn only_listeners_are_taken_from_the_kernels_table() {
        let table = "  sl  local_address rem_address   st tx_queue rx_queue\n   \
                     0: 0100007F:1F90 00000000:0000 0A 00000000:00000000\n   \
                     1: 0100007F:1F91 0100007F:A1B2 01 00000000:00000000\n";
        assert_eq!(listeners(table).collect::<Vec<_>>(), [8080]);
    }
}
