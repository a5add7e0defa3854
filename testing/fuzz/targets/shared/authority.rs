//! One authority and one identity of it, for targets that judge certificates and requests.

use std::sync::LazyLock;
use std::time::Duration;

use throwline_authority::{Authority, Subject};
use throwline_certs::enrol::Asker;
use throwline_certs::{Identity, PendingIdentity};
use tokio::runtime::{Builder, Runtime};
use url::Url;

#[allow(dead_code, reason = "each target uses its part")]
pub struct Fixture {
    pub runtime: Runtime,
    pub authority: Authority,
    pub identity: Identity,
    pub dir: tempfile::TempDir,
}

pub static FIXTURE: LazyLock<Fixture> = LazyLock::new(|| {
    let runtime = Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    let dir = tempfile::tempdir().expect("a directory");
    let (authority, identity) = runtime.block_on(async {
        let url = Url::parse("https://relay.example").expect("a URL");
        let authority = Authority::open_or_create(dir.path(), &url)
            .await
            .expect("an authority");
        let subject = Subject::Cluster("alpha".to_owned());
        let ttl = Duration::from_secs(60);
        let token = authority
            .create_token(&subject, ttl, &url)
            .await
            .expect("a token");
        let pending = PendingIdentity::generate().expect("a key");
        let asker = Asker::Cluster {
            uid: "1f".to_owned(),
        };
        let request = token.request(&asker, pending.csr_pem()).expect("a request");
        let issued = authority.redeem(&request).await.expect("enrolled");
        (
            authority,
            pending.complete(issued.chain).expect("an identity"),
        )
    });
    Fixture {
        runtime,
        authority,
        identity,
        dir,
    }
});
