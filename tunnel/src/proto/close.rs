//! Close codes: how a carrier ended, as numbers on the wire and as sentences for people.

use super::origin;

/// WebSocket close codes that Throwline sends and understands (RFC 6455 section 7.4; 4000–4999
/// are ours).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum CloseCode {
    /// 1000: both are done.
    Normal,
    /// 1001: the sender goes away (a relay drains, a process ends).
    GoingAway,
    /// 1002: the receiver of this code broke the protocol.
    Protocol,
    /// 1003: a kind of message that is never sent here, such as text.
    Unsupported,
    /// 1006: the connection was cut without a code. Never on the wire.
    Abnormal,
    /// 1009: a message over the limit.
    TooBig,
    /// 1011: the sender of this code failed.
    Internal,
    /// 4000: no common protocol version.
    Version,
    /// 4001: the proof was not accepted.
    Unauthenticated,
    /// 4002: the identity was revoked.
    Revoked,
    /// 4003: the certificate ended.
    Expired,
    /// 4004: over a limit; come back later.
    Limit,
    /// 4005: the other side was silent, or took no bytes, for too long.
    Timeout,
    /// A code this build does not know.
    Other(u16),
}

impl CloseCode {
    /// The code on the wire.
    pub fn to_u16(self) -> u16 {
        match self {
            Self::Normal => 1000,
            Self::GoingAway => 1001,
            Self::Protocol => 1002,
            Self::Unsupported => 1003,
            Self::Abnormal => 1006,
            Self::TooBig => 1009,
            Self::Internal => 1011,
            Self::Version => 4000,
            Self::Unauthenticated => 4001,
            Self::Revoked => 4002,
            Self::Expired => 4003,
            Self::Limit => 4004,
            Self::Timeout => 4005,
            Self::Other(code) => code,
        }
    }

    /// The code for a number on the wire.
    pub fn from_u16(code: u16) -> Self {
        match code {
            1000 => Self::Normal,
            1001 => Self::GoingAway,
            1002 => Self::Protocol,
            1003 => Self::Unsupported,
            1006 => Self::Abnormal,
            1009 => Self::TooBig,
            1011 => Self::Internal,
            4000 => Self::Version,
            4001 => Self::Unauthenticated,
            4002 => Self::Revoked,
            4003 => Self::Expired,
            4004 => Self::Limit,
            4005 => Self::Timeout,
            other => Self::Other(other),
        }
    }

    /// Whether dialling again at once, with the same identity, can help.
    pub fn is_transient(self) -> bool {
        !matches!(
            self,
            Self::Version | Self::Unauthenticated | Self::Revoked | Self::Expired
        )
    }
}

impl std::fmt::Display for CloseCode {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Normal => "closed normally",
            Self::GoingAway => "the closing side is going away",
            Self::Protocol => "the side that was closed broke the protocol",
            Self::Unsupported => {
                "the side that was closed sent a kind of message that is not used here"
            }
            Self::Abnormal => "the connection was cut without a close code",
            Self::TooBig => "the side that was closed sent a message over the limit",
            Self::Internal => "the closing side failed",
            Self::Version => "the two sides share no protocol version",
            Self::Unauthenticated => "the relay did not accept the proof of identity",
            Self::Revoked => "the identity was revoked",
            Self::Expired => "the certificate has expired",
            Self::Limit => "the side that was closed is over a limit",
            Self::Timeout => "the side that was closed was silent or took no bytes for too long",
            Self::Other(code) => return write!(f, "closed with code {code}"),
        })
    }
}

/// Who ended the carrier.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ClosedBy {
    /// This end closed it.
    Us,
    /// The peer sent a close frame.
    Peer,
    /// There was no close frame: a reset, an EOF, a dead link.
    Network,
}

/// How a carrier ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CloseReason {
    /// The close code.
    pub code: CloseCode,
    /// The end that closed it.
    pub by: ClosedBy,
    /// The closing side's words, for logs; at most 123 bytes on the wire.
    pub reason: String,
}

impl CloseReason {
    /// A reason with a text, which is cut to what a close frame holds.
    pub fn new(by: ClosedBy, code: CloseCode, reason: impl Into<String>) -> Self {
        Self {
            code,
            by,
            reason: reason.into(),
        }
    }
}

impl std::fmt::Display for CloseReason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let who = match self.by {
            ClosedBy::Us => "by this side",
            ClosedBy::Peer => "by the peer",
            ClosedBy::Network => "by the network",
        };
        write!(f, "carrier ended {who}: {}", self.code)?;
        if !self.reason.is_empty() {
            write!(f, " ({})", origin::without(&self.reason))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_number_goes_there_and_back() {
        for code in 0..=u16::MAX {
            assert_eq!(CloseCode::from_u16(code).to_u16(), code);
        }
    }

    #[test]
    fn only_identity_and_version_are_final() {
        assert!(CloseCode::Protocol.is_transient());
        assert!(!CloseCode::Revoked.is_transient());
        assert!(!CloseCode::Version.is_transient());
    }
}
