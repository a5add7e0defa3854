//! The cluster behind the agent: the demo cluster in this process, or a real one.

use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use throwline_demo_cluster::{DemoCluster, Options};
use tokio::net::TcpListener;

use crate::kubectl::Kubectl;
use crate::{tools, unique};

/// A cluster, reached as its administrator.
pub struct Upstream {
    demo: Option<DemoCluster>,
    kubeconfig: PathBuf,
    /// The image of the stories' pods; the demo cluster runs commands on this machine instead.
    image: String,
    home: PathBuf,
    /// The group that stories' users are in, and that is bound to `cluster-admin`.
    group: String,
}

impl Upstream {
    pub async fn start(dir: &Path) -> Result<Self> {
        let image = std::env::var("THROWLINE_E2E_IMAGE").unwrap_or_else(|_| "busybox".to_owned());
        let group = unique("throwline-e2e-");
        let home = dir.join("admin-home");
        let mut this = match std::env::var_os("THROWLINE_E2E_KUBECONFIG") {
            Some(kubeconfig) => Self {
                demo: None,
                kubeconfig: PathBuf::from(kubeconfig),
                image,
                home,
                group,
            },
            None => {
                let cluster_dir = dir.join("cluster");
                std::fs::create_dir_all(&cluster_dir)?;
                let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
                let options = Options {
                    hello: false,
                    ..Options::default()
                };
                let demo = DemoCluster::start(listener, &cluster_dir, options)
                    .await
                    .context("the demo cluster did not start")?;
                let kubeconfig = dir.join("admin.kubeconfig");
                std::fs::write(&kubeconfig, demo.kubeconfig())?;
                Self {
                    demo: Some(demo),
                    kubeconfig,
                    image,
                    home,
                    group,
                }
            }
        };
        this.bind().await?;
        this.kubeconfig = std::path::absolute(&this.kubeconfig)?;
        Ok(this)
    }

    /// Lets the stories' group do everything, as an administrator would with his own people.
    async fn bind(&self) -> Result<()> {
        let manifest = format!(
            "apiVersion: rbac.authorization.k8s.io/v1\nkind: ClusterRoleBinding\n\
             metadata: {{name: {group}}}\n\
             roleRef: {{apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: cluster-admin}}\n\
             subjects:\n- {{apiGroup: rbac.authorization.k8s.io, kind: Group, name: {group}}}\n",
            group = self.group
        );
        self.admin()?
            .ok_with(&["create", "-f", "-"], manifest.as_bytes())
            .await
            .context("the stories' group could not be bound to cluster-admin")?;
        Ok(())
    }

    pub fn is_demo(&self) -> bool {
        self.demo.is_some()
    }

    pub fn group(&self) -> &str {
        &self.group
    }

    pub fn image(&self) -> &str {
        &self.image
    }

    /// The administrator's kubeconfig, which is also the agent's: it may impersonate.
    pub fn kubeconfig(&self) -> &Path {
        &self.kubeconfig
    }

    /// Direct kubectl, not through the line.
    pub fn admin(&self) -> Result<Kubectl> {
        std::fs::create_dir_all(&self.home)?;
        Ok(Kubectl::new(
            &tools::newest_kubectl()?,
            &self.kubeconfig,
            &self.home,
        ))
    }

    /// A kubeconfig for an agent whose credential is a bearer token, and that token: a story
    /// looks for it where it must not be.
    pub async fn with_token(&self, dir: &Path) -> Result<(PathBuf, String)> {
        let text = std::fs::read_to_string(&self.kubeconfig)?;
        let mut config: serde_json::Value = serde_norway::from_str(&text)?;
        let token = match &self.demo {
            Some(demo) => demo.token_for("demo-agent", &["system:masters".to_owned()]),
            None => {
                let admin = self.admin()?.namespace("default");
                admin.ok(&["create", "serviceaccount", &self.group]).await?;
                let account = format!("default:{}", self.group);
                let (role, subject) = (
                    "--clusterrole=cluster-admin",
                    format!("--serviceaccount={account}"),
                );
                let name = format!("{}-agent", self.group);
                admin
                    .ok(&["create", "clusterrolebinding", &name, role, &subject])
                    .await?;
                admin
                    .ok(&["create", "token", &self.group])
                    .await?
                    .trim()
                    .to_owned()
            }
        };
        let current = config["current-context"]
            .as_str()
            .unwrap_or_default()
            .to_owned();
        let Some(user) = config["contexts"]
            .as_array()
            .and_then(|all| {
                all.iter()
                    .find(|context| context["name"] == current.as_str())
            })
            .and_then(|context| context["context"]["user"].as_str())
            .map(str::to_owned)
        else {
            bail!("the administrator's kubeconfig has no current context");
        };
        for entry in config["users"].as_array_mut().into_iter().flatten() {
            if entry["name"] == user.as_str() {
                entry["user"] = serde_json::json!({ "token": token });
            }
        }
        let file = dir.join("token.kubeconfig");
        std::fs::write(&file, serde_norway::to_string(&config)?)?;
        Ok((file, token))
    }

    /// Takes back what was made in a cluster that lives on.
    pub async fn clean(&self) -> Result<()> {
        if self.is_demo() {
            return Ok(());
        }
        let admin = self.admin()?.namespace("default");
        let name = format!("{}-agent", self.group);
        let bindings = [
            "delete",
            "clusterrolebinding",
            "--ignore-not-found",
            &self.group,
            &name,
        ];
        admin.ok(&bindings).await?;
        admin
            .ok(&[
                "delete",
                "serviceaccount",
                "--ignore-not-found",
                &self.group,
            ])
            .await?;
        Ok(())
    }
}
