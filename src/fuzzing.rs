//! Doors to private parsers for the fuzz targets in `fuzz/`. cargo-fuzz builds with `--cfg fuzzing`; no other build has this.

use std::path::Path;

use anyhow::Result;

use crate::front::lxc::Variables;
use crate::kernel::netlink::{Answer, mptcp_pm};
use crate::policy::{Policy, config, container_file};
use crate::request::Wish;

/// A policy from the text of the file at `path`.
pub fn policy(path: &Path, text: &str) -> Result<Policy> {
    config::parse(path, text)
}

/// The wishes of a per-container file, or why it is not for the container with these annotations. `is_trusted`: whether
/// the file was found by a name that is not from an annotation.
pub fn container_file<'a>(
    path: &Path,
    text: &str,
    is_trusted: bool,
    annotation: impl Fn(&str) -> Option<&'a str>,
) -> Result<Result<Vec<Wish>, String>> {
    container_file::parse(path, text, is_trusted, &annotation)
}

/// LXC's variables as if they were in the environment.
pub fn lxc_variables(given: Vec<(&'static str, String)>) -> Variables {
    Variables(given)
}

/// What is made of one netlink datagram: the payloads that answer the request `sequence` of `port`, and whether the answer
/// ends with it.
pub fn netlink_answer(datagram: &[u8], sequence: u32, port: u32) -> Result<(Vec<Vec<u8>>, bool)> {
    let mut answer = Answer::default();
    answer.read(datagram, sequence, port, |payload| Ok(Some(payload.to_vec())))?;
    Ok((answer.found, answer.complete))
}

/// The message type in the answer to CTRL_CMD_GETFAMILY.
pub fn family_id(payload: &[u8]) -> Result<Option<u16>> {
    mptcp_pm::parse_family_id(payload)
}
