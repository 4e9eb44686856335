//! A client's command, read as QEMU reads it (`qapi/qmp-dispatch.c`), with QEMU's words where it would refuse it.

use std::fmt;

use serde::{
    Deserialize, Deserializer,
    de::{self, MapAccess, SeqAccess, Visitor},
};
use serde_json::{Map, Number, Value, value::RawValue};

/// QEMU's class for what has none of its own.
pub(super) const GENERIC: &str = "GenericError";

/// QEMU's class for commands that it does not know, or not now.
pub(super) const NOT_FOUND: &str = "CommandNotFound";

/// A command.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Request {
    /// What the client calls it: any JSON value, given back as it is. Absent is not null.
    pub(super) id: Option<Value>,
    pub(super) command: String,
    pub(super) arguments: Option<Map<String, Value>>,
    /// Whether it may overtake others (`exec-oob`).
    pub(super) oob: bool,
}

/// An error answer.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Refusal {
    pub(super) id: Option<Value>,
    pub(super) class: String,
    pub(super) desc: String,
}

impl Refusal {
    pub(super) fn new(id: Option<Value>, class: &str, desc: impl Into<String>) -> Self {
        Self { id, class: class.to_owned(), desc: desc.into() }
    }

    /// The line for it.
    pub(super) fn line(&self) -> Vec<u8> {
        let error = serde_json::json!({"class": self.class, "desc": self.desc});
        line(self.id.as_ref(), "error", &error.to_string())
    }
}

/// The line for what a command returned.
pub(super) fn returned(id: Option<&Value>, value: &RawValue) -> Vec<u8> {
    line(id, "return", value.get())
}

/// The line for a command that returns nothing.
pub(super) fn done(id: Option<&Value>) -> Vec<u8> {
    line(id, "return", "{}")
}

fn line(id: Option<&Value>, key: &str, value: &str) -> Vec<u8> {
    let id = id.map(|id| format!(", \"id\": {id}")).unwrap_or_default();
    format!("{{\"{key}\": {value}{id}}}\r\n").into_bytes()
}

impl Request {
    /// Reads one value. `oob` is whether the client has enabled out-of-band execution.
    pub(super) fn parse(value: &[u8], oob: bool) -> Result<Self, Refusal> {
        let generic = |id, desc: String| Refusal::new(id, GENERIC, desc);
        let value = serde_json::from_slice::<Strict>(value)
            .map_err(|e| generic(None, format!("JSON parse error, {}", position_free(&e))))?;
        let Value::Object(mut members) = value.0 else {
            return Err(generic(None, super::frame::NO_OBJECT.to_owned()));
        };
        let id = members.remove("id");
        let mut found: Option<(&str, String)> = None;
        let mut arguments = None;
        for (name, value) in members {
            let key = match name.as_str() {
                "execute" => "execute",
                "exec-oob" if oob => "exec-oob",
                "arguments" => {
                    let Value::Object(map) = value else {
                        return Err(generic(id, "QMP input member 'arguments' must be an object".to_owned()));
                    };
                    arguments = Some(map);
                    continue;
                }
                _ => return Err(generic(id, format!("QMP input member '{name}' is unexpected"))),
            };
            if let Some((other, _)) = found {
                return Err(generic(id, format!("QMP input member '{key}' clashes with '{other}'")));
            }
            let Value::String(command) = value else {
                return Err(generic(id, format!("QMP input member '{key}' must be a string")));
            };
            found = Some((key, command));
        }
        let (key, command) = found.ok_or_else(|| generic(id.clone(), "QMP input lacks member 'execute'".to_owned()))?;
        Ok(Self { id, command, arguments, oob: key == "exec-oob" })
    }
}

/// `serde_json`'s words without line and column, which count from the value's own start.
fn position_free(error: &serde_json::Error) -> String {
    let text = error.to_string();
    text.split_once(" at line ").map_or(text.clone(), |(what, _)| what.to_owned())
}

/// A JSON value in which no key stands twice: QEMU refuses that, and who reads it otherwise than QEMU measures
/// something else than QEMU does.
struct Strict(Value);

impl<'de> Deserialize<'de> for Strict {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        d.deserialize_any(StrictVisitor).map(Strict)
    }
}

struct StrictVisitor;

