//! Whatever happens to carriers, the relay is afterwards what it was before.

use crate::harness::{World, line};

#[tokio::test]
async fn carriers_that_come_and_go_leave_nothing() {
    let world = World::new().await;
    let prod = world.cluster("prod").await;
    let anna = world.user("anna").await;
    for round in 0..10 {
        let agent = world.agent(&prod).await;
        let proxy = world.proxy(&anna).await;
        let lines = [line(&proxy, "prod").await, line(&proxy, "prod").await];
        match round % 3 {
            0 => drop((lines, proxy, agent)),
            1 => drop((agent, proxy, lines)),
            _ => drop((proxy, lines, agent)),
        }
        world.at_rest().await;
    }
    world.end().await;
}

#[tokio::test]
async fn streams_that_come_and_go_leave_nothing_on_their_carriers() {
    let world = World::new().await;
    let agent = world.agent(&world.cluster("prod").await).await;
    let proxy = world.proxy(&world.user("anna").await).await;
    let before = (agent.carrier.streams(), proxy.carrier.streams());
    for _ in 0..300 {
        drop(line(&proxy, "prod").await);
    }
    crate::harness::eventually("streams at the baseline", || {
        (agent.carrier.streams(), proxy.carrier.streams()) == before
    })
    .await;
    drop((proxy, agent));
    world.end().await;
}
