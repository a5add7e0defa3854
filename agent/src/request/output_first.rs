//! Holds a client's input until pending output of the API server is delivered.
//!
//! kubectl pings every 5 s, also while nothing reaches it. A command may have ended meanwhile, and the
//! API server closed its connection with unread bytes in its socket. Any further byte towards it is
//! answered by a reset, which discards those bytes (RFC 9293, section 3.10.7.1), and the command's output
//! would seem shorter than it was. So once a line was resumed, or is stuck, its input is held until its
//! output is quiet.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use throwline_kube_wire::http1::target::Target;
use throwline_kube_wire::stream::is_command;
use throwline_tunnel::line::Phase;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::watch;
use tokio::time::{Instant, Sleep, sleep_until};
use url::form_urlencoded;

use super::read_ahead::SlowReader;

/// Without a byte from the API server for so long, its output is complete: a few round trips in a
/// cluster.
const QUIET: Duration = Duration::from_millis(250);
/// The same for what may wait: kubectl's pings. An API server on a busy machine may pause for longer than
/// [`QUIET`] between two pieces of its output.
const QUIET_FOR_PINGS: Duration = Duration::from_secs(1);
/// A line that accepts nothing for so long is stuck, not slow.
const STUCK: Duration = Duration::from_millis(500);
/// Longest hold of a ping: kubectl gives a connection up after 61 s without an answer to one.
const PINGED: Duration = Duration::from_secs(45);
/// Longest hold at a line that is stuck again and again: megabytes are still queued before the answer to
/// a ping then, and at 1 MB/s they take another half a minute. It restarts when the line gets another
/// stream: the network was stuck and not the reader, and the rest is delivered soon.
const SLOW: Duration = Duration::from_secs(10);
/// Longest hold after the line accepts output again: the input may be an interrupt of endless output. The
/// contents of a socket, 4 MiB at most with the defaults of Linux, are through a line by then.
const LONGEST: Duration = Duration::from_secs(5);

/// When a connection's input is held for its output.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum HoldPolicy {
    /// Port-forwards: their streams are independent.
    Never,
    /// Terminals, whose input may be an interrupt: only after the line was resumed.
    AfterResumption,
    /// Also while the line is stuck, for so long at most.
    WhileStuck(Duration),
    /// Commands without input: all that a client sends is kubectl's pings. They are held until the output
    /// is quiet; for so long at most while the line is stuck.
    UntilQuiet(Duration),
}

impl HoldPolicy {
    fn quiet(self) -> Duration {
        match self {
            Self::UntilQuiet(_) => QUIET_FOR_PINGS,
            Self::Never | Self::AfterResumption | Self::WhileStuck(_) => QUIET,
        }
    }

    /// By the request; `detached` is how long a line may be without a stream.
    pub(crate) fn of(target: &Target, detached: Duration) -> Self {
        let is_command = is_command(target.path());
        let has = |flag: &str| {
            form_urlencoded::parse(target.query().unwrap_or_default().as_bytes())
                .any(|(key, value)| key == flag && matches!(&*value, "true" | "1"))
        };
        match is_command {
            false => Self::Never,
            true if has("tty") => Self::AfterResumption,
            true if has("stdin") => Self::WhileStuck(detached),
            true => Self::UntilQuiet(detached),
        }
    }
}

/// The user's side of an upgraded connection.
pub(crate) struct OutputFirst<S> {
    io: S,
    policy: HoldPolicy,
    line: Option<watch::Receiver<Phase>>,
    epoch: u64,
    output: Output,
    hold: Option<Hold>,
    slow_reader: SlowReader,
}

/// Output of the API server on its way to the user.
struct Output {
    /// When the line last accepted output.
    moved: Instant,
    /// Output waits since then.
    is_blocked: bool,
}

