//! The sockets between a container and its client, which lose what waits in them.
//!
//! On a real cluster the output of a command passes through container runtime, kubelet and API server, and
//! megabytes of it wait in their sockets while its client takes nothing. When the command has ended, each of
//! them closes its side; what is sent to a socket that is closed is answered by a reset, and a reset throws
//! away what the socket still holds (RFC 9293, section 3.10.7.1).

use std::future::Future;

use tokio::io::{AsyncWriteExt as _, copy, duplex, split};

use super::transport::Io;

/// Runs `work` on a connection to the client behind `io` that holds so many bytes, and carries on what
/// waits there when `work` is over, until the client sends something.
pub(super) async fn lossy<F>(io: Io, bytes: usize, work: impl FnOnce(Io) -> F)
where
    F: Future<Output = ()>,
{
    let (near, far) = duplex(bytes);
    let (mut from_client, mut to_client) = split(io);
    let (mut output, mut input) = split(far);
    let outward = async {
        copy(&mut output, &mut to_client).await?;
        to_client.shutdown().await
    };
    // Ends at the client's end, and with an error where it speaks to a command that is over.
    let inward = copy(&mut from_client, &mut input);
    let carried = async {
        let outcome = tokio::select! {
            outcome = outward => outcome,
            outcome = inward => outcome.map(drop),
        };
        if let Err(error) = outcome {
            tracing::debug!(%error, "what waited for a client is lost");
        }
    };
    // The last `near` goes with the work, or with what the work has spawned.
    tokio::join!(carried, work(Box::pin(near)));
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, DuplexStream};

    use super::*;

    const SAID: usize = 100_000;

    /// A command that writes all that, and ends; its client, behind a socket of 1 KiB.
    async fn ended() -> (DuplexStream, tokio::task::JoinHandle<()>) {
        let (client, server) = duplex(1024);
        let (over, is_over) = tokio::sync::oneshot::channel();
        let running = tokio::spawn(lossy(Box::pin(server), SAID, |mut io| async move {
            io.write_all(&[7; SAID]).await.unwrap();
            drop(io);
            over.send(()).unwrap();
        }));
        is_over.await.unwrap();
        (client, running)
    }

    #[tokio::test]
    async fn a_client_that_says_nothing_gets_all() {
        let (mut client, running) = ended().await;
        let mut read = Vec::new();
        client.read_to_end(&mut read).await.unwrap();
        assert_eq!(read.len(), SAID);
        running.await.unwrap();
    }

    #[tokio::test]
    async fn a_byte_to_a_command_that_is_over_loses_what_waits() {
        let (mut client, running) = ended().await;
        client.write_all(b"ping").await.unwrap();
        running.await.unwrap();
        let mut read = Vec::new();
        client.read_to_end(&mut read).await.unwrap();
        assert!(read.len() < SAID, "{}", read.len());
    }

    #[tokio::test]
    async fn while_the_command_runs_its_input_comes() {
        let (mut client, server) = duplex(1024);
        let running = tokio::spawn(lossy(Box::pin(server), SAID, |mut io| async move {
            let mut heard = [0; 4];
            io.read_exact(&mut heard).await.unwrap();
            io.write_all(&heard).await.unwrap();
        }));
        client.write_all(b"ping").await.unwrap();
        let mut read = Vec::new();
        client.read_to_end(&mut read).await.unwrap();
        assert_eq!(read, b"ping");
        running.await.unwrap();
    }
}
