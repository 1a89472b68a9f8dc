//! A registry that never changes.

use std::{collections::HashSet, sync::Arc};

use futures_util::{StreamExt as _, stream};

use super::{Registry, Session, session::check_role};
use crate::{
    discover::{Change, Discovery, Key, Member, Update},
    error::Error,
};

/// A fixed list of sessions, for programs whose peers stand in their configuration.
///
/// The n-th session of the list has generation n, from 1. A clone is another handle on the same list.
///
/// ```
/// use switchboard::{Session, registry::Fixed};
///
/// let registry = Fixed::new([
///     Session::new("echo", "10.0.0.5:21123"),
///     Session::new("echo", "10.0.0.6:21123"),
/// ])?;
/// # Ok::<(), switchboard::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Fixed {
    members: Arc<[Arc<Member>]>,
}

// === impl Fixed ===

impl Fixed {
    /// The registry of these sessions.
    ///
    /// # Errors
    ///
    /// [`Kind::Invalid`](crate::Kind::Invalid) if one of them cannot work (see [`Session::validate`]), or if
    /// two of a role have the same id or the same address.
    pub fn new(sessions: impl IntoIterator<Item = Session>) -> Result<Self, Error> {
        let (mut ids, mut addresses) = (HashSet::new(), HashSet::new());
        let mut members = Vec::new();
        for (session, generation) in sessions.into_iter().zip(1..) {
            session.validate()?;
            let role = session.role_arc();
            let twice = |what: &str, which: &str| {
                let why = format!("two of role {role} have the {what} {which}; each needs its own");
                Err(Error::invalid("sessions", why))
            };
            if !ids.insert((role.clone(), session.id_arc().clone())) {
                return twice("id", session.id());
            }
            if !addresses.insert((role.clone(), session.address_arc().clone())) {
                return twice("address", session.address());
            }
            members.push(Arc::new(Member::new(session, generation)));
        }
        Ok(Self {
            members: members.into(),
        })
    }
}

impl Registry for Fixed {
    fn discover(&self, role: &str) -> Result<Discovery, Error> {
        check_role(role)?;
        let mut updates = Vec::new();
        for member in self.members.iter().filter(|m| m.session().role() == role) {
            let key = format!("{role}/{}", member.session().id());
            let key = Key::new(key, member.generation());
            updates.push(Update::Change(Change::Insert(key, member.clone())));
        }
        updates.push(Update::Synced);
        // Like every discovery it has no end: there may be nothing more to say, but it stays true.
        let updates = stream::iter(updates).chain(stream::pending());
        Ok(Discovery::new(role, updates))
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;

    use super::*;
    use crate::{endpoint::Target as _, error::Kind};

    #[test]
    fn a_role_has_its_sessions_in_order_and_no_others() {
        let registry = Fixed::new([
            Session::new("echo", "h:1"),
            Session::new("other", "h:1"),
            Session::new("echo", "h:2").with_id(7),
        ])
        .expect("all are good");
        let mut updates = registry.discover("echo").expect("a good role").updates();
        let mut seen = Vec::new();
        while let Some(Some(update)) = updates.next().now_or_never() {
            seen.push(match update {
                Update::Change(Change::Insert(key, member)) => format!("{key} {}", member.peer()),
                other => format!("{other:?}"),
            });
        }
        assert_eq!(
            seen,
            ["echo/h:1@1 echo h:1", "echo/7@3 echo 7 at h:2", "Synced"]
        );
    }

    #[test]
    fn a_list_that_cannot_work_is_refused() {
        for (sessions, says) in [
            (vec![Session::new("echo", "h")], "host:port"),
            (
                vec![
                    Session::new("e", "h:1"),
                    Session::new("e", "h:1").with_id(2),
                ],
                "address h:1",
            ),
            (
                vec![
                    Session::new("e", "h:1").with_id(2),
                    Session::new("e", "h:2").with_id(2),
                ],
                "id 2",
            ),
        ] {
            let error = Fixed::new(sessions).expect_err(says);
            assert_eq!(error.kind(), Kind::Invalid);
            assert!(error.to_string().contains(says), "{error}");
        }
        Fixed::new([])
            .expect("an empty list is one")
            .discover("a b")
            .expect_err("no role");
    }
}
