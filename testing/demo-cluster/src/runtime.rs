//! Runs the containers of pods as processes of this machine.
//!
//! One loop compares the pods that should be with those that are; each container then has a
//! task, which starts its process, keeps its output and starts it again by the pod's restart
//! policy.

mod container;
mod environment;
pub(crate) mod log;
pub(crate) mod process;
mod report;

use std::{
    collections::HashMap,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use serde_json::Value;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

pub(crate) use container::{Channel, Container, exit_code};

use crate::{
    Cluster, api,
    json::{items, number, text},
    kinds::Kind,
    request::Target,
    status::Failure,
};

pub(crate) struct Runtime {
    directory: PathBuf,
    log_bytes: u64,
    pods: Mutex<HashMap<String, Arc<Pod>>>,
}

/// A pod that has been started here.
pub(crate) struct Pod {
    pub(crate) uid: String,
    pub(crate) namespace: String,
    pub(crate) name: String,
    pub(crate) restart_policy: String,
    pub(crate) containers: Vec<Arc<Container>>,
    pub(crate) directory: PathBuf,
    /// Asks the processes to end (SIGTERM); `killed` makes them.
    pub(crate) terminating: CancellationToken,
    pub(crate) killed: CancellationToken,
    /// Cancelled once every process has been waited for.
    ended: CancellationToken,
}

impl Runtime {
    pub(crate) fn new(directory: PathBuf, log_bytes: u64) -> Self {
        Self {
            directory,
            log_bytes,
            pods: Mutex::default(),
        }
    }

    /// Kills every process and waits until all have gone.
    pub(crate) async fn kill_all(&self) {
        let pods: Vec<_> = self.lock().values().cloned().collect();
        for pod in &pods {
            pod.killed.cancel();
        }
        for pod in pods {
            // A process that cannot be killed (in the kernel) must not delay us without end.
            let _ = tokio::time::timeout(Duration::from_secs(5), pod.ended.cancelled()).await;
        }
    }

    pub(crate) fn kill_now(&self) {
        for pod in self.lock().values() {
            pod.killed.cancel();
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Arc<Pod>>> {
        self.pods.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn pod(&self, uid: &str) -> Option<Arc<Pod>> {
        self.lock().get(uid).cloned()
    }
}

/// The container that a request names, or the only one.
pub(crate) fn container(
    cluster: &Cluster,
    target: &Target,
    name: &str,
) -> Result<Arc<Container>, Failure> {
    let (pod, running) = find(cluster, target)?;
    let named = items(&pod, "/spec/containers");
    let name = match (name, named) {
        ("", [only]) => text(only, "/name").to_owned(),
        ("", [first, ..]) if target.subresource() == "attach" || target.subresource() == "exec" => {
            text(first, "/name").to_owned()
        }
        ("", many) => {
            let names: Vec<&str> = many.iter().map(|one| text(one, "/name")).collect();
            return Err(Failure::bad_request(format!(
                "a container name must be specified for pod {}, choose one of: [{}]",
                target.name,
                names.join(" ")
            )));
        }
        (name, _) => name.to_owned(),
    };
    running
        .containers
        .iter()
        .find(|container| container.name == name)
        .cloned()
        .ok_or_else(|| {
            Failure::bad_request(format!(
                "container {name} is not valid for pod {}",
                target.name
            ))
        })
}

/// The pod that a request names, as an object and as it runs.
pub(crate) fn find(cluster: &Cluster, target: &Target) -> Result<(Arc<Value>, Arc<Pod>), Failure> {
    let kind = target.kind;
    let pod = cluster
        .store
        .get(kind, &target.namespace, &target.name)
        .ok_or_else(|| Failure::not_found(kind, &target.name))?;
    let running = cluster
        .runtime
        .pod(text(&pod, "/metadata/uid"))
        .ok_or_else(|| {
            Failure::bad_request(format!(
                "pod {} does not have a host assigned or is not running yet",
                target.name
            ))
        })?;
    Ok((pod, running))
}

pub(crate) async fn run(cluster: Arc<Cluster>) {
    let mut changed = cluster.store.subscribe();
    loop {
        reconcile(&cluster);
        tokio::select! {
            () = cluster.stop.cancelled() => return,
            changed = changed.changed() => if changed.is_err() { return },
        }
    }
}

fn reconcile(cluster: &Arc<Cluster>) {
    let pods = cluster.store.list(Kind::named("pods"), None).1;
    for object in &pods {
        let uid = text(object, "/metadata/uid");
        match cluster.runtime.pod(uid) {
            None if object.pointer("/metadata/deletionTimestamp").is_none() => {
                start(cluster, object)
            }
            None => api::remove_now(
                cluster,
                Kind::named("pods"),
                text(object, "/metadata/namespace"),
                text(object, "/metadata/name"),
            ),
            Some(pod) if object.pointer("/metadata/deletionTimestamp").is_some() => {
                let grace = number(object, "/metadata/deletionGracePeriodSeconds").unwrap_or(30);
                end(
                    cluster,
                    &pod,
                    Duration::from_secs(u64::try_from(grace).unwrap_or(0)),
                );
            }
            Some(_) => {}
        }
    }
    // Those that were taken away by force are killed without grace.
    let mut gone = Vec::new();
    cluster.runtime.lock().retain(|uid, pod| {
        let there = pods
            .iter()
            .any(|object| text(object, "/metadata/uid") == uid);
        if !there {
            gone.push(Arc::clone(pod));
        }
        there
    });
    for pod in gone {
        pod.killed.cancel();
        cluster.tasks.spawn(async move {
            pod.ended.cancelled().await;
            let _ = tokio::fs::remove_dir_all(&pod.directory).await;
        });
    }
}

fn start(cluster: &Arc<Cluster>, object: &Arc<Value>) {
    let uid = text(object, "/metadata/uid").to_owned();
    let directory = cluster.runtime.directory.join(&uid);
    let containers = items(object, "/spec/containers").iter().map(|spec| {
        Arc::new(Container::new(
            spec.clone(),
            directory.join(text(spec, "/name")),
            cluster.runtime.log_bytes,
        ))
    });
    let pod = Arc::new(Pod {
        uid: uid.clone(),
        namespace: text(object, "/metadata/namespace").to_owned(),
        name: text(object, "/metadata/name").to_owned(),
        restart_policy: text(object, "/spec/restartPolicy").to_owned(),
        containers: containers.collect(),
        directory,
        terminating: CancellationToken::new(),
        killed: CancellationToken::new(),
        ended: CancellationToken::new(),
    });
    cluster.runtime.lock().insert(uid, Arc::clone(&pod));
    report::event(
        cluster,
        &pod,
        "Normal",
        "Scheduled",
        &format!(
            "Successfully assigned {}/{} to {}",
            pod.namespace,
            pod.name,
            crate::seed::NODE
        ),
    );
    let cluster = Arc::clone(cluster);
    let object = Arc::clone(object);
    let tasks = cluster.tasks.clone();
    tasks.spawn(async move {
        let mut running = JoinSet::new();
        for container in &pod.containers {
            running.spawn(container::supervise(
                Arc::clone(&cluster),
                Arc::clone(&pod),
                Arc::clone(container),
                Arc::clone(&object),
            ));
        }
        while running.join_next().await.is_some() {}
        pod.ended.cancel();
    });
}

/// Ends a pod with grace, and takes the object away when its processes have gone.
fn end(cluster: &Arc<Cluster>, pod: &Arc<Pod>, grace: Duration) {
    if pod.terminating.is_cancelled() {
        return;
    }
    pod.terminating.cancel();
    let (cluster, pod) = (Arc::clone(cluster), Arc::clone(pod));
    let tasks = cluster.tasks.clone();
    tasks.spawn(async move {
        if tokio::time::timeout(grace, pod.ended.cancelled())
            .await
            .is_err()
        {
            pod.killed.cancel();
            pod.ended.cancelled().await;
        }
        let kind = Kind::named("pods");
        // Another pod of the same name is not ours to remove.
        let same = cluster.store.get(kind, &pod.namespace, &pod.name);
        if same.is_some_and(|object| {
            text(&object, "/metadata/uid") == pod.uid
                && items(&object, "/metadata/finalizers").is_empty()
        }) {
            api::remove_now(&cluster, kind, &pod.namespace, &pod.name);
        }
    });
}
