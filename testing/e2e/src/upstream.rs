//! The cluster behind the agent: the demo cluster in this process, or a real one.

use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, bail};
use throwline_demo_cluster::{DemoCluster, Options};
use tokio::net::TcpListener;

use crate::environment::write_secret;
use crate::kubectl::Kubectl;
use crate::suite::NeedsDemo;
use crate::{tools, unique};

/// Names the real cluster, if stories are to run on one.
pub const KUBECONFIG: &str = "THROWLINE_E2E_KUBECONFIG";
const RBAC: &str = "rbac.authorization.k8s.io";

/// On everything that stories make in a cluster beside what is in their namespaces; its value is the
/// group of the [`Upstream`] that made it.
pub const LABEL: &str = "throwline.dev/e2e";
/// The kinds of that.
const KINDS: &str = "namespaces,clusterroles,clusterrolebindings";

/// A cluster, reached as its administrator. What was made in one that lives on is taken back by
/// [`Upstream::clean`], or when this is dropped: by a story that failed, too.
pub struct Upstream {
    demo: Option<DemoCluster>,
    kubeconfig: PathBuf,
    /// The image of the stories' pods; the demo cluster runs commands on this machine instead.
    image: String,
    home: PathBuf,
    /// The group that stories' users are in, and that is bound to `cluster-admin`.
    group: String,
    is_clean: AtomicBool,
}

impl Upstream {
    pub async fn start(dir: &Path) -> Result<Self> {
        Self::start_with(dir, Ipv4Addr::LOCALHOST, None).await
    }

    /// The same; a demo cluster listens at this address of the machine instead of loopback's.
    pub async fn at(dir: &Path, address: Ipv4Addr) -> Result<Self> {
        Self::start_with(dir, address, None).await
    }

    /// The same; a demo cluster loses output as a real one does: see its `lossy_sockets`.
    pub async fn lossy(dir: &Path, bytes: usize) -> Result<Self> {
        Self::start_with(dir, Ipv4Addr::LOCALHOST, Some(bytes)).await
    }

    async fn start_with(
        dir: &Path,
        address: Ipv4Addr,
        lossy_sockets: Option<usize>,
    ) -> Result<Self> {
        let image = std::env::var("THROWLINE_E2E_IMAGE").unwrap_or_else(|_| "busybox".to_owned());
        let group = unique("throwline-e2e-");
        let home = dir.join("admin-home");
        let is_clean = AtomicBool::new(false);
        let this = match std::env::var_os(KUBECONFIG) {
            Some(kubeconfig) => Self {
                demo: None,
                kubeconfig: plain(Path::new(&kubeconfig), dir).await?,
                image,
                home,
                group,
                is_clean,
            },
            None => {
                let cluster_dir = dir.join("cluster");
                std::fs::create_dir_all(&cluster_dir)?;
                let listener = TcpListener::bind((address, 0)).await?;
                let options = Options {
                    hello: false,
                    lossy_sockets,
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
                    is_clean,
                }
            }
        };
        this.bind(
            &this.group,
            &format!("{{apiGroup: {RBAC}, kind: Group, name: {}}}", this.group),
        )
        .await
        .context("the stories' group could not be bound to cluster-admin")?;
        Ok(this)
    }

    /// Lets that subject do everything, as an administrator would with trusted users.
    async fn bind(&self, name: &str, subject: &str) -> Result<()> {
        let manifest = format!(
            "apiVersion: {RBAC}/v1\nkind: ClusterRoleBinding\n\
             metadata: {{name: {name}, labels: {{{LABEL}: {group}}}}}\n\
             roleRef: {{apiGroup: {RBAC}, kind: ClusterRole, name: cluster-admin}}\n\
             subjects:\n- {subject}\n",
            group = self.group
        );
        let create = ["create", "-f", "-"];
        self.admin()?.ok_with(&create, manifest.as_bytes()).await?;
        Ok(())
    }

    /// A new namespace whose name begins like that.
    pub async fn namespace(&self, prefix: &str) -> Result<String> {
        let name = unique(prefix);
        self.namespace_named(&name).await?;
        Ok(name)
    }

    /// A new namespace of that name.
    pub async fn namespace_named(&self, name: &str) -> Result<()> {
        let manifest = format!(
            "apiVersion: v1\nkind: Namespace\nmetadata: {{name: {name}, labels: {{{LABEL}: {}}}}}\n",
            self.group
        );
        let create = ["create", "-f", "-"];
        self.admin()?.ok_with(&create, manifest.as_bytes()).await?;
        Ok(())
    }

    /// [`LABEL`] with this one's value.
    pub fn label(&self) -> String {
        format!("{LABEL}={}", self.group)
    }

    pub fn is_demo(&self) -> bool {
        self.demo.is_some()
    }

    /// An error that skips a story on a real cluster, which lacks `what`.
    pub fn needs_demo(&self, what: &'static str) -> Result<()> {
        match self.is_demo() {
            true => Ok(()),
            false => Err(NeedsDemo(what).into()),
        }
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
                let namespace = self.namespace("throwline-e2e-agent-").await?;
                let admin = self.admin()?.namespace(&namespace);
                admin.ok(&["create", "serviceaccount", &self.group]).await?;
                let subject = format!(
                    "{{kind: ServiceAccount, name: {}, namespace: {namespace}}}",
                    self.group
                );
                self.bind(&format!("{}-agent", self.group), &subject)
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
        if !self.is_demo() {
            let label = self.label();
            self.admin()?.ok(&removal(&label)).await?;
        }
        self.is_clean.store(true, Ordering::Relaxed);
        Ok(())
    }
}

/// What takes back everything of that label; namespaces go in their own time.
fn removal(label: &str) -> [&str; 6] {
    [
        "delete",
        KINDS,
        "--selector",
        label,
        "--wait=false",
        "--ignore-not-found",
    ]
}

impl Drop for Upstream {
    fn drop(&mut self) {
        if self.is_demo() || *self.is_clean.get_mut() {
            return;
        }
        let label = self.label();
        // It waits here, so that it is done before the program ends. Its own directory may be gone.
        let Ok(kubectl) = tools::newest_kubectl() else {
            return;
        };
        let kubeconfig = std::env::var_os(KUBECONFIG).unwrap_or_default();
        let removed = std::process::Command::new(kubectl.path)
            .arg("--kubeconfig")
            .arg(kubeconfig)
            .args(removal(&label))
            .args(["--request-timeout", "30s"])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .status();
        if !removed.is_ok_and(|status| status.success()) {
            println!("left in the cluster: kubectl delete {KINDS} -l {label}");
        }
    }
}

/// The current context of a kubeconfig and nothing else, with all that its paths lead to: stories move it,
/// and change it.
async fn plain(kubeconfig: &Path, dir: &Path) -> Result<PathBuf> {
    let kubectl = Kubectl::new(&tools::newest_kubectl()?, kubeconfig, dir);
    let arguments = ["config", "view", "--raw", "--flatten", "--minify"];
    let text = kubectl.ok(&arguments).await?;
    let file = dir.join("admin.kubeconfig");
    write_secret(&file, &text)?;
    Ok(file)
}
