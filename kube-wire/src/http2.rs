//! HTTP/2 as frames (RFC 9113, section 4), around hyper at both ends: what its library decides without
//! asking us. Only the headers of frames are looked at; what is in them stays compressed.

pub mod frames;
pub mod interim;
pub mod open_streams;
