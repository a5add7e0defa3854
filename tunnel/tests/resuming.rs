//! A line that loses its stream, anywhere and at any time, goes on as if it had not.

#[path = "support/line_pair.rs"]
mod line_pair;

use line_pair::{Lost, Op, Pair};
use proptest::prelude::*;
use throwline_tunnel::proto::line::machine::{Machine, Read};
use throwline_tunnel::proto::line::{Position, WINDOW};

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn any_sequence_of_faults_loses_and_doubles_nothing(
        ops in prop::collection::vec((any::<u8>(), any::<bool>(), any::<u32>()), 0..120)
    ) {
        let mut pair = Pair::default();
        for (kind, side, bytes) in ops {
            pair.apply(Op::of(kind, side, bytes));
        }
        pair.heal();
    }
}

/// One side writes, and the stream is cut after each single byte of what that became.
#[test]
fn a_cut_at_every_byte() {
    let whole = |machine: &mut Machine| {
        assert_eq!(machine.write(&[7; 300]), 300);
        machine.ping();
        machine.finish();
        let mut wire = Vec::new();
        while let Some(chunk) = machine.chunk() {
            let n = chunk.len();
            wire.extend_from_slice(chunk);
            machine.on_written(n);
        }
        wire
    };
    let length = whole(&mut Machine::new(WINDOW, WINDOW, true)).len();
    for cut in 0..=length {
        let mut from = Machine::new(WINDOW, WINDOW, true);
        let mut to = Machine::new(WINDOW, WINDOW, true);
        let wire = whole(&mut from);
        to.input().extend_from_slice(&wire[..cut]);
        // Some of it is read before the cut is seen.
        let mut got = Vec::new();
        let mut buf = [0; 100];
        if let Ok(Read::Bytes(n)) = to.read(&mut &mut buf[..]) {
            got.extend_from_slice(&buf[..n]);
        }
        let at = to.fence(1).unwrap();
        let other = from.fence(1).unwrap();
        from.attach(1, at).unwrap();
        to.attach(1, other).unwrap();
        while let Some(chunk) = from.chunk() {
            let n = chunk.len();
            to.input().extend_from_slice(chunk);
            from.on_written(n);
        }
        let end = loop {
            match to.read(&mut &mut buf[..]) {
                Ok(Read::Bytes(n)) => got.extend_from_slice(&buf[..n]),
                other => break other,
            }
        };
        assert_eq!(end, Ok(Read::End), "cut at {cut}");
        assert_eq!(got, [7; 300], "cut at {cut}");
    }
}

#[test]
fn full_buffers_in_both_directions_go_on() {
    let mut pair = Pair::default();
    for _ in 0..40 {
        for side in [false, true] {
            pair.apply(Op::Write {
                side,
                bytes: 32_000,
            });
            pair.apply(Op::Send {
                side,
                bytes: 79_999,
            });
        }
    }
    for lost in [
        Lost::Resume,
        Lost::Ok,
        Lost::Ok,
        Lost::Stream,
        Lost::Nothing,
    ] {
        pair.apply(Op::Resume { lost });
        pair.apply(Op::Cut { side: true });
    }
    pair.heal();
}

#[test]
fn one_that_was_half_closed_goes_on_in_the_other_direction() {
    let mut pair = Pair::default();
    pair.apply(Op::Write {
        side: false,
        bytes: 10,
    });
    pair.apply(Op::Finish { side: false });
    for side in [false, true] {
        pair.apply(Op::Send {
            side,
            bytes: 79_999,
        });
        pair.apply(Op::Receive {
            side: !side,
            bytes: 79_999,
        });
        pair.apply(Op::Read {
            side: !side,
            bytes: 100,
        });
    }
    for _ in 0..5 {
        pair.apply(Op::Write {
            side: true,
            bytes: 70_000,
        });
        pair.apply(Op::Send {
            side: true,
            bytes: 50_000,
        });
        pair.apply(Op::Receive {
            side: false,
            bytes: 333,
        });
        pair.apply(Op::Resume {
            lost: Lost::Nothing,
        });
    }
    pair.heal();
}

