use crate::{Cluster, api::Call, status::{Body, Failure}};
pub(crate) async fn serve(_c: &Cluster, _call: &Call, _r: http::Request<hyper::body::Incoming>) -> Result<http::Response<Body>, Failure> { Err(Failure::no_such_path()) }
