//! One point in time by which a whole run has to be over.

use std::time::{Duration, Instant};

/// The moment after which nothing is waited for any more. It is fixed once, when the program starts, and handed down by
/// value, so that several short waits cannot add up to a long one.
#[derive(Clone, Copy, Debug)]
pub struct Deadline {
    /// `None`: so far away that the clock cannot express it.
    end: Option<Instant>,
}

impl Deadline {
    /// A deadline that is over when `time` has passed from now on.
    pub fn after(time: Duration) -> Self {
        Self::since(Instant::now(), time)
    }

    /// A deadline that is over when `time` has passed since `start`.
    pub fn since(start: Instant, time: Duration) -> Self {
        Self { end: start.checked_add(time) }
    }

    /// The time that is left; zero when the deadline is over.
    pub fn remaining(self) -> Duration {
        self.end.map_or(Duration::MAX, |end| end.saturating_duration_since(Instant::now()))
    }

    /// Whether no time is left.
    pub fn over(self) -> bool {
        self.remaining().is_zero()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_runs_out() {
        assert!(!Deadline::after(Duration::from_secs(3600)).over());
        let deadline = Deadline::after(Duration::from_millis(5));
        assert!(deadline.remaining() <= Duration::from_millis(5));
        std::thread::sleep(Duration::from_millis(6));
        assert!(deadline.over());
        assert_eq!(deadline.remaining(), Duration::ZERO);
    }

    #[test]
    fn zero_is_over_and_an_endless_one_is_not() {
        assert!(Deadline::after(Duration::ZERO).over());
        let endless = Deadline::after(Duration::MAX);
        assert!(!endless.over());
        assert_eq!(endless.remaining(), Duration::MAX);
    }
}
