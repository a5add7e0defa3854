//! The one task of a carrier: moves bytes between WebSocket, multiplexer and streams, pings,
//! detects a dead link, sends the close frame.
//!
//! **Invariant:** it never awaits a stream. What has to be awaited (headers of new streams,
//! streams that were dropped half-closed) is polled alongside and has a deadline.

use std::collections::VecDeque;
use std::panic::AssertUnwindSafe;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use futures::stream::FuturesUnordered;
use futures::{FutureExt as _, StreamExt as _};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, Sleep};

use crate::message;
use crate::mux::{Linger, Mux, Raw, Stream, StreamPermit};
use crate::proto::close::{CloseCode, CloseReason, ClosedBy};
use crate::proto::liveness::{self, Action, Liveness};
use crate::proto::messages::{Refusal, RefusalCode, StreamHeader, StreamReply};
use crate::proto::wire::HEADER_CAP;
use crate::ws::WsDriver;

use super::flush_policy::FlushCoalescer;
use super::incoming::IncomingStream;
use super::shared::Shared;
use super::timing::Timing;

/// Requests of the handles to the driver.
pub(super) enum Command {
    Open(oneshot::Sender<Stream>, StreamPermit),
    Close(CloseCode, String),
}

pub(super) struct Driver<T> {
    ws: WsDriver<T>,
    mux: Mux<T>,
    shared: Arc<Shared>,
    timing: Timing,
    commands: mpsc::UnboundedReceiver<Command>,
    /// No handle is left that could open a stream.
    abandoned: bool,
    /// What streams have written by now is still to be sent.
    closing: Option<CloseReason>,
    /// Bounded by the permits they hold.
    opening: VecDeque<(oneshot::Sender<Stream>, StreamPermit)>,
    // Boxed: a channel has room for 32 from its beginning, on each of thousands of idle carriers.
    incoming: mpsc::UnboundedSender<Box<IncomingStream>>,
    linger: mpsc::UnboundedSender<Box<Linger>>,
    dropped: mpsc::UnboundedReceiver<Box<Linger>>,
    reading: FuturesUnordered<BoxFuture<'static, Option<IncomingStream>>>,
    lingering: FuturesUnordered<BoxFuture<'static, Option<u32>>>,
    liveness: Liveness,
    received: u64,
    /// Bytes written when they last moved, and when that was.
    written: u64,
    stalled_since: Option<Instant>,
    ping: Option<(u64, Instant)>,
    pings: u64,
    timer: Pin<Box<Sleep>>,
    flush_policy: FlushCoalescer,
}

