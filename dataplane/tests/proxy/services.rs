//! Requests that begin inside the process: chosen for as clients' are, and in flight like them.

use std::io;
use std::net::SocketAddr;

use orca_cluster::id::ReplicaId;

use crate::world::*;

const R1: ReplicaId = ReplicaId(1);
const R2: ReplicaId = ReplicaId(2);

fn address(last: u8) -> SocketAddr {
    SocketAddr::from(([127, 0, 0, last], 80))
}

#[tokio::test]
async fn what_was_chosen_is_in_flight_until_it_ends_whatever_the_tables_become() {
    let plane = proxy(&[(1, address(1))]).await;
    let passage = plane.services().choose(&service(), &[]).unwrap();
    assert_eq!((passage.replica(), passage.address()), (R1, Some(address(1))));
    plane.apply(tables(&[(2, address(2))])).await;
    assert_eq!(traffic(&plane).in_flight[&R1].requests, 1, "a drain has to wait for it");
    assert_eq!(plane.services().choose(&service(), &[]).unwrap().replica(), R2);
    // Back in the tables before it is over, it is the same replica.
    plane.apply(tables(&[(1, address(1))])).await;
    let again = plane.services().choose(&service(), &[]).unwrap();
    assert_eq!(traffic(&plane).in_flight[&R1].requests, 2);
    drop((passage, again));
    assert!(traffic(&plane).in_flight.is_empty());
}

#[tokio::test]
async fn a_replica_that_is_avoided_or_refuses_again_and_again_is_left_alone() {
    let plane = proxy(&[(1, address(1)), (2, address(2))]).await;
    let services = plane.services();
    let chosen = |avoid: &[ReplicaId]| services.choose(&service(), avoid).unwrap().replica();
    for _ in 0..20 {
        assert_eq!(chosen(&[R1]), R2);
        assert_eq!(chosen(&[R2]), R1);
    }
    let refused = services.choose(&service(), &[R2]).unwrap();
    until("it is left alone", || {
        (0..3).for_each(|_| refused.refused(&io::ErrorKind::ConnectionRefused.into()));
        (0..20).all(|_| chosen(&[]) == R2)
    })
    .await;
    refused.succeeded();
    let mut seen = std::collections::BTreeSet::new();
    until("both get requests", || {
        seen.insert(chosen(&[]));
        seen.len() == 2
    })
    .await;
}

#[tokio::test]
async fn the_less_loaded_of_two_gets_more() {
    let plane = proxy(&[(1, address(1)), (2, address(2))]).await;
    let services = plane.services();
    let _held: Vec<_> = (0..500).map(|_| services.choose(&service(), &[R2]).unwrap()).collect();
    let to_second = (0..400).filter(|_| services.choose(&service(), &[]).unwrap().replica() == R2).count();
    // 300 are expected, and 200 if load were not looked at; either way 250 is five deviations away.
    assert!(to_second > 250, "{to_second} of 400");
}

#[tokio::test]
async fn a_service_without_replicas_is_known_and_leads_nowhere() {
    let plane = proxy(&[]).await;
    let services = plane.services();
    assert!(services.has(&service()));
    assert!(services.choose(&service(), &[]).is_none());
    assert!(!services.has(&"shop/other".parse().unwrap()));
}
