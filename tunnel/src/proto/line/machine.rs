//! A line without its I/O: bytes from the stream go in, bytes for the stream come out, and payload
//! that was lost with a stream is sent again on the next one.
//!
//! ```text
//!              write ─▶ output ─▶ chunk ─▶ stream              attached
//!                          └─▶ send buffer (until acknowledged) ─▶ chunk, after `attach`
//!  read ◀─ unread ◀─ input ◀─ stream
//! ```
//! Three states, independent of one another, make up a line: whether a stream carries it
//! (`Attachment`), how far its own end of data is (`SendState`), and how far the peer's
//! ([`RecvState`](super::RecvState)). `ended` ends all three.
//!
//! **Invariant:** what `read` has handed out is a prefix of what the peer wrote, whatever streams
//! were cut in between; `End` follows only the last byte before the peer's FIN.

mod attachment;
mod recv;
mod send;

use bytes::{BufMut, Bytes, BytesMut};

use self::attachment::{Attached, Attachment, Pending};
use self::recv::RecvHalf;
use self::send::{SendHalf, SendState};
use super::send_buffer::SendBuffer;
use super::{Header, Position, ResetCode, Violation, kind, put, put_reset};

/// Why a line ended early.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ended {
    /// The peer broke the protocol.
    Violation(Violation),
    /// The peer reset the line.
    Reset {
        /// The code.
        code: ResetCode,
        /// The reason, as text.
        reason: String,
    },
}

impl From<Violation> for Ended {
    fn from(violation: Violation) -> Self {
        Self::Violation(violation)
    }
}

/// The result of a read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Read {
    /// So many bytes were read.
    Bytes(usize),
    /// The peer's end of data; everything before it was read.
    End,
    /// More input is needed.
    Empty,
}

/// One end of a line.
#[derive(Debug)]
pub struct Machine {
    recv: RecvHalf,
    send: SendHalf,
    attachment: Attachment,
    /// Counts the streams that the line had, or was to have. Only a newer one can be attached.
    epoch: u64,
    ended: Option<Ended>,
    received: u64,
    unanswered: u64,
}

impl Machine {
    /// `resumable`: keeps unacknowledged payload, at most the peer's window.
    pub fn new(own_window: u32, peer_window: u32, resumable: bool) -> Self {
        Self {
            recv: RecvHalf::new(own_window),
            send: SendHalf::new(peer_window, resumable),
            attachment: Attachment::Attached(Attached::default()),
            epoch: 0,
            ended: None,
            received: 0,
            unanswered: 0,
        }
    }

    // ---- receiving

    /// Where the stream's bytes are to be added.
    pub fn input(&mut self) -> &mut BytesMut {
        &mut self.recv.input
    }

    /// `n` bytes were added to the input.
    pub fn on_input(&mut self, n: usize) {
        self.received += n as u64;
        self.unanswered = 0;
    }

    /// Hands out as much received payload as fits. Frames that have already arrived are processed,
    /// so that a FIN is seen together with the last bytes. Frames behind a FIN are left: they concern
    /// the writer only.
    ///
    /// # Errors
    /// The line has ended: the peer broke the protocol, or reset it.
    pub fn read(&mut self, out: &mut impl BufMut) -> Result<Read, Ended> {
        let mut taken = self.recv.read_unread(out);
        while !self.recv.has_unread() {
            taken += self.recv.read_payload(out);
            let stepped = if self.has_received_fin() {
                Ok(false)
            } else {
                self.process_header()
            };
            match stepped {
                Ok(true) if out.has_remaining_mut() => {}
                // What was read before the error is delivered first; the error stays.
                Err(ended) if taken == 0 => return Err(ended),
                _ => break,
            }
        }
        if taken > 0 {
            self.on_consumed(taken);
            return Ok(Read::Bytes(taken));
        }
        if self.recv.receiver.is_finished() {
            Ok(Read::End)
        } else {
            Ok(Read::Empty)
        }
    }

