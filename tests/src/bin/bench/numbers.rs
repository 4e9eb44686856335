//! What a bench reports: name, value, unit, and what is wanted of it.

use std::path::PathBuf;

use serde::Serialize;

/// One number. Without a target it is there to be known, and nothing has to hold.
#[derive(Debug, Serialize)]
pub(crate) struct Number {
    name: String,
    value: f64,
    unit: &'static str,
    target: Option<String>,
    pub(crate) holds: Option<bool>,
}

#[derive(Debug, Default)]
pub(crate) struct Numbers {
    pub(crate) list: Vec<Number>,
    /// Whether fleets are to be small.
    pub(crate) short: bool,
    /// Where pages that are made of numbers go.
    pub(crate) docs: Option<PathBuf>,
}

impl Numbers {
    pub(crate) fn below(&mut self, name: &str, value: f64, unit: &'static str, bound: f64) {
        self.add(name, value, unit, Some(format!("< {bound}")), Some(value < bound));
    }

    pub(crate) fn at_most(&mut self, name: &str, value: f64, unit: &'static str, bound: f64) {
        self.add(name, value, unit, Some(format!("<= {bound}")), Some(value <= bound));
    }

    pub(crate) fn at_least(&mut self, name: &str, value: f64, unit: &'static str, bound: f64) {
        self.add(name, value, unit, Some(format!(">= {bound}")), Some(value >= bound));
    }

    pub(crate) fn exactly(&mut self, name: &str, value: f64, unit: &'static str, wanted: f64) {
        self.add(name, value, unit, Some(format!("= {wanted}")), Some((value - wanted).abs() < f64::EPSILON));
    }

    pub(crate) fn known(&mut self, name: &str, value: f64, unit: &'static str) {
        self.add(name, value, unit, None, None);
    }

    fn add(&mut self, name: &str, value: f64, unit: &'static str, target: Option<String>, holds: Option<bool>) {
        let words = match (&target, holds) {
            (Some(target), Some(true)) => format!("wanted {target}: holds"),
            (Some(target), _) => format!("wanted {target}: DOES NOT HOLD"),
            (None, _) => String::new(),
        };
        println!("{name:<44} {value:>12.3} {unit:<10} {words}");
        self.list.push(Number { name: name.to_owned(), value, unit, target, holds });
    }
}
