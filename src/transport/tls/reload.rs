//! TLS that changes while it is in use: certificates that are renewed in their files, or that a program renews.

use std::{
    fmt,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{
    sync::{Mutex as AsyncMutex, watch},
    task,
    time::{self, Instant},
};

use super::{Tls, TlsConfig};
use crate::error::Error;

/// TLS for [`Connector`](super::super::Connector)s that can be replaced while they run, where certificates do not come from
/// files that [`TlsConfig::reload_every`] would look at: from a secret store, say.
///
/// New handshakes are made with what there is then. Connections that were made with what there was before are replaced
/// within some seconds, at a moment of chance each: another is made, new calls go over that one, and the old one closes
/// when its own have ended. A clone is another handle on the same.
///
/// ```
/// use switchboard::transport::{Connector, TlsConfig, TlsReloader};
///
/// # fn run(renewed: TlsConfig) -> Result<(), switchboard::Error> {
/// let tls = TlsReloader::new(TlsConfig::new().webpki_roots())?;
/// let connector = Connector::new().tls_from(&tls);
/// // Whenever there are other certificates:
/// tls.replace(renewed)?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct TlsReloader(Arc<Shared>);

struct Shared {
    current: Mutex<Arc<Current>>,
    /// That of the current one, for those who wait for the next.
    number: watch::Sender<u64>,
}

/// What handshakes are made with for the time being.
struct Current {
    tls: Tls,
    /// Goes up with each that takes the place of another.
    number: u64,
    files: Option<Files>,
}

/// Where it came from, to be looked at again.
struct Files {
    every: Duration,
    /// When they are looked at next.
    due: Mutex<Instant>,
    recipe: TlsConfig,
    looked: AsyncMutex<Looked>,
}

struct Looked {
    /// What they held when they were last of use.
    contents: Vec<Vec<u8>>,
    /// Why they were not when they were last looked at: told once.
    failed: Option<String>,
}

// === impl TlsReloader ===

impl TlsReloader {
    /// Begins with this one.
    ///
    /// # Errors
    ///
    /// [`Kind::Invalid`](crate::Kind::Invalid) if nobody is trusted: no root was given.
    pub fn new(config: TlsConfig) -> Result<Self, Error> {
        Ok(Self(Arc::new(Shared {
            current: Mutex::new(Arc::new(Current::new(config, 0)?)),
            number: watch::Sender::new(0),
        })))
    }

    /// Goes on with this one: handshakes that begin from now on are made with it. It stands for itself; nothing is kept of
    /// the one before.
    ///
    /// # Errors
    ///
    /// As [`TlsReloader::new`]; then the one before stays.
    pub fn replace(&self, config: TlsConfig) -> Result<(), Error> {
        let mut current = self.lock();
        let number = current.number + 1;
        *current = Arc::new(Current::new(config, number)?);
        self.0.number.send_replace(number);
        Ok(())
    }

    /// What a handshake that begins now is made with. Looks at the files if it is time to.
    pub(in crate::transport) async fn current(&self) -> Tls {
        self.look().await;
        self.lock().tls.clone()
    }

    pub(in crate::transport) fn number(&self) -> u64 {
        self.lock().number
    }

    /// Until there is one of a higher number than this. Looks at the files meanwhile.
    ///
    /// Cancel safe.
    pub(in crate::transport) async fn changed(&self, since: u64) {
        let mut numbers = self.0.number.subscribe();
        while *numbers.borrow_and_update() <= since {
            let due = self.lock().files.as_ref().map(Files::due);
            let Some(due) = due else {
                // Its sender is ours.
                let _ = numbers.changed().await;
                continue;
            };
            tokio::select! {
                _ = numbers.changed() => {}
                // Not for a while from now on: whoever waits may begin anew more often than that.
                () = time::sleep_until(due) => self.look().await,
            }
        }
    }

    /// Reads the files, if nobody has done so for as long as it takes, and goes on with what is in them, if that is another
    /// and can be used.
    async fn look(&self) {
        let current = self.lock().clone();
        let Some(files) = &current.files else {
            return;
        };
        let mut looked = files.looked.lock().await;
        if Instant::now() < files.due() {
            return;
        }
        files.put_off();
        let recipe = files.recipe.clone();
        let read = task::spawn_blocking(move || recipe.read_again()).await;
        let result = match read {
            // What was read is what is parsed: one that is being written is not taken for two.
            Ok(Ok((config, contents))) if contents != looked.contents => {
                Current::new(config, current.number + 1)
            }
            Ok(Ok(_)) => {
                looked.failed = None;
                return;
            }
            Ok(Err(why)) => Err(why),
            // The runtime is ending.
            Err(_) => return,
        };
        match result {
            Ok(next) => {
                let mut now = self.lock();
                // A program that has replaced it meanwhile has the last word.
                if now.number == current.number {
                    tracing::info!(files = ?files.recipe.files(), "TLS certificates were read anew");
                    self.0.number.send_replace(next.number);
                    *now = Arc::new(next);
                }
            }
            Err(why) => {
                let why = why.to_string();
                if looked.failed.as_ref() != Some(&why) {
                    tracing::warn!(error = %why, "TLS certificates that were changed cannot be used, and those before stay");
                    looked.failed = Some(why);
                }
            }
        }
    }

    /// For a look or a change; dials and those who wait for a change get here, and no call.
    fn lock(&self) -> MutexGuard<'_, Arc<Current>> {
        self.0
            .current
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for TlsReloader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let current = self.lock().clone();
        f.debug_struct("TlsReloader")
            .field("tls", &current.tls)
            .field("number", &current.number)
            .finish_non_exhaustive()
    }
}

