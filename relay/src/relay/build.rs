//! Builds the parts of a relay from its configuration.

use std::sync::Arc;

use rustls::ServerConfig;
use throwline_certs::Directory;
use throwline_certs::tls::{HttpsCertificate, RelayCertificate, peer_server, relay_server};
use throwline_tunnel::carrier::AcceptConfig;
use throwline_tunnel::splice;
use tracing::warn;
use url::Url;

use super::own_certificates::OwnCertificates;
use super::{Parts, Relay};
use crate::config::{Config, Tls};
use crate::error::{ConfigError, Error};
use crate::http::{
    Authenticator, Callers, Enrolment, Listener, ListenerKind, Requests, TrustedProxies,
};
use crate::lifecycle::Lifecycle;
use crate::limits::admission::HandshakeAdmission;
use crate::limits::carriers::CarrierLimit;
use crate::limits::half_open::HalfOpen;
use crate::limits::handshakes::Handshakes;
use crate::limits::lines::LineLimits;
use crate::limits::rate::RateLimit;
use crate::live::LiveRegistry;
use crate::metrics::Metrics;
use crate::routing::peers::{self, Peers};
use crate::routing::{Connector, RouteSelector, Router};
use crate::session::{ClusterLister, Renewals, RevocationFeed, Sessions};

impl Relay {
    pub(super) async fn build(self) -> Result<Parts, Error> {
        let Self {
            authority: directory,
            config,
            registry,
            policy,
            metrics,
            peers,
        } = self;
        check(&config)?;
        let peers = match peers {
            Some((tcp, address)) => Some((tcp, peer_audience(&address)?)),
            None => None,
        };
        let limits = &config.limits;
        let metrics = Metrics::register(&metrics, limits)?;
        let lifecycle = Lifecycle::new();
        let live = Arc::new(LiveRegistry::new(directory.validator().clone()));
        let own_certificates = OwnCertificates::issue(&directory, &config, peers.is_some()).await?;
        let peer_set = own_certificates.identity.as_ref().map(|identity| {
            let peers = Peers::new(Arc::clone(identity), config.clone(), metrics.clone());
            Arc::new(peers)
        });
        let handshakes = Arc::new(Handshakes::new()?);
        let admission = HandshakeAdmission::new(limits.handshakes_per_second);
        let revocations = Arc::new(RevocationFeed::new(
            Arc::clone(&directory),
            Arc::clone(&live),
            metrics.clone(),
        ));
        let callers = Arc::new(callers(&config, &admission, &metrics));
        let requests = Arc::new(Requests {
            enrolment: Enrolment {
                directory: Arc::clone(&directory),
                rate: RateLimit::new(limits.enrolment_burst, limits.enrolments_per_minute),
                metrics: metrics.clone(),
                body_bytes: limits.body_bytes,
                body_timeout: config.timing.request,
            },
            carriers: CarrierLimit::new(limits.carriers, limits.carriers_per_identity),
            handshakes: Arc::clone(&handshakes),
            directory: Arc::clone(&directory),
            metrics: metrics.clone(),
            path_prefix: config.public_url.path().trim_end_matches('/').to_owned(),
            head_bytes: limits.head_bytes,
            head_timeout: config.timing.request_head,
            request_timeout: config.timing.request,
        });
        let router = Router {
            connector: Connector {
                selector: RouteSelector {
                    registry: Arc::clone(&registry),
                    directory: Arc::clone(&directory),
                    relay_started: lifecycle.started,
                    agent_memory: config.timing.agent_memory,
                    agent_wait: config.timing.agent_wait,
                },
                peers: peer_set,
                metrics: metrics.clone(),
                agent_wait: config.timing.agent_wait,
                agent_answer: config.timing.agent_answer,
            },
            directory: Arc::clone(&directory),
            policy: Arc::clone(&policy),
            limits: LineLimits::new(limits, &metrics),
            live: Arc::clone(&live),
            lifecycle: lifecycle.clone(),
            metrics: metrics.clone(),
            splice: splice::Config {
                budgets: vec![metrics.buffers()],
                ..splice::Config::default()
            },
        };
        let sessions = Arc::new(Sessions {
            config: config.clone(),
            directory: Arc::clone(&directory),
            registry: Arc::clone(&registry),
            router,
            clusters: ClusterLister {
                directory: Arc::clone(&directory),
                registry: Arc::clone(&registry),
                policy,
                metrics: metrics.clone(),
                double_after: config.timing.double_after,
            },
            renewals: Renewals {
                directory: Arc::clone(&directory),
                metrics: metrics.clone(),
            },
            revocations: Arc::clone(&revocations),
            live: Arc::clone(&live),
            admission: admission.clone(),
            lifecycle: lifecycle.clone(),
            metrics: metrics.clone(),
            relays: registry.relays(),
            recording: Sessions::recording(),
        });
        let listener = |kind, tls, authenticator| {
            Arc::new(Listener {
                kind,
                tls,
                authenticator: Arc::new(authenticator),
                callers: Arc::clone(&callers),
                requests: Arc::clone(&requests),
                handshakes: Arc::clone(&handshakes),
                sessions: Arc::clone(&sessions),
                lifecycle: lifecycle.clone(),
                metrics: metrics.clone(),
                tls_timeout: config.timing.tls_handshake,
            })
        };
        let peers = match (peers, &own_certificates.identity) {
            (Some((tcp, audience)), Some(identity)) => {
                let tls = peer_server(Arc::clone(identity)).map_err(Error::Tls)?;
                let authenticator = authenticator(&*directory, &config, &audience).for_peers();
                let listener = listener(ListenerKind::Peers, Some(tls), authenticator);
                Some((tcp, listener))
            }
            _ => None,
        };
        let renewable = Arc::clone(&directory);
        let authenticator = authenticator(&*directory, &config, &config.public_url)
            .of_set(registry.relays())
            .renewing(move |peer| renewable.renewable_until(peer));
        let tls = public_tls(&config.tls, own_certificates.https.as_ref())?;
        let public = listener(ListenerKind::Public, tls, authenticator);
        Ok(Parts {
            config,
            registry,
            public,
            peers,
            admission,
            revocations,
            live,
            own_certificates,
            lifecycle,
        })
    }
}

