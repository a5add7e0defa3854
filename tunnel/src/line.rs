//! The line: a byte stream between a local proxy and an agent with an explicit end, which outlives
//! the stream that carries it.
//!
//! A line has no task. Reading and writing each drive what they need: a reader sends
//! acknowledgements, a writer without room processes acknowledgements. The two may be in different
//! tasks, so the stream below is polled with a waker that wakes both: neither takes the other's
//! wake-up.
//!
//! Small writes are gathered into one DATA frame until a flush, a full frame, or pressure.
//! Unacknowledged bytes are bounded ([`WINDOW`](crate::proto::line::WINDOW)), and the receiver
//! acknowledges what was read, not what arrived: a reader that stops holds up its writer, from end to
//! end. On a long path the bound grows, within a [budget](LineBudgets) that many lines share.
//!
//! An [armed](Line::arm) line does not end with its stream: reads wait, writes fill the window, and
//! the holder of a [`Handle`] attaches another stream.
//!
//! ```
//! use std::time::Duration;
//!
//! use throwline_tunnel::line::{self, Accepted, LineBudgets};
//! use throwline_tunnel::proto::line::resume::Key;
//! use throwline_tunnel::proto::messages::LineHello;
//! use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, duplex};
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let detached = Duration::from_secs(60);
//! let (a, b) = duplex(4096);
//! let (near, far) = tokio::join!(
//!     line::connect(a, LineHello::new([7; 16], detached), LineBudgets::default()),
//!     line::accept(b, detached, LineBudgets::default()),
//! );
//! let (mut near, mut far) = (near?, far?.into_new()?);
//! // Both ends export the key from the TLS session on the line.
//! near.arm(Key::new(&[3; 32]));
//! far.arm(Key::new(&[3; 32]));
//! let near_handle = near.handle().ok_or("not resumable")?;
//! let far_handle = far.handle().ok_or("not resumable")?;
//!
//! near.write_all(b"before, ").await?;
//! near.flush().await?;
//! // The carrier is lost, and the bytes on it. The line is not.
//! near_handle.detach(0);
//! far_handle.detach(0);
//! near.write_all(b"after").await?;
//!
//! let (a, b) = duplex(4096);
//! let accepting = async {
//!     match line::accept(b, detached, LineBudgets::default()).await? {
//!         Accepted::Resume(request) => far_handle.accept_resume(request).await,
//!         Accepted::New(_) => panic!("a new line"),
//!     }
//! };
//! let (resumed, accepted) = tokio::join!(near_handle.resume(a), accepting);
//! resumed?;
//! assert_eq!(accepted?, 1);
//! let mut received = String::new();
//! let (sent, read) = tokio::join!(near.shutdown(), far.read_to_string(&mut received));
//! sent?;
//! read?;
//! assert_eq!(received, "before, after");
//! # Ok(())
//! # }
//! ```
//!
//! The state machine is [`Machine`](crate::proto::line::machine::Machine); here are what a line has
//! beside it (`state`), its stream (`io`), how it ends (`lifecycle`), what it may hold (`memory`), and
//! the attachment of streams (`handle`).

mod error;
mod handle;
mod handshake;
mod io;
mod lifecycle;
mod memory;
mod state;

use std::sync::Arc;

use tokio::io::{AsyncRead, AsyncWrite};

use crate::budget::Budget;
use crate::proto::line::resume::Key;

use self::state::{Shared, Terms};

pub use error::{HANDSHAKE, LineError};
pub use handle::{Handle, ResumeError};
pub use handshake::{Accepted, ResumeRequest, accept, connect};
pub use memory::{LineBudgets, UNREAD, WINDOW_GROWTH};
pub use state::Phase;

/// A line. A clean end (`Ok` with nothing read) means that the peer sent FIN and every byte before
/// it was read; anything else is an error of kind `ConnectionReset` with a [`LineError`] inside.
/// `shutdown` sends FIN; dropping without it sends RESET, best effort. What was written before either
/// still arrives when an armed line is dropped, as long as its [`Handle`] is kept.
pub struct Line<S: AsyncRead + AsyncWrite + Unpin> {
    shared: Arc<Shared<S>>,
}

impl<S: AsyncRead + AsyncWrite + Unpin> std::fmt::Debug for Line<S> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Line")
            .field("phase", &*self.shared.phase.borrow())
            .finish_non_exhaustive()
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> Line<S> {
    fn new(stream: S, terms: Terms, budgets: LineBudgets) -> Self {
        Self {
            shared: Arc::new(Shared::new(stream, terms, budgets)),
        }
    }

    /// The id that the local proxy gave this line.
    pub fn id(&self) -> &[u8] {
        &self.shared.id
    }

    /// Both ends have agreed that the line may be without a stream for a while.
    pub fn is_resumable(&self) -> bool {
        !self.shared.detached.is_zero()
    }

    /// From now on a lost stream does not end the line, if both sides have agreed on that. The key
    /// is exported from the session on this line, at both ends; without it neither could prove that
    /// it may resume the line.
    pub fn arm(&self, key: Key) {
        self.shared.lock().key = Some(key);
    }

    /// From now on, unacknowledged bytes and bytes buffered for the reader are taken from this budget.
    /// While it is used up, the line holds 176 KiB of the former and 256 KiB of the latter and waits
    /// for room: slower, but never stopped by what other lines hold.
    pub fn charge(&self, memory: Budget) {
        self.shared.lock().memory.charge(memory);
    }
}
