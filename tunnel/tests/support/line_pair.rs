//! Two ends of a line without I/O, and a network between them that does its worst: a sequence of
//! operations drives both, and after each one what was read is a prefix of what was written.

use std::collections::VecDeque;

use throwline_tunnel::proto::line::machine::{Ended, Machine, Read};
use throwline_tunnel::proto::line::{Position, WINDOW};

/// What happens next; numbers are taken modulo what is possible.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Op {
    Write {
        side: bool,
        bytes: u32,
    },
    Read {
        side: bool,
        bytes: u32,
    },
    /// Hands frames down into the stream.
    Send {
        side: bool,
        bytes: u32,
    },
    /// Takes bytes from the stream up.
    Receive {
        side: bool,
        bytes: u32,
    },
    /// Frames are taken in by a writer.
    TakeIn {
        side: bool,
    },
    Finish {
        side: bool,
    },
    Ping {
        side: bool,
    },
    Rest {
        side: bool,
    },
    /// One end, or after it the other, sees that the stream is gone.
    Cut {
        side: bool,
    },
    /// A resumption, as far as it gets.
    Resume {
        lost: Lost,
    },
    /// An epoch that was used is used again.
    Stale,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Lost {
    Nothing,
    Resume,
    Ok,
    /// The stream goes right behind the OK.
    Stream,
}

impl Op {
    /// Any three numbers are an operation.
    pub(crate) fn of(kind: u8, side: bool, bytes: u32) -> Self {
        match kind % 20 {
            0..=3 => Self::Write { side, bytes },
            4..=6 => Self::Read { side, bytes },
            7..=9 => Self::Send { side, bytes },
            10..=12 => Self::Receive { side, bytes },
            13 => Self::TakeIn { side },
            14 if bytes.is_multiple_of(8) => Self::Finish { side },
            14 => Self::Rest { side },
            15 => Self::Ping { side },
            16 => Self::Cut { side },
            17 | 18 => Self::Resume {
                lost: match bytes % 6 {
                    0 => Lost::Resume,
                    1 => Lost::Ok,
                    2 => Lost::Stream,
                    _ => Lost::Nothing,
                },
            },
            _ => Self::Stale,
        }
    }
}

#[derive(Default)]
struct Wire {
    epoch: u64,
    /// What A has put in, and B not yet taken; and the other way.
    ways: [VecDeque<u8>; 2],
}

struct End {
    machine: Machine,
    written: u64,
    read: u64,
    finished: bool,
    saw_end: bool,
}

/// 0 is the local proxy, 1 the agent.
pub(crate) struct Pair {
    ends: [End; 2],
    wire: Wire,
    epoch: u64,
}

/// The byte at an offset of what a side writes.
fn byte(side: usize, offset: u64) -> u8 {
    (offset.wrapping_mul(31) >> 3) as u8 ^ (offset as u8) ^ (side as u8 * 0x55)
}

impl Default for Pair {
    fn default() -> Self {
        let end = || End {
            machine: Machine::new(WINDOW, WINDOW, true),
            written: 0,
            read: 0,
            finished: false,
            saw_end: false,
        };
        Self {
            ends: [end(), end()],
            wire: Wire::default(),
            epoch: 0,
        }
    }
}

impl Pair {
    pub(crate) fn apply(&mut self, op: Op) {
        match op {
            Op::Write { side, bytes } => self.write(side.into(), bytes % 80_000),
            Op::Read { side, bytes } => drop(self.read(side.into(), bytes % 80_000 + 1)),
            Op::Send { side, bytes } => self.send(side.into(), bytes as usize % 80_000),
            Op::Receive { side, bytes } => self.receive(side.into(), bytes as usize % 80_000),
            Op::TakeIn { side } => {
                let _ = self.ends[usize::from(side)].machine.process_input();
            }
            Op::Finish { side } => {
                let end = &mut self.ends[usize::from(side)];
                end.machine.finish();
                end.finished = true;
            }
            Op::Ping { side } => self.ends[usize::from(side)].machine.ping(),
            Op::Rest { side } => self.ends[usize::from(side)].machine.acknowledge_all(),
            Op::Cut { side } => self.ends[usize::from(side)].machine.detach(),
            Op::Resume { lost } => self.resume(lost),
            Op::Stale => self.stale(),
        }
        for end in &self.ends {
            assert!(end.machine.ended().is_none(), "{:?}", end.machine.ended());
            assert!(
                end.machine.buffered() <= u64::from(WINDOW),
                "more than a window is kept"
            );
        }
    }

