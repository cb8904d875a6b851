//! The values of `config.json` by key, with what is wrong with them.

use serde::Deserialize;
use serde_json::{Map, Value};

/// What is wrong with a key.
pub(super) type Fault = (String, String);

/// The values of `config.json` by key.
pub(super) struct Keys<'a> {
    pub(super) map: &'a Map<String, Value>,
    /// What stands before a key in messages.
    pub(super) prefix: &'static str,
}

impl<'a> Keys<'a> {
    /// The value of a key; `None` where it is missing or null.
    pub(super) fn get<T: Deserialize<'a>>(&self, key: &str) -> Result<Option<T>, Fault> {
        match self.map.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => T::deserialize(value).map(Some).map_err(|error| {
                (
                    format!("{}{key}", self.prefix),
                    format!("is {value}: {error}"),
                )
            }),
        }
    }

    pub(super) fn need<T: Deserialize<'a>>(&self, key: &str) -> Result<T, Fault> {
        let missing = || (format!("{}{key}", self.prefix), "is missing".into());
        self.get(key)?.ok_or_else(missing)
    }

    /// The object under a key.
    pub(super) fn object(
        &self,
        key: &'static str,
        prefix: &'static str,
    ) -> Result<Option<Self>, Fault> {
        match self.map.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::Object(map)) => Ok(Some(Self { map, prefix })),
            Some(value) => Err((key.into(), format!("is {value}, not an object"))),
        }
    }
}
