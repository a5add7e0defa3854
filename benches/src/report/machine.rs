//! What the figures were measured on, and when.

use anyhow::Context;

/// As "2026-11-25, 2 cores of AMD EPYC, 24 GiB, Linux 6.18".
pub(crate) fn described() -> anyhow::Result<String> {
    let cores = std::thread::available_parallelism()?;
    let cpus = std::fs::read_to_string("/proc/cpuinfo")?;
    let model = value(&cpus, "model name").unwrap_or("an unnamed processor");
    let memory = std::fs::read_to_string("/proc/meminfo")?;
    let kib = value(&memory, "MemTotal").and_then(|text| text.split(' ').next()?.parse().ok());
    let kib: u64 = kib.context("/proc/meminfo names no total")?;
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease")?;
    // What follows the version is the builder's.
    let kernel = kernel.split('-').next().unwrap_or_default();
    let today = time::OffsetDateTime::now_utc().date();
    Ok(format!(
        "{today}, {cores} cores of {model}, {} GiB, Linux {}, everything on one machine",
        (kib + (1 << 19)) >> 20,
        kernel.trim(),
    ))
}

fn value<'a>(text: &'a str, key: &str) -> Option<&'a str> {
    text.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        (name.trim() == key).then(|| value.trim())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_found_by_their_key() {
        let text = "model\t\t: 1\nmodel name\t: AMD EPYC\n";
        assert_eq!(value(text, "model name"), Some("AMD EPYC"));
        assert_eq!(value(text, "name"), None);
    }
}