// === impl Current ===

impl Current {
    fn new(config: TlsConfig, number: u64) -> Result<Self, Error> {
        let files = config.reload.map(|every| Files {
            every,
            due: Mutex::new(Instant::now() + every),
            looked: AsyncMutex::new(Looked {
                contents: config.contents(),
                failed: None,
            }),
            recipe: config.clone(),
        });
        let tls = config.build()?;
        Ok(Self { tls, number, files })
    }
}

// === impl Files ===

impl Files {
    fn due(&self) -> Instant {
        *self.due.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn put_off(&self) {
        *self.due.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now() + self.every;
    }
}

/// One file, as it was when it was read.
#[derive(Clone)]
pub(super) struct Kept {
    pub(super) path: PathBuf,
    pub(super) contents: Vec<u8>,
}

impl fmt::Debug for Kept {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Some hold keys.
        f.debug_tuple("Kept").field(&self.path).finish()
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use rcgen::{BasicConstraints, CertificateParams, IsCa, KeyPair};

    use super::*;

    fn root() -> String {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        params.self_signed(&key).unwrap().pem()
    }

    #[tokio::test]
    async fn files_are_looked_at_by_those_who_wait_but_for_a_moment_each() {
        let file = std::env::temp_dir().join(format!("switchboard-root-{}", fastrand::u64(..)));
        fs::write(&file, root()).unwrap();
        let every = Duration::from_millis(50);
        let config = TlsConfig::new().ca_file(&file).unwrap().reload_every(every);
        let reloader = TlsReloader::new(config.unwrap()).unwrap();
        // Given a file that changes, and somebody who begins to wait anew again and again
        fs::write(&file, root()).unwrap();
        let wait = async {
            while time::timeout(every / 10, reloader.changed(0))
                .await
                .is_err()
            {}
        };
        // Then it is seen all the same
        time::timeout(Duration::from_secs(10), wait).await.unwrap();
        assert_eq!(reloader.number(), 1);
        // And what does not change is no change
        let wait = time::timeout(4 * every, reloader.changed(1));
        assert!(wait.await.is_err() && reloader.number() == 1);
        fs::remove_file(&file).unwrap();
    }
}
