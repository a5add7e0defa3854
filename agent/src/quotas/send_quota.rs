//! What one body may keep in HTTP's send buffers while its reader is slow.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};

use bytes::Bytes;
use futures::task::AtomicWaker;
use throwline_tunnel::budget::{Budget, Grant};
use throwline_tunnel::sizes::BULK_CHUNK;

/// The chunks of one body that HTTP has taken and not yet sent. Two chunks of bulk need no budget, so
/// that a body progresses where the budget is used up.
pub(crate) struct SendQuota {
    memory: Budget,
    shared: Arc<Unsent>,
}

/// Bytes of one body that are not sent yet.
#[derive(Default)]
struct Unsent {
    bytes: AtomicUsize,
    waker: AtomicWaker,
}

/// A chunk, until it is sent.
struct Chunk {
    bytes: Bytes,
    unsent: Arc<Unsent>,
    _grant: Option<Grant>,
}

/// The permit for one more chunk.
pub(crate) struct SendPermit(Option<Grant>);

impl SendQuota {
    /// Bytes of one body that may be unsent without a grant.
    const UNBUDGETED: usize = 2 * BULK_CHUNK;

    pub(crate) fn new(memory: Budget) -> Self {
        Self {
            memory,
            shared: Arc::default(),
        }
    }

    /// Where the budget is used up, pending until a chunk of this body was sent.
    pub(crate) fn poll_permit(&self, cx: &mut Context<'_>) -> Poll<SendPermit> {
        if self.shared.bytes.load(Ordering::Acquire) < Self::UNBUDGETED {
            return Poll::Ready(SendPermit(None));
        }
        if let Some(grant) = self.memory.take(BULK_CHUNK as u64) {
            return Poll::Ready(SendPermit(Some(grant)));
        }
        self.shared.waker.register(cx.waker());
        // A chunk may have been sent before the waker was registered.
        match self.shared.bytes.load(Ordering::Acquire) < Self::UNBUDGETED {
            true => Poll::Ready(SendPermit(None)),
            false => Poll::Pending,
        }
    }

    /// The same bytes, counted until they are dropped.
    pub(crate) fn count(&self, bytes: Bytes, SendPermit(grant): SendPermit) -> Bytes {
        self.shared.bytes.fetch_add(bytes.len(), Ordering::AcqRel);
        Bytes::from_owner(Chunk {
            bytes,
            unsent: self.shared.clone(),
            _grant: grant,
        })
    }
}

impl AsRef<[u8]> for Chunk {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for Chunk {
    fn drop(&mut self) {
        self.unsent
            .bytes
            .fetch_sub(self.bytes.len(), Ordering::AcqRel);
        self.unsent.waker.wake();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::task::noop_waker_ref;

    fn permit(quota: &SendQuota) -> Option<SendPermit> {
        match quota.poll_permit(&mut Context::from_waker(noop_waker_ref())) {
            Poll::Ready(permit) => Some(permit),
            Poll::Pending => None,
        }
    }

    #[test]
    fn a_body_waits_for_its_own_chunks_where_the_budget_is_used_up() {
        let memory = Budget::new(BULK_CHUNK as u64);
        let quota = SendQuota::new(memory.clone());
        let chunk = Bytes::from(vec![7; BULK_CHUNK]);
        let mut waiting = Vec::new();
        while let Some(permit) = permit(&quota) {
            waiting.push(quota.count(chunk.clone(), permit));
        }
        // Two without a grant, one from the budget.
        assert_eq!((waiting.len(), memory.used()), (3, BULK_CHUNK as u64));
        assert!(waiting.iter().all(|counted| *counted == chunk));
        // Another body still has its own two.
        let other = SendQuota::new(memory.clone());
        let first = permit(&other).map(|permit| other.count(chunk.clone(), permit));
        assert!(first.is_some());
        // Half of a chunk keeps all of it.
        let rest = waiting.remove(0).split_off(BULK_CHUNK / 2);
        assert!(permit(&quota).is_none());
        drop((rest, waiting.remove(0)));
        assert!(permit(&quota).is_some());
        drop((waiting, first));
        assert_eq!(memory.used(), 0);
    }
}
