use crate::{Cluster, api::Call, status::{Body, Failure}};
pub(crate) fn serve(_c: &Cluster, _call: &Call) -> Result<http::Response<Body>, Failure> { Err(Failure::no_such_path()) }
