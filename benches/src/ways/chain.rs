//! The whole chain by the tools of others: nginx and rathole do what Throwline does.
//!
//! An nginx beside the client ends its TLS, as the local proxy does, and reaches the other nginx through
//! rathole by mutual TLS, as the sealed session does. That one, beside the upstream, holds the credential
//! and dials the upstream by TLS, as the agent does. rathole's server, where the relay would be,
//! sees no plain byte. One seal is missing: from the client's nginx to rathole's server there is the
//! mutual TLS alone, where Throwline's carrier has another TLS around it.

use std::net::SocketAddr;
use std::path::Path;

use anyhow::Context;
use throwline_e2e::kubectl::Kubectl;
use throwline_e2e::pki::Authority;
use throwline_e2e::process::Process;
use throwline_e2e::{client, free_address, tools};
use tokio::process::Command;

use super::rathole::{self, Tunnel};
use super::{Distance, Held, Route, Side, Site, first_answer};
use crate::client::Target;

pub(super) const NAME: &str = "nginx + rathole";

/// As "nginx 1.22.1 at both ends of rathole 0.5.0".
pub(super) fn version() -> anyhow::Result<String> {
    let output = std::process::Command::new(tools::find("nginx")?)
        .arg("-v")
        .output()?;
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    let (_, version) = text.split_once("nginx/").context("nginx has no version")?;
    let version = version.split_whitespace().next().unwrap_or_default();
    let rathole = rathole::version()?;
    Ok(format!("nginx {version} at both ends of {rathole}"))
}

pub(super) async fn route(site: &Site, distance: Distance) -> anyhow::Result<Route> {
    let mut held = Held::default();
    let name = format!("chain-{}", distance.label());
    let upstream = Upstream {
        addr: site.upstream.addr,
        ca_pem: site.upstream.ca_pem.clone(),
        tls_name: "localhost",
        token: "bench".to_owned(),
    };
    let chain = Chain::start(site, &name, distance, &upstream, &mut held).await?;
    let target = Target::bare(chain.entry, &chain.ca_pem)?;
    let others = [&chain.tunnel.server, &chain.tunnel.client, &chain.remote];
    first_answer(&target, &chain.local, &others).await?;
    let mut parts = chain.tunnel.parts().to_vec();
    parts.push((Side::Agent, chain.remote.pid()));
    parts.push((Side::Local, chain.local.pid()));
    held.keep(chain);
    let kubectl = match distance {
        Distance::Near => None,
        Distance::Far => kubectl(site, &mut held).await?,
    };
    Ok(Route {
        target,
        kubectl,
        parts,
        _held: held,
    })
}

/// Another chain, to what kubectl is shown; none where there is no kubectl.
async fn kubectl(site: &Site, held: &mut Held) -> anyhow::Result<Option<Kubectl>> {
    let Some(cluster) = &site.cluster else {
        return Ok(None);
    };
    let dir = site.room("chain-kubectl")?;
    let (kubeconfig, token) = cluster.with_token(&dir).await?;
    let text = std::fs::read_to_string(&kubeconfig)?;
    let context = text
        .lines()
        .find_map(|line| line.strip_prefix("current-context: "))
        .context("the cluster's kubeconfig has no current context")?;
    let shown = client::Target::read(&kubeconfig, context)?;
    let upstream = Upstream {
        addr: shown.address.parse()?,
        ca_pem: String::from_utf8(shown.ca)?,
        // Every API server's certificate has it.
        tls_name: "kubernetes.default.svc",
        token,
    };
    let chain = Chain::start(site, "chain-shown", Distance::Far, &upstream, held).await?;
    let ca = dir.join("chain-ca.pem");
    std::fs::write(&ca, &chain.ca_pem)?;
    let file = dir.join("chain.kubeconfig");
    std::fs::write(
        &file,
        format!(
            "{{apiVersion: v1, kind: Config, current-context: c, users: [{{name: u, user: {{token: replaced}}}}], \
             clusters: [{{name: c, cluster: {{server: 'https://{}', certificate-authority: '{}'}}}}], \
             contexts: [{{name: c, context: {{cluster: c, user: u}}}}]}}",
            chain.entry,
            ca.display()
        ),
    )?;
    held.keep(chain);
    Ok(Some(Kubectl::new(&tools::newest_kubectl()?, &file, &dir)))
}

/// What a chain leads to, and how it is dialled.
struct Upstream {
    addr: SocketAddr,
    ca_pem: String,
    /// A name that its certificate has: nginx verifies no addresses.
    tls_name: &'static str,
    token: String,
}

struct Chain {
    /// Where the client dials, and whom it trusts there.
    entry: SocketAddr,
    ca_pem: String,
    local: Process,
    tunnel: Tunnel,
    remote: Process,
}

