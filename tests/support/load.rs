//! Callers that go on calling, and what became of their calls.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use switchboard::Channel;
use tokio::task::JoinSet;

use super::server::pb::{EchoRequest, echo_client::EchoClient};

/// A few callers in a loop, from its start to its end.
pub struct Load {
    answered: Arc<AtomicUsize>,
    /// What failed calls said, and how often.
    failed: Arc<Mutex<BTreeMap<String, usize>>>,
    stop: Arc<AtomicBool>,
    callers: JoinSet<()>,
}

impl Load {
    /// Calls that take this long.
    pub fn start(channel: &Channel, delay_ms: u32) -> Self {
        let mut load = Self {
            answered: Arc::default(),
            failed: Arc::default(),
            stop: Arc::default(),
            callers: JoinSet::new(),
        };
        for _ in 0..4 {
            let mut client = EchoClient::new(channel.clone());
            let (answered, failed) = (load.answered.clone(), load.failed.clone());
            let stop = load.stop.clone();
            load.callers.spawn(async move {
                while !stop.load(SeqCst) {
                    let request = EchoRequest {
                        delay_ms,
                        ..EchoRequest::default()
                    };
                    match client.unary(request).await {
                        Ok(_) => drop(answered.fetch_add(1, SeqCst)),
                        Err(status) => {
                            let said = format!("{:?}: {}", status.code(), status.message());
                            *failed.lock().unwrap().entry(said).or_default() += 1;
                        }
                    }
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
            });
        }
        load
    }

    /// How many were answered so far.
    pub fn answered(&self) -> usize {
        self.answered.load(SeqCst)
    }

    /// Ends it; all calls were to be answered, and some to be made.
    pub async fn all_answered(mut self) -> usize {
        self.stop.store(true, SeqCst);
        while let Some(caller) = self.callers.join_next().await {
            caller.unwrap();
        }
        let failed = self.failed.lock().unwrap();
        let answered = self.answered();
        assert!(failed.is_empty(), "of {answered} calls: {failed:#?}");
        assert!(answered > 0, "no call was made");
        answered
    }
}