/// Input is held.
struct Hold {
    timer: Pin<Box<Sleep>>,
    /// Output is complete after so long without a byte.
    quiet: Duration,
    began: Instant,
    /// Since when the line is stuck though it has accepted something during the hold.
    slow_since: Option<Instant>,
    /// The line's stream at that time; `None` while it has none.
    stream: Option<u64>,
    longest: Duration,
    /// The latest end, while the line accepts output.
    until: Instant,
    /// The latest end, while it does not.
    stuck_until: Instant,
}

impl Hold {
    fn new(policy: HoldPolicy, stream: Option<u64>) -> Self {
        let now = Instant::now();
        let stuck = match policy {
            HoldPolicy::WhileStuck(longest) | HoldPolicy::UntilQuiet(longest) => longest,
            HoldPolicy::Never | HoldPolicy::AfterResumption => LONGEST,
        };
        let longest = match policy {
            HoldPolicy::UntilQuiet(_) => PINGED,
            _ => LONGEST,
        };
        Self {
            timer: Box::pin(sleep_until(now + policy.quiet())),
            quiet: policy.quiet(),
            began: now,
            slow_since: None,
            stream,
            longest,
            until: now + longest,
            stuck_until: now + stuck.max(LONGEST),
        }
    }

    /// `true`: the output is still not delivered. `stream`: the line's, if it has one now.
    fn poll(&mut self, cx: &mut Context<'_>, output: &Output, stream: Option<u64>) -> Poll<bool> {
        loop {
            ready!(self.timer.as_mut().poll(cx));
            let now = Instant::now();
            if stream.is_none() || stream != self.stream {
                self.stream = stream;
                self.slow_since = None;
            }
            if output.is_stuck(now) && output.moved > self.began {
                self.slow_since.get_or_insert(now);
            }
            let is_late = self.slow_since.is_some_and(|since| now >= since + SLOW);
            let end = match output.is_blocked {
                _ if is_late => now,
                true if now >= self.stuck_until => return Poll::Ready(true),
                true if output.is_stuck(now) => {
                    self.until = now + self.longest;
                    now + QUIET
                }
                true => (now + QUIET).min(self.until),
                false => (output.moved + self.quiet).min(self.until),
            };
            if end <= now {
                return Poll::Ready(false);
            }
            self.timer.as_mut().reset(end);
        }
    }
}

impl Output {
    fn is_busy(&self, now: Instant, quiet: Duration) -> bool {
        self.is_blocked || now < self.moved + quiet
    }

    fn is_stuck(&self, now: Instant) -> bool {
        self.is_blocked && now >= self.moved + STUCK
    }
}

impl<S> OutputFirst<S> {
    /// `slow_reader` is notified when the line accepts nothing.
    pub(crate) fn new(
        io: S,
        policy: HoldPolicy,
        line: Option<watch::Receiver<Phase>>,
        slow_reader: SlowReader,
    ) -> Self {
        let epoch = line.as_ref().map_or(0, |line| line.borrow().epoch);
        let output = Output {
            moved: Instant::now(),
            is_blocked: false,
        };
        Self {
            io,
            policy,
            line,
            epoch,
            output,
            hold: None,
            slow_reader,
        }
    }

    /// The number of the line's stream; `None` while it has none.
    fn stream(&self) -> Option<u64> {
        let Some(line) = &self.line else {
            return Some(self.epoch);
        };
        let phase = line.borrow();
        phase.attached.then_some(phase.epoch)
    }

