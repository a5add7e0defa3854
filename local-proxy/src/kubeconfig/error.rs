//! Why a kubeconfig was not changed.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

/// Why nothing was changed. Where several files are to be changed, those before may have been.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot read the kubeconfig {}: {source}", path.display())]
    Unreadable { path: PathBuf, source: io::Error },
    #[error("cannot write the kubeconfig {}: {source}; choose another file with --kubeconfig", path.display())]
    Unwritable { path: PathBuf, source: io::Error },
    #[error("the kubeconfig {} is broken and was not touched: {source}", path.display())]
    Broken { path: PathBuf, source: Box<Fault> },
    #[error(
        "the kubeconfig {} was not touched, since what else is in it might change: {source}; write that part as kubectl does, or choose another file with --kubeconfig and list both in KUBECONFIG",
        path.display()
    )]
    Unsafe { path: PathBuf, source: Box<Fault> },
    #[error("the kubeconfig {} is being changed by another program: {} exists since {age:?}; if no such program runs, remove that file", path.display(), lock.display())]
    Locked {
        path: PathBuf,
        lock: PathBuf,
        age: Duration,
    },
    #[error("the kubeconfig was not changed: the local proxy stops")]
    Stopped,
}

/// What is wrong with a kubeconfig, or would be after a change.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    #[error("it is not a regular file")]
    NotAFile,
    #[error("it is larger than {limit} bytes")]
    TooLarge { limit: u64 },
    #[error("it is not UTF-8 text")]
    NotText,
    #[error(transparent)]
    Syntax(#[from] granit_parser::ScanError),
    /// libyaml does not read it, so kubectl does not.
    #[error(transparent)]
    Yaml(#[from] serde_norway::Error),
    #[error("a collection ends that did not begin")]
    Unbalanced,
    #[error("a node is outside of the text")]
    Outside,
    #[error("a node has no place in the text")]
    NoPlace,
    #[error("it has carriage returns that end no line")]
    CarriageReturns,
    #[error("its top level is not a mapping")]
    NotAMapping,
    #[error("its top level takes a part of itself from elsewhere, by '<<'")]
    Merged,
    #[error("its top level is empty in a way that is not known")]
    Empty,
    #[error("'{list}' has an anchor or a tag")]
    DecoratedList { list: String },
    #[error("'{name}' in '{list}' has an anchor, an alias or a tag")]
    DecoratedItem { list: String, name: String },
    #[error("'{list}' is not a list")]
    NotAList { list: String },
    #[error("'{list}' was not found")]
    NotFound { list: String },
    #[error("the items of '{list}' do not begin on lines of their own")]
    SharedLines { list: String },
    #[error("'{key}' is not a plain string")]
    NotAString { key: String },
    #[error("the result could not be read: {0}")]
    Result(#[source] Box<Fault>),
    #[error("what is not Throwline's would change")]
    ForeignChange,
    #[error("'{key}' would be wrong")]
    WrongKey { key: String },
    #[error("an item of '{list}' would be wrong")]
    WrongItem { list: String },
    #[error("an item of '{list}' would change")]
    ChangedItem { list: String },
    #[error("an item of '{list}' would be lost")]
    LostItem { list: String },
    #[error("nothing would be left")]
    NothingLeft,
    #[error("something else would be added")]
    Addition,
}
