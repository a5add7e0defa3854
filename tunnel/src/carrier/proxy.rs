//! The way out to a relay: directly, or through an HTTP proxy by CONNECT (RFC 9110 section 9.3.6).

mod error;
mod tunnel;

use std::ffi::OsString;
use std::fmt;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use http::{HeaderValue, Uri};
use hyper_util::client::proxy::matcher::{Intercept, Matcher};
use percent_encoding::percent_decode_str;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite};
use url::Url;

use super::socket::{Socket, secure};
use super::target::{self, Target, is_loopback};
use super::{DialError, Timing, connect, timing};

pub use error::{BadProxy, ProxyFault};

/// What this build is called by default.
pub(super) const SOFTWARE: &str = concat!("throwline/", env!("CARGO_PKG_VERSION"));

/// The variables that name a proxy for `https://`, the first that is set counts (as in Go, and
/// so in kubectl). There is none for `http://`: a relay of that kind is on loopback.
const VARIABLES: [&str; 2] = ["HTTPS_PROXY", "https_proxy"];
/// The hosts that are reached without it.
const EXCEPTIONS: [&str; 2] = ["NO_PROXY", "no_proxy"];

/// Which proxy leads to which relay. Its `Debug` shows no user and no password.
#[derive(Clone, Default)]
pub struct Proxies {
    through: Option<Through>,
    tls: Option<Arc<rustls::ClientConfig>>,
}

#[derive(Clone)]
struct Through {
    /// As [`checked`] gave it; may hold a password.
    url: String,
    /// As `NO_PROXY` lists them. None: the proxy is for loopback hosts, too.
    exceptions: Option<String>,
}

impl Proxies {
    /// Every relay is reached directly.
    pub fn none() -> Self {
        Self::default()
    }

    /// Every relay is reached through the proxy `url`: `http://[USER:PASSWORD@]HOST[:PORT]`, or
    /// `https://` for a proxy that speaks TLS. User and password are percent-encoded.
    ///
    /// # Errors
    /// The URL cannot be used; the error shows `origin`, the variable or flag that held it.
    pub fn always(url: &str, origin: &'static str) -> Result<Self, BadProxy> {
        Ok(Self {
            through: Some(Through {
                url: checked(url, origin)?,
                exceptions: None,
            }),
            tls: None,
        })
    }

    /// As `HTTPS_PROXY` and `NO_PROXY`, or their lower-case forms, say; loopback hosts are always
    /// reached directly. `lookup` gives an environment variable's value.
    ///
    /// # Errors
    /// The proxy's variable holds something that cannot be used.
    pub fn from_environment(
        lookup: impl Fn(&'static str) -> Option<OsString>,
    ) -> Result<Self, BadProxy> {
        let first = |names: [&'static str; 2]| {
            names.into_iter().find_map(|name| {
                let value = lookup(name).filter(|value| !value.is_empty())?;
                Some((name, value))
            })
        };
        let text = |(name, value): (&'static str, OsString)| {
            let value = value.into_string();
            let value = value.map_err(|_| BadProxy::new(name, "it is not UTF-8"))?;
            Ok((name, value))
        };
        let Some((name, url)) = first(VARIABLES).map(text).transpose()? else {
            return Ok(Self::none());
        };
        let exceptions = first(EXCEPTIONS).map(text).transpose()?;
        Ok(Self {
            through: Some(Through {
                url: checked(&url, name)?,
                exceptions: Some(exceptions.map_or_else(String::new, |(_, list)| list)),
            }),
            tls: None,
        })
    }

    /// The same, and `tls` to check the certificate of the proxy on the way to `relay` against. It
    /// is asked for only where there is such a proxy and it speaks TLS.
    ///
    /// # Errors
    /// Those of `tls`.
    pub fn trusting<E>(
        &self,
        relay: &Url,
        tls: impl FnOnce() -> Result<Arc<rustls::ClientConfig>, E>,
    ) -> Result<Self, E> {
        let mut this = self.clone();
        if matches!(self.way(relay), Ok(Some(proxy)) if proxy.over_tls) {
            this.tls = Some(tls()?);
        }
        Ok(this)
    }

    /// The proxy on the way to `relay`, if there is one.
    fn way(&self, relay: &Url) -> Result<Option<Proxy>, DialError> {
        let Some(through) = &self.through else {
            return Ok(None);
        };
        let mut matcher = Matcher::builder().all(&through.url);
        if let Some(exceptions) = &through.exceptions {
            // To the matcher, '*' stands for names and not for addresses.
            let everything = exceptions.split(',').any(|entry| entry.trim() == "*");
            if everything || is_loopback(relay) {
                return Ok(None);
            }
            let port = relay.port_or_known_default();
            matcher = matcher.no(for_matcher(exceptions, port));
        }
        let host = relay.host_str().unwrap_or_default();
        let uri = format!("{}://{host}", relay.scheme()).parse::<Uri>();
        let uri = uri.map_err(|_| DialError::BadUrl {
            url: relay.to_string(),
            why: "its host cannot be sent to a proxy",
        })?;
        Ok(matcher.build().intercept(&uri).as_ref().map(Proxy::from))
    }
}

impl fmt::Debug for Proxies {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let through = self.through.as_ref();
        let at = through.and_then(|through| intercept(&through.url));
        f.debug_struct("Proxies")
            .field("through", &at.as_ref().map(|at| Proxy::from(at).at()))
            .field("exceptions", &through.map(|through| &through.exceptions))
            .finish_non_exhaustive()
    }
}