    fn on_consumed(&mut self, n: usize) {
        self.recv.receiver.consume(n);
        // Without a stream an ACK would be lost; `attach` makes up for it.
        if let Attachment::Attached(attached) = &mut self.attachment
            && let Some(consumed) = self.recv.receiver.take_ack()
        {
            put(self.send.control(), kind::ACK, 0, consumed);
            attached.expects_reply = true;
        }
    }

    /// Processes one frame without a reader: payload is buffered, within the window. True if there
    /// was something to process.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn process_input(&mut self) -> Result<bool, Ended> {
        Ok(self.recv.buffer_unread() || self.process_header()?)
    }

    /// The same for a line that has no reader any more: payload is acknowledged and dropped.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn process_and_discard(&mut self) -> Result<bool, Ended> {
        let processed = self.process_input()?;
        self.recv.discard_unread();
        Ok(processed)
    }

    fn process_header(&mut self) -> Result<bool, Ended> {
        if let Some(ended) = &self.ended {
            return Err(ended.clone());
        }
        let (header, kind) = match self.recv.next_header() {
            Ok(Some(next)) => next,
            Ok(None) => return Ok(false),
            Err(violation) => return Err(self.end_with_violation(violation)),
        };
        match self.on_header(header, kind) {
            Ok(()) => Ok(true),
            Err(Ended::Violation(violation)) => Err(self.end_with_violation(violation)),
            Err(reset) => {
                self.ended = Some(reset.clone());
                if self.is_resumable() && self.is_attached() {
                    // Everything before the RESET has arrived: its sender need not keep it.
                    let received = self.recv.receiver.received();
                    put(self.send.control(), kind::ACK, 0, received);
                }
                Err(reset)
            }
        }
    }

    fn on_header(&mut self, header: Header, kind: u8) -> Result<(), Ended> {
        let resumable = self.is_resumable();
        match header {
            Header::Data { offset, len } => self.recv.on_data(offset, len)?,
            Header::Ack { received } => {
                self.send.sender.on_ack(received)?;
                self.send.on_arrived(received);
            }
            Header::Fin { end } => {
                self.recv.receiver.on_fin(end)?;
                if resumable {
                    // An ACK has no offset for a FIN: only DONE lets the peer forget the line.
                    self.attachment.queue(Pending::DONE);
                }
            }
            Header::Reset { code, len } => {
                // `next_header` has waited for the whole reason.
                let reason = self.recv.input.split_to(len);
                let reason = String::from_utf8_lossy(&reason).into_owned();
                return Err(Ended::Reset { code, reason });
            }
            // Only behind this side's FIN and for its offset: an early DONE would free bytes that
            // the peer has not received.
            Header::Done { end } if resumable && self.is_done_expected(end) => {
                self.send.state = SendState::FinAcked;
                self.send.on_arrived(end);
            }
            Header::Ping if resumable => self.attachment.queue(Pending::PONG),
            // That it arrived is its whole meaning.
            Header::Pong if resumable => {}
            Header::Move if resumable => {
                if let Attachment::Attached(attached) = &mut self.attachment {
                    attached.move_requested = true;
                }
            }
            _ => return Err(Violation::OutOfPlace(kind).into()),
        }
        Ok(())
    }

    fn is_done_expected(&self, end: u64) -> bool {
        let has_fin = matches!(self.send.state, SendState::FinSent | SendState::FinAcked);
        has_fin && end == self.send.sender.sent()
    }

    fn end_with_violation(&mut self, violation: Violation) -> Ended {
        // The first cause stays.
        if self.ended.is_none() {
            self.reset(ResetCode::Protocol, &violation.to_string());
            self.ended = Some(Ended::Violation(violation.clone()));
        }
        Ended::Violation(violation)
    }

    /// Detaches from a stream on which frames were dropped, doubled or reordered, instead of ending
    /// the line: what was processed so far was in order, and the rest is sent again. False: the line
    /// has to end, because the peer has reset it or it cannot be resumed.
    pub fn drop_stream(&mut self) -> bool {
        if !self.is_resumable() || !matches!(self.ended, Some(Ended::Violation(_))) {
            return false;
        }
        self.ended = None;
        // Nothing behind the violation counts.
        self.recv.input = BytesMut::new();
        self.detach();
        true
    }

    /// Frees the input's capacity after a burst, before the line waits for more.
    pub fn shrink_input(&mut self) {
        self.recv.shrink_input();
    }

    /// Frees all capacity that holds nothing, on an idle line.
    pub fn release_memory(&mut self) {
        self.recv.release_memory();
        self.send.release_memory();
    }

    /// There is payload that a reader could take now.
    pub fn is_readable(&self) -> bool {
        self.recv.is_readable()
    }

    /// Payload buffered until the reader takes it.
    pub fn unread(&self) -> usize {
        self.recv.unread_bytes()
    }

    // ---- sending

    /// Takes what window, frame and cork allow; 0 when there is no room.
    pub fn write(&mut self, buf: &[u8]) -> usize {
        let n = self.send.room(buf.len());
        if n == 0 {
            return 0;
        }
        if !self.send.append(&buf[..n]) {
            // An acknowledgement beside data costs no further write, and lets the peer free what
            // it would otherwise keep until the next 128 KiB.
            let ack = self.take_small_ack();
            self.send.begin_frame(n, ack);
            let appended = self.send.append(&buf[..n]);
            debug_assert!(appended, "a new frame has room");
        }
        self.attachment.expect_reply();
        n
    }

    /// Offset behind everything written so far.
    pub fn sent(&self) -> u64 {
        self.send.sender.sent()
    }

    /// How much of it the peer has read.
    pub fn acked(&self) -> u64 {
        self.send.sender.acked()
    }

    /// See [`Sender::growth`](super::Sender::growth).
    pub fn window_growth(&self) -> u64 {
        self.send.sender.growth()
    }

    /// Uses more of the peer's window.
    pub fn grow_window(&mut self, by: u64) {
        self.send.sender.grow(by);
    }

    /// Uses only the initial window again; false: too much is unacknowledged.
    pub fn shrink_window(&mut self) -> bool {
        self.send.sender.shrink()
    }

    /// Whether the peer's window has room.
    pub fn has_room(&self) -> bool {
        self.send.sender.room() > 0
    }

    /// Whether half of the window or more is unacknowledged.
    pub fn is_window_half_used(&self) -> bool {
        self.send.sender.is_half_used()
    }

    /// Whether what was gathered must be handed down before more is written.
    pub fn is_corked(&self) -> bool {
        self.send.is_corked()
    }

    /// Sends FIN, behind everything that was written. No effect after a FIN or a RESET.
    pub fn finish(&mut self) {
        if self.send.state == SendState::Open {
            self.send.state = SendState::FinSent;
            self.attachment.queue_request(Pending::FIN);
        }
    }

    /// Sends RESET at once, on this stream only; frames behind it do not count.
    pub fn reset(&mut self, code: ResetCode, reason: &str) {
        put_reset(self.send.control(), code, reason);
    }

    /// Sends RESET behind everything that was written, also when that has to be sent again. A code
    /// that was given before stays.
    pub fn reset_after_data(&mut self) {
        let code = match self.send.state {
            SendState::Reset { code } => code,
            _ => ResetCode::Abandoned,
        };
        self.reset_after_data_with(code);
    }

    /// The same, with this code.
    pub fn reset_after_data_with(&mut self, code: ResetCode) {
        self.send.state = SendState::Reset { code };
        self.attachment.queue(Pending::RESET);
    }

    /// Sends PING, which the peer answers.
    pub fn ping(&mut self) {
        self.attachment.queue_request(Pending::PING);
    }

    /// Asks the peer to resume the line over another carrier.
    pub fn request_move(&mut self) {
        self.attachment.queue_request(Pending::MOVE);
    }

    /// Acknowledges the little that [`Receiver::take_ack`](super::Receiver::take_ack) leaves, on an
    /// idle line.
    pub fn acknowledge_all(&mut self) {
        if !self.send.has_open_frame()
            && let Some(consumed) = self.take_small_ack()
        {
            put(self.send.control(), kind::ACK, 0, consumed);
        }
    }

    fn take_small_ack(&mut self) -> Option<u64> {
        // Without a stream it would be lost.
        match self.attachment {
            Attachment::Attached(_) => self.recv.receiver.take_small_ack(),
            Attachment::Detached => None,
        }
    }

    /// Something waits to be handed down that no writer will flush.
    pub fn has_frames(&self) -> bool {
        !self.send.has_open_frame() && self.has_output()
    }

    /// Something waits to be handed down.
    pub fn has_output(&self) -> bool {
        let attached = self.attachment.attached();
        self.send.has_output() || attached.is_some_and(Attached::has_output)
    }

    /// The next bytes for the stream; `None` when there are none. Without a stream, frames gathered
    /// so far are only kept.
    pub fn chunk(&mut self) -> Option<&[u8]> {
        let Self {
            recv,
            send,
            attachment,
            ..
        } = self;
        let Attachment::Attached(attached) = attachment else {
            if send.has_output() {
                send.flush_to_buffer();
            }
            return None;
        };
        if attached.chunk.is_empty() {
            attached.chunk = next_chunk(send, attached, recv.receiver.received());
        }
        (!attached.chunk.is_empty()).then_some(&attached.chunk[..])
    }

    /// `n` bytes of the last chunk were handed down.
    pub fn on_written(&mut self, n: usize) {
        if let Attachment::Attached(attached) = &mut self.attachment
            && attached.on_written(n, self.send.has_output())
        {
            self.unanswered += n as u64;
        }
    }

    // ---- streams

    /// The stream is lost, or is to be replaced. What has arrived whole is kept; the rest will be
    /// sent again.
    pub fn detach(&mut self) {
        if !self.is_attached() {
            return;
        }
        // A violation or a RESET in the input is remembered in `ended`.
        while let Ok(true) = self.process_input() {}
        self.attachment = Attachment::Detached;
        // Payload that was not handed down waits for the next stream; `attach` makes control frames
        // again from the state.
        self.send.flush_to_buffer();
        self.recv.interrupt();
    }

    /// Fences off the present stream: from now on only one of `epoch` or later counts. The position
    /// is for the peer. `None`: that epoch is not newer, or the line has ended.
    pub fn fence(&mut self, epoch: u64) -> Option<Position> {
        if epoch <= self.epoch || self.ended.is_some() || !self.is_resumable() {
            return None;
        }
        // Before the position is taken: what has arrived whole on the old stream is part of it.
        self.detach();
        self.epoch = epoch;
        Some(self.recv.interrupt())
    }

    /// Continues on a stream of this epoch, with a peer at position `peer`.
    ///
    /// # Errors
    /// The position is impossible. The line stays as it is, without a stream.
    pub fn attach(&mut self, epoch: u64, peer: Position) -> Result<(), Violation> {
        let is_fenced = epoch == self.epoch && !self.is_attached() && self.ended.is_none();
        // A peer cannot have a FIN that was not sent, nor have it before the data.
        let is_end_possible =
            !peer.ended || (self.has_sent_fin() && peer.received == self.send.sender.sent());
        if !is_fenced || !is_end_possible {
            return Err(Violation::Position);
        }
        self.send.sender.on_position(peer)?;
        self.send.on_arrived(peer.received);
        let sent = self.send.sender.sent();
        let mut attached = Attached {
            retransmit_from: (peer.received < sent).then_some(peer.received),
            ..Attached::default()
        };
        // Retransmitted payload is acknowledged, so silence behind it is the sign of a stalled
        // path.
        attached.expects_reply = attached.retransmit_from.is_some();
        // DONE is not repeated: the position that this side has sent carries the same.
        match self.send.state {
            SendState::FinSent | SendState::FinAcked if peer.ended => {
                self.send.state = SendState::FinAcked;
            }
            SendState::FinSent | SendState::FinAcked => {
                attached.pending.insert(Pending::FIN);
                attached.expects_reply = true;
            }
            // The first RESET may have been lost with the stream.
            SendState::Reset { .. } => attached.pending.insert(Pending::RESET),
            SendState::Open => {}
        }
        self.attachment = Attachment::Attached(attached);
        self.unanswered = 0;
        // What was read while there was no stream.
        self.acknowledge_all();
        Ok(())
    }

    /// A stream carries the line.
    pub fn is_attached(&self) -> bool {
        self.attachment.attached().is_some()
    }

    /// Payload that was lost with a stream is being sent again.
    pub fn is_retransmitting(&self) -> bool {
        let attached = self.attachment.attached();
        attached.is_some_and(|attached| attached.retransmit_from.is_some())
    }

    /// Counts the streams of the line.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Both ends have agreed that the line may be without a stream.
    pub fn is_resumable(&self) -> bool {
        self.send.is_resumable()
    }

    // ---- state

    /// Why the line ended early, if it has.
    pub fn ended(&self) -> Option<&Ended> {
        self.ended.as_ref()
    }

    /// This side's FIN was sent, or waits to be.
    pub fn has_sent_fin(&self) -> bool {
        matches!(self.send.state, SendState::FinSent | SendState::FinAcked)
    }

    /// This side resets the line behind what it has written.
    pub fn is_reset(&self) -> bool {
        matches!(self.send.state, SendState::Reset { .. })
    }

    /// FIN has arrived.
    pub fn has_received_fin(&self) -> bool {
        self.recv.receiver.has_fin()
    }

    /// The peer has everything that was ever written, and the FIN. A line that is not resumable
    /// has no acknowledgement of a FIN, and relies on its stream.
    pub fn is_delivered(&self) -> bool {
        match self.send.state {
            SendState::FinAcked => true,
            SendState::FinSent => !self.is_resumable(),
            SendState::Open | SendState::Reset { .. } => false,
        }
    }

    /// Both sides have sent FIN and know that it has arrived: the stream may be closed.
    pub fn is_settled(&self) -> bool {
        self.is_delivered() && self.has_received_fin() && !self.has_output()
    }

    /// The peer has asked for the line to be resumed over another carrier.
    pub fn is_move_requested(&self) -> bool {
        let attached = self.attachment.attached();
        attached.is_some_and(|attached| attached.move_requested)
    }

    /// Bytes received, ever.
    pub fn received(&self) -> u64 {
        self.received
    }

    /// Bytes sent since the last that were received, among them some that are answered.
    pub fn unanswered(&self) -> u64 {
        self.unanswered
    }

    /// Bytes sent again, ever.
    pub fn retransmitted(&self) -> u64 {
        self.send.retransmitted()
    }

    /// Bytes kept until they are acknowledged.
    pub fn buffered(&self) -> u64 {
        self.send.buffer.as_ref().map_or(0, SendBuffer::len)
    }
}

/// A retransmission goes first, since the peer takes payload in order only; then control frames
/// behind what was written.
fn next_chunk(send: &mut SendHalf, attached: &mut Attached, received: u64) -> Bytes {
    if let Some(from) = attached.retransmit_from {
        let (chunk, rest) = send.retransmit(from);
        attached.retransmit_from = rest;
        return chunk;
    }
    let pending = std::mem::take(&mut attached.pending);
    if !pending.is_empty() {
        put_pending(send, pending, received);
    }
    send.flush_to_buffer()
}

fn put_pending(send: &mut SendHalf, pending: Pending, received: u64) {
    let (state, sent) = (send.state, send.sender.sent());
    let out = send.control();
    for (frame, kind, value) in [
        (Pending::PONG, kind::PONG, 0),
        (Pending::PING, kind::PING, 0),
        (Pending::MOVE, kind::MOVE, 0),
        (Pending::DONE, kind::DONE, received),
        (Pending::FIN, kind::FIN, sent),
    ] {
        if pending.contains(frame) {
            put(out, kind, 0, value);
        }
    }
    if let SendState::Reset { code } = state
        && pending.contains(Pending::RESET)
    {
        put_reset(out, code, "");
    }
}
