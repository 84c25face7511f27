//! The door of OCI runtimes: the container's state on standard input (OCI runtime-spec, runtime.md "State").

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::process::parent_id;

use anyhow::{Context, Result, bail};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use oci_spec::runtime::{ContainerState, State};
use serde::Deserialize;
use serde::de::IgnoredAny;

use super::bundle::Bundle;
use super::{Apply, Call, ContainerFiles, Place, gateways};
use crate::deadline::Deadline;
use crate::error::usage;
use crate::instance::{ContainerId, Door, netns_inode, parent_of};
use crate::policy::Policy;
use crate::policy::container_file::Name;
use crate::request::{Request, What, Wish, annotations};

/// The most of standard input that is kept. Engines write some kilobytes.
const STATE_MAX: usize = 1024 * 1024;

/// Where CRI-O and containerd write the id of a container's pod.
const POD_ANNOTATIONS: [&str; 2] = ["io.kubernetes.cri-o.SandboxID", "io.kubernetes.cri.sandbox-id"];

/// Reads standard input to its end, whatever is in it: a hook that exits before the runtime has written everything
/// makes the runtime's write fail, and with it the container's start. What goes beyond [`STATE_MAX`] is read and dropped.
pub fn drain_stdin(deadline: Deadline) -> Result<Vec<u8>> {
    let stdin = io::stdin();
    let mut kept = Vec::new();
    let mut buffer = vec![0; 64 * 1024];
    loop {
        let mut waiting = [PollFd::new(stdin.as_fd(), PollFlags::POLLIN)];
        let timeout = PollTimeout::try_from(deadline.remaining()).unwrap_or(PollTimeout::MAX);
        match poll(&mut waiting, timeout) {
            Ok(0) => bail!("standard input was not closed in time; an OCI hook reads the container's state from it"),
            Ok(_) => {}
            Err(nix::Error::EINTR) => continue,
            Err(error) => return Err(error).context("cannot wait for standard input"),
        }
        match nix::unistd::read(&stdin, &mut buffer) {
            Ok(0) => return Ok(kept),
            Ok(n) => {
                let room = (STATE_MAX + 1).saturating_sub(kept.len());
                kept.extend_from_slice(&buffer[..n.min(room)]);
            }
            Err(nix::Error::EINTR | nix::Error::EAGAIN) => {}
            // Closed before we were started: there is nothing to drain.
            Err(nix::Error::EBADF) => return Ok(kept),
            Err(error) => {
                return Err(error).with_context(|| format!("cannot read standard input (fd {})", stdin.as_raw_fd()));
            }
        }
    }
}

/// The container's state, with what the specification demands made sure of: `{}` parses, too.
pub struct Checked {
    state: State,
    container: ContainerId,
}

/// Parses and checks a state.
pub fn parse(text: &[u8]) -> Result<Checked> {
    if text.iter().all(u8::is_ascii_whitespace) {
        return Err(usage("standard input is empty; an OCI hook reads the container's state (JSON) from it"));
    }
    if text.len() > STATE_MAX {
        return Err(usage(format!("the state on standard input is larger than {STATE_MAX} bytes")));
    }
    let state: State = serde_json::from_slice(text).map_err(|e| {
        usage(format!("the state on standard input is not the OCI runtime-spec's: {}", crate::error::plain(e)))
    })?;
    // The library takes a state without status for a stopped one.
    #[derive(Deserialize)]
    struct Required {
        status: Option<IgnoredAny>,
    }
    if serde_json::from_slice::<Required>(text).is_ok_and(|required| required.status.is_none()) {
        return Err(usage("the state on standard input has no status"));
    }
    if state.id().is_empty() {
        return Err(usage("the state on standard input has no id"));
    }
    let engine = state.bundle().to_string_lossy().into_owned();
    if engine.is_empty() {
        return Err(usage("the state on standard input has no bundle"));
    }
    let container = ContainerId::new(Door::Oci, engine, state.id())?;
    Ok(Checked { state, container })
}

impl Checked {
    /// The container's id.
    pub fn id(&self) -> &str {
        &self.container.id
    }

    /// Whether it is a poststop hook's.
    pub fn has_stopped(&self) -> bool {
        *self.state.status() == ContainerState::Stopped
    }