    /// Whether a hold of input has to begin.
    fn must_hold(&mut self) -> bool {
        if self.policy == HoldPolicy::Never || self.hold.is_some() {
            return false;
        }
        let epoch = self.line.as_ref().map_or(0, |line| line.borrow().epoch);
        if epoch != self.epoch {
            self.epoch = epoch;
            self.output.moved = Instant::now();
            return true;
        }
        match self.policy {
            HoldPolicy::WhileStuck(_) => self.output.is_stuck(Instant::now()),
            HoldPolicy::UntilQuiet(_) => self.output.is_busy(Instant::now(), self.policy.quiet()),
            HoldPolicy::Never | HoldPolicy::AfterResumption => false,
        }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for OutputFirst<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if this.must_hold() {
            this.hold = Some(Hold::new(this.policy, this.stream()));
        }
        let stream = this.stream();
        if let Some(hold) = &mut this.hold {
            let is_undelivered = ready!(hold.poll(cx, &this.output, stream));
            this.hold = None;
            this.output.moved = Instant::now();
            if is_undelivered && matches!(this.policy, HoldPolicy::WhileStuck(_)) {
                // The client reads nothing, perhaps until its own input has an effect.
                this.policy = HoldPolicy::AfterResumption;
            }
        }
        Pin::new(&mut this.io).poll_read(cx, buf)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for OutputFirst<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let this = &mut *self;
        let written = Pin::new(&mut this.io).poll_write(cx, buf);
        let was_blocked = std::mem::replace(&mut this.output.is_blocked, written.is_pending());
        if this.output.is_blocked && !was_blocked {
            this.slow_reader.notify();
        }
        if !(was_blocked && this.output.is_blocked) {
            this.output.moved = Instant::now();
        }
        written
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use throwline_tunnel::proto::traffic::TrafficClass;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, duplex};

    fn phase(epoch: u64) -> Phase {
        Phase {
            epoch,
            attached: true,
            move_requested: false,
            released: false,
            over: false,
            class: TrafficClass::Interactive,
        }
    }

    #[tokio::test(start_paused = true)]
    async fn after_a_resumption_the_other_direction_goes_first() {
        let (near, mut far) = duplex(1024);
        let (phases, line) = watch::channel(phase(0));
        let mut user = OutputFirst::new(
            near,
            HoldPolicy::AfterResumption,
            Some(line),
            SlowReader::default(),
        );
        let (mut byte, began) = ([0; 1], Instant::now());
        far.write_all(b"12345").await.unwrap();
        user.read_exact(&mut byte).await.unwrap();
        assert_eq!(began.elapsed(), Duration::ZERO);

        phases.send_replace(phase(1));
        let (mut reading, mut writing) = tokio::io::split(user);
        let server = async {
            for _ in 0..4 {
                tokio::time::sleep(Duration::from_millis(100)).await;
                writing.write_all(b"x").await.unwrap();
            }
        };
        let (read, ()) = tokio::join!(reading.read_exact(&mut byte), server);
        read.unwrap();
        assert!(
            began.elapsed() >= Duration::from_millis(650),
            "{:?}",
            began.elapsed()
        );
        assert!(
            began.elapsed() < Duration::from_millis(700),
            "{:?}",
            began.elapsed()
        );

        let then = Instant::now();
        reading.read_exact(&mut byte).await.unwrap();
        assert_eq!(then.elapsed(), Duration::ZERO);
    }

    #[tokio::test(start_paused = true)]
    async fn endless_output_can_be_interrupted() {
        let (near, mut far) = duplex(16);
        let (phases, line) = watch::channel(phase(0));
        let user = OutputFirst::new(
            near,
            HoldPolicy::AfterResumption,
            Some(line),
            SlowReader::default(),
        );
        phases.send_replace(phase(1));
        far.write_all(b"^C").await.unwrap();
        let (mut reading, mut writing) = tokio::io::split(user);
        let began = Instant::now();
        // What is written has no reader.
        let flooding = tokio::spawn(async move { writing.write_all(&[0; 64]).await });
        reading.read_exact(&mut [0; 2]).await.unwrap();
        assert!(began.elapsed() >= LONGEST, "{:?}", began.elapsed());
        assert!(began.elapsed() < LONGEST + QUIET, "{:?}", began.elapsed());
        flooding.abort();
    }

