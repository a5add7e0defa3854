//! How a line loses its stream, and how it ends.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use futures::task::waker_ref;
use tokio::io::{AsyncRead, AsyncWrite};

use crate::proto::line::ResetCode;
use crate::proto::line::machine::Ended;

use super::state::{Core, Lifecycle, Owner, Shared};
use super::{Line, LineError};

/// Streams that a line may drop because frames on them were invalid. After as many, the other end
/// itself is at fault.
const MAX_DROPPED_STREAMS: u32 = 8;

impl<S> Core<S> {
    /// Nothing is left to resume.
    pub(super) fn end(&mut self, shared: &Shared<S>) {
        if !self.lifecycle.is_over() {
            self.lifecycle = Lifecycle::Over;
            shared.publish(self);
        }
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> Core<S> {
    /// Ends the line with an error; the first one stays.
    pub(super) fn fail(&mut self, shared: &Shared<S>, error: LineError) -> LineError {
        if let Some(failed) = self.lifecycle.failure() {
            return failed.clone();
        }
        self.lifecycle = Lifecycle::Failed(error.clone());
        if self.machine.ended().is_some() {
            // The RESET that tells the peer why.
            self.try_drain(shared);
        }
        shared.publish(self);
        shared.wake_all();
        error
    }

    /// Invalid frames, or a RESET. A relay may have corrupted the stream, so a resumable line drops
    /// the stream and is resumed instead of failing. `Ok`: the line continues without it.
    pub(super) fn on_violation(
        &mut self,
        shared: &Shared<S>,
        ended: Ended,
    ) -> Result<(), LineError> {
        let may_drop = self.may_resume() && self.dropped_streams < MAX_DROPPED_STREAMS;
        if !may_drop || !self.machine.drop_stream() {
            return Err(self.fail(shared, ended.into()));
        }
        tracing::debug!(?ended, "a line drops a stream with invalid frames");
        self.dropped_streams += 1;
        self.stream = None;
        shared.publish(self);
        Ok(())
    }

    /// The stream is lost. `Ok`: the line continues without it.
    pub(super) fn on_stream_lost(
        &mut self,
        shared: &Shared<S>,
        error: LineError,
    ) -> Result<(), LineError> {
        if let Some(failed) = self.lifecycle.failure() {
            return Err(failed.clone());
        }
        if self.lifecycle.is_over() {
            self.stream = None;
            return Ok(());
        }
        if self.may_resume() {
            // Before the position is fixed: what has arrived need not be sent again, and a RESET
            // among it explains the loss.
            self.salvage_input(shared);
            self.machine.detach();
        } else {
            // The peer's RESET, if it has arrived, is a better error than the broken stream.
            while let Ok(true) = self.machine.process_input() {}
        }
        if let Some(ended) = self.machine.ended().cloned() {
            return self.on_violation(shared, ended);
        }
        if !self.may_resume() {
            return Err(self.fail(shared, error));
        }
        self.stream = None;
        let now = tokio::time::Instant::now().into_std();
        self.autotune.on_stream_lost(now);
        shared.publish(self);
        // Payload that was salvaged can be read now.
        shared.wakers.reader.wake();
        Ok(())
    }

    /// Shuts the stream down, once both sides have sent FIN and everything has left.
    pub(super) fn try_close(&mut self, shared: &Shared<S>) {
        if !self.machine.is_settled() || self.lifecycle.is_closed() {
            return;
        }
        let is_shut = match &mut self.stream {
            Some(stream) => {
                let waker = waker_ref(&shared.wakers);
                let cx = &mut Context::from_waker(&waker);
                Pin::new(stream).poll_shutdown(cx).is_ready()
            }
            None => true,
        };
        if is_shut && self.lifecycle.failure().is_none() {
            self.lifecycle = Lifecycle::Closed;
            shared.publish(self);
        }
    }

    /// Drives a line without reader and writer, until the peer has everything that was written.
    pub(super) fn drain(&mut self, shared: &Shared<S>) {
        loop {
            if !self.discard_input(shared) {
                return;
            }
            self.on_progress(shared);
            // The peer's writer may be blocked on its window, with its FIN behind the rest.
            self.machine.acknowledge_all();
            self.try_drain(shared);
            if self.machine.is_delivered() && !self.machine.has_received_fin() {
                // Nothing reads what the peer would still send.
                self.reset_and_leave(shared);
                return;
            }
            if self.machine.is_reset() && !self.has_unsent(shared) {
                self.leave(shared);
                return;
            }
            self.try_close(shared);
            if self.lifecycle.is_over() {
                self.stream = None;
                return;
            }
            match self.poll_fill(shared) {
                Poll::Ready(Ok(())) => {}
                Poll::Ready(Err(_)) | Poll::Pending => return,
            }
        }
    }

    /// Processes what has arrived, and drops its payload. False: the stream is of no use any more.
    fn discard_input(&mut self, shared: &Shared<S>) -> bool {
        loop {
            match self.machine.process_and_discard() {
                Ok(true) => {}
                Ok(false) => return true,
                Err(ended) => {
                    // Without an owner the error has no receiver; the line is detached or over.
                    let _ = self.on_violation(shared, ended);
                    self.stream = None;
                    return false;
                }
            }
        }
    }

    /// Something that was written has still to be handed down, or may have to be sent again.
    pub(super) fn has_unsent(&mut self, shared: &Shared<S>) -> bool {
        self.try_drain(shared);
        let is_queued = self.stream.is_some() && self.machine.has_output();
        is_queued || (self.may_resume() && self.machine.buffered() > 0)
    }

    /// Sends RESET, best effort, and ends the line.
    pub(super) fn reset_and_leave(&mut self, shared: &Shared<S>) {
        self.machine.reset_after_data();
        self.try_drain(shared);
        self.leave(shared);
    }

    /// The same, with this code.
    pub(super) fn reset_with_and_leave(&mut self, shared: &Shared<S>, code: ResetCode) {
        self.machine.reset_after_data_with(code);
        self.reset_and_leave(shared);
    }

    /// Drops the stream of a line that has sent all it will.
    pub(super) fn leave(&mut self, shared: &Shared<S>) {
        if let Some(mut stream) = self.stream.take() {
            let waker = waker_ref(&shared.wakers);
            // Best effort: an error changes nothing any more.
            let _ = Pin::new(&mut stream).poll_flush(&mut Context::from_waker(&waker));
        }
        self.end(shared);
    }

    fn release(&mut self, shared: &Shared<S>, is_supervised: bool) {
        self.owner = Owner::Released;
        let may_resume = self.may_resume();
        let is_finished = self.machine.has_sent_fin() && self.machine.has_received_fin();
        // A line that cannot be resumed awaits no DONE: both FINs make a clean close.
        if self.lifecycle.is_over() || (is_finished && !may_resume) {
            self.try_drain(shared);
            self.try_close(shared);
            self.stream = None;
            self.end(shared);
            return;
        }
        // Dropped without a shutdown: the peer must read an error, not an end of data.
        if !self.machine.has_sent_fin() {
            self.machine.reset_after_data();
        }
        let is_kept = may_resume && is_supervised;
        if is_kept && (self.machine.has_sent_fin() || self.has_unsent(shared)) {
            // What was written before the end has still to arrive, which the supervisor ensures.
            shared.publish(self);
            shared.wakers.supervisor.wake();
        } else {
            self.reset_and_leave(shared);
        }
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> Drop for Line<S> {
    fn drop(&mut self) {
        let is_supervised = Arc::strong_count(&self.shared) > 1;
        self.shared.lock().release(&self.shared, is_supervised);
    }
}
