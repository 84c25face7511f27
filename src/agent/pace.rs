//! How often a container is looked at. Whoever changes all the time, or has so much that each look takes long, would keep
//! the agent busy with nothing else: a container gets work on credit, and pays it back by waiting.

use std::time::{Duration, Instant};

/// What a look costs at least: what it changes is written down and said.
const LEAST: Duration = Duration::from_millis(20);
/// How much work is done without a pause.
const CREDIT: Duration = Duration::from_secs(5);
/// The part of the time that the work for one container may take when that is used up.
const SHARE: u32 = 10;

/// The work that was done for one container and is not paid back yet.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    owed: Duration,
    at: Instant,
}

impl Pace {
    /// Nothing was done yet.
    pub fn new(now: Instant) -> Self {
        Self { owed: Duration::ZERO, at: now }
    }

    /// Notes work that has just been done.
    pub fn worked(&mut self, took: Duration, now: Instant) {
        // One that took longer than all that is done without a pause had no processor.
        *self = Self { owed: self.owed(now) + took.clamp(LEAST, CREDIT), at: now };
    }

    /// How long the next work has to wait; mostly not at all.
    pub fn pause(&self, now: Instant) -> Duration {
        self.owed(now).saturating_sub(CREDIT).saturating_mul(SHARE)
    }

    fn owed(&self, now: Instant) -> Duration {
        self.owed.saturating_sub(now.saturating_duration_since(self.at) / SHARE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The time until `count` pieces of work are done, each of which takes `took`.
    fn time_for(count: u32, took: Duration) -> Duration {
        let begin = Instant::now();
        let mut now = begin;
        let mut pace = Pace::new(now);
        for _ in 0..count {
            now += pace.pause(now) + took;
            pace.worked(took, now);
        }
        now - begin
    }

    #[test]
    fn what_happens_now_and_then_never_waits() {
        let quick = Duration::from_millis(1);
        assert_eq!(time_for(200, quick), quick * 200);
        let (mut now, mut pace) = (Instant::now(), Pace::new(Instant::now()));
        for _ in 0..10_000 {
            now += Duration::from_secs(1);
            assert_eq!(pace.pause(now), Duration::ZERO);
            pace.worked(Duration::from_millis(50), now);
        }
    }

    #[test]
    fn what_was_held_up_for_long_does_not_wait_for_ever() {
        let hour = Duration::from_secs(3600);
        assert_eq!(time_for(1, hour), hour);
        assert!(time_for(2, hour) < 2 * hour + Duration::from_secs(1));
        let mut pace = Pace::new(Instant::now());
        let now = Instant::now();
        pace.worked(Duration::from_secs(1), now);
        pace.worked(hour, now);
        assert_eq!(pace.pause(now), Duration::from_secs(10));
    }

    #[test]
    fn what_goes_on_for_ever_has_its_share() {
        // Each piece counts as twenty milliseconds, and a tenth of the time is for it.
        let many = time_for(10_000, Duration::from_millis(1)).as_secs();
        assert!((1900..2000).contains(&many), "{many}");
        let long = time_for(100, Duration::from_secs(1)).as_secs();
        assert!((900..1000).contains(&long), "{long}");
    }
}
