//! The sum of what ran: one line at the end, made from what the steps and tests themselves print.

use std::fmt;

/// Passed and failed checks so far, and the names of what failed.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    passed: usize,
    failed: usize,
    failures: Vec<String>,
}

impl Tally {
    /// Counts one check of ours: a step, a fuzz target.
    pub(crate) fn check(&mut self, name: &str, good: bool) {
        if good {
            self.passed += 1;
        } else {
            self.failed += 1;
            self.failures.push(name.to_owned());
        }
    }

    /// Counts what a test run printed. A run that failed without saying that a test did (it did
    /// not compile, it crashed) counts as one failure, so that it cannot pass unseen.
    pub(crate) fn tests(&mut self, name: &str, output: &Results, good: bool) {
        self.passed += output.passed;
        self.failed += output.failed;
        self.failures.extend(output.names.iter().cloned());
        if !good && output.failed == 0 {
            self.check(name, false);
        } else if output.passed + output.failed == 0 {
            self.check(&format!("{name}: no test ran"), false);
        }
    }

    pub(crate) fn is_good(&self) -> bool {
        self.failed == 0 && self.passed > 0
    }

    pub(crate) fn failures(&self) -> &[String] {
        &self.failures
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} passed, {} failed", self.passed, self.failed)
    }
}

/// What the `test …` and `test result:` lines of a run say.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Results {
    passed: usize,
    failed: usize,
    names: Vec<String>,
}

impl Results {
    /// Reads one line of a test run's output; lines of no interest change nothing.
    pub(crate) fn line(&mut self, line: &str) {
        if let Some(sum) = line.strip_prefix("test result: ") {
            for part in sum.split([';', '.']) {
                let mut words = part.split_whitespace();
                let Some(count) = words.next().and_then(|word| word.parse::<usize>().ok()) else {
                    continue;
                };
                match words.next() {
                    Some("passed") => self.passed += count,
                    Some("failed") => self.failed += count,
                    _ => {}
                }
            }
        } else if let Some(name) = line
            .strip_prefix("test ")
            .and_then(|rest| rest.strip_suffix(" ... FAILED"))
        {
            self.names.push(name.to_owned());
        } else if let Some(why) = line.strip_prefix("failed ")
            && let Some((name, _)) = why.split_once(": ")
            && let Some(known) = self.names.iter_mut().find(|known| *known == name)
        {
            // A story prints the reason; the standard runner does not.
            *known = why.to_owned();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Results {
        let mut results = Results::default();
        text.lines().for_each(|line| results.line(line));
        results
    }

    #[test]
    fn result_lines_are_summed() {
        let results = read(
            "running 3 tests\ntest a ... ok\ntest b ... FAILED\n\
             test result: FAILED. 2 passed; 1 failed; 0 ignored; 0 measured; 7 filtered out; finished in 0.01s\n\
             test result: ok. 40 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 2.50s\n",
        );
        assert_eq!(
            results,
            Results {
                passed: 42,
                failed: 1,
                names: vec!["b".to_owned()]
            }
        );
    }

    #[test]
    fn a_failed_story_is_listed_with_its_reason() {
        let results = read("test a ... FAILED\nfailed a: no port\nfailed b: not one of ours\n");
        assert_eq!(results.names, ["a: no port"]);
    }

    #[test]
    fn other_lines_count_nothing() {
        assert_eq!(
            read("the test result: 5 passed\ntest result: pending\n"),
            Results::default()
        );
    }

    #[test]
    fn a_crash_without_a_result_line_is_a_failure() {
        let mut tally = Tally::default();
        tally.tests("tests", &read("running 1 test\n"), false);
        assert!(!tally.is_good());
        assert_eq!(tally.to_string(), "0 passed, 1 failed");
    }

    #[test]
    fn a_run_without_tests_is_a_failure() {
        let mut tally = Tally::default();
        tally.check("formatting", true);
        tally.tests("tests", &Results::default(), true);
        assert!(!tally.is_good());
    }
}
