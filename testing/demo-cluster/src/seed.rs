//! What a new cluster holds: namespaces, a node, the usual roles, a pod to play with.

use std::net::SocketAddr;

use serde_json::{Value, json};

use crate::{Cluster, json, kinds::Kind, validate};

/// The one node, on which every pod runs: this machine.
pub(crate) const NODE: &str = "this-machine";

pub(crate) fn seed(cluster: &Cluster, address: SocketAddr) {
    for name in ["default", "kube-system", "kube-public"] {
        put(cluster, "namespaces", "", name, json!({}));
        put(cluster, "serviceaccounts", name, "default", json!({}));
        let ca = json!({"data": {"ca.crt": cluster.pki.ca_pem()}});
        put(cluster, "configmaps", name, "kube-root-ca.crt", ca);
    }
    node(cluster);
    roles(cluster);
    let port =
        json!([{"name": "https", "port": 443, "protocol": "TCP", "targetPort": address.port()}]);
    put(
        cluster,
        "services",
        "default",
        "kubernetes",
        json!({"spec": {"clusterIP": "10.96.0.1", "ports": port}}),
    );
    let greeting = json!({"data": {"greeting": "hello from the demo cluster", "colour": "orange"}});
    put(cluster, "configmaps", "default", "hello", greeting);
    if cluster.options.hello {
        let script = "echo \"hello from $POD_NAME\"; n=0; while true; do sleep 5; n=$((n+1)); echo \"still here ($n)\"; done";
        let container =
            json!({"name": "hello", "image": "busybox", "command": ["sh", "-c", script]});
        let spec = json!({"containers": [container], "terminationGracePeriodSeconds": 1});
        put(
            cluster,
            "pods",
            "default",
            "hello",
            json!({"metadata": {"labels": {"app": "hello"}}, "spec": spec}),
        );
    }
}

fn node(cluster: &Cluster) {
    let version = &cluster.options.version;
    let status = json!({
        "capacity": {"cpu": "2", "memory": "4Gi", "pods": "110"},
        "allocatable": {"cpu": "2", "memory": "4Gi", "pods": "110"},
        "conditions": [{"type": "Ready", "status": "True", "reason": "KubeletReady", "message": "pods are processes of this machine",
                        "lastHeartbeatTime": json::now(), "lastTransitionTime": json::now()}],
        "addresses": [{"type": "InternalIP", "address": "127.0.0.1"}, {"type": "Hostname", "address": NODE}],
        "nodeInfo": {
            "kubeletVersion": version, "kubeProxyVersion": version, "osImage": "processes, not containers", "operatingSystem": std::env::consts::OS,
            "architecture": std::env::consts::ARCH, "containerRuntimeVersion": "process://1", "kernelVersion": "", "machineID": "",
            "systemUUID": "", "bootID": "",
        },
    });
    let labels =
        json!({"kubernetes.io/hostname": NODE, "node-role.kubernetes.io/control-plane": ""});
    put(
        cluster,
        "nodes",
        "",
        NODE,
        json!({"metadata": {"labels": labels}, "spec": {}, "status": status}),
    );
}

fn roles(cluster: &Cluster) {
    let all = json!([
        {"verbs": ["*"], "apiGroups": ["*"], "resources": ["*"]},
        {"verbs": ["*"], "nonResourceURLs": ["*"]},
    ]);
    role(cluster, "cluster-admin", all, &["system:masters"]);
    bind(
        cluster,
        "throwline:demo",
        "cluster-admin",
        &["throwline:demo"],
    );
    let read = ["get", "list", "watch"];
    let plain = [
        "configmaps",
        "events",
        "pods",
        "pods/log",
        "pods/status",
        "serviceaccounts",
        "services",
        "namespaces",
    ];
    let view = json!([
        {"verbs": read, "apiGroups": [""], "resources": plain},
        {"verbs": read, "apiGroups": ["apps"], "resources": ["deployments", "deployments/scale", "replicasets", "replicasets/scale"]},
    ]);
    role(cluster, "view", view, &[]);
    let edit = json!([
        {"verbs": ["*"], "apiGroups": [""], "resources": ["configmaps", "events", "pods", "pods/attach", "pods/eviction", "pods/exec", "pods/log",
            "pods/portforward", "pods/status", "secrets", "serviceaccounts", "services"]},
        {"verbs": read, "apiGroups": [""], "resources": ["namespaces"]},
        {"verbs": ["*"], "apiGroups": ["apps"], "resources": ["deployments", "deployments/scale", "replicasets", "replicasets/scale"]},
        {"verbs": ["*"], "apiGroups": ["coordination.k8s.io"], "resources": ["leases"]},
    ]);
    role(cluster, "edit", edit, &[]);
    let discovery = [
        "/api",
        "/api/*",
        "/apis",
        "/apis/*",
        "/healthz",
        "/livez",
        "/openapi",
        "/openapi/*",
        "/readyz",
        "/version",
        "/version/",
    ];
    let discovery = json!([{"verbs": ["get"], "nonResourceURLs": discovery}]);
    role(
        cluster,
        "system:discovery",
        discovery,
        &["system:authenticated"],
    );
    let basic = json!([
        {"verbs": ["create"], "apiGroups": ["authorization.k8s.io"], "resources": ["selfsubjectaccessreviews", "selfsubjectrulesreviews"]},
        {"verbs": ["create"], "apiGroups": ["authentication.k8s.io"], "resources": ["selfsubjectreviews"]},
    ]);
    role(
        cluster,
        "system:basic-user",
        basic,
        &["system:authenticated"],
    );
    let public = json!([{"verbs": ["get"], "nonResourceURLs": ["/healthz", "/livez", "/readyz", "/version", "/version/"]}]);
    role(
        cluster,
        "system:public-info-viewer",
        public,
        &["system:authenticated", "system:unauthenticated"],
    );
}

fn role(cluster: &Cluster, name: &str, rules: Value, groups: &[&str]) {
    put(cluster, "clusterroles", "", name, json!({"rules": rules}));
    if !groups.is_empty() {
        bind(cluster, name, name, groups);
    }
}

fn bind(cluster: &Cluster, name: &str, role: &str, groups: &[&str]) {
    let api = "rbac.authorization.k8s.io";
    let subjects: Vec<Value> = groups
        .iter()
        .map(|group| json!({"apiGroup": api, "kind": "Group", "name": group}))
        .collect();
    let role_ref = json!({"apiGroup": api, "kind": "ClusterRole", "name": role});
    put(
        cluster,
        "clusterrolebindings",
        "",
        name,
        json!({"subjects": subjects, "roleRef": role_ref}),
    );
}

/// Keeps an object that this program itself makes, unless it exists.
pub(crate) fn put(cluster: &Cluster, plural: &str, namespace: &str, name: &str, mut object: Value) {
    let kind = Kind::named(plural);
    json::set(&mut object, &["apiVersion"], json!(kind.api_version()));
    json::set(&mut object, &["kind"], json!(kind.kind));
    json::set(&mut object, &["metadata", "name"], json!(name));
    if kind.namespaced {
        json::set(&mut object, &["metadata", "namespace"], json!(namespace));
    }
    validate::defaults(kind, &mut object);
    let _ = cluster.store.create(kind, object);
}
