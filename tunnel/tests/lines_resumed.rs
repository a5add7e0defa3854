//! A line over streams that come and go: its reader and writer notice a pause and nothing else.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::time::Duration;

use bytes::BytesMut;
use support::{eventually, pattern, pipe};
use throwline_tunnel::line::{
    self, Accepted, Handle, Line, LineBudgets, LineError, ResumeError, ResumeRequest,
};
use throwline_tunnel::proto::line::resume::Key;
use throwline_tunnel::proto::line::{self as frames, HEADER_LEN, ResetCode, kind};
use throwline_tunnel::proto::messages::LineHello;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, split};
use tokio::time::timeout;

const LIFE: Duration = Duration::from_secs(120);

struct Ends {
    proxy: Handle<DuplexStream>,
    agent: Handle<DuplexStream>,
}

/// A line whose two ends have the same key, and their keepers.
async fn lines(room: usize) -> (Line<DuplexStream>, Line<DuplexStream>, Ends) {
    let (a, b) = pipe(room);
    let hello = LineHello::new([9; 16], LIFE);
    let (opened, accepted) = tokio::join!(
        line::connect(a, hello, LineBudgets::default()),
        line::accept(b, LIFE, LineBudgets::default())
    );
    let (opened, accepted) = (opened.unwrap(), accepted.unwrap().into_new().unwrap());
    for line in [&opened, &accepted] {
        assert!(line.is_resumable());
        assert!(line.handle().is_none(), "nobody could prove who resumes");
        line.arm(Key::new(&[3; 32]));
    }
    let ends = Ends {
        proxy: opened.handle().unwrap(),
        agent: accepted.handle().unwrap(),
    };
    (opened, accepted, ends)
}

async fn asked(stream: DuplexStream) -> Result<ResumeRequest<DuplexStream>, LineError> {
    match line::accept(stream, LIFE, LineBudgets::default()).await? {
        Accepted::Resume(asked) => Ok(asked),
        Accepted::New(_) => panic!("a new line"),
    }
}

impl Ends {
    /// Puts both ends on a new pipe.
    async fn resume(&self, room: usize) -> Result<(), ResumeError> {
        let (a, b) = pipe(room);
        let agent = async { self.agent.accept_resume(asked(b).await?).await };
        let (resumed, answered) = tokio::join!(self.proxy.resume(a), agent);
        resumed?;
        answered?;
        Ok(())
    }

    /// Both see that the stream is gone.
    fn cut(&self) {
        self.proxy.detach(self.proxy.phase().epoch);
        self.agent.detach(self.agent.phase().epoch);
    }

    /// What keepers do while nothing is to be done.
    fn keep(&self) -> tokio::task::JoinSet<()> {
        let mut keeping = tokio::task::JoinSet::new();
        for handle in [self.proxy.clone(), self.agent.clone()] {
            keeping.spawn(async move {
                handle.drive_until(|phase| phase.over).await;
            });
        }
        keeping
    }
}

/// No keeper stays behind.
async fn all_end(keeping: tokio::task::JoinSet<()>) {
    timeout(Duration::from_secs(10), keeping.join_all())
        .await
        .expect("a keeper stays");
}

async fn flood(line: Line<DuplexStream>, bytes: usize) {
    let (mut reader, mut writer) = split(line);
    let sent = pattern(bytes);
    let write = async {
        for chunk in sent.chunks(10_007) {
            writer.write_all(chunk).await.unwrap();
        }
        writer.shutdown().await.unwrap();
    };
    let mut got = Vec::new();
    let (read, ()) = tokio::join!(reader.read_to_end(&mut got), write);
    read.unwrap();
    assert!(got == sent, "{} of {} bytes", got.len(), sent.len());
}