    /// Turns the state and the hook's arguments into a call. `arguments` are the wishes of the hook's entry.
    pub fn into_call(self, arguments: Vec<Wish>, policy: &Policy, containers: &ContainerFiles) -> Result<Call> {
        if self.has_stopped() {
            return Ok(Call::Release(self.container));
        }
        let Self { state, container } = self;
        let annotations = state.annotations().as_ref();
        let pairs = annotations.into_iter().flatten().map(|(key, value)| (key.as_str(), value.as_str()));
        let mut request = Request::default();
        request.extend(annotations::wishes(pairs).map_err(usage)?)?;
        let name_of = |wishes: &[Wish]| {
            wishes.iter().find_map(|wish| match &wish.what {
                What::Name(name) => Some(name.clone()),
                _ => None,
            })
        };
        let annotated = name_of(request.wishes());
        let given = name_of(&arguments);
        request.extend(arguments)?;
        let mut names = vec![Name::Trusted(&container.id)];
        names.extend(given.as_deref().map(Name::Trusted));
        names.extend(annotated.as_deref().map(Name::FromAnnotation));
        let found = containers.load(&names, |key| annotations?.get(key).map(String::as_str))?;
        request.extend(found.wishes)?;
        request.extend(policy.defaults.iter().cloned())?;
        if request.is_empty() {
            // Nothing more is read for a container that nobody asks anything for.
            let place = Place::Inside(None);
            return Ok(Call::Apply(Box::new(Apply {
                container,
                place,
                netns_path: None,
                request,
                notes: found.notes,
            })));
        }
        // What Kubernetes calls a pod is CNI's container.
        let pod = POD_ANNOTATIONS.iter().filter_map(|key| Some(annotations?.get(*key)?.as_str()));
        gateways::add(&mut request, &container, &pod.collect::<Vec<_>>(), containers.initial_user_namespace);
        let bundle = Bundle::read(state.bundle())?;
        request.extend(bundle.wishes())?;
        let place = place(&state, &bundle)?;
        let netns_path = bundle.netns_path().map(String::from);
        Ok(Call::Apply(Box::new(Apply { container, place, netns_path, request, notes: found.notes })))
    }
}

/// Where the container's network namespace is. At createContainer the state's pid is 0 or counted inside the
/// container, where 1 is the container's init and, seen from outside, the host's.
fn place(state: &State, bundle: &Bundle) -> Result<Place> {
    let is_inside = is_inside_container()?;
    // In the host's pid namespace, the container's init is our parent there, and the runtime's nowhere else.
    let runs_us = |pid: i32| pid == 0 || u32::try_from(pid) == Ok(parent_id());
    let is_run_by_init = is_inside || state.pid().is_some_and(runs_us);
    if is_run_by_init && bundle.has_user_namespace() {
        bail!(
            "a createContainer hook has no rights outside the container's user namespace; use createRuntime or prestart"
        );
    }
    if is_inside && (!bundle.has_netns() || is_in_runtimes_netns() == Some(true)) {
        bail!(
            "the container uses the host's network, and a createContainer hook cannot tell it from its own; use createRuntime"
        );
    }
    if is_inside || is_run_by_init && bundle.has_netns() && is_in_runtimes_netns() == Some(false) {
        return Ok(Place::Inside(parent_of("self")));
    }
    match state.pid() {
        Some(pid) if *pid > 0 => Ok(Place::Process(u32::try_from(*pid)?)),
        Some(0) => Err(usage(
            "the state's pid is 0; is the hook at a stage other than prestart, createRuntime, createContainer or poststart, or at createContainer of a container on the host's network (use createRuntime there)?",
        )),
        Some(pid) => Err(usage(format!("the state's pid is {pid}"))),
        None => Err(usage("the state has no pid")),
    }
}

/// Whether we are in another pid namespace than the one that `/proc` belongs to: then the runtime has put us inside the
/// container and has not yet changed its root.
fn is_inside_container() -> Result<bool> {
    let seen = std::fs::read_link("/proc/self").context("cannot read /proc/self; is /proc mounted?")?;
    let own = std::process::id().to_string();
    Ok(seen.as_os_str() != own.as_str())
}

/// Whether we are in the network namespace that the runtime is in: it is the parent of the container's init, which runs
/// createContainer hooks. A bundle can lead the container there by a path. None if that cannot be told.
fn is_in_runtimes_netns() -> Option<bool> {
    let runtime = parent_of(&parent_of("self")?.to_string())?;
    Some(netns_inode(&format!("/proc/{runtime}/ns/net"))? == netns_inode("/proc/self/ns/net")?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(text: &str) -> String {
        format!("{:#}", parse(text.as_bytes()).err().unwrap_or_else(|| panic!("{text} was taken")))
    }

    #[test]
    fn states_that_are_none() {
        assert!(error("").contains("empty"));
        assert!(error("  \n").contains("empty"));
        assert!(error("{}").contains("no status"));
        assert!(error(r#"{"status":"created"}"#).contains("no id"));
        assert!(error(r#"{"id":"a","status":"creating","#).contains("runtime-spec"));
        assert!(error(&" ".repeat(STATE_MAX).replacen(' ', "{", 1)).contains("runtime-spec"));
        assert!(error(&"x".repeat(STATE_MAX + 1)).contains("larger"));
        assert!(
            error(r#"{"ociVersion":"1.0.0","id":"../a","status":"created","pid":5,"bundle":"/b"}"#)
                .contains("character")
        );
        assert!(error(r#"{"ociVersion":"1.0.0","id":"a","status":"created","pid":5,"bundle":""}"#).contains("bundle"));
        let hostile = error(r#"{"ociVersion":"1.0.0","id":"a","status":"x\u001b[2J","pid":5,"bundle":"/b"}"#);
        assert!(!hostile.contains(char::is_control), "{hostile:?}");
    }
}
