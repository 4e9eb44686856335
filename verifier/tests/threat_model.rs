//! `docs/threat-model.md` against the sources: the tests that it names exist, the findings that it names are codes, and no
//! code is forgotten.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{collections::BTreeSet, fs, path::Path};

use onequote_verifier::finding::Code;

const DOC: &str = include_str!("../../docs/threat-model.md");

/// The cells of every table row that begins with a number.
fn rows() -> Vec<Vec<&'static str>> {
    let row = |line: &'static str| Some(line.strip_prefix('|')?.strip_suffix('|')?.split('|').map(str::trim).collect());
    let numbered = |cells: &Vec<&str>| cells[0].parse::<u32>().is_ok();
    DOC.lines().filter_map(row).filter(numbered).collect()
}

/// What stands in backquotes.
fn quoted(text: &str) -> impl Iterator<Item = &str> {
    text.split('`').skip(1).step_by(2)
}

/// Whether the file has a test of that name.
fn has_test(file: &str, name: &str) -> bool {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(file);
    let source = fs::read_to_string(&path).unwrap_or_else(|e| panic!("{file}: {e}"));
    // A suite's tests are named in a list, which makes them tests.
    let suite = source.split_once("\nsuite!(").and_then(|(_, rest)| rest.split_once(");"));
    if suite.is_some_and(|(names, _)| names.split(',').any(|listed| listed.trim() == name)) {
        return true;
    }
    let Some((before, _)) = source.split_once(&format!("fn {name}(")) else { return false };
    // Attributes and comments are all that may stand between the mark and the function; tests made by proptest are marked
    // in the same way.
    before.rsplit("\n\n").next().is_some_and(|block| block.contains("#[test]") || block.contains("#[tokio::test"))
}

#[test]
fn every_named_test_exists() {
    let mut claims = BTreeSet::new();
    let mut tested = BTreeSet::new();
    for cells in rows() {
        match cells[..] {
            [number, file, tests] => {
                let file = quoted(file).next().expect("a file");
                for name in quoted(tests) {
                    assert!(has_test(file, name), "{file} has no test {name}");
                }
                assert!(quoted(tests).next().is_some(), "{file}: no test is named");
                tested.insert(number);
            }
            [number, ..] => assert!(claims.insert(number), "claim {number} stands twice"),
            [] => {}
        }
    }
    assert!(!claims.is_empty());
    assert_eq!(tested, claims, "claims and tests");
    for (file, name) in quoted(DOC).filter_map(|word| word.split_once("::")) {
        assert!(has_test(file, name), "{file} has no test {name}");
    }
}

#[test]
fn every_named_finding_is_a_code() {
    for cells in rows().into_iter().filter(|cells| cells.len() == 4) {
        for word in quoted(cells[3]) {
            let is = |code: &&Code| match (word.strip_suffix('…'), word.strip_prefix('-')) {
                (Some(beginning), _) => code.as_str().starts_with(beginning),
                (None, Some(_)) => code.as_str().ends_with(word),
                (None, None) => code.as_str() == word,
            };
            assert!(Code::ALL.iter().any(|code| is(&code)), "{word} of claim {} is no code", cells[0]);
        }
    }
}

#[test]
fn no_code_is_forgotten() {
    let words: BTreeSet<_> = quoted(DOC).collect();
    let families: Vec<_> = words.iter().filter_map(|word| word.strip_suffix('…')).collect();
    for code in Code::ALL.iter().map(|code| code.as_str()) {
        let family = families.iter().any(|beginning| code.starts_with(beginning)) || code.ends_with("-malformed");
        assert!(family || words.contains(code), "{code} is not on the page");
    }
}