#[test]
fn what_cannot_be_is_refused() {
    let sent_100 = || {
        let mut machine = Machine::new(WINDOW, WINDOW, true);
        machine.write(&[0; 100]);
        machine.fence(3).unwrap();
        machine
    };
    let at = |received, consumed, ended| Position {
        received,
        consumed,
        ended,
    };
    for wrong in [at(101, 0, false), at(10, 20, false), at(100, 100, true)] {
        assert!(sent_100().attach(3, wrong).is_err(), "{wrong:?}");
    }
    assert!(
        sent_100().attach(2, at(0, 0, false)).is_err(),
        "another epoch"
    );
    let mut machine = sent_100();
    machine.attach(3, at(50, 10, false)).unwrap();
    assert!(machine.attach(3, at(50, 10, false)).is_err(), "twice");
    assert!(machine.fence(3).is_none(), "an epoch twice");
    assert!(machine.fence(2).is_none(), "an older epoch");

    let mut ended = sent_100();
    ended.finish();
    assert!(ended.attach(3, at(99, 0, true)).is_err(), "ended too early");

    let mut deaf = Machine::new(WINDOW, WINDOW, false);
    assert!(deaf.fence(1).is_none(), "one that keeps nothing");
}

/// A reader that reads only while there is no stream must not leave the writer without room.
#[test]
fn what_is_read_while_there_is_no_stream_is_acknowledged_later() {
    let mut from = Machine::new(WINDOW, WINDOW, true);
    let mut to = Machine::new(WINDOW, WINDOW, true);
    let move_all = |from: &mut Machine, to: &mut Machine| {
        while let Some(chunk) = from.chunk() {
            let n = chunk.len();
            to.input().extend_from_slice(chunk);
            from.on_written(n);
        }
    };
    while from.has_room() {
        from.write(&[1; 16 * 1024]);
        move_all(&mut from, &mut to);
    }
    let (at, other) = (to.fence(1).unwrap(), from.fence(1).unwrap());
    let mut buf = vec![0; WINDOW as usize];
    assert_eq!(to.read(&mut &mut buf[..]), Ok(Read::Bytes(WINDOW as usize)));
    from.attach(1, at).unwrap();
    to.attach(1, other).unwrap();
    assert!(!from.has_room());
    move_all(&mut to, &mut from);
    let _ = from.process_input();
    assert!(from.has_room());
}

/// An end that only answers expects no answer: two idle ends fall silent.
#[test]
fn two_ends_that_rest_say_nothing() {
    use std::time::{Duration, Instant};
    use throwline_tunnel::proto::line::stall_detector::{Action, StallDetector};

    let mut ends = [(); 2].map(|()| (Machine::new(WINDOW, WINDOW, true), StallDetector::default()));
    let mut seen = [0; 2];
    assert_eq!(ends[0].0.write(b"ahoy"), 4);
    let mut now = Instant::now();
    let mut last_said = 0;
    for step in 0..200 {
        for side in 0..2 {
            // As the looks at a line do, which come twice a second.
            let (machine, detector) = &mut ends[side];
            let heard = machine.received();
            if heard == seen[side] {
                machine.acknowledge_all();
                machine.release_memory();
            }
            seen[side] = heard;
            match detector.check(now, heard, machine.unanswered()) {
                Action::Nothing => {}
                Action::Probe => machine.ping(),
                Action::Suspect => panic!("the other end is there"),
            }
            let mut wire = Vec::new();
            while let Some(chunk) = machine.chunk() {
                let n = chunk.len();
                wire.extend_from_slice(chunk);
                machine.on_written(n);
            }
            if wire.is_empty() {
                continue;
            }
            last_said = step;
            let (other, _) = &mut ends[1 - side];
            other.input().extend_from_slice(&wire);
            other.on_input(wire.len());
            let mut buf = [0; 16];
            while let Ok(Read::Bytes(_)) = other.read(&mut &mut buf[..]) {}
        }
        now += Duration::from_millis(500);
    }
    assert!(last_said < 20, "still talking at look {last_said}");
}

/// What is answered is waited for: a PING into nothing, and bulk that is read no further.
#[test]
fn who_asks_waits() {
    let written = |machine: &mut Machine| {
        while let Some(chunk) = machine.chunk() {
            let n = chunk.len();
            machine.on_written(n);
        }
        machine.unanswered()
    };
    let mut machine = Machine::new(WINDOW, WINDOW, true);
    machine.ping();
    assert!(written(&mut machine) > 0);
    machine.on_input(16);
    assert_eq!(written(&mut machine), 0);
    machine.write(b"ahoy");
    // An answer to earlier frames does not stand for frames that have not left yet.
    machine.on_input(16);
    assert!(written(&mut machine) > 0);
}
