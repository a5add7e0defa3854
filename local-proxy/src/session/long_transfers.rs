//! What an API session moves in long answers and uploads. Many small ones at a high rate are no bulk: a
//! person waits for each of them.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Bytes of an answer, or of an upload, that do not count yet: most lists and objects are shorter.
const SHORT: u64 = 256 * 1024;

/// Bytes that the long transfers of one session have moved. Clones count together.
#[derive(Clone, Default)]
pub(crate) struct LongTransfers(Arc<AtomicU64>);

/// One answer, or one upload.
pub(crate) struct Transfer {
    all: LongTransfers,
    moved: u64,
}

impl LongTransfers {
    pub(crate) fn begin(&self) -> Transfer {
        Transfer {
            all: self.clone(),
            moved: 0,
        }
    }

    pub(crate) fn bytes(&self) -> Arc<AtomicU64> {
        self.0.clone()
    }
}

impl Transfer {
    pub(crate) fn count(&mut self, bytes: usize) {
        let bytes = bytes as u64;
        self.moved += bytes;
        if self.moved > SHORT {
            self.all.0.fetch_add(bytes, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_long_counts() {
        let all = LongTransfers::default();
        for _ in 0..1000 {
            all.begin().count(40 * 1024);
        }
        assert_eq!(all.bytes().load(Ordering::Relaxed), 0);
        let mut long = all.begin();
        for _ in 0..10 {
            long.count(64 * 1024);
        }
        assert_eq!(all.bytes().load(Ordering::Relaxed), 6 * 64 * 1024);
    }
}
