//! The list of revocations, and the document in which it is stored and sent.

use crate::{Error, InvalidInput, JsonError, Kind, PeerIdentity, TrustDomain};
use serde::{Deserialize, Serialize};
use std::{
    collections::{HashMap, HashSet},
    time::{SystemTime, UNIX_EPOCH},
};

/// Bytes of a list: room for some 20,000 entries.
pub const MAX_LIST: usize = 2 * 1024 * 1024;
/// Bytes of one name or serial number in a list; names have 128 characters at most.
const MAX_NAME: usize = 1024;

/// Which certificates no longer count.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Revocations {
    version: u64,
    /// Of each identity, the last second at which a revoked certificate's life may begin, since 1970.
    identities: HashMap<(Kind, String), u64>,
    serials: HashSet<String>,
}

/// Why a signed list was not accepted. Its carrier's fault, unless the authority is at fault.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ListError {
    /// Larger than a valid list.
    #[error("the list of revocations is too large")]
    TooBig,
    /// Not signed by a CA that is trusted here.
    #[error("the list of revocations is not signed by this authority")]
    BadSignature,
    /// The list is of another trust domain.
    #[error("the list of revocations is of the trust domain {0}")]
    Domain(String),
    /// The document cannot be decoded.
    #[error("the list of revocations is malformed: {0}")]
    Malformed(#[source] MalformedList),
}

/// The rule of form that a list breaks.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MalformedList {
    /// It is of another shape.
    #[error(transparent)]
    Json(JsonError),
    /// Longer than any name.
    #[error("a name is too long")]
    LongName,
    /// Longer than any serial number.
    #[error("a serial number is too long")]
    LongSerial,
}

/// The document. Members that are not known here are ignored.
#[derive(Serialize, Deserialize)]
struct Document {
    domain: String,
    version: u64,
    #[serde(default)]
    identities: Vec<Entry>,
    #[serde(default)]
    serials: Vec<String>,
}

#[derive(Serialize, Deserialize)]
struct Entry {
    kind: String,
    name: String,
    last_not_before: u64,
}

impl Revocations {
    /// An empty list of this version.
    pub fn new(version: u64) -> Self {
        Self {
            version,
            ..Self::default()
        }
    }

    /// Revokes the certificates of an identity whose life begins at `last_not_before` (seconds since
    /// 1970) or earlier.
    #[must_use]
    pub fn identity(mut self, kind: Kind, name: &str, last_not_before: u64) -> Self {
        let last = self.identities.entry((kind, name.to_owned())).or_default();
        *last = last_not_before.max(*last);
        self
    }

    /// Revokes one certificate by its serial number, in lower-case hexadecimal.
    #[must_use]
    pub fn serial(mut self, serial: &str) -> Self {
        self.serials.insert(serial.to_owned());
        self
    }

    /// Rises with every revocation.
    pub fn version(&self) -> u64 {
        self.version
    }

    /// How many entries there are.
    pub fn len(&self) -> usize {
        self.identities.len() + self.serials.len()
    }

    /// Whether nothing is revoked.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether this certificate is revoked.
    pub fn covers(&self, peer: &PeerIdentity) -> bool {
        self.serials.contains(&peer.serial)
            || self.covers_life(peer.id.kind(), peer.id.name(), peer.not_before)
    }

    /// Whether an identity's certificate whose life begins then is revoked by its name.
    pub fn covers_life(&self, kind: Kind, name: &str, begins: SystemTime) -> bool {
        if self.identities.is_empty() {
            return false;
        }
        let begins = begins.duration_since(UNIX_EPOCH);
        let begins = begins.map_or(0, |since| since.as_secs());
        let last = self.identities.get(&(kind, name.to_owned()));
        last.is_some_and(|last| begins <= *last)
    }

    /// The document that is signed.
    ///
    /// # Errors
    /// The list is larger than a document may be.
    pub fn to_document(&self, domain: &TrustDomain) -> Result<Vec<u8>, Error> {
        let mut identities: Vec<_> = self
            .identities
            .iter()
            .map(|((kind, name), last)| Entry {
                kind: kind.as_str().to_owned(),
                name: name.clone(),
                last_not_before: *last,
            })
            .collect();
        // A hash map has no order; sorted, one list has one document.
        identities.sort_by(|a, b| (&a.kind, &a.name).cmp(&(&b.kind, &b.name)));
        let mut serials: Vec<_> = self.serials.iter().cloned().collect();
        serials.sort();
        let document = Document {
            domain: domain.as_str().to_owned(),
            version: self.version,
            identities,
            serials,
        };
        let list = serde_json::to_vec(&document).map_err(InvalidInput::from)?;
        if list.len() > MAX_LIST {
            return Err(InvalidInput::TooManyRevocations.into());
        }
        Ok(list)
    }
}

/// Reads a document that has been verified.
pub(super) fn read(list: &[u8], domain: &TrustDomain) -> Result<Revocations, ListError> {
    let document: Document = serde_json::from_slice(list)
        .map_err(|error| ListError::Malformed(MalformedList::Json(error.into())))?;
    // A CA that is trusted in two domains must not have its list of one replayed in the other.
    if document.domain != domain.as_str() {
        return Err(ListError::Domain(document.domain));
    }
    let mut revocations = Revocations::new(document.version);
    for entry in document.identities {
        if entry.name.len() > MAX_NAME {
            return Err(ListError::Malformed(MalformedList::LongName));
        }
        // A kind of a later version is not checked here.
        let Ok(kind) = entry.kind.parse::<Kind>() else {
            continue;
        };
        revocations = revocations.identity(kind, &entry.name, entry.last_not_before);
    }
    for serial in document.serials {
        if serial.len() > MAX_NAME {
            return Err(ListError::Malformed(MalformedList::LongSerial));
        }
        revocations = revocations.serial(&serial);
    }
    Ok(revocations)
}

/// A serial number as people write it (with colons, in capitals) in the form that is compared.
///
/// # Errors
/// It is not hexadecimal.
pub fn parse_serial(text: &str) -> Result<String, Error> {
    let serial: String = text
        .chars()
        .filter(|c| *c != ':')
        .map(|c| c.to_ascii_lowercase())
        .collect();
    let is_hex = !serial.is_empty() && serial.chars().all(|c| c.is_ascii_hexdigit());
    if !is_hex || serial.len() > MAX_NAME {
        return Err(InvalidInput::Serial.into());
    }
    Ok(serial)
}
