//! What a component can be, and what it says of itself.

use std::{sync::Arc, time::Duration};

use super::{
    core::{Dependency, Settings},
    hook::Change,
};
use crate::{
    Backoff, InstanceId,
    address::HostPort,
    backoff::check_duration,
    error::Error,
    registry::{Session, session::check_role},
};

/// The longest time to settle.
const LONGEST_SETTLE: Duration = Duration::from_secs(60);

/// Refuses what cannot work, before anything is done.
pub(super) fn check(
    role: &str,
    dependencies: &[Dependency],
    settings: &Settings,
) -> Result<(), Error> {
    check_role(role)?;
    for Dependency {
        role,
        require,
        serving,
    } in dependencies
    {
        check_role(role)?;
        let none = |what| {
            let why = format!("0 {role} is not at least 1; leave it out to need none");
            Err(Error::invalid(what, why))
        };
        match require {
            Some((0, _)) => return none("require"),
            Some((_, within)) => {
                let least = Duration::from_millis(1);
                check_duration("require", *within, least, Backoff::LONGEST)?;
            }
            None => {}
        }
        if *serving == Some(0) {
            return none("serving needs");
        }
    }
    let least = Duration::ZERO;
    check_duration("drain bound", settings.drain, least, Backoff::LONGEST)?;
    check_duration("time to settle", settings.settle, least, LONGEST_SETTLE)?;
    match &settings.listens_at {
        Some(address) => HostPort::parse(address).map(drop),
        None => Ok(()),
    }
}

/// The session of one that advertises an address.
pub(super) fn session(
    role: Arc<str>,
    address: Arc<str>,
    id: Option<InstanceId>,
    change: Option<Change>,
) -> Result<Session, Error> {
    // That a server listens is found out over TCP, and others reach a component from other machines.
    HostPort::parse(&address)?;
    let mut session = Session::new(role.clone(), address.clone());
    if let Some(id) = id {
        session = session.with_id(id);
    }
    if let Some(change) = change {
        session = change(session);
    }
    session.validate()?;
    if *session.role() != *role || *session.address() != *address || session.is_stopping() {
        let why = "its role and its address stay as the builder has them, and it is not stopping; change what else it says";
        return Err(Error::invalid("session", why));
    }
    Ok(session)
}
