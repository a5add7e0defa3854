//! What the HTTP hops at both ends of a session share around the parser.

pub mod discovery;
pub mod head;
mod rewound;

pub use rewound::Rewound;