/// A stream of bytes to `relay`, TLS not begun, on the way that `proxies` gives. Connecting and,
/// with a proxy, its TLS and its answer may take [`Timing::connect`]'s default each.
///
/// Through a proxy, the relay's name is resolved there and not here.
///
/// # Errors
/// [`ProxyFault`], which names the remedy.
pub async fn reach(
    relay: &Url,
    proxies: &Proxies,
) -> Result<impl AsyncRead + AsyncWrite + Send + Unpin + use<>, DialError> {
    let target = Target::at(relay)?;
    let within = Timing::default().connect;
    connected(relay, &target, proxies, SOFTWARE, within).await
}

pub(super) async fn connected(
    relay: &Url,
    target: &Target,
    proxies: &Proxies,
    software: &str,
    within: Duration,
) -> Result<Socket, DialError> {
    let Some(proxy) = proxies.way(relay)? else {
        let connecting = connect::connect(&target.host, target.port);
        let tcp = timing::timely(within, "connecting", connecting).await?;
        return Ok(Socket::Plain(tcp));
    };
    let tls = proxies.tls.clone();
    let authority = target.authority();
    let led = proxy.lead_to(&authority, tls, software, within);
    led.await.map_err(|fault| DialError::Proxy {
        proxy: proxy.at(),
        fault,
    })
}

struct Proxy {
    /// Without the brackets of an IPv6 address.
    host: String,
    port: u16,
    over_tls: bool,
    /// The value of `Proxy-Authorization`.
    credentials: Option<HeaderValue>,
}

impl From<&Intercept> for Proxy {
    fn from(intercept: &Intercept) -> Self {
        let uri = intercept.uri();
        let over_tls = uri.scheme_str() == Some("https");
        let host = uri.host().unwrap_or_default();
        Self {
            host: host.trim_matches(['[', ']']).to_owned(),
            port: uri.port_u16().unwrap_or(if over_tls { 443 } else { 80 }),
            over_tls,
            credentials: intercept.basic_auth().cloned(),
        }
    }
}

impl Proxy {
    /// For people; without the credentials.
    fn at(&self) -> String {
        target::authority(&self.host, self.port)
    }

    async fn lead_to(
        &self,
        authority: &str,
        tls: Option<Arc<rustls::ClientConfig>>,
        software: &str,
        within: Duration,
    ) -> Result<Socket, ProxyFault> {
        let connecting = async {
            let tcp = connect::connect(&self.host, self.port).await;
            tcp.map_err(unconnected)
        };
        let mut socket = Socket::Plain(timely(within, "connecting to it", connecting).await?);
        if self.over_tls {
            let tls = tls.ok_or(ProxyFault::NoTrust)?;
            let name = ServerName::try_from(self.host.clone());
            let name = name.map_err(|_| ProxyFault::WrongHost)?;
            let securing = async {
                let secured = secure(socket, name, tls).await;
                secured.map_err(ProxyFault::from_tls)
            };
            socket = timely(within, "in the TLS handshake with it", securing).await?;
        }
        let asking = tunnel::ask(socket, authority, self.credentials.as_ref(), software);
        timely(within, "waiting for its answer", asking).await
    }
}

