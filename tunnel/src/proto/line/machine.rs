//! A line without its I/O: bytes from the stream go in, bytes for the stream come out, and what a
//! lost stream took with it is sent again on the next one.
//!
//! ```text
//!              write ─▶ output ─▶ chunk ─▶ stream        attached
//!                          └─▶ replay (until acknowledged) ─▶ chunk, after `attach`
//!  read ◀─ waiting ◀─ input ◀─ stream
//! ```
//! **Invariant:** what `read` has handed out is a prefix of what the peer wrote, whatever streams
//! were cut in between; `End` comes only behind the last byte before the peer's FIN.

use std::collections::VecDeque;
use std::ops::Range;

use bytes::{Buf as _, BufMut, Bytes, BytesMut};

use crate::piece::SEALED;

use super::replay::Replay;
use super::{
    HEADER_LEN, Header, MAX_DATA, Position, Receiver, ResetCode, Sender, Violation, kind, parse,
    put, put_reset,
};

/// Bytes gathered before they must be handed down: a piece of bulk whole. Below [`MAX_DATA`].
const CORK: usize = SEALED;

/// What a buffer for frames has at least; most hold one request.
const FRAMES: usize = 4 * 1024;

/// What the input may keep while a line waits.
const SPARE: usize = 64 * 1024;

/// Why a line is over before its end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ended {
    /// The peer's fault.
    Violation(Violation),
    /// The peer's decision.
    Reset { code: ResetCode, reason: String },
}

impl From<Violation> for Ended {
    fn from(violation: Violation) -> Self {
        Self::Violation(violation)
    }
}

/// What a read gave.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Read {
    Bytes(usize),
    /// The peer's end; everything before it was read.
    End,
    /// More input is needed.
    Empty,
}

#[derive(Debug)]
pub struct Machine {
    recv: Receiver,
    send: Sender,
    /// Bytes of frames, as they come.
    input: BytesMut,
    /// Of the DATA frame at the front of `input`: bytes of payload still to come.
    data_left: usize,
    /// Payload taken in by a writer that waited for acknowledgements; at most a window.
    waiting: VecDeque<Bytes>,
    /// Bytes in it.
    aside: usize,
    /// Frames on their way down.
    output: BytesMut,
    /// Where in `output` the header of the DATA frame is that writes are still added to.
    open: Option<usize>,
    /// Payload in `output` that is to be kept for a replay.
    framed: Vec<Range<usize>>,
    /// What is being handed down.
    leaving: Bytes,
    /// `None`: a lost stream is the end.
    replay: Option<Replay>,
    /// From where on the replay goes out before anything else.
    again: Option<u64>,
    attached: bool,
    epoch: u64,
    fin_said: bool,
    /// A RESET goes out behind everything that was written, on whatever stream.
    abandoned: bool,
    /// Frames of which one is enough, however often they are owed.
    due: Due,
    /// The peer has our FIN.
    done: bool,
    asked_to_move: bool,
    ended: Option<Ended>,
    heard: u64,
    outstanding: u64,
    /// Something waits to be handed down that the peer will answer, or that it takes as bulk goes on.
    asks: bool,
    replayed: u64,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
struct Due {
    fin: bool,
    done: bool,
    ping: bool,
    pong: bool,
    leave: bool,
    reset: bool,
}

impl Machine {
    /// `resumable`: keeps what is unacknowledged, at most the peer's window.
    pub fn new(own_window: u32, peer_window: u32, resumable: bool) -> Self {
        Self {
            recv: Receiver::new(own_window),
            send: Sender::new(peer_window),
            input: BytesMut::new(),
            data_left: 0,
            waiting: VecDeque::new(),
            aside: 0,
            output: BytesMut::new(),
            open: None,
            framed: Vec::new(),
            leaving: Bytes::new(),
            replay: resumable.then(Replay::default),
            again: None,
            attached: true,
            epoch: 0,
            fin_said: false,
            abandoned: false,
            due: Due::default(),
            done: false,
            asked_to_move: false,
            ended: None,
            heard: 0,
            outstanding: 0,
            asks: false,
            replayed: 0,
        }
    }

    // ---- what comes in

    /// Where the stream's bytes are to be added.
    pub fn input(&mut self) -> &mut BytesMut {
        &mut self.input
    }

    /// `n` bytes were added to the input.
    pub fn on_input(&mut self, n: usize) {
        self.heard += n as u64;
        self.outstanding = 0;
    }

