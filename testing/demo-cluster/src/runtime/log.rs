//! `pods/log`.

use futures::stream;
use http::Response;
use http_body::Frame;
use http_body_util::{BodyExt as _, StreamBody};
use time::{Duration, OffsetDateTime};

use crate::{
    Cluster,
    api::Call,
    json::parse_time,
    logs::{Options, Reader},
    status::{Body, Failure, bytes_response},
};

pub(crate) fn serve(cluster: &Cluster, call: &Call) -> Result<Response<Body>, Failure> {
    let query = &call.query;
    let container = super::container(
        cluster,
        &call.target,
        query.get("container").unwrap_or_default(),
    )?;
    let since = match (query.get("sinceTime"), query.number::<i64>("sinceSeconds")?) {
        (Some(time), _) => Some(
            parse_time(time)
                .ok_or_else(|| Failure::bad_request(format!("invalid sinceTime {time:?}")))?,
        ),
        (None, Some(seconds)) => {
            Some(OffsetDateTime::now_utc() - Duration::seconds(seconds.clamp(0, 1 << 32)))
        }
        (None, None) => None,
    };
    let previous = query.flag("previous");
    let options = Options {
        follow: query.flag("follow") && !previous,
        timestamps: query.flag("timestamps"),
        tail: query.number("tailLines")?,
        since,
        limit: query.number("limitBytes")?,
    };
    let log = if previous {
        container.previous_log()
    } else {
        container.log()
    };
    let Some(log) = log else {
        let (name, pod) = (&container.name, &call.target.name);
        return Err(Failure::bad_request(if previous {
            format!("previous terminated container {name:?} in pod {pod:?} not found")
        } else {
            format!("container {name:?} in pod {pod:?} is waiting to start: ContainerCreating")
        }));
    };
    let reader = Reader::new(log, options).map_err(|error| Failure::internal(error.to_string()))?;
    let stop = cluster.stop.clone();
    let body = stream::unfold((reader, stop), |(mut reader, stop)| async move {
        let next = tokio::select! {
            next = reader.next() => next?,
            () = stop.cancelled() => return None,
        };
        Some((next.map(Frame::data), (reader, stop)))
    });
    let mut response = bytes_response(200, "text/plain", bytes::Bytes::new());
    *response.body_mut() = StreamBody::new(body).boxed_unsync();
    Ok(response)
}
