//! OpenAPI, versions 2 and 3.

use http::Response;

use crate::status::{Body, Failure};

pub(crate) fn serve(_path: &str, _accept: &str) -> Result<Response<Body>, Failure> {
    Err(Failure::no_such_path())
}
