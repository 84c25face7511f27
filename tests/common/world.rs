//! A container without a runtime on two paths.

use super::bare::Bare;
use super::paths::{TwoPaths, Wiring};
use super::sandbox::{Netns, Sandbox};

/// The namespace of the container in a [`World`].
pub fn ctr() -> Netns {
    Netns::named("ctr")
}

/// A container `web` in [`ctr`], wired to a server as in the module [`paths`](super::paths). Files of tests give it
/// what else they need.
pub struct World<'a> {
    pub sandbox: &'a Sandbox,
    pub paths: TwoPaths<'a>,
    pub web: Bare<'a>,
}

impl<'a> World<'a> {
    /// With a default route over each path.
    pub fn new(sandbox: &'a Sandbox) -> Self {
        Self::wired(sandbox, &Wiring::new())
    }

    pub fn wired(sandbox: &'a Sandbox, wiring: &Wiring) -> Self {
        sandbox.patient_policy("");
        let paths = TwoPaths::with_container_netns(sandbox, wiring);
        Self { sandbox, paths, web: Bare::in_netns(sandbox, "web", &ctr()) }
    }

    /// A shell script in the container's namespace.
    #[track_caller]
    pub fn sh(&self, script: &str) -> String {
        self.sandbox.sh_in(&ctr(), script)
    }
}