impl<'de> Visitor<'de> for StrictVisitor {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E: de::Error>(self, value: f64) -> Result<Value, E> {
        Number::from_f64(value).map(Value::Number).ok_or_else(|| E::custom("number out of range"))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_string<E>(self, value: String) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Value, A::Error> {
        let mut list = Vec::new();
        while let Some(Strict(value)) = seq.next_element()? {
            list.push(value);
        }
        Ok(Value::Array(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Value, A::Error> {
        let mut map = Map::new();
        while let Some(key) = access.next_key::<String>()? {
            let Strict(value) = access.next_value()?;
            if map.insert(key, value).is_some() {
                return Err(de::Error::custom("duplicate key"));
            }
        }
        Ok(Value::Object(map))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn desc(text: &str, oob: bool) -> (Option<Value>, String) {
        let refusal = Request::parse(text.as_bytes(), oob).unwrap_err();
        assert_eq!(refusal.class, GENERIC);
        (refusal.id, refusal.desc)
    }

    #[test]
    fn any_id_comes_back_as_it_was() {
        for id in [
            json!(null),
            json!(7),
            json!(-1),
            json!(18_446_744_073_709_551_615_u64),
            json!(1.5),
            json!("libvirt-12"),
            json!([1, {"a": "é"}]),
            json!({"a": [null]}),
            json!(true),
        ] {
            let request = Request::parse(json!({"execute": "x", "id": id}).to_string().as_bytes(), false).unwrap();
            assert_eq!(request.id.as_ref(), Some(&id));
            let raw = RawValue::from_string("{\"big\": 1e5}".to_owned()).unwrap();
            let line = String::from_utf8(returned(request.id.as_ref(), &raw)).unwrap();
            assert!(line.starts_with("{\"return\": {\"big\": 1e5}, \"id\": ") && line.ends_with("}\r\n"), "{line}");
            assert_eq!(serde_json::from_str::<Value>(&line).unwrap()["id"], id);
        }
        assert_eq!(Request::parse(b"{\"execute\": \"x\"}", false).unwrap().id, None);
    }

    /// The words are those of QEMU 7.2.
    #[test]
    fn errors_are_qemus() {
        for (text, want) in [
            (r#"{"execute":"x","bogus":1,"id":"b"}"#, "QMP input member 'bogus' is unexpected"),
            (r#"{"execute":5,"id":"b"}"#, "QMP input member 'execute' must be a string"),
            (r#"{"id":"b"}"#, "QMP input lacks member 'execute'"),
            (r#"{"execute":"x","arguments":5,"id":"b"}"#, "QMP input member 'arguments' must be an object"),
            (r#"{"exec-oob":"x","id":"b"}"#, "QMP input member 'exec-oob' is unexpected"),
        ] {
            assert_eq!(desc(text, false), (Some(json!("b")), want.to_owned()), "{text}");
        }
        assert_eq!(
            desc(r#"{"execute":"x","exec-oob":"y"}"#, true).1,
            "QMP input member 'execute' clashes with 'exec-oob'"
        );
        assert_eq!(desc("[1]", false).1, "QMP input must be a JSON object");
        for (text, want) in [
            (r#"{"execute":"a","execute":"b"}"#, "JSON parse error, duplicate key"),
            (r#"{"execute":"a","arguments":{"f":"a","f":"b"}}"#, "JSON parse error, duplicate key"),
            ("{]", "JSON parse error, "),
            ("{\"execute\": \"\\ud800\"}", "JSON parse error, "),
        ] {
            assert!(desc(text, false).1.starts_with(want), "{}", desc(text, false).1);
        }
    }

    fn json_value() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            any::<u64>().prop_map(Value::from),
            // Others may come out other by their last bit.
            any::<i32>().prop_map(|n| Value::from(f64::from(n) / 8.0)),
            any::<String>().prop_map(Value::from),
        ];
        leaf.prop_recursive(4, 32, 6, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..6).prop_map(Value::from),
                prop::collection::btree_map(any::<String>(), inner, 0..6)
                    .prop_map(|m| Value::Object(m.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #[test]
        fn values_pass_unchanged(id in json_value(), arguments in prop::collection::btree_map(any::<String>(), json_value(), 0..5)) {
            let arguments: Map<String, Value> = arguments.into_iter().collect();
            let text = json!({"execute": "x", "id": id, "arguments": arguments}).to_string();
            let request = Request::parse(text.as_bytes(), false).unwrap();
            prop_assert_eq!(request.id, Some(id));
            prop_assert_eq!(request.arguments, Some(arguments));
        }

        #[test]
        fn nothing_panics(bytes in prop::collection::vec(any::<u8>(), 0..200), oob in any::<bool>()) {
            let _ = Request::parse(&bytes, oob);
        }
    }
}