fn callers(config: &Config, admission: &HandshakeAdmission, metrics: &Metrics) -> Callers {
    let limits = &config.limits;
    let trusted = TrustedProxies::new(&config.trusted_proxies);
    let clients_are_known = config.tls != Tls::Plaintext || !trusted.is_empty();
    if !clients_are_known {
        warn!(
            "every client will have the balancer's address in limits, logs and the audit; \
             name the balancer with --trust-proxy"
        );
    }
    Callers {
        trusted,
        half_open: HalfOpen::new(
            limits.half_open,
            clients_are_known.then_some(limits.half_open_per_address),
            metrics.half_open.clone(),
            metrics.half_open_shed.clone(),
        ),
        admission: admission.clone(),
        metrics: metrics.clone(),
        proxy_protocol: config.proxy_protocol,
    }
}

fn authenticator(directory: &dyn Directory, config: &Config, audience: &Url) -> Authenticator {
    Authenticator::new(
        directory.validator().clone(),
        audience,
        config.timing.clock_tolerance,
        config.limits.remembered_assertions,
        AcceptConfig {
            instance: config.instance.clone(),
            relays: 0,
            timing: config.timing.carrier.clone(),
            ws: config.ws.clone(),
            mux: config.mux.clone(),
            max_streams: config.limits.streams_per_carrier,
        },
    )
}

fn peer_audience(address: &str) -> Result<Url, ConfigError> {
    peers::audience(address).ok_or_else(|| ConfigError::PeerAddress(address.to_owned()))
}

fn public_tls(
    tls: &Tls,
    own: Option<&Arc<HttpsCertificate>>,
) -> Result<Option<Arc<ServerConfig>>, Error> {
    let server = |certificate| relay_server(certificate).map_err(Error::Tls);
    certificate(tls, own).map(server).transpose()
}

/// The certificate of the public listener; `None` where a balancer terminates TLS.
fn certificate(tls: &Tls, own: Option<&Arc<HttpsCertificate>>) -> Option<RelayCertificate> {
    match tls {
        Tls::Plaintext => None,
        Tls::Own => own.cloned().map(RelayCertificate::Own),
        Tls::Files { cert, key } => Some(RelayCertificate::Files {
            cert: cert.clone(),
            key: key.clone(),
        }),
    }
}

fn check(config: &Config) -> Result<(), ConfigError> {
    let scheme = config.public_url.scheme();
    if !matches!(scheme, "http" | "https") || config.public_url.host().is_none() {
        return Err(ConfigError::PublicUrl(config.public_url.clone()));
    }
    if config.limits.streams_per_carrier == 0 || config.limits.carriers == 0 {
        return Err(ConfigError::NoCapacity);
    }
    if config.proxy_protocol && config.trusted_proxies.is_empty() {
        return Err(ConfigError::NoTrustedProxies);
    }
    Ok(())
}
