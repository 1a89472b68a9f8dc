//! The record that one running server instance keeps in the registry.

use std::{collections::BTreeMap, sync::Arc};

use crate::{
    address::Address,
    error::{Error, shown},
    pool::InstanceId,
};

/// What one running server instance says of itself: who it is, where it listens, and how it is to be
/// treated.
///
/// Building one cannot fail; [`Session::validate`] says whether it can work, and every registry asks before it
/// takes one.
///
/// ```
/// use switchboard::Session;
///
/// let session = Session::new("querynode", "10.0.0.5:21123")
///     .with_id(7)
///     .with_version("2.6.0")
///     .with_metadata("zone", "eu-1a");
/// assert_eq!(session.id(), "7");
/// session.validate()?;
/// # Ok::<(), switchboard::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Session {
    role: Arc<str>,
    id: Arc<str>,
    address: Arc<str>,
    version: String,
    metadata: BTreeMap<String, String>,
    weight: u32,
    exclusive: bool,
    stopping: bool,
}

// === impl Session ===

impl Session {
    /// A session of this role, listening at `host:port` or, for those on the same machine, at a Unix domain socket such
    /// as `unix:///run/a.sock`. Its id is its address, with `_` for each `/`, until [`Session::with_id`], its weight 1,
    /// and it has no version and no metadata.
    pub fn new(role: impl Into<Arc<str>>, address: impl Into<Arc<str>>) -> Self {
        let address = address.into();
        Self {
            role: role.into(),
            id: match address.contains('/') {
                // An id stands in keys, where a slash would begin another part.
                true => address.replace('/', "_").into(),
                false => address.clone(),
            },
            address,
            version: String::new(),
            metadata: BTreeMap::new(),
            weight: 1,
            exclusive: false,
            stopping: false,
        }
    }

    /// The same under this id, which is unique in its role: what calls are pinned by. Default: the address, with
    /// `_` for each `/`.
    #[must_use]
    pub fn with_id(mut self, id: impl Into<InstanceId>) -> Self {
        self.id = id.into().0;
        self
    }

    /// The same at another address. Its id stays, also where that is the address that it had before: to a
    /// [`Registration::update`](super::Registration::update) it is the instance that it was, and has moved. Its calls go on
    /// where it was until it is reached where it is, so it should listen at both for a while.
    #[must_use]
    pub fn with_address(mut self, address: impl Into<Arc<str>>) -> Self {
        self.address = address.into();
        self
    }

    /// The same with the version of its program, in whatever form. Default: empty.
    #[must_use]
    pub fn with_version(mut self, version: impl Into<String>) -> Self {
        self.version = version.into();
        self
    }

    /// The same with one more piece of metadata; a key that is there is replaced.
    #[must_use]
    pub fn with_metadata(mut self, key: impl Into<String>, value: impl Into<String>) -> Self {
        self.metadata.insert(key.into(), value.into());
        self
    }

    /// The same with this weight, which is to be its share of the calls against the weights of the others.
    /// Default 1; at least 1.
    ///
    /// So far it is only written and read: balancing goes by the calls in flight and ignores it.
    #[must_use]
    pub fn with_weight(mut self, weight: u32) -> Self {
        self.weight = weight;
        self
    }

    /// The same, saying whether it is the only one of its role: then all sessions of the role compete for one
    /// key, whoever holds it is active, and the others stand by. Default: no.
    #[must_use]
    pub fn with_exclusive(mut self, exclusive: bool) -> Self {
        self.exclusive = exclusive;
        self
    }

    /// The same, saying whether it is stopping: then it gets no new calls but pinned ones, and those in
    /// flight finish. Default: no.
    #[must_use]
    pub fn with_stopping(mut self, stopping: bool) -> Self {
        self.stopping = stopping;
        self
    }

    /// The kind of server that it is.
    pub fn role(&self) -> &str {
        &self.role
    }

    /// Its id, unique in its role.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Where it listens, `host:port` or a Unix domain socket: see [`Session::validate`].
    pub fn address(&self) -> &str {
        &self.address
    }

    /// The version of its program; empty if it did not say.
    pub fn version(&self) -> &str {
        &self.version
    }

    /// What else it says of itself.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// Its weight, at least 1. Balancing ignores it so far: see [`Session::with_weight`].
    pub fn weight(&self) -> u32 {
        self.weight
    }

    /// Whether there is one active session of its role, which is this one, and others stand by.
    pub fn is_exclusive(&self) -> bool {
        self.exclusive
    }

    /// Whether it has said that it is stopping.
    pub fn is_stopping(&self) -> bool {
        self.stopping
    }