#[tokio::test]
async fn both_directions_flood_through_many_cuts() {
    let (a, b, ends) = lines(4096).await;
    let mut keeping = ends.keep();
    let ended = async { tokio::join!(flood(a, 8_000_000), flood(b, 8_000_000)) };
    let mut ended = std::pin::pin!(ended);
    let mut resumed = 0;
    let cutting = async {
        while !ends.proxy.phase().over && !ends.agent.phase().over {
            for _ in 0..200 {
                tokio::task::yield_now().await;
            }
            // Sometimes one end knows first, sometimes neither does.
            match resumed % 3 {
                0 => ends.cut(),
                1 => ends.agent.detach(ends.agent.phase().epoch),
                _ => {}
            }
            match ends.resume(1000 + resumed * 37).await {
                Ok(()) => resumed += 1,
                Err(_) if ends.proxy.phase().over || ends.agent.phase().over => break,
                Err(error) => panic!("{error}"),
            }
        }
    };
    let both = async { tokio::join!(&mut ended, cutting) };
    timeout(Duration::from_secs(60), both)
        .await
        .expect("stands still");
    assert!(resumed > 20, "only {resumed} resumptions");
    assert!(ends.proxy.retransmitted() + ends.agent.retransmitted() > 0);
    while let Some(kept) = keeping.join_next().await {
        kept.unwrap();
    }
}

#[tokio::test]
async fn the_last_words_of_a_line_that_was_let_go_still_arrive() {
    let (mut a, mut b, ends) = lines(64 * 1024).await;
    let keeping = ends.keep();
    ends.cut();
    b.write_all(b"the exit code").await.unwrap();
    b.shutdown().await.unwrap();
    drop(b);
    assert!(ends.agent.phase().released && !ends.agent.phase().over);
    ends.resume(64 * 1024).await.unwrap();
    let mut got = Vec::new();
    a.read_to_end(&mut got).await.unwrap();
    assert_eq!(got, b"the exit code");
    a.shutdown().await.unwrap();
    drop(a);
    all_end(keeping).await;
}

#[tokio::test]
async fn what_was_written_before_a_line_broke_off_still_arrives_and_then_the_error() {
    let (mut a, mut b, ends) = lines(64 * 1024).await;
    let keeping = ends.keep();
    ends.cut();
    b.write_all(b"the last words").await.unwrap();
    drop(b);
    assert!(ends.agent.phase().released && !ends.agent.phase().over);
    ends.resume(64 * 1024).await.unwrap();
    let mut got = Vec::new();
    let error = a.read_to_end(&mut got).await.unwrap_err();
    assert_eq!(got, b"the last words");
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    drop(a);
    all_end(keeping).await;
}

#[tokio::test]
async fn a_way_that_is_full_does_not_swallow_what_was_written_before_a_line_broke_off() {
    let (mut a, mut b, ends) = lines(1024).await;
    let keeping = ends.keep();
    let bytes = pattern(30_000);
    b.write_all(&bytes).await.unwrap();
    drop(b);
    assert!(ends.agent.phase().released && !ends.agent.phase().over);
    let mut got = Vec::new();
    let error = a.read_to_end(&mut got).await.unwrap_err();
    assert!(got == bytes, "{} bytes", got.len());
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    drop(a);
    all_end(keeping).await;
}

/// What was handed down is not there yet: it may be lost with the stream.
#[tokio::test]
async fn a_line_that_broke_off_is_kept_until_the_other_end_has_it_all() {
    let (mut a, mut b, ends) = lines(64 * 1024).await;
    let keeping = ends.keep();
    let bytes = pattern(30_000);
    b.write_all(&bytes).await.unwrap();
    drop(b);
    assert!(ends.agent.phase().released && !ends.agent.phase().over);
    // What is in the pipe has not been read.
    let (near, far) = pipe(64 * 1024);
    drop(far);
    let _ = ends.proxy.resume(near).await.unwrap_err();
    ends.agent.detach(0);
    assert!(!ends.agent.phase().over);
    ends.resume(64 * 1024).await.unwrap();
    let mut got = Vec::new();
    let error = a.read_to_end(&mut got).await.unwrap_err();
    assert!(got == bytes, "{} bytes", got.len());
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    all_end(keeping).await;
}

#[tokio::test]
async fn dropped_in_the_middle_it_is_never_a_clean_end() {
    let (a, mut b, ends) = lines(64 * 1024).await;
    ends.cut();
    drop(a);
    assert!(ends.proxy.phase().over);
    let over = ends.resume(1024).await.unwrap_err();
    assert!(matches!(over, ResumeError::Over), "{over}");
    ends.agent.give_up(LineError::Expired {
        after: LIFE,
        why: "nobody came".to_owned(),
    });
    let error = b.read_to_end(&mut Vec::new()).await.unwrap_err();
    assert!(error.to_string().contains("nobody came"), "{error}");
}

