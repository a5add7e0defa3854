/// Why the database cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The URL that we were given.
    #[error("{0}")]
    Invalid(String),
    /// A statement or a connection failed.
    #[error("the database {at}: {what}")]
    Failed {
        /// `HOST:PORT/NAME`.
        at: String,
        /// What is wrong.
        what: String,
    },
}
