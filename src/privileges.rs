//! Only the capabilities that are needed, for as long as they are needed.
//!
//! | phase | effective, permitted | inheritable, ambient, bounding |
//! |---|---|---|
//! | from the start on: reading the call, the work | those that the [`Work`] needs and the caller had | none |
//! | the doctor's probe | CAP_NET_ADMIN | none |
//! | reporting | none | none |
//!
//! The bounding set says what executing a program could give. None is ever executed and no_new_privs is set, so that
//! nothing can come from there; it is emptied all the same wherever CAP_SETPCAP allows it. The kernel takes one call for
//! each capability, which is most of what this module costs.

use anyhow::{Context, Result};
use caps::{CapSet, Capability, CapsHashSet};

/// What the work needs: setns (SYS_ADMIN), namespaces and sysctls of the container (NET_ADMIN), other users'
/// `/proc/PID/ns` (SYS_PTRACE), bundles that belong to a remapped root (DAC_READ_SEARCH); for the agent, which may be a
/// hook's child, what the kernel says of changes in containers' namespaces (NET_BROADCAST).
pub const WORKING: [Capability; 5] = [
    Capability::CAP_SYS_ADMIN,
    Capability::CAP_NET_ADMIN,
    Capability::CAP_NET_BROADCAST,
    Capability::CAP_SYS_PTRACE,
    Capability::CAP_DAC_READ_SEARCH,
];

/// What there is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// Everything but `capture`.
    SetUp,
    /// Open a packet socket, too (NET_RAW).
    Capture,
}

impl Work {
    fn needs(self) -> Vec<Capability> {
        let mut needs = WORKING.to_vec();
        if self == Self::Capture {
            needs.push(Capability::CAP_NET_RAW);
        }
        needs
    }
}

/// Drops everything but what the work needs, and the way to get anything by executing a program.
pub fn begin(work: Work) -> Result<()> {
    nix::sys::prctl::set_no_new_privs().context("cannot set no_new_privs")?;
    reduce_to(&work.needs())
}

/// Drops everything but the right to see and change a network namespace: what is left is to talk with strangers.
pub fn keep_network() -> Result<()> {
    reduce_to(&[Capability::CAP_NET_ADMIN])
}

/// Drops all of them: what is left is to report.
pub fn end() -> Result<()> {
    reduce_to(&[])
}

/// Keeps those of `keep` that are permitted. Entering a user namespace gives all of that namespace's capabilities,
/// bounding set included (user_namespaces(7)), so that it may be more than the last call left.
fn reduce_to(keep: &[Capability]) -> Result<()> {
    // While CAP_SETPCAP is there.
    if caps::has_cap(None, CapSet::Effective, Capability::CAP_SETPCAP).context("cannot read the capabilities")? {
        empty_bounding_set()?;
    }
    let have = caps::read(None, CapSet::Permitted).context("cannot read the capabilities")?;
    let keep: CapsHashSet = keep.iter().copied().filter(|capability| have.contains(capability)).collect();
    for set in [CapSet::Effective, CapSet::Permitted] {
        caps::set(None, set, &keep).context("cannot reduce the capabilities")?;
    }
    for set in [CapSet::Inheritable, CapSet::Ambient] {
        caps::clear(None, set).context("cannot clear the inheritable and ambient capabilities")?;
    }
    Ok(())
}

fn empty_bounding_set() -> Result<()> {
    for capability in caps::all() {
        // An error: this kernel does not know it yet.
        if let Ok(true) = caps::has_cap(None, CapSet::Bounding, capability) {
            caps::drop(None, CapSet::Bounding, capability)
                .with_context(|| format!("cannot drop {capability} from the bounding set"))?;
        }
    }
    Ok(())
}
