//! The same work on many small things, on all processors. A ledger of ten thousand containers is sixty thousand files.

use std::panic::resume_unwind;
use std::sync::{Mutex, PoisonError};
use std::thread;

/// How many a thread takes at a time; with fewer than two such portions no other thread is started.
const PORTION: usize = 64;

/// More threads than this only wait for each other's locks in the kernel.
const THREADS_MAX: usize = 8;

/// What `work` makes of each item, in their order. The calling thread takes its share, and all of it where the system
/// allows no other thread.
pub fn map<T: Send, R: Send>(items: Vec<T>, work: impl Fn(T) -> R + Sync) -> Vec<R> {
    if items.len() < 2 * PORTION {
        return items.into_iter().map(work).collect();
    }
    let processors = thread::available_parallelism().map_or(1, usize::from);
    let threads = processors.min(items.len() / PORTION).min(THREADS_MAX);
    let count = items.len();
    let source = Mutex::new((0, items.into_iter()));
    let run = || {
        let mut done = Vec::new();
        loop {
            let mut source = source.lock().unwrap_or_else(PoisonError::into_inner);
            let portion: Vec<T> = source.1.by_ref().take(PORTION).collect();
            let place = source.0;
            source.0 += 1;
            drop(source);
            if portion.is_empty() {
                return done;
            }
            done.push((place, portion.into_iter().map(&work).collect::<Vec<R>>()));
        }
    };
    let mut done = thread::scope(|scope| {
        let start = |_| thread::Builder::new().spawn_scoped(scope, run).ok();
        let helpers: Vec<_> = (1..threads).map_while(start).collect();
        let mut done = run();
        for helper in helpers {
            done.extend(helper.join().unwrap_or_else(|panic| resume_unwind(panic)));
        }
        done
    });
    done.sort_unstable_by_key(|(place, _)| *place);
    let mut results = Vec::with_capacity(count);
    done.into_iter().for_each(|(_, portion)| results.extend(portion));
    results
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_is_done_once_and_in_order() {
        for count in [0, 1, PORTION, 2 * PORTION, 10_001] {
            let items: Vec<usize> = (0..count).collect();
            let expected: Vec<String> = items.iter().map(usize::to_string).collect();
            assert_eq!(map(items, |item| item.to_string()), expected);
        }
    }
}
