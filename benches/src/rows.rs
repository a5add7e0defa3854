//! What is measured: the rows of the report, and what one run found for each.

use std::collections::BTreeMap;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Row {
    Download,
    Cpu,
    EightDownloads,
    Upload,
    KeptMedian,
    KeptTail,
    Fresh,
    Together1,
    Together40,
    AmidDownloads,
    AmidStalled,
    FarFirst,
    FarKept,
    FarRested,
    FarDownload,
    FarUpload,
    FarKubectl,
    RelayDownload,
    RelayKept,
    RelayTogether,
    RelayIdleAgent,
    PeakRelay,
    PeakAgent,
    PeakLocal,
    IdleAgent,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Group {
    /// All on one machine, with nothing between.
    Near,
    /// Over wide-area paths, see [`crate::delay`].
    Far,
    /// The relay's process alone, and where it would be the peers' servers.
    Relay,
    Memory,
}

impl Group {
    pub(crate) const ALL: [Self; 4] = [Self::Near, Self::Far, Self::Relay, Self::Memory];

    pub(crate) fn title(self) -> &'static str {
        match self {
            Self::Near => "On one machine",
            Self::Far => {
                "Over a wide-area network: direct 100 ms round trip, each of the tunnel's two hops 50 ms"
            }
            Self::Relay => "What the relay takes, beside the server halves of the peers",
            Self::Memory => "Resident memory of each process of the tunnel",
        }
    }

    /// What a reader must know to read the table; empty where the method has all of it.
    pub(crate) fn note(self) -> &'static str {
        match self {
            Self::Near | Self::Far | Self::Memory => "",
            Self::Relay => {
                "CPU is the user and system time of the relay's process and its children, from \
                 `/proc/PID/stat`, during the rows of the same name above: of Throwline's relay, sshd, rathole's \
                 and wstunnel's server. Memory is that process's (its children's with it) for each further \
                 agent that is connected and does nothing, without what the kernel holds for its sockets."
            }
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Better {
    Less,
    More,
}

impl Row {
    pub(crate) const ALL: [Self; 25] = [
        Self::Download,
        Self::Cpu,
        Self::EightDownloads,
        Self::Upload,
        Self::KeptMedian,
        Self::KeptTail,
        Self::Fresh,
        Self::Together1,
        Self::Together40,
        Self::AmidDownloads,
        Self::AmidStalled,
        Self::FarFirst,
        Self::FarKept,
        Self::FarRested,
        Self::FarDownload,
        Self::FarUpload,
        Self::FarKubectl,
        Self::RelayDownload,
        Self::RelayKept,
        Self::RelayTogether,
        Self::RelayIdleAgent,
        Self::PeakRelay,
        Self::PeakAgent,
        Self::PeakLocal,
        Self::IdleAgent,
    ];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Download => "bulk download, one connection",
            Self::Cpu => "CPU of all tunnel processes, that download",
            Self::EightDownloads => "8 downloads at once",
            Self::Upload => "bulk upload, one connection",
            Self::KeptMedian => "small GET, kept connection, p50",
            Self::KeptTail => "small GET, kept connection, p99",
            Self::Fresh => "small GET, new TCP and TLS each, p50",
            Self::Together1 => "64 connections, 1 KiB answers",
            Self::Together40 => "64 connections, 40 KiB answers",
            Self::AmidDownloads => "small GET while 8 downloads run, p99",
            Self::AmidStalled => "small GET while 20 readers are stalled, p99",
            Self::FarFirst => "first request of a new kubectl, session warm",
            Self::FarKept => "small GET, kept connection",
            Self::FarRested => "an answer of 128 KiB after 3 s of rest",
            Self::FarDownload => "one bulk download",
            Self::FarUpload => "one bulk upload",
            Self::FarKubectl => "`kubectl get pods`, cold discovery cache",
            Self::RelayDownload => "relay's CPU, bulk download, one connection",
            Self::RelayKept => "relay's CPU, each small GET, kept connection",
            Self::RelayTogether => "relay's CPU, each of 64 connections' 1 KiB answers",
            Self::RelayIdleAgent => "relay's memory, each idle agent",
            Self::PeakRelay => "relay's side, most during 1 GiB",
            Self::PeakAgent => "agent's side, most during 1 GiB",
            Self::PeakLocal => "local proxy, most during 1 GiB",
            Self::IdleAgent => "agent's side, idle, before any request",
        }
    }

    pub(crate) fn unit(self) -> &'static str {
        match self {
            Self::Download
            | Self::EightDownloads
            | Self::Upload
            | Self::FarDownload
            | Self::FarUpload => "MB/s",
            Self::Cpu | Self::RelayDownload => "s/GiB",
            Self::KeptMedian
            | Self::KeptTail
            | Self::Fresh
            | Self::AmidStalled
            | Self::RelayKept
            | Self::RelayTogether => "µs",
            Self::Together1 | Self::Together40 => "requests/s",
            Self::AmidDownloads
            | Self::FarFirst
            | Self::FarKept
            | Self::FarRested
            | Self::FarKubectl => "ms",
            Self::RelayIdleAgent => "KiB",
            Self::PeakRelay | Self::PeakAgent | Self::PeakLocal | Self::IdleAgent => "MiB",
        }
    }

    pub(crate) fn better(self) -> Better {
        match self.unit() {
            "MB/s" | "requests/s" => Better::More,
            _ => Better::Less,
        }
    }

    pub(crate) fn group(self) -> Group {
        match self {
            Self::FarFirst
            | Self::FarKept
            | Self::FarRested
            | Self::FarDownload
            | Self::FarUpload
            | Self::FarKubectl => Group::Far,
            Self::RelayDownload | Self::RelayKept | Self::RelayTogether | Self::RelayIdleAgent => {
                Group::Relay
            }
            Self::PeakRelay | Self::PeakAgent | Self::PeakLocal | Self::IdleAgent => Group::Memory,
            _ => Group::Near,
        }
    }

    pub(crate) fn of(group: Group) -> impl Iterator<Item = Self> {
        Self::ALL
            .into_iter()
            .filter(move |row| row.group() == group)
    }
}

