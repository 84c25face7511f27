//! LXC's hook: NAME=VALUE NUL ... as in the environment, an empty one, and the arguments of the hook, NUL after each.
#![no_main]

use invariants as must;
use libfuzzer_sys::fuzz_target;
use mptcp_hook::cli::{self, Action};
use mptcp_hook::front::{Call, ContainerFiles, Place, lxc};
use mptcp_hook::policy::Policy;
use mptcp_hook::request::Rank;

const NAMES: [&str; 5] = ["LXC_NAME", "LXC_PID", "LXC_CONFIG_FILE", "LXC_HOOK_VERSION", "LXC_HOOK_TYPE"];

fuzz_target!(|text: &str| {
    let mut words = text.split('\0');
    let mut given: Vec<(&'static str, String)> = Vec::new();
    for (name, value) in words.by_ref().take_while(|word| !word.is_empty()).filter_map(|word| word.split_once('=')) {
        if let Some(name) = NAMES.iter().find(|known| **known == name) {
            given.push((name, value.into()));
        }
    }
    let variables = mptcp_hook::fuzzing::lxc_variables(given);
    let arguments = std::iter::once("lxc").chain(words.filter(|word| !word.is_empty())).map(Into::into).collect();
    let (wishes, words) = match cli::parse(arguments) {
        Ok((_, Action::Lxc(wishes, words))) => (wishes, words),
        Ok((_, Action::Print(_))) => return,
        Ok((_, other)) => panic!("lxc became {other:?}"),
        Err(error) => return must::usage_error(&error),
    };
    must::wishes(&wishes, &[Rank::HookArgument]);
    let environment = match lxc::Environment::read(&variables, &words) {
        Ok(environment) => environment,
        Err(error) => return must::usage_error(&error),
    };
    let name = environment.name().to_string();
    // LXC says who it is; the words of version 0 serve where it does not.
    assert!(variables.name().is_none_or(|known| known == name));
    let files = ContainerFiles { directory: "/nonexistent/containers.d".into(), initial_user_namespace: true };
    match environment.into_call(wishes.clone(), &Policy::default(), &files) {
        Ok(Call::Release(container)) => {
            must::container(&container);
            assert_eq!(container.id, name);
        }
        Ok(Call::Apply(call)) => {
            must::apply(&call);
            assert_eq!(call.container.id, name);
            assert!(matches!(call.place, Place::Process(pid) if pid > 0));
            let asked = |wish: &_| wishes.contains(wish);
            assert!(call.request.wishes().iter().all(asked));
        }
        Err(error) => must::usage_error(&error),
    }
});