impl<T: AsyncRead + AsyncWrite + Unpin + Send + 'static> Driver<T> {
    pub(super) fn new(
        ws: WsDriver<T>,
        mux: Mux<T>,
        shared: Arc<Shared>,
        timing: Timing,
        commands: mpsc::UnboundedReceiver<Command>,
        incoming: mpsc::UnboundedSender<Box<IncomingStream>>,
    ) -> Self {
        let now = Instant::now();
        let config = liveness::Config {
            ping_interval: timing.ping_interval,
            jitter: timing.ping_jitter,
            dead_after: timing.dead_after,
        };
        let (linger, dropped) = mpsc::unbounded_channel();
        Self {
            received: ws.received(),
            written: ws.written(),
            ws,
            mux,
            shared,
            commands,
            abandoned: false,
            closing: None,
            opening: VecDeque::new(),
            incoming,
            linger,
            dropped,
            reading: FuturesUnordered::new(),
            lingering: FuturesUnordered::new(),
            liveness: Liveness::new(config, now.into_std(), rand::random()),
            stalled_since: None,
            ping: None,
            pings: 0,
            timer: Box::pin(tokio::time::sleep_until(now)),
            timing,
            flush_policy: FlushCoalescer::default(),
        }
    }

    /// Runs until the carrier ends. A panic below ends this carrier and nothing else.
    pub(super) async fn run(mut self) {
        let driven = std::future::poll_fn(|cx| self.poll(cx));
        let reason = match AssertUnwindSafe(driven).catch_unwind().await {
            Ok(reason) => reason,
            Err(_) => CloseReason::new(ClosedBy::Us, CloseCode::Internal, "the driver panicked"),
        };
        tracing::debug!(carrier = self.shared.id(), %reason, "carrier ended");
        // Published before the streams fail, so that their users find this reason behind the broken
        // stream.
        self.shared.finish(reason.clone());
        let Self {
            ws, mux, timing, ..
        } = self;
        // Wakes every reader and writer of a stream.
        drop(mux);
        if reason.by == ClosedBy::Us {
            ws.close(reason.code, &reason.reason, timing.close).await;
        } else if reason.by == ClosedBy::Peer {
            // The WebSocket answers a close frame by itself; let the answer out.
            let _ = tokio::time::timeout(timing.close, ws.flush()).await;
        }
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<CloseReason> {
        loop {
            if let Poll::Ready(reason) = self.poll_commands(cx) {
                return Poll::Ready(reason);
            }
            // Polled before a requested close takes effect: the same call writes the streams'
            // frames, and what was written before the close still leaves.
            let inbound = self.mux.poll_inbound(cx);
            if let Some(reason) = self.closing.take() {
                self.mux.inject(&self.ws);
                return Poll::Ready(reason);
            }
            match inbound {
                Poll::Ready(Some(Ok(raw))) => {
                    self.on_inbound(raw);
                    continue;
                }
                Poll::Ready(Some(Err(error))) => return Poll::Ready(self.lost(Some(error))),
                Poll::Ready(None) => return Poll::Ready(self.lost(None)),
                Poll::Pending => {}
            }
            // yamux answers a violation with GOAWAY only; the close code names the side at fault.
            if self.mux.gave_up() {
                let why = "the peer broke the multiplexer's protocol";
                let reason = CloseReason::new(ClosedBy::Us, CloseCode::Protocol, why);
                return Poll::Ready(reason);
            }
            if self.poll_tasks(cx) {
                continue;
            }
            // Behind what yamux has written, and before the flush, which takes both.
            self.mux.inject(&self.ws);
            // Tasks that are ready write first and share the message and the system call
            // (docs/adr/0009).
            if self.flush_policy.should_wait(self.ws.corked()) {
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            match self.ws.poll_flush(cx) {
                // Writers had to wait, and there is room again.
                Poll::Ready(Ok(())) if self.ws.take_blocked() => continue,
                Poll::Ready(Err(error)) => return Poll::Ready(self.lost(Some(error))),
                Poll::Ready(Ok(())) | Poll::Pending => {}
            }
            // After the flush: write stalls are measured on what the network took.
            match self.poll_timers(cx) {
                Poll::Ready(Some(reason)) => return Poll::Ready(reason),
                Poll::Ready(None) => continue,
                Poll::Pending => {}
            }
            // Streams outlive the handles: the carrier lasts until the last of both has ended.
            if self.abandoned && self.incoming.is_closed() && self.shared.streams() == 0 {
                let reason = CloseReason::new(ClosedBy::Us, CloseCode::Normal, "");
                return Poll::Ready(reason);
            }
            return Poll::Pending;
        }
    }

    fn poll_commands(&mut self, cx: &mut Context<'_>) -> Poll<CloseReason> {
        while !self.abandoned {
            match self.commands.poll_recv(cx) {
                Poll::Ready(Some(Command::Open(reply, permit))) => {
                    self.opening.push_back((reply, permit));
                }
                Poll::Ready(Some(Command::Close(code, reason))) => {
                    self.closing = Some(CloseReason::new(ClosedBy::Us, code, reason));
                    return Poll::Pending;
                }
                Poll::Ready(None) => self.abandoned = true,
                Poll::Pending => break,
            }
        }
        // In order: yamux bounds the streams that the peer has not acknowledged, and a later
        // request must not take the place of an earlier one.
        while let Some((reply, permit)) = self.opening.pop_front() {
            // The requester has timed out; a stream opened for it would only be reset.
            if reply.is_closed() {
                continue;
            }
            match self.mux.poll_open(cx) {
                Poll::Ready(Ok(raw)) => {
                    // If the requester is gone, dropping the stream resets it.
                    let _ = reply.send(raw.into_stream(permit, self.linger.clone()));
                }
                Poll::Ready(Err(error)) => return Poll::Ready(self.lost(Some(error))),
                // Too many that the peer has not acknowledged.
                Poll::Pending => {
                    self.opening.push_front((reply, permit));
                    break;
                }
            }
        }
        Poll::Pending
    }

    fn on_inbound(&mut self, raw: Raw) {
        let deadline = self.timing.header;
        match self.shared.incoming_permit() {
            Some(permit) => {
                let stream = raw.into_stream(permit, self.linger.clone());
                self.reading.push(read_header(stream, deadline).boxed());
            }
            None => self.reading.push(refuse_over_limit(raw, deadline).boxed()),
        }
    }

    /// True if something moved, and the multiplexer may have more to do.
    fn poll_tasks(&mut self, cx: &mut Context<'_>) -> bool {
        let mut moved = false;
        while let Poll::Ready(Some(linger)) = self.dropped.poll_recv(cx) {
            self.lingering.push(linger.run(self.timing.close).boxed());
            moved = true;
        }
        while let Poll::Ready(Some(stream)) = self.reading.poll_next_unpin(cx) {
            if let Some(stream) = stream {
                // Without a receiver of streams, dropping it resets it.
                let _ = self.incoming.send(Box::new(stream));
            }
            moved = true;
        }
        while let Poll::Ready(Some(reset)) = self.lingering.poll_next_unpin(cx) {
            if let Some(stream) = reset {
                self.mux.reset(stream);
            }
            moved = true;
        }
        moved
    }

    /// `Some` ends the carrier; `None` means that a timer did something.
    fn poll_timers(&mut self, cx: &mut Context<'_>) -> Poll<Option<CloseReason>> {
        let now = Instant::now();
        let received = self.ws.received();
        // Any byte proves life: a pong may be queued behind bulk.
        if received != self.received {
            self.received = received;
            self.liveness.on_bytes(now.into_std());
            self.shared.set_heard(now);
        }
        if let Some(payload) = self.ws.take_pong() {
            self.on_pong(&payload, now);
        }
        let written = self.ws.written();
        // TCP reports a dead path only after minutes of retransmission; bytes that wait and do not
        // move are the earlier sign.
        if !self.ws.is_unflushed() {
            self.stalled_since = None;
        } else if written != self.written || self.stalled_since.is_none() {
            self.stalled_since = Some(now);
        }
        self.written = written;

        if let Some(since) = self.stalled_since
            && now >= since + self.timing.write_stall
        {
            let why = "the network took no bytes for too long";
            let reason = CloseReason::new(ClosedBy::Us, CloseCode::Timeout, why);
            return Poll::Ready(Some(reason));
        }
        match self.liveness.on_timer(now.into_std()) {
            Action::Dead => {
                let why = "nothing was received for too long";
                let reason = CloseReason::new(ClosedBy::Us, CloseCode::Timeout, why);
                return Poll::Ready(Some(reason));
            }
            Action::Ping => {
                self.send_ping(cx, now);
                return Poll::Ready(None);
            }
            Action::Nothing if self.pings == 0 => {
                // The first at once, so that the round trip is known early.
                self.send_ping(cx, now);
                return Poll::Ready(None);
            }
            Action::Nothing => {}
        }
        let mut next = Instant::from_std(self.liveness.next());
        if let Some(since) = self.stalled_since {
            next = next.min(since + self.timing.write_stall);
        }
        if self.timer.deadline() != next {
            self.timer.as_mut().reset(next);
        }
        self.timer.as_mut().poll(cx).map(|()| None)
    }

    fn send_ping(&mut self, cx: &mut Context<'_>, now: Instant) {
        self.pings += 1;
        let payload = Bytes::copy_from_slice(&self.pings.to_be_bytes());
        if self.ws.ping(cx, payload) {
            self.ping = Some((self.pings, now));
        }
    }

    fn on_pong(&mut self, payload: &[u8], now: Instant) {
        // RFC 6455 section 5.5.3 allows unsolicited pongs, and one pong for several pings: only the
        // answer to the newest ping is timed.
        if let Some((number, sent)) = self.ping
            && payload == number.to_be_bytes()
        {
            self.ping = None;
            self.shared.set_round_trip(now.duration_since(sent));
        }
    }

    /// The WebSocket's own reason takes precedence over the multiplexer's error.
    fn lost(&self, error: Option<std::io::Error>) -> CloseReason {
        if let Some(reason) = self.ws.ended() {
            return reason;
        }
        match error {
            Some(error) if error.kind() == std::io::ErrorKind::InvalidData => {
                CloseReason::new(ClosedBy::Us, CloseCode::Protocol, error.to_string())
            }
            Some(error) => {
                CloseReason::new(ClosedBy::Network, CloseCode::Abnormal, error.to_string())
            }
            // One of the two multiplexers found the other at fault.
            None => CloseReason::new(ClosedBy::Us, CloseCode::Protocol, "the multiplexer ended"),
        }
    }
}

async fn read_header(mut stream: Stream, deadline: Duration) -> Option<IncomingStream> {
    let header = message::read::<StreamHeader, _>(&mut stream, HEADER_CAP);
    let refusal = match tokio::time::timeout(deadline, header).await {
        Ok(Ok(header)) if header.kind.is_some() => {
            return Some(IncomingStream::new(header, stream, deadline));
        }
        Ok(Ok(_)) => Refusal::new(
            RefusalCode::Unsupported,
            "this kind of stream is not known here",
        ),
        Ok(Err(error)) if error.kind() == std::io::ErrorKind::InvalidData => {
            Refusal::new(RefusalCode::BadRequest, "the stream's header is malformed")
        }
        Ok(Err(_)) => return None,
        Err(_) => Refusal::new(
            RefusalCode::Timeout,
            "the stream's header did not come in time",
        ),
    };
    let header = StreamHeader::default();
    IncomingStream::new(header, stream, deadline)
        .refuse(refusal)
        .await;
    None
}

async fn refuse_over_limit(raw: Raw, deadline: Duration) -> Option<IncomingStream> {
    let refusal = Refusal::new(
        RefusalCode::Limit,
        "too many streams are open on this carrier",
    );
    let mut stream = raw.into_refusal();
    let reply = StreamReply::refused(refusal);
    let written = message::write(&mut stream, &reply, HEADER_CAP);
    let _ = tokio::time::timeout(deadline, written).await;
    None
}