    /// Hands out as much as fits of what has come. Frames already here are looked at, so that a FIN
    /// is seen with the last bytes; what comes behind a FIN is not the reader's business.
    pub fn read(&mut self, out: &mut impl BufMut) -> Result<Read, Ended> {
        let mut taken = 0;
        while let Some(front) = self.waiting.front_mut()
            && out.has_remaining_mut()
        {
            let n = front.len().min(out.remaining_mut());
            out.put_slice(&front[..n]);
            front.advance(n);
            self.aside -= n;
            taken += n;
            if front.is_empty() {
                self.waiting.pop_front();
            }
        }
        // What is set aside was before what is in the input.
        while self.waiting.is_empty() {
            let n = self
                .data_left
                .min(self.input.len())
                .min(out.remaining_mut());
            if n > 0 {
                out.put_slice(&self.input[..n]);
                self.input.advance(n);
                self.data_left -= n;
                taken += n;
            }
            let stepped = match self.recv.is_ended() {
                true => Ok(false),
                false => self.step(),
            };
            match stepped {
                Ok(true) if out.has_remaining_mut() => {}
                Err(ended) if taken == 0 => return Err(ended),
                _ => break,
            }
        }
        if taken > 0 {
            self.recv.consume(taken);
            // Without a stream it would be lost; `attach` makes up for it.
            if self.attached
                && let Some(received) = self.recv.take_ack()
            {
                self.seal();
                put(&mut self.output, kind::ACK, 0, received);
                self.asks = true;
            }
            return Ok(Read::Bytes(taken));
        }
        match self.recv.is_finished() {
            true => Ok(Read::End),
            false => Ok(Read::Empty),
        }
    }

    /// Takes one frame in without a reader: payload is set aside, within the window. True if
    /// something moved.
    pub fn take_in(&mut self) -> Result<bool, Ended> {
        Ok(self.set_aside() || self.step()?)
    }

    /// The same for a line that nobody reads any more.
    pub fn take_in_and_drop(&mut self) -> Result<bool, Ended> {
        let moved = self.take_in()?;
        self.waiting.clear();
        let dropped = std::mem::take(&mut self.aside);
        if dropped > 0 {
            self.recv.consume(dropped);
        }
        Ok(moved)
    }

    /// Takes one header off the input, if it is complete and no payload stands before it.
    fn step(&mut self) -> Result<bool, Ended> {
        if let Some(ended) = &self.ended {
            return Err(ended.clone());
        }
        if self.data_left > 0 {
            return Ok(false);
        }
        let header = match parse(&self.input) {
            Ok(Some(header)) => header,
            Ok(None) => return Ok(false),
            Err(violation) => return Err(self.broken(violation)),
        };
        if let Header::Reset { len, .. } = header
            && self.input.len() < HEADER_LEN + len
        {
            return Ok(false);
        }
        let kind = self.input[0];
        self.input.advance(HEADER_LEN);
        match self.take(header, kind) {
            Ok(()) => Ok(true),
            Err(Ended::Violation(violation)) => Err(self.broken(violation)),
            Err(reset) => {
                self.ended = Some(reset.clone());
                if self.replay.is_some() && self.attached {
                    // All before it has come: whoever said it need not keep it any longer.
                    self.seal();
                    put(&mut self.output, kind::ACK, 0, self.recv.received());
                }
                Err(reset)
            }
        }
    }

    fn take(&mut self, header: Header, kind: u8) -> Result<(), Ended> {
        let resumable = self.replay.is_some();
        match header {
            // Payload counts only behind a header that may stand here.
            Header::Data { offset, len } => {
                self.recv.on_data(offset, len)?;
                self.data_left = len;
            }
            Header::Ack { received } => {
                self.send.on_ack(received)?;
                if let Some(replay) = &mut self.replay {
                    replay.free_to(received);
                }
            }
            Header::Fin { end } => {
                self.recv.on_fin(end)?;
                self.due.done = resumable;
            }
            Header::Reset { code, len } => {
                let reason = self.input.split_to(len);
                let reason = String::from_utf8_lossy(&reason).into_owned();
                return Err(Ended::Reset { code, reason });
            }
            Header::Done { end } if resumable && self.fin_said && end == self.send.sent() => {
                self.done = true;
                if let Some(replay) = &mut self.replay {
                    replay.free_to(end);
                }
            }
            Header::Ping if resumable => self.due.pong = true,
            // Its bytes were what was asked for.
            Header::Pong if resumable => {}
            Header::Move if resumable => self.asked_to_move = true,
            _ => return Err(Violation::OutOfPlace(kind).into()),
        }
        Ok(())
    }

