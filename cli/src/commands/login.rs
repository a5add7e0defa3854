//! `throwline login`.

use throwline_local_proxy::Store;
use throwline_ops::text::escape;

use crate::args;
use crate::commands::common::{outbound, read_token, state_dir};

pub(super) async fn run(args: args::Login) -> anyhow::Result<()> {
    let outbound = outbound(args.outbound)?;
    let token = read_token(&args.token_file).await?;
    let store = Store::new(state_dir(args.state.state_dir)?);
    let outcome = throwline_local_proxy::login(&token, &store, &outbound).await?;
    let groups = match outcome.groups.as_slice() {
        [] => "in no groups".to_owned(),
        groups => format!("in groups {}", groups.join(", ")),
    };
    let signed_in = format!(
        "Signed in to {} as {}, {groups}.",
        outcome.relay, outcome.user
    );
    println!("{}", escape(&signed_in));
    println!("Now: throwline proxy");
    Ok(())
}
