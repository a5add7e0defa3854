//! How much work waits for a carrier that is dialled on demand.

use tokio::sync::watch;

/// Counts what waits for a carrier, such as lines.
#[derive(Debug, Default)]
pub struct Demand(watch::Sender<usize>);

/// One thing that waits, until it is dropped.
#[derive(Debug)]
#[must_use = "dropping it ends the wait"]
pub struct Waiting<'a>(&'a Demand);

impl Demand {
    /// Counts one more, while what is returned lives.
    pub fn wait(&self) -> Waiting<'_> {
        self.0.send_modify(|waiting| *waiting += 1);
        Waiting(self)
    }

    /// Ends when anything waits; for [`UplinkHandler::needed`](crate::UplinkHandler::needed).
    pub async fn arises(&self) {
        // `self` keeps the channel open.
        let _ = self.0.subscribe().wait_for(|waiting| *waiting > 0).await;
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.0.send_modify(|waiting| *waiting -= 1);
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt as _;

    use super::*;

    #[test]
    fn demand_lasts_as_long_as_anything_waits() {
        let demand = Demand::default();
        assert!(demand.arises().now_or_never().is_none());
        let one = demand.wait();
        let another = demand.wait();
        drop(one);
        assert!(demand.arises().now_or_never().is_some());
        drop(another);
        assert!(demand.arises().now_or_never().is_none());
    }
}
