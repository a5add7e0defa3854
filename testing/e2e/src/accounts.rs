//! Accounts of a cluster for agents that may do less than everything, and what is bound to them.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::kubectl::Kubectl;
use crate::unique;

/// The roles that are shipped.
const CEILINGS: &str = include_str!("../../../deploy/kubernetes/ceilings.yaml");
/// The older kind, as agents had it before Kubernetes 1.36.
const LEGACY: &str = "apiVersion: rbac.authorization.k8s.io/v1\nkind: ClusterRole\n\
    metadata: {name: throwline-legacy}\nrules:\n\
    - {apiGroups: [\"\"], resources: [users, groups], verbs: [impersonate]}\n\
    - {apiGroups: [authentication.k8s.io], resources: [userextras/throwline.dev/credential-id], verbs: [impersonate]}\n";

/// The roles of `deploy/kubernetes/ceilings.yaml` under names of their own, and service accounts.
pub struct Accounts {
    admin: Kubectl,
    prefix: String,
    roles: String,
    namespace: String,
    label: String,
}

impl Accounts {
    /// What they are is labelled, so that it can be taken back even when this fails.
    pub async fn new(admin: Kubectl, label: &str) -> Result<Self> {
        let prefix = unique("throwline-e2e-");
        let roles = format!("{CEILINGS}---\n{LEGACY}").replace("throwline-", &format!("{prefix}-"));
        let namespace = prefix.clone();
        let this = Self {
            admin,
            prefix,
            roles,
            namespace,
            label: label.to_owned(),
        };
        this.admin
            .ok(&["create", "namespace", &this.namespace])
            .await?;
        this.mark(&["namespace", &this.namespace]).await?;
        this.admin
            .ok_with(&["create", "-f", "-"], this.roles.as_bytes())
            .await
            .context("the roles of deploy/kubernetes/ceilings.yaml are not accepted")?;
        let label = ["label", "-f", "-", &this.label];
        this.admin.ok_with(&label, this.roles.as_bytes()).await?;
        Ok(this)
    }

    async fn mark(&self, what: &[&str]) -> Result<()> {
        let label = [&["label"], what, &[&self.label]].concat();
        self.admin.ok(&label).await.map(drop)
    }

    /// A service account with these roles (`who`, `basics`, `view`, …, `legacy`): a kubeconfig in `dir`
    /// whose cluster is that of `template`.
    pub async fn with(
        &self,
        dir: &Path,
        template: &Path,
        name: &str,
        roles: &[&str],
    ) -> Result<PathBuf> {
        let admin = self.admin.clone().namespace(&self.namespace);
        admin.ok(&["create", "serviceaccount", name]).await?;
        for role in roles {
            let binding = self.binding(name, role);
            let role = format!("--clusterrole={}-{role}", self.prefix);
            let account = format!("--serviceaccount={}:{name}", self.namespace);
            admin
                .ok(&["create", "clusterrolebinding", &binding, &role, &account])
                .await?;
            self.mark(&["clusterrolebinding", &binding]).await?;
        }
        let token = admin.ok(&["create", "token", name]).await?;
        let text = std::fs::read_to_string(template)?;
        let mut config: serde_json::Value = serde_norway::from_str(&text)?;
        for user in config["users"].as_array_mut().into_iter().flatten() {
            user["user"] = serde_json::json!({ "token": token.trim() });
        }
        let file = dir.join(format!("{name}.kubeconfig"));
        std::fs::write(&file, serde_norway::to_string(&config)?)?;
        Ok(file)
    }

    pub async fn unbind(&self, name: &str, role: &str) -> Result<()> {
        let binding = self.binding(name, role);
        let arguments = ["delete", "clusterrolebinding", &binding];
        self.admin.ok(&arguments).await.map(drop)
    }

    /// Takes everything back, whatever of it was made.
    pub async fn clean(&self) -> Result<()> {
        let list = ["get", "clusterrolebindings", "-o", "name"];
        let bindings = self.admin.ok(&list).await?;
        for binding in bindings.lines().filter(|name| name.contains(&self.prefix)) {
            self.admin.ok(&["delete", binding]).await?;
        }
        let roles = ["delete", "--ignore-not-found", "-f", "-"];
        self.admin.ok_with(&roles, self.roles.as_bytes()).await?;
        let namespace = ["delete", "namespace", &self.namespace, "--wait=false"];
        self.admin.ok(&namespace).await.map(drop)
    }

    fn binding(&self, name: &str, role: &str) -> String {
        format!("{}-{name}-{role}", self.prefix)
    }
}
