//! How much memory and CPU replicas use. CPU is the difference between two readings, so a replica's first has none.

use std::collections::BTreeMap;
use std::time::Duration;

use bollard::models::ContainerStatsResponse;
use bollard::query_parameters::{ListContainersOptionsBuilder, StatsOptionsBuilder};
use futures_util::{StreamExt as _, stream};
use orca_cluster::id::ReplicaId;
use orca_cluster::replica::{Cause, Usage};
use orca_cluster::resource::{Cpu, Memory};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::{MissedTickBehavior, interval, timeout};

use super::{Docker, LABEL_CLUSTER, LABEL_REPLICA};

/// Containers asked about at once; each answer costs the engine a walk through a control group.
const AT_ONCE: usize = 8;
/// One reading of all of them; what an engine says later than this is given up.
const READ_TIME_MAX: Duration = Duration::from_secs(60);

/// What replicas use, read again and again until this is dropped.
#[derive(Debug)]
pub struct Measurements {
    taken: mpsc::Receiver<BTreeMap<ReplicaId, Usage>>,
    task: JoinHandle<()>,
}

/// Remembers the readings before: there is one for as long as anybody measures.
struct Meter {
    docker: Docker,
    before: BTreeMap<ReplicaId, Reading>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Reading {
    memory: u64,
    /// Nanoseconds of CPU time since the container's start.
    cpu: u64,
    /// When, in nanoseconds since 1970.
    at: i128,
}

impl Docker {
    /// Measures at once and then so often, one reading after the other; what cannot be read is left out.
    pub fn measure(&self, every: Duration) -> Measurements {
        let (sender, taken) = mpsc::channel(1);
        let meter = Meter { docker: self.clone(), before: BTreeMap::new() };
        Measurements { taken, task: tokio::spawn(meter.run(every, sender)) }
    }
}

impl Measurements {
    /// Waits for the next: what each running replica uses. Nothing is lost when the wait is given up.
    pub async fn next(&mut self) -> BTreeMap<ReplicaId, Usage> {
        match self.taken.recv().await {
            Some(usage) => usage,
            // The task ends only by a panic, and has no more to say.
            None => std::future::pending().await,
        }
    }
}

impl Drop for Measurements {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Meter {
    async fn run(mut self, every: Duration, sender: mpsc::Sender<BTreeMap<ReplicaId, Usage>>) {
        let mut due = interval(every);
        due.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            due.tick().await;
            if let Ok(Ok(usage)) = timeout(READ_TIME_MAX, self.read()).await
                && sender.send(usage).await.is_err()
            {
                return;
            }
        }
    }

    async fn read(&mut self) -> Result<BTreeMap<ReplicaId, Usage>, Cause> {
        let filters = std::collections::HashMap::from([
            ("label", vec![format!("{LABEL_CLUSTER}={}", self.docker.config().cluster)]),
            ("status", vec!["running".to_owned()]),
        ]);
        let options = ListContainersOptionsBuilder::default().filters(&filters).build();
        let client = self.docker.client()?;
        let running = client.list_containers(Some(options)).await.map_err(|error| self.docker.cause(error))?;
        let running = running.into_iter().filter_map(|container| {
            let replica = container.labels?.get(LABEL_REPLICA)?.parse().ok()?;
            Some((replica, container.id?))
        });
        let client = &client;
        // No async closures: with them, rustc 1.95 panics when it compiles this incrementally.
        let readings = stream::iter(running).map(|(replica, id): (ReplicaId, String)| async move {
            let options = StatsOptionsBuilder::default().stream(false).one_shot(true).build();
            let answer = std::pin::pin!(client.stats(&id, Some(options))).next().await;
            // One that has just ended has none.
            Some((replica, Reading::of(&answer?.ok()?)?))
        });
        let readings: Vec<Option<(ReplicaId, Reading)>> = readings.buffer_unordered(AT_ONCE).collect().await;
        let readings: BTreeMap<ReplicaId, Reading> = readings.into_iter().flatten().collect();
        let usage =
            readings.iter().map(|(replica, reading)| (*replica, reading.usage(self.before.get(replica)))).collect();
        self.before = readings;
        Ok(usage)
    }
}

impl Reading {
    fn of(answer: &ContainerStatsResponse) -> Option<Reading> {
        let memory = answer.memory_stats.as_ref()?;
        // Pages of files that were not used lately go before anything is killed; `docker stats` leaves them out too.
        // Control groups version 1 and 2 name them differently.
        let stats = memory.stats.as_ref();
        let inactive = stats.and_then(|stats| stats.get("total_inactive_file").or_else(|| stats.get("inactive_file")));
        let at: jiff::Timestamp = answer.read.as_deref()?.parse().ok()?;
        Some(Reading {
            memory: memory.usage?.saturating_sub(inactive.copied().unwrap_or_default()),
            cpu: answer.cpu_stats.as_ref()?.cpu_usage.as_ref()?.total_usage?,
            at: at.as_nanosecond(),
        })
    }

    fn usage(&self, before: Option<&Reading>) -> Usage {
        let cpu = before.and_then(|before| {
            let time = u64::try_from(self.at - before.at).ok().filter(|time| *time > 0)?;
            // Less than before: it was started again in between.
            let used = self.cpu.checked_sub(before.cpu)?;
            u32::try_from(u128::from(used) * 1000 / u128::from(time)).ok()
        });
        Usage { memory: Memory(self.memory), cpu: Cpu(cpu.unwrap_or_default()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_is_what_was_used_between_two_readings() {
        let reading = |cpu, at| Reading { memory: 1, cpu, at };
        let check = |before: Option<Reading>, expect| {
            assert_eq!(reading(1_000_000_000, 4_000_000_000).usage(before.as_ref()).cpu, Cpu(expect));
        };
        check(None, 0);
        check(Some(reading(500_000_000, 2_000_000_000)), 250);
        check(Some(reading(2_000_000_000, 2_000_000_000)), 0);
        check(Some(reading(0, 4_000_000_000)), 0);
        check(Some(reading(0, 5_000_000_000)), 0);
    }
}
