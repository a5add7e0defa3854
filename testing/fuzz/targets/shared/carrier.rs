//! A relay's end of a carrier in memory, fed with bytes by its dialer.

use std::sync::LazyLock;

use throwline_tunnel::carrier::{AcceptConfig, Timing, accept};
use throwline_tunnel::proto::messages::StreamReply;
use throwline_tunnel::{mux, ws};
use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};
use tokio::runtime::{Builder, Runtime};

/// Its clock is paused, so that a deadline costs nothing.
static RUNTIME: LazyLock<Runtime> = LazyLock::new(|| {
    Builder::new_current_thread()
        .enable_all()
        .start_paused(true)
        .build()
        .expect("a runtime")
});

/// Lets a relay read `data`, accept whatever streams it holds, and see the connection end.
pub fn feed(data: &[u8]) {
    RUNTIME.block_on(async {
        let config = AcceptConfig {
            relays: 0,
            instance: "fuzz".to_owned(),
            timing: Timing::default(),
            ws: ws::Config::default(),
            mux: mux::Config::default(),
            max_streams: 16,
        };
        let (ours, theirs) = duplex(64 * 1024);
        let (mut reader, mut writer) = tokio::io::split(theirs);
        let dialler = async {
            // The relay may have hung up.
            let _ = writer.write_all(data).await;
            let _ = writer.shutdown().await;
        };
        let drain = async {
            let mut answer = [0; 4096];
            while let Ok(1..) = reader.read(&mut answer).await {}
        };
        let relay = async {
            let accepted = accept(ours, config, |_, _| Ok(())).await;
            let Ok((connection, _)) = accepted else {
                return;
            };
            let mut incoming = connection.incoming;
            while let Some(stream) = incoming.next().await {
                let Ok(mut stream) = stream.accept(StreamReply::accepted()).await else {
                    continue;
                };
                tokio::spawn(async move {
                    let mut bytes = [0; 1024];
                    while let Ok(1..) = stream.read(&mut bytes).await {}
                });
            }
            connection.carrier.closed().await;
        };
        tokio::join!(dialler, drain, relay);
    });
}

/// One masked binary frame, as a client sends it. The mask is zero: it is the relay's to undo.
#[allow(dead_code, reason = "only one of the two targets frames its bytes")]
pub fn frame(out: &mut Vec<u8>, payload: &[u8]) {
    out.push(0x82);
    let length = u16::try_from(payload.len()).expect("a short payload");
    match u8::try_from(length) {
        Ok(short @ ..126) => out.push(0x80 | short),
        _ => {
            out.push(0x80 | 126);
            out.extend(length.to_be_bytes());
        }
    }
    out.extend([0; 4]);
    out.extend(payload);
}