    fn write(&mut self, side: usize, bytes: u32) {
        let end = &mut self.ends[side];
        if end.finished {
            return;
        }
        let from = end.written;
        let data: Vec<u8> = (from..from + u64::from(bytes))
            .map(|at| byte(side, at))
            .collect();
        end.written += end.machine.write(&data) as u64;
    }

    fn read(&mut self, side: usize, bytes: u32) -> bool {
        let end = &mut self.ends[side];
        let mut buf = vec![0; bytes as usize];
        let mut space = &mut buf[..];
        match end.machine.read(&mut space) {
            Ok(Read::Bytes(n)) => {
                for (at, got) in buf[..n].iter().enumerate() {
                    let at = end.read + at as u64;
                    assert_eq!(*got, byte(1 - side, at), "byte {at} is another");
                }
                end.read += n as u64;
                assert!(!end.saw_end, "bytes behind the end");
                let read = end.read;
                assert!(read <= self.ends[1 - side].written, "more than was written");
                true
            }
            Ok(Read::End) => {
                end.saw_end = true;
                let other = &self.ends[1 - side];
                assert!(other.finished, "an end that nobody said");
                assert_eq!(
                    self.ends[side].read, other.written,
                    "an end before the last byte"
                );
                false
            }
            Ok(Read::Empty) => false,
            Err(Ended::Violation(violation)) => panic!("{violation}"),
            Err(Ended::Reset { .. }) => panic!("reset"),
        }
    }

    /// Whether the side is on the stream that there is.
    fn is_on(&self, side: usize) -> bool {
        let machine = &self.ends[side].machine;
        machine.is_attached() && machine.epoch() == self.wire.epoch
    }

    fn send(&mut self, side: usize, most: usize) {
        let is_on = self.is_on(side);
        let machine = &mut self.ends[side].machine;
        let Some(chunk) = machine.chunk() else { return };
        let n = chunk.len().min(most);
        let bytes = chunk[..n].to_vec();
        machine.on_written(n);
        // Into a stream that is already gone, as far as the others know.
        if is_on {
            self.wire.ways[side].extend(bytes);
        }
    }

    fn receive(&mut self, side: usize, most: usize) {
        if !self.is_on(side) {
            return;
        }
        let way = &mut self.wire.ways[1 - side];
        let n = way.len().min(most);
        let machine = &mut self.ends[side].machine;
        machine.input().extend(way.drain(..n));
        machine.on_input(n);
    }

    fn resume(&mut self, lost: Lost) {
        self.epoch += 1;
        let epoch = self.epoch;
        let asked: Position = self.ends[0].machine.fence(epoch).expect("a newer epoch");
        if lost == Lost::Resume {
            return;
        }
        let answered = self.ends[1].machine.fence(epoch).expect("a newer epoch");
        self.wire = Wire {
            epoch,
            ..Wire::default()
        };
        self.ends[1]
            .machine
            .attach(epoch, asked)
            .expect("a position that can be");
        if lost == Lost::Ok {
            return;
        }
        self.ends[0]
            .machine
            .attach(epoch, answered)
            .expect("a position that can be");
        if lost == Lost::Stream {
            self.ends[0].machine.detach();
        }
    }

    fn stale(&mut self) {
        let epoch = self.epoch;
        for end in &mut self.ends {
            let known = end.machine.epoch();
            assert!(
                end.machine.fence(known).is_none(),
                "an epoch was used twice"
            );
            assert!(epoch >= known);
        }
    }

    /// The network is well again: everything that was written arrives, and both ends.
    pub(crate) fn heal(&mut self) {
        for end in &mut self.ends {
            end.machine.finish();
            end.finished = true;
        }
        self.resume(Lost::Nothing);
        for _ in 0..10_000 {
            for side in [0, 1] {
                self.send(side, usize::MAX);
                self.receive(side, usize::MAX);
                while self.read(side, 65_536) {}
                let _ = self.ends[side].machine.process_and_discard();
            }
            if self.ends.iter().all(|end| end.machine.is_settled()) {
                for side in [0, 1] {
                    assert!(!self.read(side, 1));
                    assert!(self.ends[side].saw_end, "no end was seen");
                    assert_eq!(self.ends[side].machine.buffered(), 0, "kept for nobody");
                }
                return;
            }
        }
        panic!(
            "stands still: {:?}",
            self.ends.each_ref().map(|end| &end.machine)
        );
    }
}
