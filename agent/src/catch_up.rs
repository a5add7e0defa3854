//! What the API server has said goes out before it is told more, where the way out is stuck.
//!
//! kubectl pings every 5 s, also while nothing reaches it. A command may have ended meanwhile, and
//! the API server closed its connection with bytes in its socket that nobody has read. Any byte that
//! it is sent then makes its kernel answer with a reset and throw those bytes away (RFC 9293, section
//! 3.10.7.1), and the command would seem to have said less than it did. So once a line is back, or
//! takes nothing for a while, what comes over it waits until the other direction rests.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use http::uri::PathAndQuery;
use throwline_tunnel::line::Phase;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::watch;
use tokio::time::{Instant, Sleep, sleep_until};
use url::form_urlencoded;

/// Without a byte from the API server for so long, it has said what it had to say: a few round
/// trips in a cluster.
const QUIET: Duration = Duration::from_millis(250);
/// The line has taken nothing for so long: it is stuck, not slow.
const STUCK: Duration = Duration::from_millis(500);
/// Longest wait after the line takes something again: somebody may want to interrupt what never
/// ends. What waits in a socket, 4 MiB at most as Linux is set, is through a line by then.
const LONGEST: Duration = Duration::from_secs(5);

/// When a connection's input waits for its output.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum When {
    /// Port-forwards: streams that know nothing of each other.
    Never,
    /// Terminals, where somebody may interrupt what he does not want to see: after the line was
    /// without its stream.
    Resumed,
    /// Also while the line takes nothing, for so long at most.
    Stuck(Duration),
}

impl When {
    /// By what was asked of the API server; `detached` is how long a line may be cut.
    pub(crate) fn of(target: &PathAndQuery, detached: Duration) -> Self {
        let is_command = ["/exec", "/attach"]
            .iter()
            .any(|end| target.path().ends_with(end));
        let is_terminal = form_urlencoded::parse(target.query().unwrap_or_default().as_bytes())
            .any(|(key, value)| key == "tty" && matches!(&*value, "true" | "1"));
        match (is_command, is_terminal) {
            (false, _) => Self::Never,
            (true, true) => Self::Resumed,
            (true, false) => Self::Stuck(detached),
        }
    }
}

/// The user's side of an upgraded connection.
pub(crate) struct CatchUp<S> {
    io: S,
    when: When,
    line: Option<watch::Receiver<Phase>>,
    epoch: u64,
    output: Output,
    hold: Option<Hold>,
}

/// What the API server says, on its way to the user.
struct Output {
    /// Something was last taken.
    moved: Instant,
    /// Something waits to be taken since then.
    is_blocked: bool,
}

/// Input waits.
struct Hold {
    timer: Pin<Box<Sleep>>,
    /// At the latest, while output is taken.
    until: Instant,
    /// At the latest, while it is not.
    stuck_until: Instant,
}

impl Hold {
    fn new(when: When) -> Self {
        let now = Instant::now();
        let stuck = match when {
            When::Stuck(longest) => longest,
            When::Never | When::Resumed => LONGEST,
        };
        Self {
            timer: Box::pin(sleep_until(now + QUIET)),
            until: now + LONGEST,
            stuck_until: now + stuck.max(LONGEST),
        }
    }

    /// `true`: in vain.
    fn poll(&mut self, cx: &mut Context<'_>, output: &Output) -> Poll<bool> {
        loop {
            ready!(self.timer.as_mut().poll(cx));
            let now = Instant::now();
            let end = match output.is_blocked {
                true if now >= self.stuck_until => return Poll::Ready(true),
                true if output.is_stuck(now) => {
                    self.until = now + LONGEST;
                    now + QUIET
                }
                true => (now + QUIET).min(self.until),
                false => (output.moved + QUIET).min(self.until),
            };
            if end <= now {
                return Poll::Ready(false);
            }
            self.timer.as_mut().reset(end);
        }
    }
}

impl Output {
    fn is_stuck(&self, now: Instant) -> bool {
        self.is_blocked && now >= self.moved + STUCK
    }
}