    /// Whether it can work.
    ///
    /// # Errors
    ///
    /// [`Kind::Invalid`](crate::Kind::Invalid), naming what is allowed, unless
    /// - the role is 1 to 128 characters of `A-Z a-z 0-9 . _ -`,
    /// - the address is `host:port`, with a DNS name, an IPv4 address or an IPv6 address in brackets, and a
    ///   port of 1 to 65535; or a Unix domain socket, `unix:path`, `unix:///absolute/path` or, to be dialled on Linux
    ///   only, `unix-abstract:name`, of 1 to 107 bytes without control characters,
    /// - the id is 1 to 256 bytes without `/` and control characters,
    /// - the weight is at least 1.
    pub fn validate(&self) -> Result<(), Error> {
        check_role(&self.role)?;
        Address::parse(&self.address)?;
        check_id(&self.id)?;
        if self.weight == 0 {
            return Err(Error::invalid("weight", "0 is not at least 1"));
        }
        Ok(())
    }

    pub(crate) fn role_arc(&self) -> &Arc<str> {
        &self.role
    }

    pub(crate) fn id_arc(&self) -> &Arc<str> {
        &self.id
    }

    pub(crate) fn address_arc(&self) -> &Arc<str> {
        &self.address
    }
}

/// Refuses a role that could not stand in a key, or would read as another.
pub(crate) fn check_role(role: &str) -> Result<(), Error> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    if role.is_empty() || role.len() > 128 || !role.chars().all(allowed) {
        let why = format!(
            "{} is not 1 to 128 characters of A-Z a-z 0-9 . _ -",
            shown(role)
        );
        return Err(Error::invalid("role", why));
    }
    Ok(())
}

/// Refuses a prefix under which keys would be ambiguous.
// Only registries with a prefix ask.
#[cfg_attr(not(any(feature = "etcd", test)), allow(dead_code))]
pub(crate) fn check_prefix(prefix: &str) -> Result<(), Error> {
    let bad = |c: char| c.is_control() || c.is_whitespace();
    if prefix.is_empty()
        || prefix.len() > 256
        || prefix.ends_with('/')
        || prefix.contains("//")
        || prefix.contains(bad)
    {
        let why = format!(
            "{} is not 1 to 256 bytes without spaces, control characters, a slash at its end or two in a row",
            shown(prefix)
        );
        return Err(Error::invalid("prefix", why));
    }
    Ok(())
}

fn check_id(id: &str) -> Result<(), Error> {
    if id.is_empty() || id.len() > 256 || id.contains(|c: char| c == '/' || c.is_control()) {
        let why = format!(
            "{} is not 1 to 256 bytes without / and control characters",
            shown(id)
        );
        return Err(Error::invalid("id", why));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Kind;

    #[test]
    fn what_can_be_dialled_is_an_address() {
        for address in [
            "h:1",
            "[::1]:80",
            "unix:a.sock",
            "unix:///run/a.sock",
            "unix-abstract:a",
        ] {
            Session::new("echo", address).validate().expect(address);
        }
        for (address, says) in [
            ("h", "host:port"),
            ("unix:", "unix:path"),
            ("unix://run/a.sock", "unix:///absolute/path"),
        ] {
            let error = Session::new("echo", address).validate().expect_err(address);
            assert_eq!(error.kind(), Kind::Invalid);
            assert!(error.to_string().contains(says), "{error}");
        }
    }

    #[test]
    fn a_session_that_cannot_work_says_what_is_allowed() {
        let good = Session::new("echo", "h:1");
        let long = "x".repeat(300);
        for (session, says) in [
            (Session::new("", "h:1"), "1 to 128 characters"),
            (Session::new("a/b", "h:1"), "1 to 128 characters"),
            (Session::new(&*long, "h:1"), "1 to 128 characters"),
            (Session::new("ä", "h:1"), "1 to 128 characters"),
            (good.clone().with_id(""), "1 to 256 bytes"),
            (good.clone().with_id("a/b"), "1 to 256 bytes"),
            (good.clone().with_id("a\nb"), "1 to 256 bytes"),
            (good.clone().with_id(&*long), "1 to 256 bytes"),
            (good.clone().with_weight(0), "at least 1"),
        ] {
            let error = session.validate().expect_err(says);
            assert_eq!(error.kind(), Kind::Invalid);
            assert!(error.to_string().contains(says), "{error}");
            assert!(error.to_string().len() < 300, "{error}");
        }
        good.validate().expect("this one is good");
    }

    #[test]
    fn prefixes_that_make_keys_ambiguous_are_refused() {
        for prefix in ["", "a/", "/", "a//b", "a b", "a\n"] {
            let error = check_prefix(prefix).expect_err(prefix);
            assert!(error.to_string().contains("1 to 256 bytes"), "{error}");
        }
        for prefix in ["demo", "/demo", "by-dev/meta"] {
            check_prefix(prefix).expect(prefix);
        }
    }

    #[test]
    fn the_id_is_the_address_unless_given() {
        assert_eq!(Session::new("echo", "h:1").id(), "h:1");
        assert_eq!(Session::new("echo", "h:1").with_id(7).id(), "7");
        let local = Session::new("echo", "unix:///run/a.sock");
        assert_eq!(local.id(), "unix:___run_a.sock");
        local.validate().expect("it may stand in a key");
    }
}
