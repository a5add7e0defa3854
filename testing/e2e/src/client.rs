//! A client of the local proxy that can say what kubectl never would.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use base64::Engine;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use throwline_certs::tls;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

/// One context of a kubeconfig.
#[derive(Debug, Clone)]
pub struct Target {
    /// As `127.0.0.1:47611`.
    pub address: String,
    /// As `/clusters/alpha`.
    pub prefix: String,
    /// PEM.
    pub ca: Vec<u8>,
    certificate: Option<(Vec<u8>, Vec<u8>)>,
}

impl Target {
    pub fn read(kubeconfig: &Path, context: &str) -> Result<Self> {
        let text = std::fs::read_to_string(kubeconfig)?;
        let config: serde_json::Value = serde_norway::from_str(&text)?;
        let context = &entry(&config, "contexts", context)?["context"];
        let name = |field: &str| context[field].as_str().unwrap_or_default().to_owned();
        let cluster = &entry(&config, "clusters", &name("cluster"))?["cluster"];
        let user = &entry(&config, "users", &name("user"))?["user"];
        let server = cluster["server"]
            .as_str()
            .context("the cluster has no server")?;
        let url = url::Url::parse(server)?;
        let (Some(host), Some(port)) = (url.host_str(), url.port_or_known_default()) else {
            bail!("not a server: {server}");
        };
        Ok(Self {
            address: format!("{host}:{port}"),
            prefix: url.path().trim_end_matches('/').to_owned(),
            ca: field(cluster, "certificate-authority")?.context("the cluster has no CA")?,
            certificate: field(user, "client-certificate")?.zip(field(user, "client-key")?),
        })
    }

    /// The same without a client certificate.
    pub fn anonymous(mut self) -> Self {
        self.certificate = None;
        self
    }

    pub async fn connect(&self, alpn: &[&[u8]]) -> Result<TlsStream<TcpStream>> {
        let config = self.tls(alpn)?;
        let tcp = TcpStream::connect(&self.address).await?;
        tcp.set_nodelay(true)?;
        let name = ServerName::try_from("127.0.0.1")?;
        Ok(TlsConnector::from(Arc::new(config))
            .connect(name, tcp)
            .await?)
    }

    /// What [`Self::connect`] speaks TLS by.
    pub fn tls(&self, alpn: &[&[u8]]) -> Result<rustls::ClientConfig> {
        self.tls_with(tls::provider(), alpn)
    }

    /// The same with other cryptography than ours.
    pub fn tls_with(
        &self,
        provider: Arc<CryptoProvider>,
        alpn: &[&[u8]],
    ) -> Result<rustls::ClientConfig> {
        let mut roots = rustls::RootCertStore::empty();
        for certificate in CertificateDer::pem_slice_iter(&self.ca) {
            roots.add(certificate?)?;
        }
        let builder = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .with_root_certificates(roots);
        let mut config = match &self.certificate {
            Some((certificate, key)) => builder.with_client_auth_cert(
                CertificateDer::pem_slice_iter(certificate).collect::<Result<_, _>>()?,
                PrivateKeyDer::from_pem_slice(key)?,
            )?,
            None => builder.with_no_client_auth(),
        };
        config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
        Ok(config)
    }

    /// Sends exactly these bytes over HTTP/1.1 and reads the answer until the other end
    /// closes, or is silent for a second after something came.
    pub async fn raw(&self, bytes: &[u8]) -> Result<String> {
        let mut stream = self.connect(&[b"http/1.1"]).await?;
        stream.write_all(bytes).await?;
        stream.flush().await?;
        let mut answer = Vec::new();
        let mut buffer = vec![0; 16 * 1024];
        loop {
            let patience = Duration::from_secs(if answer.is_empty() { 20 } else { 1 });
            match tokio::time::timeout(patience, stream.read(&mut buffer)).await {
                Ok(Ok(count @ 1..)) => answer.extend_from_slice(&buffer[..count]),
                Err(_) if answer.is_empty() => bail!("no answer within {patience:?}"),
                // The end, a cut, or nothing more to say.
                _ => break,
            }
        }
        Ok(String::from_utf8_lossy(&answer).into_owned())
    }

    /// One GET with these header lines; the status line's code and everything after the head.
    pub async fn get(&self, path: &str, headers: &[&str]) -> Result<(u16, String)> {
        let mut request = format!(
            "GET {}{path} HTTP/1.1\r\nHost: {}\r\n",
            self.prefix, self.address
        );
        for header in headers {
            request.push_str(header);
            request.push_str("\r\n");
        }
        request.push_str("\r\n");
        let answer = self.raw(request.as_bytes()).await?;
        Ok((status(&answer)?, answer))
    }
}

/// The code of an answer's status line.
pub fn status(answer: &str) -> Result<u16> {
    let code = answer
        .strip_prefix("HTTP/1.1 ")
        .and_then(|rest| rest.split(' ').next());
    let code = code.and_then(|code| code.parse().ok());
    code.with_context(|| format!("not an answer: {answer:?}"))
}

fn entry<'a>(
    config: &'a serde_json::Value,
    list: &str,
    name: &str,
) -> Result<&'a serde_json::Value> {
    config[list]
        .as_array()
        .and_then(|all| all.iter().find(|entry| entry["name"] == name))
        .with_context(|| format!("kubeconfig has no {name} among its {list}"))
}

/// A field that is a file's name, or its content in base64 under `NAME-data`.
fn field(object: &serde_json::Value, name: &str) -> Result<Option<Vec<u8>>> {
    if let Some(file) = object[name].as_str() {
        return Ok(Some(std::fs::read(file).with_context(|| file.to_owned())?));
    }
    let data = object[format!("{name}-data")].as_str();
    Ok(data
        .map(|data| base64::engine::general_purpose::STANDARD.decode(data))
        .transpose()?)
}
