//! The operations on CubeCL, behind every GPU backend of Burn.

mod backend;
mod product;
mod view;
