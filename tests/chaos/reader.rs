//! Readers of a client's watch, some of them slow: what they were told last has to be what is there.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
    time::Duration,
};

use fastrand::Rng;
use futures_util::StreamExt as _;
use switchboard::{
    ConnectionManager,
    manager::{InstanceChange, Watch},
};
use tokio::time;

use crate::world::{Truth, lock};

/// What one reader was told is there: where each listens, and whether it is ready.
pub(crate) type View = Arc<Mutex<BTreeMap<String, (String, bool)>>>;

/// Reads with a pause of up to this before each change.
pub(crate) fn read(
    manager: &ConnectionManager,
    pause: Duration,
    random: Rng,
    truth: Arc<Mutex<Truth>>,
) -> View {
    let view = View::default();
    let watch = manager.watch("echo");
    tokio::spawn(follow(watch, pause, random, view.clone(), truth));
    view
}

async fn follow(
    mut watch: Watch,
    pause: Duration,
    mut random: Rng,
    view: View,
    truth: Arc<Mutex<Truth>>,
) {
    while let Some(change) = watch.next().await {
        if let Err(what) = view_after(&view, &change) {
            lock(&truth).is_wrong(&format!("a watch told {what}"));
        }
        time::sleep(pause.mul_f64(random.f64())).await;
    }
}

fn view_after(view: &View, change: &InstanceChange) -> Result<(), String> {
    let mut view = view.lock().map_err(|_| "in vain".to_owned())?;
    let Some(instance) = change.instance() else {
        return Ok(());
    };
    let id = instance.id().to_owned();
    let was_there = view.contains_key(&id);
    match change {
        InstanceChange::Added(_) if was_there => return Err(format!("{id} added twice")),
        InstanceChange::Added(_) => {}
        _ if !was_there => return Err(format!("of {id}, whom it had not added")),
        _ => {}
    }
    if let InstanceChange::Removed(_) = change {
        view.remove(&id);
    } else {
        let now = (instance.address().to_owned(), instance.is_ready());
        view.insert(id, now);
    }
    Ok(())
}

/// Whether that is what is true.
pub(crate) fn is_exact(view: &View, truth: &BTreeMap<&'static str, String>) -> bool {
    let Ok(view) = view.lock() else {
        return false;
    };
    view.len() == truth.len()
        && view.iter().all(|(id, (address, ready))| {
            *ready && truth.get(&**id).is_some_and(|there| there == address)
        })
}