/// All that one run found, by row and way.
#[derive(Debug, Default)]
pub(crate) struct Figures {
    values: BTreeMap<(Row, &'static str), Vec<f64>>,
    /// Why a row has fewer values than rounds: the last reason.
    failures: BTreeMap<(Row, &'static str), String>,
}

impl Figures {
    pub(crate) fn add(&mut self, row: Row, way: &'static str, value: f64) {
        self.values.entry((row, way)).or_default().push(value);
    }

    pub(crate) fn fail(&mut self, row: Row, way: &'static str, why: String) {
        self.failures.insert((row, way), why);
    }

    pub(crate) fn failures(&self) -> impl Iterator<Item = (Row, &'static str, &str)> {
        let failures = self.failures.iter();
        failures.map(|((row, way), why)| (*row, *way, why.as_str()))
    }

    pub(crate) fn spread(&self, row: Row, way: &'static str) -> Option<Spread> {
        Spread::of(self.values.get(&(row, way))?)
    }

    /// How a way's median compares with the direct one's, as `median / direct`.
    pub(crate) fn ratio(&self, row: Row, way: &'static str) -> Option<f64> {
        let direct = self.spread(row, DIRECT)?.median;
        let ratio = self.spread(row, way)?.median / direct;
        (way != DIRECT && direct > 0.0 && ratio.is_finite()).then_some(ratio)
    }
}

/// The name of the way that all others are compared with.
pub(crate) const DIRECT: &str = "direct";

/// The median of some values, and between which all of them lie.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Spread {
    pub(crate) median: f64,
    pub(crate) least: f64,
    pub(crate) most: f64,
}

impl Spread {
    pub(crate) fn of(values: &[f64]) -> Option<Self> {
        let mut sorted = values.to_vec();
        sorted.sort_by(f64::total_cmp);
        let (least, most) = (*sorted.first()?, *sorted.last()?);
        let middle = sorted.len() / 2;
        let median = match sorted.len() % 2 {
            1 => sorted[middle],
            _ => (sorted[middle - 1] + sorted[middle]) / 2.0,
        };
        Some(Self {
            median,
            least,
            most,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ratio_is_that_of_the_medians() {
        let mut figures = Figures::default();
        for value in [100.0, 900.0, 110.0] {
            figures.add(Row::Fresh, DIRECT, value);
        }
        for value in [220.0, 200.0, 240.0] {
            figures.add(Row::Fresh, "other", value);
        }
        assert_eq!(figures.ratio(Row::Fresh, "other"), Some(2.0));
        assert_eq!(figures.ratio(Row::Fresh, DIRECT), None);
        assert_eq!(figures.ratio(Row::Upload, "other"), None);
    }

    #[test]
    fn an_even_number_of_values_has_the_middle_of_two_as_median() {
        let spread = Spread::of(&[4.0, 1.0, 3.0, 2.0]);
        let expected = Spread {
            median: 2.5,
            least: 1.0,
            most: 4.0,
        };
        assert_eq!(spread, Some(expected));
        assert_eq!(Spread::of(&[]), None);
    }
}
