//! What QEMU's own schema says of its commands (`query-qmp-schema`; QEMU `docs/devel/qapi-code-gen`, "client JSON
//! protocol introspection").

use std::collections::{BTreeMap, BTreeSet};

use serde::Deserialize;

use super::files;

/// Commands, and what their arguments may hold.
#[derive(Debug, Default)]
pub(super) struct Schema {
    commands: BTreeMap<String, Command>,
}

/// One command.
#[derive(Debug)]
pub(super) struct Command {
    /// Whether it may overtake others.
    pub(super) oob: bool,
    /// Members of its arguments, at any depth, whose names are those of files and that this version has no rule for.
    pub(super) unknown_files: BTreeSet<String>,
}

/// An entry of the schema, as far as it is needed.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct Entity {
    name: String,
    meta_type: String,
    #[serde(default)]
    arg_type: Option<String>,
    #[serde(default)]
    allow_oob: bool,
    #[serde(default)]
    json_type: Option<String>,
    #[serde(default)]
    element_type: Option<String>,
    #[serde(default)]
    members: Vec<Member>,
    #[serde(default)]
    variants: Vec<Variant>,
}

/// Of an object (name and type), an alternate (type) or an enumeration (name).
#[derive(Debug, Deserialize)]
struct Member {
    #[serde(default)]
    name: Option<String>,
    #[serde(default, rename = "type")]
    kind: Option<String>,
}

#[derive(Debug, Deserialize)]
struct Variant {
    #[serde(rename = "type")]
    kind: String,
}

impl Schema {
    /// Reads what `query-qmp-schema` returned.
    pub(super) fn new(entities: &[Entity]) -> Self {
        let types: BTreeMap<&str, &Entity> = entities.iter().map(|e| (e.name.as_str(), e)).collect();
        let of_commands = entities.iter().filter(|e| e.meta_type == "command");
        let commands = of_commands.map(|e| {
            let mut members = BTreeSet::new();
            if let Some(arg) = &e.arg_type {
                texts(&types, arg, None, &mut BTreeSet::new(), &mut members);
            }
            members.retain(|member| files::looks_like_one(member) && !files::is_reviewed(&e.name, member));
            (e.name.clone(), Command { oob: e.allow_oob, unknown_files: members })
        });
        Self { commands: commands.collect() }
    }

    /// A command, if QEMU has it.
    pub(super) fn command(&self, name: &str) -> Option<&Command> {
        self.commands.get(name)
    }

    /// The commands' names.
    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.commands.keys().map(String::as_str)
    }
}

/// Collects the names of members that are text, below the type `kind`. `name` is the member that has this type.
fn texts<'a>(
    types: &BTreeMap<&'a str, &'a Entity>,
    kind: &str,
    name: Option<&str>,
    seen: &mut BTreeSet<(&'a str, Option<String>)>,
    found: &mut BTreeSet<String>,
) {
    let Some((&key, entity)) = types.get_key_value(kind) else { return };
    // The same type can be a member under several names, and within itself.
    if !seen.insert((key, name.map(str::to_owned))) {
        return;
    }
    match entity.meta_type.as_str() {
        "builtin" if entity.json_type.as_deref() == Some("string") => found.extend(name.map(str::to_owned)),
        "array" => {
            if let Some(element) = &entity.element_type {
                texts(types, element, name, seen, found);
            }
        }
        "alternate" => {
            for member in entity.members.iter().filter_map(|m| m.kind.as_deref()) {
                texts(types, member, name, seen, found);
            }
        }
        "object" => {
            for member in &entity.members {
                if let Some(kind) = &member.kind {
                    texts(types, kind, member.name.as_deref(), seen, found);
                }
            }
            for variant in &entity.variants {
                texts(types, &variant.kind, name, seen, found);
            }
        }
        _ => {}
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_found_however_deep() {
        let entities: Vec<Entity> = serde_json::from_value(serde_json::json!([
            {"name": "future-add", "meta-type": "command", "arg-type": "1", "ret-type": "0"},
            {"name": "x-oob", "meta-type": "command", "arg-type": "0", "ret-type": "0", "allow-oob": true},
            {"name": "0", "meta-type": "object", "members": []},
            {"name": "1", "meta-type": "object", "members": [{"name": "kind", "type": "e"}, {"name": "next", "type": "a"}],
             "tag": "kind", "variants": [{"case": "x", "type": "2"}]},
            {"name": "2", "meta-type": "object", "members": [{"name": "seed-file", "type": "[str]"}, {"name": "id", "type": "str"}]},
            {"name": "a", "meta-type": "alternate", "members": [{"type": "1"}, {"type": "str"}]},
            {"name": "e", "meta-type": "enum", "members": [{"name": "x"}], "values": ["x"]},
            {"name": "[str]", "meta-type": "array", "element-type": "str"},
            {"name": "str", "meta-type": "builtin", "json-type": "string"},
            {"name": "STOP", "meta-type": "event", "arg-type": "0"},
        ]))
        .unwrap();
        let schema = Schema::new(&entities);
        assert_eq!(schema.names().collect::<Vec<_>>(), ["future-add", "x-oob"]);
        let command = schema.command("future-add").unwrap();
        assert_eq!(command.unknown_files.iter().collect::<Vec<_>>(), ["seed-file"]);
        assert!(!command.oob && schema.command("x-oob").unwrap().oob && schema.command("STOP").is_none());
    }
}
