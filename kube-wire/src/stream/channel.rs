//! Frames of `v4.channel.k8s.io` and `v5.channel.k8s.io`: a WebSocket message whose first byte is
//! the channel.

/// Why a message is not a frame. Always the client's fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ChannelError {
    /// There is no channel byte.
    #[error("the message is empty")]
    Empty,
    /// The channel is none of those that a client may write to.
    #[error("the client may not write to channel {0}")]
    Channel(u8),
    /// A close frame (version 5) names its channel in exactly one byte.
    #[error("the close frame is malformed")]
    Close,
    /// A resize is JSON with `Width` and `Height`.
    #[error("the terminal size is malformed")]
    Resize,
}

/// One message of a client.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ChannelFrame<'a> {
    /// Bytes for the standard input.
    Stdin(&'a [u8]),
    /// A new size of the terminal.
    Resize {
        /// Lines.
        rows: u16,
        /// Columns.
        columns: u16,
    },
    /// The end of a channel (version 5).
    Close(u8),
}

/// Channel of the standard input.
pub const STDIN: u8 = 0;
/// Channel of the standard output.
pub const STDOUT: u8 = 1;
/// Channel of the standard error.
pub const STDERR: u8 = 2;
/// Channel of the `Status` with which exec and attach end.
pub const STATUS: u8 = 3;
const RESIZE: u8 = 4;
const CLOSE: u8 = 255;

/// Reads one message of a client. `closing`: the version has close frames.
///
/// ```
/// use throwline_kube_wire::stream::channel::{ChannelFrame, decode_channel};
///
/// assert_eq!(decode_channel(b"\0ls\n", true), Ok(ChannelFrame::Stdin(b"ls\n")));
/// assert_eq!(decode_channel(&[255, 0], true), Ok(ChannelFrame::Close(0)));
/// assert!(decode_channel(&[255, 0], false).is_err());
/// ```
pub fn decode_channel(message: &[u8], closing: bool) -> Result<ChannelFrame<'_>, ChannelError> {
    let (channel, rest) = message.split_first().ok_or(ChannelError::Empty)?;
    match *channel {
        STDIN => Ok(ChannelFrame::Stdin(rest)),
        RESIZE => {
            let (columns, rows) = terminal_size(rest).ok_or(ChannelError::Resize)?;
            Ok(ChannelFrame::Resize { rows, columns })
        }
        CLOSE if closing => match rest {
            [channel] => Ok(ChannelFrame::Close(*channel)),
            _ => Err(ChannelError::Close),
        },
        other => Err(ChannelError::Channel(other)),
    }
}

/// `{"Width":…,"Height":…}`, as columns and rows.
pub fn terminal_size(json: &[u8]) -> Option<(u16, u16)> {
    let size: serde_json::Value = serde_json::from_slice(json).ok()?;
    let part = |name: &str| {
        size.get(name)?
            .as_u64()
            .and_then(|number| u16::try_from(number).ok())
    };
    Some((part("Width")?, part("Height")?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_of_frame() {
        assert_eq!(
            decode_channel(b"\0abc", true),
            Ok(ChannelFrame::Stdin(b"abc"))
        );
        assert_eq!(
            decode_channel(b"\x04{\"Width\":80,\"Height\":24}", true),
            Ok(ChannelFrame::Resize {
                rows: 24,
                columns: 80
            })
        );
        assert_eq!(decode_channel(b"\xff\0", true), Ok(ChannelFrame::Close(0)));
    }

    #[test]
    fn what_a_client_may_not_say() {
        assert_eq!(decode_channel(b"", true), Err(ChannelError::Empty));
        assert_eq!(
            decode_channel(b"\x01x", true),
            Err(ChannelError::Channel(1))
        );
        assert_eq!(
            decode_channel(b"\xff\0", false),
            Err(ChannelError::Channel(255))
        );
        assert_eq!(decode_channel(b"\xff", true), Err(ChannelError::Close));
        assert_eq!(
            decode_channel(b"\x04{\"Width\":99999,\"Height\":1}", true),
            Err(ChannelError::Resize)
        );
    }
}