/// What a failed connection means, when it was to the proxy.
fn unconnected(error: DialError) -> ProxyFault {
    match error {
        DialError::Resolve { source, .. } => ProxyFault::Resolve(source),
        DialError::Connect { source, .. } => ProxyFault::Connect(source),
        other => ProxyFault::Connect(io::Error::other(other)),
    }
}

async fn timely<T>(
    within: Duration,
    phase: &'static str,
    step: impl Future<Output = Result<T, ProxyFault>>,
) -> Result<T, ProxyFault> {
    match tokio::time::timeout(within, step).await {
        Ok(result) => result,
        Err(_) => Err(ProxyFault::Timeout {
            phase,
            after: within,
        }),
    }
}

/// The URL in the one form that the matcher reads as we do. No error quotes it: it may hold a
/// password, and in the wrong place.
fn checked(url: &str, origin: &'static str) -> Result<String, BadProxy> {
    let bad = |why| BadProxy::new(origin, why);
    let url = url.trim();
    // As curl and Go read it.
    let whole = if url.contains("://") {
        url.to_owned()
    } else {
        format!("http://{url}")
    };
    let parsed = Url::parse(&whole).map_err(|error| {
        let why = match error {
            url::ParseError::InvalidPort => {
                "its port is not a number; special characters of a password are percent-encoded"
            }
            _ => "it is not a URL like http://HOST:PORT",
        };
        bad(why)
    })?;
    match parsed.scheme() {
        "http" | "https" => {}
        scheme if scheme.starts_with("socks") => {
            return Err(bad(
                "SOCKS is not supported; give an HTTP proxy, http://HOST:PORT",
            ));
        }
        _ => return Err(bad("it must begin with http:// or https://")),
    }
    // An unencoded '/', '?' or '#' of a password ends the host, and what follows is not seen.
    if !matches!(parsed.path(), "" | "/") || parsed.query().is_some() || parsed.fragment().is_some()
    {
        return Err(bad(
            "something follows its host and port; special characters of a password are \
             percent-encoded",
        ));
    }
    for part in [parsed.username(), parsed.password().unwrap_or_default()] {
        if !is_percent_encoded(part) {
            return Err(bad(
                "its user or password is not percent-encoded UTF-8 (a % is written %25)",
            ));
        }
    }
    // Also what a URL's parser encodes by itself: other readers of the same variable would not.
    if whole.parse::<Uri>().is_err() {
        return Err(bad("a character in it is not percent-encoded"));
    }
    let username = percent_decode_str(parsed.username());
    if username.into_iter().any(|byte| byte == b':') {
        // RFC 7617 section 2: the first colon ends the user.
        return Err(bad("a user name with a colon cannot be sent to a proxy"));
    }
    match intercept(parsed.as_str()) {
        Some(_) => Ok(parsed.into()),
        None => Err(bad("it is not a URL like http://HOST:PORT")),
    }
}

fn is_percent_encoded(text: &str) -> bool {
    let escapes = text.split('%').skip(1);
    let sound = |escape: &str| {
        let digits = escape.as_bytes().get(..2);
        digits.is_some_and(|digits| digits.iter().all(u8::is_ascii_hexdigit))
    };
    escapes.into_iter().all(sound) && percent_decode_str(text).decode_utf8().is_ok()
}

fn intercept(proxy: &str) -> Option<Intercept> {
    let anywhere = Uri::from_static("https://relay.invalid");
    Matcher::builder().all(proxy).build().intercept(&anywhere)
}

/// `NO_PROXY` as the matcher accepts it, which lacks two things that Go's has: an entry for one
/// port (`host:8443`) and `*.` before a domain.
fn for_matcher(exceptions: &str, port: Option<u16>) -> String {
    let entries = exceptions.split(',').map(str::trim);
    let entries = entries.filter_map(|entry| {
        let entry = match entry.rsplit_once(':') {
            Some((host, at)) if !host.contains(':') || host.ends_with(']') => {
                if at.parse().ok() != port {
                    return None;
                }
                host
            }
            _ => entry,
        };
        let entry = entry.trim_start_matches('[').trim_end_matches(']');
        Some(match entry.strip_prefix("*.") {
            Some(domain) => format!(".{domain}"),
            None => entry.to_owned(),
        })
    });
    entries.collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests;
