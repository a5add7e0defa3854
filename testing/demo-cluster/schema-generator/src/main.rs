//! Prints the definitions of the kinds which the demo cluster serves, in the form of an OpenAPI
//! document's `definitions`. Kept apart from the workspace: compiling every Kubernetes type with
//! its schema costs minutes, and the result changes only with a new Kubernetes version.

use k8s_openapi::api::{
    apps::v1 as apps, authentication::v1 as authn, authorization::v1 as authz, autoscaling::v1 as autoscaling,
    coordination::v1 as coordination, core::v1 as core, policy::v1 as policy, rbac::v1 as rbac,
};
use schemars::{JsonSchema, generate::SchemaSettings};
use serde_json::Value;

fn add<T: JsonSchema>(generator: &mut schemars::SchemaGenerator) {
    let _ = generator.subschema_for::<T>();
}

fn main() {
    let mut settings = SchemaSettings::openapi3();
    settings.definitions_path = "/definitions".into();
    settings.meta_schema = None;
    let mut generator = settings.into_generator();
    add::<core::Namespace>(&mut generator);
    add::<core::Pod>(&mut generator);
    add::<core::ConfigMap>(&mut generator);
    add::<core::Secret>(&mut generator);
    add::<core::Service>(&mut generator);
    add::<core::Event>(&mut generator);
    add::<core::ServiceAccount>(&mut generator);
    add::<core::Node>(&mut generator);
    add::<apps::Deployment>(&mut generator);
    add::<apps::ReplicaSet>(&mut generator);
    add::<rbac::Role>(&mut generator);
    add::<rbac::RoleBinding>(&mut generator);
    add::<rbac::ClusterRole>(&mut generator);
    add::<rbac::ClusterRoleBinding>(&mut generator);
    add::<coordination::Lease>(&mut generator);
    add::<authn::SelfSubjectReview>(&mut generator);
    add::<authn::TokenRequest>(&mut generator);
    add::<authz::SelfSubjectAccessReview>(&mut generator);
    add::<authz::SubjectAccessReview>(&mut generator);
    add::<authz::SelfSubjectRulesReview>(&mut generator);
    add::<authz::LocalSubjectAccessReview>(&mut generator);
    add::<policy::Eviction>(&mut generator);
    add::<autoscaling::Scale>(&mut generator);
    let definitions = generator.take_definitions(true);
    let value = Value::Object(definitions);
    println!("{value:#}");
}
