//! Only the capabilities that are needed, for as long as they are needed.

use anyhow::{Context, Result};
use caps::{CapSet, Capability, CapsHashSet};

/// What the work needs: setns (SYS_ADMIN), namespaces and sysctls of the container (NET_ADMIN), other users'
/// `/proc/PID/ns` (SYS_PTRACE), bundles that belong to a remapped root (DAC_READ_SEARCH).
const WORKING: [Capability; 4] =
    [Capability::CAP_SYS_ADMIN, Capability::CAP_NET_ADMIN, Capability::CAP_SYS_PTRACE, Capability::CAP_DAC_READ_SEARCH];

/// Drops everything but what the work needs, and the way to get anything by executing a program.
pub fn begin() -> Result<()> {
    nix::sys::prctl::set_no_new_privs().context("cannot set no_new_privs")?;
    let have = caps::read(None, CapSet::Permitted).context("cannot read the capabilities")?;
    let keep: CapsHashSet = WORKING.into_iter().filter(|capability| have.contains(capability)).collect();
    for set in [CapSet::Effective, CapSet::Permitted] {
        caps::set(None, set, &keep).context("cannot reduce the capabilities")?;
    }
    caps::clear(None, CapSet::Inheritable).context("cannot clear the inheritable capabilities")
}

/// Drops all of them: what is left is to report.
pub fn end() -> Result<()> {
    for set in [CapSet::Effective, CapSet::Permitted] {
        caps::clear(None, set).context("cannot drop the capabilities")?;
    }
    Ok(())
}
