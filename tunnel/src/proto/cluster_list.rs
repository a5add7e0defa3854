//! The bounds of a [`ClusterList`]. A relay must not exhaust the memory of a dialer, so the entries are
//! counted before they are decoded: an entry of two bytes takes a hundred times that in memory.

use super::messages::{ClusterInfo, ClusterList};
use super::wire::{CLUSTER_LIST_CAP, WireError};
use prost::Message as _;
use prost::encoding::{self, DecodeContext, WireType};

/// The most clusters in one list. A user who reaches more names those that are needed.
pub const MAX_CLUSTERS: usize = 10_000;
/// Bytes of a version, in UTF-8; longer ones are cut.
pub const MAX_VERSION: usize = 48;
/// Bytes of a message, in UTF-8; longer ones are cut.
pub const MAX_MESSAGE: usize = 192;

impl ClusterList {
    /// As many of these as a list may hold; `total` is the number of all where some are left out.
    #[must_use]
    pub fn bounded(all: Vec<ClusterInfo>) -> Self {
        let count = u32::try_from(all.len()).unwrap_or(u32::MAX);
        // The count itself.
        let mut room = CLUSTER_LIST_CAP - 16;
        let mut clusters = Vec::new();
        for mut info in all.into_iter().take(MAX_CLUSTERS) {
            clip(&mut info);
            let len = encoding::message::encoded_len(1, &info);
            let Some(left) = room.checked_sub(len) else {
                break;
            };
            room = left;
            clusters.push(info);
        }
        let is_cut = clusters.len() < usize::try_from(count).unwrap_or(usize::MAX);
        Self {
            clusters,
            total: if is_cut { count } else { 0 },
        }
    }

    /// Decodes a list of [`MAX_CLUSTERS`] at most, with texts of bounded length.
    ///
    /// # Errors
    /// The list is malformed, or has more entries than the limit.
    pub fn decode_bounded(mut bytes: &[u8]) -> Result<Self, WireError> {
        // Entry by entry: an empty one has two bytes on the wire and over a hundred in memory, so
        // prost's `decode` would allocate a multiple of the message before they could be counted.
        let mut list = Self::default();
        while !bytes.is_empty() {
            let (tag, wire_type) = encoding::decode_key(&mut bytes)?;
            match (tag, wire_type) {
                (1, WireType::LengthDelimited) if list.clusters.len() == MAX_CLUSTERS => {
                    return Err(WireError::TooMany { cap: MAX_CLUSTERS });
                }
                (1, WireType::LengthDelimited) => {
                    let mut info = ClusterInfo::default();
                    info.merge_length_delimited(&mut bytes)?;
                    clip(&mut info);
                    list.clusters.push(info);
                }
                (2, WireType::Varint) => {
                    let total = encoding::decode_varint(&mut bytes)?;
                    list.total = u32::try_from(total).unwrap_or(u32::MAX);
                }
                // A newer peer may send more fields within a version.
                _ => encoding::skip_field(wire_type, tag, &mut bytes, DecodeContext::default())?,
            }
        }
        Ok(list)
    }
}

fn clip(info: &mut ClusterInfo) {
    for (text, most) in [
        (&mut info.kubernetes_version, MAX_VERSION),
        (&mut info.agent_version, MAX_VERSION),
        (&mut info.message, MAX_MESSAGE),
    ] {
        text.truncate(text.floor_char_boundary(most));
        text.shrink_to_fit();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named(number: usize) -> ClusterInfo {
        ClusterInfo {
            name: format!("cluster-{number}"),
            ..ClusterInfo::default()
        }
    }

    #[test]
    fn what_fits_is_read_as_it_was_written() {
        let all: Vec<_> = (0..MAX_CLUSTERS).map(named).collect();
        let list = ClusterList::bounded(all.clone());
        assert_eq!((list.total, list.clusters.len()), (0, MAX_CLUSTERS));
        let read = ClusterList::decode_bounded(&list.encode_to_vec()).unwrap();
        assert_eq!(read.clusters, all);
    }

    #[test]
    fn a_long_list_is_cut_by_number_and_by_bytes_and_says_so() {
        let list = ClusterList::bounded((0..=MAX_CLUSTERS).map(named).collect());
        assert_eq!(list.clusters.len(), MAX_CLUSTERS);
        assert_eq!(list.total, 10_001);

        let long = |number| ClusterInfo {
            name: format!("{number:063}"),
            message: "m".repeat(10_000),
            agent_version: "ä".repeat(10_000),
            kubernetes_version: "v".repeat(10_000),
            ..ClusterInfo::default()
        };
        let list = ClusterList::bounded((0..2 * MAX_CLUSTERS).map(long).collect());
        let bytes = list.encode_to_vec();
        assert!(bytes.len() <= CLUSTER_LIST_CAP, "{}", bytes.len());
        assert!(list.clusters.len() > 9_000, "{}", list.clusters.len());
        assert_eq!(list.total, 20_000);
        assert_eq!(list.clusters[0].agent_version, "ä".repeat(24));
        assert_eq!(ClusterList::decode_bounded(&bytes).unwrap(), list);
    }

    #[test]
    fn a_hostile_list_is_refused_before_it_fills_memory() {
        // Two million entries of nothing.
        let bytes = [0x0a, 0x00].repeat(2 * 1024 * 1024);
        let error = ClusterList::decode_bounded(&bytes).unwrap_err();
        assert!(matches!(error, WireError::TooMany { .. }), "{error}");
        for broken in [
            &b"\x0a"[..],
            b"\x0a\x05ab",
            b"\x0b",
            b"\xff\xff\xff\xff\xff\xff",
            b"\x00",
        ] {
            assert!(ClusterList::decode_bounded(broken).is_err(), "{broken:?}");
        }
        // A field of a later version.
        let list = ClusterList::decode_bounded(b"\x1a\x02ab\x0a\x03\x0a\x01x").unwrap();
        assert_eq!(list.clusters[0].name, "x");
    }
}
