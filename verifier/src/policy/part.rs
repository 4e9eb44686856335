//! A part that several rules have, written among their own keys.
//!
//! serde's `flatten` would take what it does not know without a word, and forget where it stood. So a part's keys are taken
//! out while the rule is read, by their common prefix, and all others go to the rule itself, which refuses those that it
//! does not know: each with its name and line.

use std::marker::PhantomData;

use serde::de::{
    DeserializeSeed, Deserializer, Error, IntoDeserializer as _, MapAccess, Visitor,
    value::{MapAccessDeserializer, StrDeserializer},
};

/// What several rules have in common.
pub(super) trait Part: Default {
    /// Its first key; those that go on after it with an underscore, and no others of a rule, are its keys too.
    const PREFIX: &'static str;
    /// Its keys.
    const KEYS: &'static [&'static str];

    /// Reads the value of one of its keys.
    ///
    /// # Errors
    /// The value's.
    fn take<'de, M: MapAccess<'de>>(&mut self, key: &str, map: &mut M) -> Result<(), M::Error>;
}

/// A rule that has a part.
pub(super) trait Whole<P>: Sized {
    /// Reads the rule's own keys.
    ///
    /// # Errors
    /// What is wrong with them.
    fn own<'de, D: Deserializer<'de>>(d: D) -> Result<Self, D::Error>;
}

/// Reads a rule and its part.
pub(super) fn deserialize<'de, W: Whole<P>, P: Part, D: Deserializer<'de>>(d: D) -> Result<(W, P), D::Error> {
    d.deserialize_map(Both(PhantomData))
}

struct Both<W, P>(PhantomData<(W, P)>);

impl<'de, W: Whole<P>, P: Part> Visitor<'de> for Both<W, P> {
    type Value = (W, P);

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a table")
    }

    fn visit_map<M: MapAccess<'de>>(self, map: M) -> Result<Self::Value, M::Error> {
        let mut part = P::default();
        let whole = W::own(MapAccessDeserializer::new(Rest { map, part: &mut part }))?;
        Ok((whole, part))
    }
}

/// A rule's table without the part's keys, whose values go to the part on the way.
struct Rest<'p, M, P> {
    map: M,
    part: &'p mut P,
}

impl<'de, M: MapAccess<'de>, P: Part> MapAccess<'de> for Rest<'_, M, P> {
    type Error = M::Error;

    fn next_key_seed<K: DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>, M::Error> {
        let mut seed = Some(seed);
        loop {
            let key = Key::<K, P> { whole: &mut seed, part: PhantomData };
            match self.map.next_key_seed(key)? {
                None => return Ok(None),
                Some(Whose::Whole(key)) => return Ok(Some(key)),
                Some(Whose::Part(key)) => self.part.take(key, &mut self.map)?,
            }
        }
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value, M::Error> {
        self.map.next_value_seed(seed)
    }
}

enum Whose<W> {
    Whole(W),
    Part(&'static str),
}

/// One key. What is wrong with it must be said in here: only so it is told with its place.
struct Key<'k, K, P> {
    whole: &'k mut Option<K>,
    part: PhantomData<P>,
}

impl<'de, K: DeserializeSeed<'de>, P: Part> DeserializeSeed<'de> for Key<'_, K, P> {
    type Value = Whose<K::Value>;

    fn deserialize<D: Deserializer<'de>>(self, d: D) -> Result<Self::Value, D::Error> {
        d.deserialize_str(self)
    }
}

impl<'de, K: DeserializeSeed<'de>, P: Part> Visitor<'de> for Key<'_, K, P> {
    type Value = Whose<K::Value>;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a key")
    }

    fn visit_str<E: Error>(self, key: &str) -> Result<Self::Value, E> {
        if key.strip_prefix(P::PREFIX).is_some_and(|rest| rest.is_empty() || rest.starts_with('_')) {
            let known = P::KEYS.iter().find(|known| **known == key);
            return known.copied().map(Whose::Part).ok_or_else(|| E::unknown_field(key, P::KEYS));
        }
        let seed = self.whole.take().ok_or_else(|| E::custom("a key without a reader"))?;
        let key: StrDeserializer<'_, E> = key.into_deserializer();
        seed.deserialize(key).map(Whose::Whole)
    }
}
