//! What a manager is doing, to be looked at.

use std::fmt;

use serde::Serialize;

use super::RoleStatus;

/// A picture of all that a manager manages, in the order of the roles' names.
///
/// Its `Display` is a table for a terminal; `serde` writes it for programs, where times are milliseconds since the Unix
/// epoch:
///
/// ```
/// # use switchboard::{ConnectionManager, MemoryRegistry};
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let manager = ConnectionManager::builder(MemoryRegistry::new()).build();
/// manager.depends_on("echo")?;
/// let status = serde_json::to_value(manager.status())?;
/// assert_eq!(status["roles"][0]["role"], "echo");
/// assert_eq!(status["roles"][0]["ready"], 0);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct Status {
    /// The components of this process that are over this manager, in the order in which they were made.
    #[cfg(feature = "component")]
    pub components: Vec<crate::component::ComponentStatus>,
    /// A pool's status for each role that was asked for.
    pub roles: Vec<RoleStatus>,
    /// Whether the manager was stopped.
    pub stopped: bool,
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.stopped {
            f.write_str("stopped\n")?;
        }
        #[cfg(feature = "component")]
        for component in &self.components {
            writeln!(f, "{component}")?;
        }
        if self.roles.is_empty() && !self.stopped {
            f.write_str("no role was asked for yet\n")?;
        }
        for role in &self.roles {
            role.fmt(f)?;
        }
        Ok(())
    }
}