    #[tokio::test(start_paused = true)]
    async fn input_is_held_while_the_line_is_stuck_within_a_bound() {
        let (near, mut far) = duplex(16);
        let user = OutputFirst::new(
            near,
            HoldPolicy::WhileStuck(Duration::from_secs(60)),
            None,
            SlowReader::default(),
        );
        let (mut reading, mut writing) = tokio::io::split(user);
        let began = Instant::now();
        let flooding = tokio::spawn(async move {
            writing.write_all(&[0; 64]).await.unwrap();
            std::future::pending::<()>().await;
        });
        far.write_all(b"1").await.unwrap();
        reading.read_exact(&mut [0; 1]).await.unwrap();
        assert!(began.elapsed() < STUCK, "it may only be slow");
        tokio::time::sleep(Duration::from_secs(1)).await;
        far.write_all(b"2").await.unwrap();
        let taking = async {
            tokio::time::sleep(Duration::from_secs(9)).await;
            far.read_exact(&mut [0; 64]).await.unwrap();
        };
        let mut byte = [0; 1];
        let (read, ()) = tokio::join!(reading.read_exact(&mut byte), taking);
        read.unwrap();
        assert!(began.elapsed() >= Duration::from_secs(10) + QUIET);
        assert!(began.elapsed() < Duration::from_secs(11));
        flooding.abort();
    }

    #[tokio::test(start_paused = true)]
    async fn input_of_a_client_that_reads_nothing_is_delivered_in_the_end() {
        let (near, mut far) = duplex(16);
        let user = OutputFirst::new(
            near,
            HoldPolicy::WhileStuck(Duration::from_secs(60)),
            None,
            SlowReader::default(),
        );
        let (mut reading, mut writing) = tokio::io::split(user);
        let began = Instant::now();
        let flooding = tokio::spawn(async move { writing.write_all(&[0; 64]).await });
        tokio::time::sleep(Duration::from_secs(1)).await;
        far.write_all(b"12").await.unwrap();
        reading.read_exact(&mut [0; 1]).await.unwrap();
        assert!(began.elapsed() >= Duration::from_secs(61));
        assert!(began.elapsed() < Duration::from_secs(62));
        tokio::time::sleep(Duration::from_secs(1)).await;
        let then = Instant::now();
        reading.read_exact(&mut [0; 1]).await.unwrap();
        assert_eq!(then.elapsed(), Duration::ZERO);
        flooding.abort();
    }