    /// Moves payload out of the way of the frames behind it. The window bounds how much.
    fn set_aside(&mut self) -> bool {
        let n = self.data_left.min(self.input.len());
        if n > 0 {
            self.data_left -= n;
            self.aside += n;
            let payload = self.input.split_to(n).freeze();
            self.waiting.push_back(payload);
        }
        n > 0
    }

    /// Gives back what a burst has left, before the line waits.
    pub fn shrink(&mut self) {
        if self.input.is_empty() && self.input.capacity() > SPARE {
            self.input = BytesMut::new();
        }
    }

    /// Gives back all room that nothing is in, of a line that rests.
    pub fn rest(&mut self) {
        if self.input.is_empty() {
            self.input = BytesMut::new();
        }
        if self.output.is_empty() {
            self.output = BytesMut::new();
        }
        if self.waiting.is_empty() {
            self.waiting = VecDeque::new();
        }
    }

    /// There is payload that a reader could have now.
    pub fn has_waiting(&self) -> bool {
        !self.waiting.is_empty() || (self.data_left > 0 && !self.input.is_empty())
    }

    fn broken(&mut self, violation: Violation) -> Ended {
        let ended = Ended::Violation(violation);
        if self.ended.is_none() {
            if let Ended::Violation(violation) = &ended {
                self.reset(ResetCode::Protocol, &violation.to_string());
            }
            self.ended = Some(ended.clone());
        }
        ended
    }

    /// Lets a stream go on which frames were dropped, doubled or in another order, instead of the
    /// line: what has been taken so far was in order, and the rest comes again. Not for a RESET.
    pub fn forgive(&mut self) -> bool {
        if self.replay.is_none() || !matches!(self.ended, Some(Ended::Violation(_))) {
            return false;
        }
        self.ended = None;
        self.input = BytesMut::new();
        self.detach();
        true
    }

    // ---- what goes out

    /// Takes what window, frame and cork allow; 0 when there is no room.
    pub fn write(&mut self, buf: &[u8]) -> usize {
        if self.fin_said || self.abandoned {
            return 0;
        }
        let most = self
            .send
            .room()
            .min(CORK.saturating_sub(self.output.len()))
            .min(MAX_DATA);
        let n = buf.len().min(most);
        if n == 0 {
            return 0;
        }
        if self.room_in_frame() < n {
            self.seal();
            // Where it costs no write of its own: what waits here for the next 128 KiB is kept
            // over there.
            let ack = self.small_ack();
            let need = n + 2 * HEADER_LEN;
            if self.output.capacity() - self.output.len() < need {
                // Bulk comes in pieces: what grew for each of them would be copied for each.
                let enough = if n < FRAMES { FRAMES } else { CORK };
                self.output.reserve(need.max(enough));
            }
            if let Some(received) = ack {
                put(&mut self.output, kind::ACK, 0, received);
            }
            self.open = Some(self.output.len());
            put(&mut self.output, kind::DATA, 0, self.send.sent());
        }
        self.output.extend_from_slice(&buf[..n]);
        self.send.advance(n);
        self.asks = true;
        n
    }

    /// What was ever written, and how much of it the peer has read.
    pub fn sent(&self) -> u64 {
        self.send.sent()
    }

    pub fn acked(&self) -> u64 {
        self.send.acked()
    }

    /// See [`Sender::may_grow`].
    pub fn may_grow(&self) -> u64 {
        self.send.may_grow()
    }

    /// Uses more of the peer's window.
    pub fn grow(&mut self, by: u64) {
        self.send.grow(by);
    }

    /// Uses as much of it as at first; false: too much is on the way.
    pub fn shrink_window(&mut self) -> bool {
        self.send.shrink()
    }

    /// Payload that was set aside for a reader.
    pub fn aside(&self) -> usize {
        self.aside
    }

    /// Whether the peer's window has room.
    pub fn has_room(&self) -> bool {
        self.send.room() > 0
    }

    /// Whether half of the window or more is on the way.
    pub fn is_window_half_used(&self) -> bool {
        self.send.is_half_used()
    }

    /// Whether what was gathered must be handed down before more is written.
    pub fn is_corked(&self) -> bool {
        self.output.len() + HEADER_LEN >= CORK
    }

