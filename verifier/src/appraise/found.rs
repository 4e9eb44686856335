//! Findings and notes as they are gathered: bounded, and the same whether they come at once or round by round.
//!
//! Of findings those of the worst kinds are kept, of notes the newest. What is left out is counted, and what it means
//! for the state is not lost. Cutting before more is added leaves what cutting at the end would leave: whatever was cut
//! stands behind enough others then as well.

use crate::{
    finding::{Class, Finding},
    result::{MAX_FINDINGS, MAX_NOTES, State},
};

/// Findings about one host or one VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Findings {
    list: Vec<Finding>,
    omitted: u64,
    state: State,
    authentic: bool,
}

impl Default for Findings {
    fn default() -> Self {
        Self { list: Vec::new(), omitted: 0, state: State::Trusted, authentic: true }
    }
}

impl Findings {
    /// Adds one.
    pub fn push(&mut self, finding: Finding) {
        self.state = self.state.max(State::after(finding.code));
        self.authentic &= finding.code.class() != Class::Evidence;
        self.list.push(finding);
        if self.list.len() >= 2 * MAX_FINDINGS {
            self.cut();
        }
    }

    /// Adds those that another has gathered.
    pub fn append(&mut self, other: &Self) {
        for finding in &other.list {
            self.push(finding.clone());
        }
        self.omitted += other.omitted;
        self.state = self.state.max(other.state);
        self.authentic &= other.authentic;
    }

    /// The state that all of them lead to.
    #[must_use]
    pub fn state(&self) -> State {
        self.state
    }

    /// Whether none says that evidence is not the host's, or not whole.
    #[must_use]
    pub fn is_authentic(&self) -> bool {
        self.authentic
    }

    /// Those that are kept, in the order in which they came.
    #[must_use]
    pub fn list(&self) -> &[Finding] {
        &self.list
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    /// The worst kinds first, and how many were left out.
    #[must_use]
    pub fn finish(mut self) -> (Vec<Finding>, u64) {
        self.cut();
        (self.list, self.omitted)
    }

    fn cut(&mut self) {
        self.list.sort_by_key(|finding| finding.code);
        self.omitted += self.list.len().saturating_sub(MAX_FINDINGS) as u64;
        self.list.truncate(MAX_FINDINGS);
    }
}

impl Extend<Finding> for Findings {
    fn extend<I: IntoIterator<Item = Finding>>(&mut self, findings: I) {
        findings.into_iter().for_each(|finding| self.push(finding));
    }
}

impl From<Vec<Finding>> for Findings {
    fn from(list: Vec<Finding>) -> Self {
        let mut findings = Self::default();
        findings.extend(list);
        findings
    }
}

/// What the operator should know although it changes no state.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Notes {
    list: Vec<String>,
    omitted: u64,
}

impl Notes {
    /// Adds one.
    pub fn push(&mut self, note: String) {
        self.list.push(note);
        if self.list.len() >= 2 * MAX_NOTES {
            self.cut(MAX_NOTES);
        }
    }

    /// The newest, behind the number of those that were left out.
    #[must_use]
    pub fn finish(mut self) -> Vec<String> {
        if self.omitted + self.list.len() as u64 > MAX_NOTES as u64 {
            self.cut(MAX_NOTES - 1);
            self.list.insert(0, format!("{} older notes were left out", self.omitted));
        }
        self.list
    }

    /// Gives back the memory that is not needed until more comes.
    pub fn rest(&mut self) {
        if self.list.len() > MAX_NOTES {
            self.cut(MAX_NOTES);
        }
        self.list.shrink_to_fit();
    }

    fn cut(&mut self, keep: usize) {
        let surplus = self.list.len().saturating_sub(keep);
        self.list.drain(..surplus);
        self.omitted += surplus as u64;
    }
}

impl Extend<String> for Notes {
    fn extend<I: IntoIterator<Item = String>>(&mut self, notes: I) {
        notes.into_iter().for_each(|note| self.push(note));
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::finding::Code;

    proptest! {
        #[test]
        fn cutting_early_changes_nothing(codes in prop::collection::vec(0..Code::ALL.len(), 0..1500), at in any::<prop::sample::Index>()) {
            let all: Vec<Finding> = codes.iter().enumerate().map(|(i, code)| Finding::new(Code::ALL[*code], i.to_string())).collect();
            let mut sorted = all.clone();
            sorted.sort_by_key(|finding| finding.code);
            sorted.truncate(MAX_FINDINGS);
            let (first, second) = all.split_at(at.index(all.len() + 1));
            let mut gathered = Findings::from(first.to_vec());
            gathered.append(&Findings::from(second.to_vec()));
            prop_assert_eq!(gathered.state(), State::of(&all));
            prop_assert_eq!(gathered.is_authentic(), all.iter().all(|f| f.code.class() != Class::Evidence));
            prop_assert_eq!(gathered.finish(), (sorted, all.len().saturating_sub(MAX_FINDINGS) as u64));
        }

        #[test]
        fn the_newest_notes_are_kept(count in 0_usize..3000) {
            let mut notes = Notes::default();
            for i in 0..count {
                notes.push(i.to_string());
                if i % 700 == 0 {
                    notes.rest();
                }
            }
            let kept = notes.finish();
            if count <= MAX_NOTES {
                prop_assert_eq!(kept, (0..count).map(|i| i.to_string()).collect::<Vec<_>>());
            } else {
                prop_assert_eq!(kept.len(), MAX_NOTES);
                prop_assert_eq!(&kept[0], &format!("{} older notes were left out", count - MAX_NOTES + 1));
                prop_assert_eq!(&kept[1], &(count - MAX_NOTES + 1).to_string());
            }
        }
    }
}