#[tokio::test]
async fn who_has_no_key_gets_nothing_and_harms_nothing() {
    let (mut a, mut b, ends) = lines(64 * 1024).await;
    a.write_all(b"before").await.unwrap();
    a.flush().await.unwrap();

    // What a relay could record, and what it could guess.
    let recorded = {
        let (near, mut far) = pipe(4096);
        let proxy = ends.proxy.clone();
        let resuming = tokio::spawn(async move { proxy.resume(near).await });
        let mut head = [0; HEADER_LEN];
        far.read_exact(&mut head).await.unwrap();
        let mut rest = vec![0; usize::from(u16::from_be_bytes([head[2], head[3]]))];
        far.read_exact(&mut rest).await.unwrap();
        drop(far);
        assert!(resuming.await.unwrap().is_err());
        [&head[..], &rest].concat()
    };
    let guess = |epoch: u64| {
        let other = Key::new(&[4; 32]);
        let at = frames::Position {
            received: 0,
            consumed: 0,
            ended: false,
        };
        let message = other.sign_resume(&[9; 16], epoch, [1; 16], at);
        let body = prost::Message::encode_to_vec(&message);
        let mut out = BytesMut::new();
        frames::put(&mut out, kind::RESUME, body.len() as u16, epoch);
        out.extend_from_slice(&body);
        out.to_vec()
    };
    let mut other_epoch = recorded.clone();
    other_epoch[11] += 1;
    // The line is on a later epoch by now, so that what was recorded is old.
    ends.resume(64 * 1024).await.unwrap();
    for attempt in [recorded, other_epoch, guess(3), guess(u64::MAX)] {
        let (mut near, far) = pipe(4096);
        near.write_all(&attempt).await.unwrap();
        let refused = ends
            .agent
            .accept_resume(asked(far).await.unwrap())
            .await
            .unwrap_err();
        assert!(matches!(refused, ResumeError::Forged), "{refused}");
        let mut answer = [0; HEADER_LEN];
        near.read_exact(&mut answer).await.unwrap();
        assert_eq!(answer[0], kind::GONE);
        assert_eq!(u64::from(answer[11]), ResetCode::Unknown.to_u64());
        assert!(
            ends.agent.phase().attached,
            "the rightful stream was harmed"
        );
    }
    a.write_all(b" and after").await.unwrap();
    a.flush().await.unwrap();
    let mut got = [0; 16];
    b.read_exact(&mut got).await.unwrap();
    assert_eq!(&got, b"before and after");
}

/// Frames of one direction, as an intermediary holds them.
async fn frames(stream: &mut DuplexStream, count: usize) -> Vec<Vec<u8>> {
    let mut all = Vec::new();
    for _ in 0..count {
        let mut frame = vec![0; HEADER_LEN];
        stream.read_exact(&mut frame).await.unwrap();
        let length = usize::from(u16::from_be_bytes([frame[2], frame[3]]));
        frame.resize(HEADER_LEN + length, 0);
        stream.read_exact(&mut frame[HEADER_LEN..]).await.unwrap();
        all.push(frame);
    }
    all
}

