//! Who calls, on which container, asking what: an OCI runtime, LXC, or a person.

pub mod bundle;
pub mod command;
mod gateways;
pub mod lxc;
pub mod oci;

use std::path::PathBuf;

use crate::instance::ContainerId;
use crate::policy::container_file::{self, Name};
use crate::request::Request;

/// What a hook or a person wants done.
pub enum Call {
    /// Bring the container to what is asked for.
    Apply(Box<Apply>),
    /// The container is gone, or shall be let go.
    Release(ContainerId),
}

/// A container to be set up.
pub struct Apply {
    /// Which container.
    pub container: ContainerId,
    /// Where its network namespace is.
    pub place: Place,
    /// A bind mount of the namespace, where the caller knows one. It outlives the process.
    pub netns_path: Option<String>,
    /// What is asked for.
    pub request: Request,
    /// What people should know about how it came about.
    pub notes: Vec<String>,
}

/// Where a network namespace is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// That of a process.
    Process(u32),
    /// The one that we are in (createContainer), with the container's init as its process where that is known.
    Inside(Option<u32>),
    /// A bind mount such as `/run/netns/NAME`.
    Path(PathBuf),
}

/// Where the per-container files are, and whether they are looked at as host root sees them.
pub struct ContainerFiles {
    /// `/etc/mptcp-hook/containers.d`, or the directory of that name beside `--config`.
    pub directory: PathBuf,
    /// Whether we are in the initial user namespace.
    pub initial_user_namespace: bool,
}

impl ContainerFiles {
    /// The wishes of the files for these names.
    pub fn load<'a>(
        &self,
        names: &[Name],
        annotation: impl Fn(&str) -> Option<&'a str>,
    ) -> anyhow::Result<container_file::Found> {
        container_file::load(&self.directory, names, annotation, self.initial_user_namespace)
    }
}
