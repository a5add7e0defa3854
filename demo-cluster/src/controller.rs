use std::sync::Arc;
use crate::Cluster;
pub(crate) async fn run(_cluster: Arc<Cluster>) {}