#[tokio::test]
async fn a_relay_that_drops_doubles_or_reorders_costs_the_stream_and_not_the_line() {
    type Meddle = fn(&mut Vec<Vec<u8>>);
    let meddlers: [(&str, Meddle); 4] = [
        ("drops", |frames| drop(frames.remove(1))),
        ("doubles", |frames| frames.insert(1, frames[0].clone())),
        ("reorders", |frames| frames.swap(0, 2)),
        ("ends", |frames| {
            frames[1] = b"\x12\0\0\0\0\0\0\0\0\0\0\x0e".to_vec()
        }),
    ];
    for (name, meddle) in meddlers {
        let (mut a, mut b, ends) = lines(64 * 1024).await;
        let (near, mut middle_near) = pipe(64 * 1024);
        let (mut middle_far, far) = pipe(64 * 1024);
        let agent = ends.agent.clone();
        let answering =
            tokio::spawn(async move { agent.accept_resume(asked(far).await.unwrap()).await });
        let proxy = ends.proxy.clone();
        let resuming = tokio::spawn(async move { proxy.resume(near).await });
        // The two first messages pass.
        let resume = frames(&mut middle_near, 1).await.concat();
        middle_far.write_all(&resume).await.unwrap();
        let ok = frames(&mut middle_far, 1).await.concat();
        middle_near.write_all(&ok).await.unwrap();
        resuming.await.unwrap().unwrap();
        answering.await.unwrap().unwrap();

        for word in [b"one....", b"two....", b"three.."] {
            a.write_all(word).await.unwrap();
            a.flush().await.unwrap();
        }
        let mut meddled = frames(&mut middle_near, 3).await;
        meddle(&mut meddled);
        middle_far.write_all(&meddled.concat()).await.unwrap();
        let reading = tokio::spawn(async move {
            let mut got = [0; 21];
            b.read_exact(&mut got).await.map(|_| got)
        });
        ends.agent.wait_until(|phase| !phase.attached).await;
        ends.resume(64 * 1024).await.unwrap();
        let got = reading.await.unwrap().unwrap();
        assert_eq!(&got, b"one....two....three..", "a relay that {name}");
    }
}

#[tokio::test]
async fn a_forged_answer_is_not_believed_and_the_next_one_is() {
    let (mut a, mut b, ends) = lines(64 * 1024).await;
    let forge = |kind, body: &[u8], value| {
        let mut out = BytesMut::new();
        frames::put(&mut out, kind, body.len() as u16, value);
        out.extend_from_slice(body);
        out
    };
    let answers = [
        forge(kind::OK, b"", 1),
        forge(kind::OK, &[8; 40], 2),
        forge(kind::GONE, b"no", 7),
        forge(kind::DATA, b"x", 0),
        forge(kind::RESET, b"no", 5),
        BytesMut::new(),
    ];
    for answer in answers {
        let (near, mut far) = pipe(4096);
        far.write_all(&answer).await.unwrap();
        let proxy = ends.proxy.clone();
        let resuming = tokio::spawn(async move { proxy.resume(near).await });
        far.read_exact(&mut [0; HEADER_LEN]).await.unwrap();
        drop(far);
        let error = resuming.await.unwrap().unwrap_err();
        assert!(!matches!(error, ResumeError::Over), "{error}");
        assert!(!ends.proxy.phase().over);
    }
    ends.resume(1024).await.unwrap();
    b.write_all(b"still here").await.unwrap();
    b.flush().await.unwrap();
    let mut got = [0; 10];
    a.read_exact(&mut got).await.unwrap();
    assert_eq!(&got, b"still here");
}

#[tokio::test]
async fn the_agent_can_ask_to_be_left() {
    let (mut a, _b, ends) = lines(64 * 1024).await;
    let reading = tokio::spawn(async move { a.read(&mut [0; 1]).await });
    ends.agent.request_move(ends.agent.phase().epoch);
    ends.proxy.wait_until(|phase| phase.move_requested).await;
    ends.resume(1024).await.unwrap();
    assert!(!ends.proxy.phase().move_requested);
    // For a stream that is left already, it means nothing.
    ends.agent.request_move(0);
    eventually("attached", || ends.proxy.phase().attached).await;
    assert!(!ends.proxy.phase().move_requested);
    reading.abort();
}

#[tokio::test(start_paused = true)]
async fn silence_is_probed_and_answered() {
    use std::time::Instant;
    use throwline_tunnel::proto::line::stall_detector::Action;
    let (mut a, mut b, ends) = lines(64 * 1024).await;
    let answering = tokio::spawn(async move {
        let mut got = [0; 5];
        b.read_exact(&mut got).await.unwrap();
        b.read(&mut [0; 1]).await
    });
    let start = Instant::now();
    let look = |ms| ends.proxy.tick(start + Duration::from_millis(ms));
    assert_eq!(look(0), Action::Nothing);
    a.write_all(b"typed").await.unwrap();
    a.flush().await.unwrap();
    assert_eq!(look(100), Action::Nothing);
    assert_eq!(look(1100), Action::Probe);
    let reading = tokio::spawn(async move { a.read(&mut [0; 1]).await });
    // Both ends have their turn before this clock moves.
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(look(10_000), Action::Nothing);
    reading.abort();
    answering.abort();
}
