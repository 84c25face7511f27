//! The doctor's findings, as `mptcp-hook doctor --json` prints them.

use serde_json::Value;

use super::sandbox::{Outcome, Sandbox};

/// What `mptcp-hook doctor ... --json` said.
pub struct Diagnosis {
    /// Its exit status.
    pub code: Option<i32>,
    /// Its JSON object.
    pub json: Value,
}

impl Diagnosis {
    #[track_caller]
    pub fn of(sandbox: &Sandbox, arguments: &[&str]) -> Self {
        let arguments: Vec<&str> = ["doctor", "--json"].iter().chain(arguments).copied().collect();
        Self::read(sandbox.hook(&arguments))
    }

    #[track_caller]
    pub fn read(outcome: Outcome) -> Self {
        let json = serde_json::from_str(&outcome.stdout).unwrap_or_else(|e| panic!("{e}: {outcome}"));
        assert_eq!(outcome.stderr, "", "{outcome}");
        Self { code: outcome.code, json }
    }

    pub fn findings(&self) -> &[Value] {
        self.json["findings"].as_array().expect("findings is a list")
    }

    /// The names of the findings that are no notes.
    pub fn ids(&self) -> Vec<&str> {
        let wrong = self.findings().iter().filter(|finding| finding["severity"] != "note");
        wrong.map(|finding| finding["id"].as_str().expect("a name")).collect()
    }

    pub fn has(&self, id: &str) -> bool {
        self.findings().iter().any(|finding| finding["id"] == id)
    }

    #[track_caller]
    pub fn finding(&self, id: &str) -> &Value {
        let found = self.findings().iter().find(|finding| finding["id"] == id);
        found.unwrap_or_else(|| panic!("no {id} in {:#}", self.json))
    }

    /// The ip(8) commands that mend a finding as well.
    #[track_caller]
    pub fn by_hand(&self, id: &str) -> &str {
        self.finding(id)["by_hand"].as_str().unwrap_or_else(|| panic!("{id} has no other way: {:#}", self.json))
    }

    /// The command that mends a finding.
    #[track_caller]
    pub fn command(&self, id: &str) -> &str {
        self.finding(id)["command"].as_str().unwrap_or_else(|| panic!("{id} has no command: {:#}", self.json))
    }

    #[track_caller]
    pub fn says(&self, id: &str, key: &str, word: &str) {
        let text = self.finding(id)[key].as_str().unwrap_or_default();
        assert!(text.contains(word), "{id}: no {word:?} in {key}: {:#}", self.json);
    }

    /// No problem and no warning.
    #[track_caller]
    pub fn is_clean(&self) {
        assert!(self.ids().is_empty() && self.code == Some(0), "{:#}", self.json);
    }

    /// Exactly these, and the exit status that goes with them.
    #[track_caller]
    pub fn is(&self, ids: &[&str], code: i32) {
        assert_eq!((self.ids().as_slice(), self.code), (ids, Some(code)), "{:#}", self.json);
    }
}
