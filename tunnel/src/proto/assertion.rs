//! The claims of the bearer assertion that opens a carrier, and their check. Signing and the
//! certificate chain are checked by the holder of the keys; this file defines the claims' meaning.

use serde::{Deserialize, Serialize};
use url::Url;

/// Longest life a relay accepts, in seconds.
pub const MAX_LIFE: u64 = 60;

/// Longest `jti` a relay accepts and has to remember.
pub const MAX_JTI: usize = 64;

/// The purpose of a carrier that serves renewals and nothing else, which a certificate that has
/// expired may open too.
pub const RENEWAL: &str = "renewal";

/// The claims of an assertion.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
pub struct Claims {
    /// Equal to `sub`: the dialer speaks for itself.
    pub iss: String,
    /// The certificate's SPIFFE URI.
    pub sub: String,
    /// The relay's public URL, as [`audience`] writes it.
    pub aud: String,
    /// Seconds since 1970.
    pub iat: u64,
    /// The expiry, in seconds since 1970.
    pub exp: u64,
    /// Unique; a relay refuses one that it has seen within its life.
    pub jti: String,
    /// What the carrier is for; absent: for everything. [`RENEWAL`] is the only other one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub purpose: Option<String>,
}

/// Why claims are not accepted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ClaimsError {
    /// `by`: how far the dialer's clock is ahead of ours (negative: behind), in seconds.
    #[error("the dialer's clock is {by} s off the relay's")]
    ClockSkew {
        /// By how many seconds; negative: behind.
        by: i64,
    },
    /// `aud` is not this relay's URL.
    #[error("the assertion is for another relay")]
    Audience,
    /// `iss` or `sub` is not the certificate's name.
    #[error("the assertion is not about the certificate that signed it")]
    Subject,
    /// The time between `iat` and `exp` is over the limit.
    #[error("the assertion lives longer than {MAX_LIFE} s")]
    TooLong,
    /// `jti` is empty or too long.
    #[error("the assertion has no usable id")]
    Id,
}

impl Claims {
    /// Claims that live as long as a relay accepts.
    pub fn new(sub: impl Into<String>, aud: impl Into<String>, now: u64, jti: String) -> Self {
        let sub = sub.into();
        Self {
            iss: sub.clone(),
            sub,
            aud: aud.into(),
            iat: now,
            exp: now.saturating_add(MAX_LIFE),
            jti,
            purpose: None,
        }
    }

    /// Checks everything but replay. Times are judged last, so that only a dialer whose other
    /// claims are good learns that its clock is wrong.
    ///
    /// # Errors
    /// The first claim that is not accepted.
    pub fn check(
        &self,
        expected_sub: &str,
        aud: &str,
        now: u64,
        skew: u64,
    ) -> Result<(), ClaimsError> {
        if self.iss != self.sub || self.sub != expected_sub {
            return Err(ClaimsError::Subject);
        }
        if self.aud != aud {
            return Err(ClaimsError::Audience);
        }
        // The relay remembers each id until the assertion expires: id and life bound that memory.
        if self.jti.is_empty() || self.jti.len() > MAX_JTI {
            return Err(ClaimsError::Id);
        }
        match self.exp.checked_sub(self.iat) {
            Some(life) if life <= MAX_LIFE => {}
            _ => return Err(ClaimsError::TooLong),
        }
        let too_new = self.iat > now.saturating_add(skew);
        let too_old = self.exp.saturating_add(skew) < now;
        if too_new || too_old {
            let by = i128::from(self.iat) - i128::from(now);
            let by = by.clamp(i128::from(i64::MIN), i128::from(i64::MAX));
            return Err(ClaimsError::ClockSkew {
                by: i64::try_from(by).unwrap_or(i64::MAX),
            });
        }
        Ok(())
    }
}

/// The audience for a relay: scheme, host, port unless it is the default, path without a trailing
/// slash. Both ends derive it from the relay's public URL.
pub fn audience(relay: &Url) -> String {
    let mut url = relay.clone();
    url.set_query(None);
    url.set_fragment(None);
    let _ = url.set_username("");
    let _ = url.set_password(None);
    url.as_str().trim_end_matches('/').to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: u64 = 1_700_000_000;

    fn claims() -> Claims {
        Claims::new("spiffe://d/user/ann", "https://relay", NOW, "id".into())
    }

    fn check_at(claims: &Claims, now: u64) -> Result<(), ClaimsError> {
        claims.check("spiffe://d/user/ann", "https://relay", now, 60)
    }

    #[test]
    fn good_within_a_minute_of_skew_either_way() {
        for now in [NOW - 60, NOW, NOW + 60, NOW + 120] {
            assert_eq!(check_at(&claims(), now), Ok(()), "at {now}");
        }
    }

    #[test]
    fn ten_minutes_off_names_the_skew() {
        let ahead = check_at(&claims(), NOW - 600);
        assert_eq!(ahead, Err(ClaimsError::ClockSkew { by: 600 }));
        let behind = check_at(&claims(), NOW + 600);
        assert_eq!(behind, Err(ClaimsError::ClockSkew { by: -600 }));
    }

    #[test]
    fn each_wrong_claim_is_refused() {
        let mut other = claims();
        other.iss = "spiffe://d/user/bob".into();
        assert_eq!(check_at(&other, NOW), Err(ClaimsError::Subject));
        let mut other = claims();
        other.aud = "https://elsewhere".into();
        assert_eq!(check_at(&other, NOW), Err(ClaimsError::Audience));
        let mut other = claims();
        other.exp = NOW + 61;
        assert_eq!(check_at(&other, NOW), Err(ClaimsError::TooLong));
        other.exp = NOW - 1;
        assert_eq!(check_at(&other, NOW), Err(ClaimsError::TooLong));
        let mut other = claims();
        other.jti = "x".repeat(65);
        assert_eq!(check_at(&other, NOW), Err(ClaimsError::Id));
        let got = claims().check("spiffe://d/user/bob", "https://relay", NOW, 60);
        assert_eq!(got, Err(ClaimsError::Subject));
    }

    #[test]
    fn extreme_times_do_not_overflow() {
        let mut far = claims();
        far.iat = u64::MAX;
        far.exp = u64::MAX;
        assert_eq!(
            check_at(&far, NOW),
            Err(ClaimsError::ClockSkew { by: i64::MAX })
        );
    }

    #[test]
    fn audience_is_the_same_however_the_url_is_written() {
        for url in [
            "https://R.example:443/",
            "https://r.example",
            "https://r.example/?x#y",
        ] {
            assert_eq!(audience(&Url::parse(url).unwrap()), "https://r.example");
        }
        let prefixed = Url::parse("http://127.0.0.1:80/line/").unwrap();
        assert_eq!(audience(&prefixed), "http://127.0.0.1/line");
    }
}