    /// Says FIN, behind everything that was written.
    pub fn finish(&mut self) {
        if !self.fin_said {
            self.fin_said = true;
            self.due.fin = true;
            self.asks = true;
        }
    }

    /// Says RESET; nothing counts after it.
    pub fn reset(&mut self, code: ResetCode, reason: &str) {
        self.seal();
        put_reset(&mut self.output, code, reason);
    }

    /// Says RESET behind everything that was written, also when that has to go again.
    pub fn abandon(&mut self) {
        self.abandoned = true;
        self.due.reset = true;
    }

    /// Asks for a sign of life.
    pub fn ping(&mut self) {
        self.due.ping = true;
        self.asks = true;
    }

    /// Asks the peer to take the line up over another carrier.
    pub fn ask_to_move(&mut self) {
        self.due.leave = true;
        self.asks = true;
    }

    /// Acknowledges the little that is left, because the line rests.
    pub fn acknowledge_all(&mut self) {
        if self.open.is_none()
            && let Some(received) = self.small_ack()
        {
            put(&mut self.output, kind::ACK, 0, received);
        }
    }

    fn small_ack(&mut self) -> Option<u64> {
        // Without a stream it would be lost.
        self.attached.then(|| self.recv.take_small_ack()).flatten()
    }

    /// Something waits to be handed down that no writer will flush.
    pub fn has_frames(&self) -> bool {
        self.open.is_none() && self.has_output()
    }

    /// Something waits to be handed down.
    pub fn has_output(&self) -> bool {
        !self.leaving.is_empty()
            || !self.output.is_empty()
            || self.again.is_some()
            || self.due != Due::default()
    }

    /// The next bytes for the stream, until there are none. While there is no stream, what was
    /// gathered is only kept.
    pub fn chunk(&mut self) -> Option<&[u8]> {
        if !self.attached {
            if !self.output.is_empty() {
                self.harvest();
            }
            return None;
        }
        if self.leaving.is_empty() {
            self.leaving = self.next_chunk();
        }
        (!self.leaving.is_empty()).then_some(&self.leaving[..])
    }

    /// `n` bytes of the last chunk were handed down.
    pub fn on_written(&mut self, n: usize) {
        self.leaving.advance(n);
        // What only answers, a PONG or the last ACK of a line that rests, is not answered: were it
        // waited for, two ends that rest would ask each other for ever.
        if self.asks {
            self.outstanding += n as u64;
            self.asks = !self.leaving.is_empty() || !self.output.is_empty() || self.again.is_some();
        }
    }

    fn next_chunk(&mut self) -> Bytes {
        if let Some(from) = self.again {
            return self.chunk_again(from);
        }
        let due = std::mem::take(&mut self.due);
        if due != Due::default() {
            self.seal();
        }
        let one = |out: &mut BytesMut, is_due, kind, value| {
            if is_due {
                put(out, kind, 0, value);
            }
        };
        one(&mut self.output, due.pong, kind::PONG, 0);
        one(&mut self.output, due.ping, kind::PING, 0);
        one(&mut self.output, due.leave, kind::MOVE, 0);
        one(&mut self.output, due.done, kind::DONE, self.recv.received());
        one(&mut self.output, due.fin, kind::FIN, self.send.sent());
        if due.reset {
            put_reset(&mut self.output, ResetCode::Abandoned, "");
        }
        self.harvest()
    }

    fn chunk_again(&mut self, from: u64) -> Bytes {
        let Some(replay) = &self.replay else {
            self.again = None;
            return Bytes::new();
        };
        let mut out = BytesMut::with_capacity(CORK + HEADER_LEN);
        let mut at = from;
        while out.len() < CORK
            && let Some(piece) = replay.piece(at)
        {
            let n = piece.len().min(CORK);
            // At most CORK.
            put(&mut out, kind::DATA, n as u16, at);
            out.extend_from_slice(&piece[..n]);
            at += n as u64;
        }
        self.replayed += at - from;
        self.again = (at < replay.end()).then_some(at);
        out.freeze()
    }

    /// Takes what was gathered, and keeps its payload if it may have to go again.
    fn harvest(&mut self) -> Bytes {
        self.seal();
        let chunk = self.output.split().freeze();
        if let Some(replay) = &mut self.replay {
            for range in self.framed.drain(..) {
                replay.push(chunk.slice(range));
            }
        }
        chunk
    }