impl Chain {
    async fn start(
        site: &Site,
        name: &str,
        distance: Distance,
        upstream: &Upstream,
        held: &mut Held,
    ) -> anyhow::Result<Self> {
        let dir = site.room(name)?;
        let authority = Authority::new("the chain's CA")?;
        let (certificate, key) = authority.server(&["localhost", "127.0.0.1"])?;
        let (user, user_key) = authority.server(&["user"])?;
        for (file, text) in [
            ("ca.pem", authority.pem()),
            ("cert.pem", &certificate),
            ("cert.key", &key),
            ("user.pem", &user),
            ("user.key", &user_key),
            ("upstream.pem", &upstream.ca_pem),
        ] {
            std::fs::write(dir.join(file), text)?;
        }
        let (entry, exit) = (free_address()?, free_address()?);
        let remote = nginx(&dir, "remote", &remote_config(exit, upstream))?;
        let room = site.room(&format!("{name}-rathole"))?;
        let tunnel = Tunnel::start(room, exit, distance, held).await?;
        let next = distance.hop(tunnel.door, held).await?;
        let local = nginx(&dir, "local", &local_config(entry, next))?;
        Ok(Self {
            entry,
            ca_pem: authority.pem().to_owned(),
            local,
            tunnel,
            remote,
        })
    }
}

fn nginx(dir: &Path, name: &str, config: &str) -> anyhow::Result<Process> {
    let file = dir.join(format!("{name}.conf"));
    std::fs::write(&file, config)?;
    let mut command = Command::new(tools::find("nginx")?);
    command.arg("-p").arg(dir).arg("-c").arg(&file);
    command.args(["-e", "stderr"]);
    Process::start(name, dir, command)
}

/// Ends the client's TLS; proves by a certificate who the user is.
fn local_config(listen: SocketAddr, next: SocketAddr) -> String {
    let dialling = "proxy_ssl_name localhost; proxy_ssl_trusted_certificate ca.pem;
         proxy_ssl_certificate user.pem; proxy_ssl_certificate_key user.key;";
    config("local", listen, "", next, dialling)
}

/// Admits users with a certificate; it holds the credential for the upstream.
fn remote_config(listen: SocketAddr, upstream: &Upstream) -> String {
    let dialling = format!(
        "proxy_ssl_name {}; proxy_ssl_trusted_certificate upstream.pem;
         proxy_set_header Authorization \"Bearer {}\";",
        upstream.tls_name, upstream.token
    );
    let admitting = "ssl_client_certificate ca.pem; ssl_verify_client on;";
    config("remote", listen, admitting, upstream.addr, &dialling)
}

/// Paths are relative to the directory of the configuration, which is nginx's prefix too.
///
/// What favours nginx beside its defaults: connections are kept to the next hop and never closed for their
/// number of requests, bodies are passed on unbuffered in pieces of 64 KiB, and TLS 1.3 takes AES-128, as
/// everything else here does. One process without a master, which would leave its workers behind.
fn config(
    name: &str,
    listen: SocketAddr,
    admitting: &str,
    next: SocketAddr,
    dialling: &str,
) -> String {
    format!(
        "daemon off;
         master_process off;
         pid {name}.pid;
         error_log stderr warn;
         events {{ worker_connections 4096; }}
         http {{
           access_log off;
           client_body_temp_path {name}-body; proxy_temp_path {name}-proxy;
           fastcgi_temp_path {name}-fastcgi; uwsgi_temp_path {name}-uwsgi; scgi_temp_path {name}-scgi;
           client_max_body_size 0;
           keepalive_requests 1000000000;
           map $http_upgrade $connection_upgrade {{ default upgrade; '' ''; }}
           upstream next {{ server {next}; keepalive 128; keepalive_requests 1000000000; }}
           server {{
             listen {listen} ssl;
             ssl_certificate cert.pem;
             ssl_certificate_key cert.key;
             ssl_protocols TLSv1.3;
             {admitting}
             location / {{
               proxy_pass https://next;
               proxy_http_version 1.1;
               proxy_set_header Host $http_host;
               proxy_set_header Upgrade $http_upgrade;
               proxy_set_header Connection $connection_upgrade;
               proxy_buffering off;
               proxy_buffer_size 64k; proxy_buffers 8 64k;
               proxy_request_buffering off;
               proxy_read_timeout 1h;
               proxy_send_timeout 1h;
               proxy_ssl_protocols TLSv1.3;
               proxy_ssl_conf_command Ciphersuites TLS_AES_128_GCM_SHA256;
               proxy_ssl_server_name on;
               proxy_ssl_verify on;
               {dialling}
             }}
           }}
         }}\n"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_ends_verify_whom_they_dial_and_the_remote_one_who_dials() {
        let at = |port| SocketAddr::from(([127, 0, 0, 1], port));
        let upstream = Upstream {
            addr: at(3),
            ca_pem: String::new(),
            tls_name: "api",
            token: "secret".to_owned(),
        };
        let (local, remote) = (local_config(at(1), at(2)), remote_config(at(2), &upstream));
        for config in [&local, &remote] {
            assert!(config.contains("proxy_ssl_verify on;"), "{config}");
            assert!(!config.contains("proxy_pass http:"), "{config}");
        }
        assert!(local.contains("server 127.0.0.1:2;") && local.contains("user.pem"));
        assert!(remote.contains("ssl_verify_client on;") && remote.contains("Bearer secret"));
        assert!(!local.contains("Bearer") && !remote.contains("user.pem"));
    }
}
