//! Pauses of an operation: each gap between two signs of progress, and the fault behind it.

use std::collections::BTreeMap;
use std::fmt;
use std::time::{Duration, Instant};

/// Shorter ones are not recorded; an operation of a million lines would have as many of them.
const LEAST: Duration = Duration::from_millis(1);

/// From one sign of progress to the next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pause {
    from: Instant,
    lasted: Duration,
}

impl Pause {
    /// How much of it fell into that time.
    fn within(&self, from: Instant, until: Option<Instant>) -> Duration {
        let end = self.from + self.lasted;
        let end = until.map_or(end, |until| until.min(end));
        end.saturating_duration_since(self.from.max(from))
    }
}

/// The pauses of one operation.
#[derive(Debug, Default, Clone)]
pub struct Pauses(Vec<Pause>);

impl Pauses {
    pub fn since(&mut self, from: Instant) {
        self.between(from, Instant::now());
    }

    pub fn between(&mut self, from: Instant, until: Instant) {
        let lasted = until.saturating_duration_since(from);
        if lasted >= LEAST {
            self.0.push(Pause { from, lasted });
        }
    }

    pub fn merge(&mut self, other: Self) {
        self.0.extend(other.0);
    }

    pub fn longest(&self) -> Duration {
        let all = self.0.iter().map(|pause| pause.lasted);
        all.max().unwrap_or_default()
    }

    /// The longest pause for each fault, by the time at which the fault began, in order. A pause is
    /// attributed to the fault during which most of it fell; a fault lasts until the next begins.
    pub fn longest_for(&self, began: &[Instant]) -> Vec<Duration> {
        let mut longest = vec![Duration::ZERO; began.len()];
        for pause in &self.0 {
            let share = |index: usize| match began.get(index) {
                Some(from) => pause.within(*from, began.get(index + 1).copied()),
                None => Duration::ZERO,
            };
            let most = (0..began.len()).max_by_key(|index| share(*index));
            let Some(most) = most.filter(|most| share(*most) * 2 >= pause.lasted) else {
                continue;
            };
            if let Some(longest) = longest.get_mut(most) {
                *longest = pause.lasted.max(*longest);
            }
        }
        longest
    }
}

/// Pauses by what they were for, as a table of milliseconds.
#[derive(Debug, Default)]
pub struct Table(BTreeMap<String, Vec<Duration>>);

impl Table {
    pub fn add(&mut self, what: &str, pause: Duration) {
        self.0.entry(what.to_owned()).or_default().push(pause);
    }
}

/// The one in the middle, the upper of two.
pub fn median(mut pauses: Vec<Duration>) -> Duration {
    pauses.sort_unstable();
    pauses.get(pauses.len() / 2).copied().unwrap_or_default()
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{:<34} {:>5} {:>9} {:>8}",
            "", "count", "median ms", "worst ms"
        )?;
        for (what, pauses) in &self.0 {
            let worst = pauses.iter().max().copied().unwrap_or_default();
            writeln!(
                f,
                "{what:<34} {:>5} {:>9} {:>8}",
                pauses.len(),
                median(pauses.clone()).as_millis(),
                worst.as_millis()
            )?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn a_wait_is_for_what_happened_in_most_of_its_time() {
        let start = Instant::now();
        let at = |after: u64| start + ms(after);
        let began = [at(1000), at(2000), at(5000)];
        let mut pauses = Pauses::default();
        // Before anything happened; what the first took from under it; its end, which the second
        // met; a long one of the last.
        pauses.between(at(100), at(900));
        pauses.between(at(980), at(1500));
        pauses.between(at(1600), at(2100));
        pauses.between(at(5500), at(9500));
        assert_eq!(pauses.longest_for(&began), [ms(520), ms(0), ms(4000)]);
        assert_eq!(pauses.longest(), ms(4000));
    }

    #[test]
    fn a_pause_mostly_before_the_first_fault_is_not_counted() {
        let start = Instant::now();
        let mut pauses = Pauses::default();
        pauses.between(start, start + ms(100));
        assert_eq!(pauses.longest_for(&[start + ms(90)]), [ms(0)]);
        assert!(pauses.longest_for(&[]).is_empty());
    }

    #[test]
    fn the_table_has_count_median_and_worst() {
        let mut table = Table::default();
        for pause in [5, 100, 7] {
            table.add("relay killed", ms(pause));
        }
        let text = table.to_string();
        let row: Vec<&str> = text.lines().nth(1).unwrap().split_whitespace().collect();
        assert_eq!(row, ["relay", "killed", "3", "7", "100"]);
    }
}
