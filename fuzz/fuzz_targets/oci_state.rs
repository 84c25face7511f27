//! An OCI runtime's state on standard input, NUL, and config.json of the bundle.
#![no_main]

use std::fs;

use invariants as must;
use libfuzzer_sys::fuzz_target;
use mptcp_hook::front::{Call, ContainerFiles, Place, oci};
use mptcp_hook::policy::Policy;
use serde_json::Value;

fuzz_target!(|input: &[u8]| {
    let mut parts = input.splitn(2, |byte| *byte == 0);
    let (state, config) = (parts.next().unwrap_or_default(), parts.next());
    match oci::parse(state) {
        Ok(checked) => must::one_line(checked.id()),
        Err(error) => return must::usage_error(&error),
    }
    let Ok(Value::Object(mut object)) = serde_json::from_slice(state) else { return };
    // No other bundle is looked at than our own.
    let bundle = must::scratch();
    object.insert("bundle".into(), bundle.to_string_lossy().into());
    let Ok(checked) = oci::parse(&serde_json::to_vec(&object).expect("serializes")) else { return };
    let path = bundle.join("config.json");
    match config {
        Some(config) => fs::write(&path, config).expect("the scratch directory can be written"),
        None => drop(fs::remove_file(&path)),
    }
    let files = ContainerFiles { directory: bundle.join("none"), initial_user_namespace: true };
    match checked.into_call(Vec::new(), &Policy::default(), &files) {
        Ok(Call::Release(container)) => must::container(&container),
        Ok(Call::Apply(call)) => {
            must::apply(&call);
            if let Place::Process(pid) = call.place {
                assert!(pid > 0 && !call.request.is_empty());
            }
            must::author_stays_inside(&call.request);
        }
        Err(error) => must::one_line_error(&error),
    }
});
