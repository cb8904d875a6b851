//! The cases that are compared or timed.

use burn::tensor::DType;
use serde::Serialize;

/// An operation, a dtype, sizes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Case {
    pub operation: String,
    pub dtype: String,
    pub sizes: String,
}

impl Case {
    pub fn new(operation: impl Into<String>, dtype: DType, sizes: impl Into<String>) -> Self {
        Self {
            operation: operation.into(),
            dtype: dtype.name().into(),
            sizes: sizes.into(),
        }
    }
}
