//! The cluster that the demo reaches, and the identity that it sees.

use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use k8s_openapi::api::authentication::v1::SelfSubjectReview;
use k8s_openapi::api::authorization::v1::{
    ResourceAttributes, SubjectAccessReview, SubjectAccessReviewSpec,
};
use kube::api::PostParams;
use kube::{Api, Client};
use throwline_agent::upstream::read_kubeconfig;
use throwline_certs::files;
use throwline_demo_cluster::{DemoCluster, Options};
use throwline_policy::system_names::check_exception;
use throwline_policy::{ReservedName, SystemNames};
use tokio::net::TcpListener;

use crate::args;

/// Who one is in the demo cluster, which binds this group to all rights.
const DEMO_USER: &str = "demo";
const DEMO_GROUP: &str = "throwline:demo";

/// RBAC cannot limit its members, so the agent never passes it on.
const MASTERS: &str = "system:masters";

/// Every API server adds these itself to each authenticated user.
const IMPLIED: [&str; 2] = ["system:authenticated", "system:unauthenticated"];

pub(super) struct Upstream {
    pub(super) kubeconfig: PathBuf,
    pub(super) description: String,
    pub(super) user: String,
    pub(super) groups: Vec<String>,
    /// What a person has to know or do about the user, if anything.
    pub(super) hint: Option<String>,
    demo: Option<DemoCluster>,
}

impl Upstream {
    pub(super) async fn start(args: &args::Demo, dir: &Path) -> anyhow::Result<Self> {
        match &args.kubeconfig {
            Some(kubeconfig) => Self::existing(kubeconfig, args).await,
            None => Self::small(dir).await,
        }
    }

    /// A kubeconfig's own user, or one that was named, may be Kubernetes' own: here that is asked for.
    pub(super) fn system_names(&self) -> Result<SystemNames, ReservedName> {
        let names = std::iter::once(&self.user).chain(&self.groups);
        let own = names.filter(|name| check_exception(name).is_ok());
        SystemNames::allowing(own.cloned().collect())
    }

    pub(super) async fn stop(self) {
        if let Some(demo) = self.demo {
            demo.stop().await;
        }
    }

    async fn small(dir: &Path) -> anyhow::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")
            .await
            .context("cannot open a loopback port for the cluster")?;
        let home = dir.join("cluster");
        std::fs::create_dir(&home).with_context(|| format!("cannot make {}", home.display()))?;
        let demo = DemoCluster::start(listener, &home, Options::default()).await?;
        let kubeconfig = dir.join("cluster.kubeconfig");
        files::write_new_private(&kubeconfig, demo.kubeconfig().as_bytes())?;
        Ok(Self {
            kubeconfig,
            description: format!("a small Kubernetes API server, {}", demo.url()),
            user: DEMO_USER.to_owned(),
            groups: vec![DEMO_GROUP.to_owned()],
            hint: None,
            demo: Some(demo),
        })
    }

    async fn existing(file: &Path, args: &args::Demo) -> anyhow::Result<Self> {
        let (client, server) = client(file).await?;
        let (user, groups, mut hint) = match &args.user {
            Some(user) => (user.clone(), args.groups.clone(), None),
            None => own_identity(&client, &args.groups).await?,
        };
        if groups.iter().any(|group| group == MASTERS) {
            bail!(
                "--group {MASTERS} is refused: RBAC cannot limit its members; bind another group to the rights you need"
            );
        }
        if !may_do_anything(&client, &user, &groups).await {
            let bind = format!(
                "User {user} may list no pods in this cluster. To let it look around:\n  \
                 kubectl --kubeconfig {} create clusterrolebinding throwline-demo --clusterrole=view --user={user}",
                file.display()
            );
            hint = Some(
                hint.map(|hint: String| format!("{hint}\n{bind}"))
                    .unwrap_or(bind),
            );
        }
        Ok(Self {
            kubeconfig: file.to_owned(),
            description: format!("{server}, as {} says", file.display()),
            user,
            groups,
            hint,
            demo: None,
        })
    }
}

async fn client(file: &Path) -> anyhow::Result<(Client, String)> {
    let config = read_kubeconfig(file).await?;
    let server = config.cluster_url.to_string();
    Ok((Client::try_from(config)?, server))
}

/// Who the kubeconfig's user is, by the cluster's own word.
async fn own_identity(
    client: &Client,
    wanted_groups: &[String],
) -> anyhow::Result<(String, Vec<String>, Option<String>)> {
    let reviews: Api<SelfSubjectReview> = Api::all(client.clone());
    let review = reviews
        .create(&PostParams::default(), &SelfSubjectReview::default())
        .await
        .context("the cluster did not say who this kubeconfig's user is; name one with --user")?;
    let info = review
        .status
        .and_then(|status| status.user_info)
        .unwrap_or_default();
    let Some(user) = info.username.filter(|user| !user.is_empty()) else {
        bail!("the cluster did not say who this kubeconfig's user is; name one with --user");
    };
    let own = info.groups.unwrap_or_default();
    let was_master = own.iter().any(|group| group == MASTERS);
    let groups = if wanted_groups.is_empty() {
        own.into_iter()
            .filter(|group| group != MASTERS && !IMPLIED.contains(&group.as_str()))
            .collect()
    } else {
        wanted_groups.to_vec()
    };
    let hint = was_master.then(|| {
        format!("The cluster sees {user} without the group {MASTERS}, which RBAC cannot limit.")
    });
    Ok((user, groups, hint))
}

/// Whether the cluster would let them list pods somewhere. A cluster that does not answer the
/// question counts as yes: the hint is a courtesy.
async fn may_do_anything(client: &Client, user: &str, groups: &[String]) -> bool {
    let mut all_groups = groups.to_vec();
    all_groups.push(IMPLIED[0].to_owned());
    for namespace in [None, Some("default".to_owned())] {
        let review = SubjectAccessReview {
            spec: SubjectAccessReviewSpec {
                user: Some(user.to_owned()),
                groups: Some(all_groups.clone()),
                resource_attributes: Some(ResourceAttributes {
                    verb: Some("list".to_owned()),
                    resource: Some("pods".to_owned()),
                    namespace,
                    ..ResourceAttributes::default()
                }),
                ..SubjectAccessReviewSpec::default()
            },
            ..SubjectAccessReview::default()
        };
        let reviews: Api<SubjectAccessReview> = Api::all(client.clone());
        match reviews.create(&PostParams::default(), &review).await {
            Ok(answer) if answer.status.as_ref().is_some_and(|status| status.allowed) => {
                return true;
            }
            Ok(_) => {}
            Err(error) => {
                tracing::debug!(%error, "the cluster does not say what the user may do");
                return true;
            }
        }
    }
    false
}