impl<S> CatchUp<S> {
    pub(crate) fn new(io: S, when: When, line: Option<watch::Receiver<Phase>>) -> Self {
        let epoch = line.as_ref().map_or(0, |line| line.borrow().epoch);
        let output = Output {
            moved: Instant::now(),
            is_blocked: false,
        };
        Self {
            io,
            when,
            line,
            epoch,
            output,
            hold: None,
        }
    }

    /// Whether input has to begin to wait.
    fn must_wait(&mut self) -> bool {
        if self.when == When::Never || self.hold.is_some() {
            return false;
        }
        let epoch = self.line.as_ref().map_or(0, |line| line.borrow().epoch);
        if epoch != self.epoch {
            self.epoch = epoch;
            self.output.moved = Instant::now();
            return true;
        }
        matches!(self.when, When::Stuck(_)) && self.output.is_stuck(Instant::now())
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for CatchUp<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if this.must_wait() {
            this.hold = Some(Hold::new(this.when));
        }
        if let Some(hold) = &mut this.hold {
            let in_vain = ready!(hold.poll(cx, &this.output));
            this.hold = None;
            this.output.moved = Instant::now();
            if in_vain {
                // It is the user who takes nothing, perhaps until more was said to the other side.
                this.when = When::Resumed;
            }
        }
        Pin::new(&mut this.io).poll_read(cx, buf)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for CatchUp<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let this = &mut *self;
        let written = Pin::new(&mut this.io).poll_write(cx, buf);
        let was_blocked = std::mem::replace(&mut this.output.is_blocked, written.is_pending());
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
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, duplex};

    fn phase(epoch: u64) -> Phase {
        Phase {
            epoch,
            attached: true,
            asked_to_move: false,
            let_go: false,
            over: false,
        }
    }

    #[tokio::test(start_paused = true)]
    async fn after_a_resumption_the_other_direction_goes_first() {
        let (near, mut far) = duplex(1024);
        let (phases, line) = watch::channel(phase(0));
        let mut user = CatchUp::new(near, When::Resumed, Some(line));
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
    async fn what_never_rests_is_interrupted_all_the_same() {
        let (near, mut far) = duplex(16);
        let (phases, line) = watch::channel(phase(0));
        let user = CatchUp::new(near, When::Resumed, Some(line));
        phases.send_replace(phase(1));
        far.write_all(b"^C").await.unwrap();
        let (mut reading, mut writing) = tokio::io::split(user);
        let began = Instant::now();
        // Nobody takes what is written.
        let flooding = tokio::spawn(async move { writing.write_all(&[0; 64]).await });
        reading.read_exact(&mut [0; 2]).await.unwrap();
        assert!(began.elapsed() >= LONGEST, "{:?}", began.elapsed());
        assert!(began.elapsed() < LONGEST + QUIET, "{:?}", began.elapsed());
        flooding.abort();
    }

    #[tokio::test(start_paused = true)]
    async fn while_nothing_is_taken_nothing_more_is_said_but_not_for_ever() {
        let (near, mut far) = duplex(16);
        let user = CatchUp::new(near, When::Stuck(Duration::from_secs(60)), None);
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
    async fn who_takes_nothing_until_more_was_said_is_heard_in_the_end() {
        let (near, mut far) = duplex(16);
        let user = CatchUp::new(near, When::Stuck(Duration::from_secs(60)), None);
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

    #[test]
    fn what_waits_goes_by_the_request() {
        let pod = "/api/v1/namespaces/a/pods/b";
        let of = |end: &str| When::of(&format!("{pod}{end}").parse().unwrap(), LONGEST);
        assert_eq!(of("/exec?stdin=true&tty=true"), When::Resumed);
        assert_eq!(of("/attach?tty=false"), When::Stuck(LONGEST));
        assert_eq!(of("/exec"), When::Stuck(LONGEST));
        assert_eq!(of("/portforward"), When::Never);
    }
}