    #[tokio::test(start_paused = true)]
    async fn a_ping_to_a_command_without_input_waits_until_its_output_is_quiet() {
        let (near, mut far) = duplex(1024);
        let user = OutputFirst::new(
            near,
            HoldPolicy::UntilQuiet(LONGEST),
            None,
            SlowReader::default(),
        );
        let (mut reading, mut writing) = tokio::io::split(user);
        tokio::time::sleep(QUIET).await;
        let began = Instant::now();
        let output = tokio::spawn(async move {
            for _ in 0..100 {
                writing.write_all(b"output").await.unwrap();
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
            writing
        });
        let taking = tokio::spawn(async move {
            far.write_all(b"ping").await.unwrap();
            far.read_exact(&mut [0; 600]).await.unwrap();
            far
        });
        tokio::time::sleep(Duration::from_millis(10)).await;
        reading.read_exact(&mut [0; 4]).await.unwrap();
        assert!(
            began.elapsed() >= Duration::from_millis(9_900) + QUIET_FOR_PINGS,
            "{:?}",
            began.elapsed()
        );
        assert!(
            began.elapsed() < Duration::from_millis(10_200) + QUIET_FOR_PINGS,
            "{:?}",
            began.elapsed()
        );
        drop((output.await.unwrap(), taking.await.unwrap()));
    }

    #[tokio::test(start_paused = true)]
    async fn a_command_with_endless_output_is_pinged_in_time() {
        let (near, mut far) = duplex(1024);
        let user = OutputFirst::new(
            near,
            HoldPolicy::UntilQuiet(LONGEST),
            None,
            SlowReader::default(),
        );
        let (mut reading, mut writing) = tokio::io::split(user);
        let output = tokio::spawn(async move {
            while writing.write_all(b"output").await.is_ok() {
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        });
        let began = Instant::now();
        far.write_all(b"ping").await.unwrap();
        let taking = tokio::spawn(async move { far.read_to_end(&mut Vec::new()).await });
        reading.read_exact(&mut [0; 4]).await.unwrap();
        assert!(began.elapsed() >= PINGED && began.elapsed() < PINGED + QUIET * 2);
        output.abort();
        taking.abort();
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_with_a_slow_reader_is_pinged_in_time() {
        for policy in [
            HoldPolicy::WhileStuck(PINGED * 3),
            HoldPolicy::UntilQuiet(PINGED * 3),
        ] {
            let (near, mut far) = duplex(16);
            let user = OutputFirst::new(near, policy, None, SlowReader::default());
            let (mut reading, mut writing) = tokio::io::split(user);
            let output =
                tokio::spawn(async move { while writing.write_all(&[0; 64]).await.is_ok() {} });
            tokio::time::sleep(STUCK * 2).await;
            let began = Instant::now();
            far.write_all(b"ping").await.unwrap();
            let taking = tokio::spawn(async move {
                while far.read_exact(&mut [0; 8]).await.is_ok() {
                    tokio::time::sleep(STUCK * 3).await;
                }
            });
            reading.read_exact(&mut [0; 4]).await.unwrap();
            assert!(
                began.elapsed() < SLOW + STUCK * 6,
                "{policy:?}: {:?}",
                began.elapsed()
            );
            output.abort();
            taking.abort();
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_line_that_was_silent_is_not_a_slow_reader() {
        let (near, mut far) = duplex(16);
        let (phases, line) = watch::channel(phase(0));
        let policy = HoldPolicy::UntilQuiet(PINGED * 3);
        let user = OutputFirst::new(near, policy, Some(line), SlowReader::default());
        let (mut reading, mut writing) = tokio::io::split(user);
        let output = tokio::spawn(async move {
            writing.write_all(&[0; 64]).await.unwrap();
            std::future::pending::<()>().await;
        });
        tokio::time::sleep(QUIET).await;
        let began = Instant::now();
        far.write_all(b"ping").await.unwrap();
        let taking = async {
            tokio::time::sleep(QUIET).await;
            // Some of it is taken after the ping, then nothing: a silent network.
            far.read_exact(&mut [0; 8]).await.unwrap();
            tokio::time::sleep(SLOW - STUCK).await;
            phases.send_modify(|phase| phase.attached = false);
            tokio::time::sleep(SLOW).await;
            phases.send_replace(phase(1));
            tokio::time::sleep(SLOW - STUCK).await;
            let then = began.elapsed();
            far.read_exact(&mut [0; 56]).await.unwrap();
            then
        };
        let passed = async {
            reading.read_exact(&mut [0; 4]).await.unwrap();
            began.elapsed()
        };
        let (passed, all_taken) = tokio::join!(passed, taking);
        assert!(all_taken > SLOW * 2, "{all_taken:?}");
        assert!(passed >= all_taken, "{passed:?} but {all_taken:?}");
        output.abort();
    }

    #[test]
    fn the_policy_follows_from_the_request() {
        let pod = "/api/v1/namespaces/a/pods/b";
        let of = |end: &str| HoldPolicy::of(&format!("{pod}{end}").parse().unwrap(), LONGEST);
        assert_eq!(of("/exec?stdin=true&tty=true"), HoldPolicy::AfterResumption);
        assert_eq!(
            of("/attach?tty=false&stdin=1"),
            HoldPolicy::WhileStuck(LONGEST)
        );
        assert_eq!(of("/exec?stdin=true"), HoldPolicy::WhileStuck(LONGEST));
        assert_eq!(of("/exec"), HoldPolicy::UntilQuiet(LONGEST));
        assert_eq!(of("/portforward"), HoldPolicy::Never);
    }
}