    /// No more bytes are added to the frame that is open.
    fn seal(&mut self) {
        if let Some(at) = self.open.take() {
            let payload = at + HEADER_LEN..self.output.len();
            // `room_in_frame` keeps it within MAX_DATA.
            let len = (payload.len() as u16).to_be_bytes();
            self.output[at + 2..at + 4].copy_from_slice(&len);
            if self.replay.is_some() {
                self.framed.push(payload);
            }
        }
    }

    fn room_in_frame(&self) -> usize {
        match self.open {
            Some(at) => MAX_DATA - (self.output.len() - at - HEADER_LEN),
            None => 0,
        }
    }

    // ---- streams that come and go

    /// The stream is lost, or is to be. What has come whole is kept, the rest of it will come again.
    pub fn detach(&mut self) {
        if !self.attached {
            return;
        }
        // A violation or a RESET among it has its word in `ended`.
        while let Ok(true) = self.take_in() {}
        self.attached = false;
        self.harvest();
        self.leaving = Bytes::new();
        self.again = None;
        self.asked_to_move = false;
        self.due = Due::default();
        self.recv.interrupt(std::mem::take(&mut self.data_left));
        self.input = BytesMut::new();
    }

    /// Fences the present stream: from now on only one of `epoch` or later counts. The position is
    /// what the peer must be told. `None`: that epoch is not newer, or the line is over.
    pub fn fence(&mut self, epoch: u64) -> Option<Position> {
        if epoch <= self.epoch || self.ended.is_some() || self.replay.is_none() {
            return None;
        }
        self.detach();
        self.epoch = epoch;
        Some(self.recv.interrupt(0))
    }

    /// Goes on over a stream of this epoch, with a peer that stands at `peer`.
    ///
    /// # Errors
    /// A peer that says what cannot be. The line stays as it is, without a stream.
    pub fn attach(&mut self, epoch: u64, peer: Position) -> Result<(), Violation> {
        let is_next = epoch == self.epoch && !self.attached && self.ended.is_none();
        if !is_next || (peer.ended && !self.fin_said) {
            return Err(Violation::Position);
        }
        let ended_early = peer.ended && peer.received != self.send.sent();
        if ended_early {
            return Err(Violation::Position);
        }
        self.send.on_position(peer)?;
        let sent = self.send.sent();
        if let Some(replay) = &mut self.replay {
            // What has arrived there is not lost again.
            replay.free_to(peer.received);
        }
        self.again = (peer.received < sent).then_some(peer.received);
        self.done |= peer.ended;
        // Our position has told the peer whether we have its end.
        self.due = Due {
            fin: self.fin_said && !peer.ended,
            reset: self.abandoned,
            ..Due::default()
        };
        self.outstanding = 0;
        self.asks = self.again.is_some() || self.due.fin;
        self.attached = true;
        // What was read while there was no stream.
        self.acknowledge_all();
        Ok(())
    }

    pub fn is_attached(&self) -> bool {
        self.attached
    }

    /// What a lost stream took is still going out again.
    pub fn is_replaying(&self) -> bool {
        self.again.is_some()
    }

    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    pub fn is_resumable(&self) -> bool {
        self.replay.is_some()
    }

    // ---- what is known

    pub fn ended(&self) -> Option<&Ended> {
        self.ended.as_ref()
    }

    pub fn fin_said(&self) -> bool {
        self.fin_said
    }

    /// Let go of before its end.
    pub fn is_abandoned(&self) -> bool {
        self.abandoned
    }

    /// The peer has said its end.
    pub fn has_peer_ended(&self) -> bool {
        self.recv.is_ended()
    }

    /// The peer has all that was ever written, and knows that this was all.
    pub fn is_delivered(&self) -> bool {
        self.fin_said && (self.done || self.replay.is_none())
    }

    /// Both sides have said their end and know that the other one has it: the stream may go.
    pub fn is_settled(&self) -> bool {
        self.is_delivered() && self.recv.is_ended() && !self.has_output()
    }

    pub fn asked_to_move(&self) -> bool {
        self.asked_to_move
    }

    /// Bytes that ever came in.
    pub fn heard(&self) -> u64 {
        self.heard
    }

    /// Bytes that went out since the last that came in, among them some that are answered.
    pub fn outstanding(&self) -> u64 {
        self.outstanding
    }

    /// Bytes that were sent again.
    pub fn replayed(&self) -> u64 {
        self.replayed
    }

    /// Bytes kept until they are acknowledged.
    pub fn kept(&self) -> u64 {
        self.replay.as_ref().map_or(0, Replay::len)
    }
}
