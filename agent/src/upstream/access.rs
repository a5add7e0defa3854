//! The agent's account at its own cluster: a kubeconfig, or the service account of its pod.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use futures::future::{BoxFuture, FutureExt, Ready, ready};
use http::header::AUTHORIZATION;
use http::uri::{Authority, Scheme};
use http::{HeaderValue, Request, Response};
use http_body_util::Empty;
use kube::client::ConfigExt;
use kube::config::{InClusterError, KubeConfigOptions, Kubeconfig, KubeconfigError};
use rustls::pki_types::ServerName;
use throwline_kube_wire::http1::target::Target;
use tower_layer::Layer;
use tower_service::Service;

use super::trust::Trust;

type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// Where the agent finds its cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ClusterAccess {
    /// The service account of the pod that the agent runs in; its token is read again every minute.
    InCluster,
    /// A kubeconfig's current context, with everything that kube understands: client certificates,
    /// tokens, token files, exec plugins.
    Kubeconfig(PathBuf),
}

/// The agent's own access to its cluster cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum AccessError {
    #[error("the kubeconfig {} cannot be used: {source}", path.display())]
    Kubeconfig {
        path: PathBuf,
        source: Box<KubeconfigError>,
    },
    #[error(
        "there is no service account here ({0}): outside a cluster, give a kubeconfig with --kubeconfig FILE; in a \
         pod, let automountServiceAccountToken be true"
    )]
    InCluster(#[source] InClusterError),
    #[error("the access to the API server has {0}, which the agent does not support")]
    Unsupported(&'static str),
    #[error("the API server's address {url} cannot be used: {reason}")]
    Address { url: String, reason: &'static str },
    #[error("the agent's credentials for the API server cannot be used: {0}")]
    Credentials(#[from] UnusableCredentials),
}

/// Why the agent's credentials cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum UnusableCredentials {
    #[error(transparent)]
    Kube(#[from] Box<kube::Error>),
    #[error("there is no certificate in its certificate-authority")]
    NoCertificate,
    #[error("loading them was broken off: {0}")]
    Interrupted(#[from] tokio::task::JoinError),
}

/// Everything needed to connect and to authenticate.
pub(super) struct Credentials {
    pub(super) scheme: Scheme,
    pub(super) authority: Authority,
    /// `authority` as the `Host` header of HTTP/1.1.
    pub(super) host: HeaderValue,
    pub(super) address: (String, u16),
    /// Before every path, for API servers that live below one.
    prefix: String,
    pub(super) tls: Option<(rustls::ClientConfig, ServerName<'static>)>,
    authorization: Option<Authorization>,
}

/// The current context of a kubeconfig. The environment's proxy is not for the API server.
///
/// # Errors
/// It cannot be read, or names a proxy.
pub async fn read_kubeconfig(path: &Path) -> Result<kube::Config, AccessError> {
    let bad = |error: KubeconfigError| AccessError::Kubeconfig {
        path: path.to_owned(),
        source: Box::new(error),
    };
    if let Some(exposed) = throwline_certs::files::exposure(path) {
        // kubectl accepts it, so this is no error; but the cluster's keys may be in it.
        tracing::warn!(%exposed, "the kubeconfig is open to other users of this machine");
    }
    let kubeconfig = Kubeconfig::read_from(path).map_err(bad)?;
    if names_a_proxy(&kubeconfig) {
        return Err(AccessError::Unsupported("a proxy-url"));
    }
    let options = KubeConfigOptions::default();
    let config = kube::Config::from_custom_kubeconfig(kubeconfig, &options).await;
    let mut config = config.map_err(bad)?;
    // kube would use HTTPS_PROXY, which an agent has for its relay.
    config.proxy_url = None;
    Ok(config)
}

fn names_a_proxy(kubeconfig: &Kubeconfig) -> bool {
    let current = kubeconfig.current_context.as_deref();
    let contexts = &mut kubeconfig.contexts.iter();
    let context = contexts.find(|named| Some(named.name.as_str()) == current);
    let name = context.and_then(|named| Some(named.context.as_ref()?.cluster.as_str()));
    let clusters = &mut kubeconfig.clusters.iter();
    let cluster = clusters.find(|named| Some(named.name.as_str()) == name);
    let url = cluster.and_then(|named| named.cluster.as_ref()?.proxy_url.as_deref());
    url.is_some_and(|url| !url.is_empty())
}

type Authorization =
    Arc<dyn Fn() -> BoxFuture<'static, Result<Option<HeaderValue>, BoxError>> + Send + Sync>;

impl Credentials {
    pub(super) async fn load(source: &ClusterAccess) -> Result<Self, AccessError> {
        let config = match source {
            ClusterAccess::InCluster => {
                kube::Config::incluster().map_err(AccessError::InCluster)?
            }
            ClusterAccess::Kubeconfig(path) => read_kubeconfig(path).await?,
        };
        // An exec plugin is run to its end in there.
        tokio::task::spawn_blocking(move || Self::of(&config))
            .await
            .map_err(UnusableCredentials::Interrupted)?
    }

    fn of(config: &kube::Config) -> Result<Self, AccessError> {
        let auth = &config.auth_info;
        // Its headers would be replaced by those for the user: the agent would act with other
        // rights than configured.
        if auth.impersonate.is_some() || auth.impersonate_groups.is_some() {
            return Err(AccessError::Unsupported("impersonation (as, as-groups)"));
        }
        if config.accept_invalid_certs {
            tracing::warn!(
                "insecure-skip-tls-verify is set in the kubeconfig, so the API server is not authenticated"
            );
        }
        let url = &config.cluster_url;
        let bad = |reason| AccessError::Address {
            url: url.to_string(),
            reason,
        };
        let authority = url
            .authority()
            .cloned()
            .ok_or_else(|| bad("it has no host"))?;
        let scheme = url.scheme().cloned().unwrap_or(Scheme::HTTPS);
        let bare = authority
            .host()
            .trim_start_matches('[')
            .trim_end_matches(']')
            .to_owned();
        let is_https = match scheme.as_str() {
            "https" => true,
            "http" => false,
            _ => return Err(bad("its scheme is neither https nor http")),
        };
        let host =
            HeaderValue::from_str(authority.as_str()).map_err(|_| bad("its host is not ASCII"))?;
        let tls = if is_https {
            throwline_certs::tls::provide_to_libraries();
            let tls = client_config(config)?;
            let name = config
                .tls_server_name
                .clone()
                .unwrap_or_else(|| bare.clone());
            let name =
                ServerName::try_from(name).map_err(|_| bad("its host is not a name for TLS"))?;
            Some((tls, name))
        } else {
            None
        };
        Ok(Self {
            host,
            address: (
                bare,
                authority
                    .port_u16()
                    .unwrap_or(if is_https { 443 } else { 80 }),
            ),
            scheme,
            authority,
            prefix: url.path().trim_end_matches('/').to_owned(),
            tls,
            authorization: authorization(config)?,
        })
    }

    /// The `Authorization` of now; tokens from files and plugins are refreshed as they age.
    pub(super) async fn authorization(&self) -> Result<Option<HeaderValue>, BoxError> {
        match &self.authorization {
            Some(current) => current().await,
            None => Ok(None),
        }
    }

    pub(super) fn prefixed(&self, target: &Target) -> Target {
        target.prefixed(&self.prefix)
    }
}

/// kube's configuration, with our verifier where the certificates to trust are given.
fn client_config(config: &kube::Config) -> Result<rustls::ClientConfig, AccessError> {
    let unusable = |error: kube::Error| UnusableCredentials::Kube(Box::new(error));
    let trusted = config
        .root_cert
        .as_ref()
        .filter(|_| !config.accept_invalid_certs);
    let Some(trusted) = trusted else {
        let tls = config.rustls_client_config();
        return Ok(tls.map_err(unusable)?);
    };
    let trust = Trust::new(trusted, config.root_cert_file.clone())
        .ok_or(UnusableCredentials::NoCertificate)?;
    let mut bare = config.clone();
    // Until the verifier is set, nothing is trusted.
    (bare.root_cert, bare.root_cert_file) = (Some(Vec::new()), None);
    let mut tls = bare.rustls_client_config().map_err(unusable)?;
    tls.dangerous().set_certificate_verifier(Arc::new(trust));
    Ok(tls)
}

/// kube's layer, which has all kinds of tokens and refreshes them, around a service that returns the
/// header it received.
fn authorization(config: &kube::Config) -> Result<Option<Authorization>, AccessError> {
    let layer = config
        .auth_layer()
        .map_err(|error| UnusableCredentials::Kube(Box::new(error)))?;
    let Some(layer) = layer else { return Ok(None) };
    let service = layer.layer(Mirror);
    Ok(Some(Arc::new(move || {
        let mut service = service.clone();
        async move {
            futures::future::poll_fn(|cx| {
                Service::<Request<Empty<Bytes>>>::poll_ready(&mut service, cx)
            })
            .await?;
            Ok(service.call(Request::new(Empty::new())).await?.into_body())
        }
        .boxed()
    })))
}

#[derive(Clone)]
struct Mirror;

impl Service<Request<Empty<Bytes>>> for Mirror {
    type Response = Response<Option<HeaderValue>>;
    type Error = BoxError;
    type Future = Ready<Result<Self::Response, BoxError>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Empty<Bytes>>) -> Self::Future {
        ready(Ok(Response::new(
            request.headers().get(AUTHORIZATION).cloned(),
        )))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn load(cluster: &str, user: &str) -> Result<Credentials, AccessError> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("kubeconfig");
        let text = format!(
            "apiVersion: v1\nkind: Config\ncurrent-context: c\n\
             contexts: [{{name: c, context: {{cluster: c, user: u}}}}]\n\
             clusters: [{{name: c, cluster: {{{cluster}}}}}]\nusers: [{{name: u, user: {{{user}}}}}]\n"
        );
        std::fs::write(&path, text).unwrap();
        Credentials::load(&ClusterAccess::Kubeconfig(path)).await
    }

    #[tokio::test]
    async fn a_token_becomes_a_sensitive_header() {
        let credentials = load("server: 'http://127.0.0.1:1/base/'", "token: t0p")
            .await
            .unwrap();
        let value = credentials.authorization().await.unwrap().unwrap();
        assert_eq!(value, "Bearer t0p");
        assert!(value.is_sensitive());
        assert_eq!(
            credentials
                .prefixed(&Target::read(b"/api?x=1", 0).unwrap())
                .as_str(),
            "/base/api?x=1"
        );
    }

    #[tokio::test]
    async fn what_cannot_be_used_is_an_error() {
        for (cluster, user) in [
            ("server: 'http://127.0.0.1:1'", "as: someone"),
            (
                "server: 'http://127.0.0.1:1', proxy-url: 'http://p'",
                "token: t",
            ),
            ("server: 'ftp://127.0.0.1:1'", "token: t"),
            (
                "server: 'http://127.0.0.1:1'",
                "tokenFile: /nonexistent/token",
            ),
            ("insecure-skip-tls-verify: true", "token: t"),
        ] {
            let error = load(cluster, user)
                .await
                .err()
                .map(|error| error.to_string());
            assert!(
                error.as_ref().is_some_and(|text| !text.is_empty()),
                "{cluster} {user}: {error:?}"
            );
        }
        let missing = ClusterAccess::Kubeconfig("/nonexistent/config".into());
        assert!(matches!(
            Credentials::load(&missing).await,
            Err(AccessError::Kubeconfig { .. })
        ));
    }
}
