//! The command line, NUL after each argument.
#![no_main]

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;

use invariants as must;
use libfuzzer_sys::fuzz_target;
use mptcp_hook::cli::{self, Action, Target, Verb};
use mptcp_hook::request::{Rank, Request, Wish};

fuzz_target!(|input: &[u8]| {
    let arguments: Vec<OsString> =
        input.split(|byte| *byte == 0).filter(|word| !word.is_empty()).map(|w| OsString::from_vec(w.into())).collect();
    let verb = cli::peek(&arguments);
    let (_, action) = match cli::parse(arguments) {
        Ok(parsed) => parsed,
        Err(error) => return must::usage_error(&error),
    };
    match action {
        Action::Print(text) => assert!(!text.contains('\x1b') && text.ends_with('\n')),
        Action::Oci(wishes) => {
            // Standard input is drained by what `peek` says.
            assert_eq!(verb, Some(Verb::Oci));
            merged(wishes, Rank::HookArgument);
        }
        Action::Lxc(wishes, _) => {
            assert_eq!(verb, Some(Verb::Lxc));
            merged(wishes, Rank::HookArgument);
        }
        Action::Apply { target, wishes, .. } => {
            assert!(target != Target::Pid(0));
            merged(wishes, Rank::CommandLine);
        }
        Action::Capture(capture) => {
            assert_eq!(verb, Some(Verb::Capture));
            assert!(capture.target != Target::Pid(0) && capture.count != Some(0));
        }
        Action::Release(target) | Action::Doctor { target: Some(target), .. } => assert!(target != Target::Pid(0)),
        Action::Doctor { target: None, probe, .. } => assert!(probe.is_none()),
        Action::ReleaseStale | Action::Repair | Action::Agent { .. } | Action::Status { .. } => {}
    }
});

fn merged(wishes: Vec<Wish>, rank: Rank) {
    must::wishes(&wishes, &[rank]);
    let mut request = Request::default();
    match request.extend(wishes) {
        Ok(()) => must::request(&request),
        Err(error) => must::usage_error(&error),
    }
}
