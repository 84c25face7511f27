//! A container's annotations: KEY NUL VALUE NUL KEY NUL VALUE ...
#![no_main]

use invariants as must;
use libfuzzer_sys::fuzz_target;
use mptcp_hook::request::{Rank, Request, annotations};

fuzz_target!(|text: &str| {
    let words: Vec<&str> = text.split('\0').collect();
    let pairs = words.chunks_exact(2).map(|pair| (pair[0], pair[1]));
    let wishes = match annotations::wishes(pairs.clone()) {
        Ok(wishes) => wishes,
        Err(error) => return must::one_line(&error),
    };
    must::wishes(&wishes, &[Rank::Annotation]);
    let ours = pairs.clone().any(|(key, _)| key.starts_with("mptcp-hook/"));
    assert!(ours || wishes.is_empty());
    // The order of a JSON object is nobody's wish.
    let reversed: Vec<_> = pairs.rev().collect();
    assert_eq!(annotations::wishes(reversed).as_ref(), Ok(&wishes));
    let mut request = Request::default();
    match request.extend(wishes) {
        Ok(()) => {
            must::request(&request);
            must::author_stays_inside(&request);
        }
        Err(error) => must::usage_error(&error),
    }
});
