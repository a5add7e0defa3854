//! What bounds the relay's work: how many of each thing there may be, and how fast they may come.

pub(crate) mod admission;
pub(crate) mod carriers;
pub(crate) mod half_open;
pub(crate) mod handshakes;
pub(crate) mod keyed;
pub(crate) mod lines;
pub(crate) mod rate;
pub(crate) mod replay;
