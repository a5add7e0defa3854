-- Times are milliseconds since 1970, UTC.

CREATE TABLE settings (
    key   TEXT PRIMARY KEY,
    value TEXT NOT NULL
) STRICT;

-- An enrolment token; only the hash of its secret is kept.
CREATE TABLE tokens (
    secret_hash BLOB PRIMARY KEY,
    kind        TEXT NOT NULL CHECK (kind IN ('cluster', 'user')),
    name        TEXT NOT NULL,
    groups      TEXT NOT NULL, -- JSON array of strings
    created_at  INTEGER NOT NULL,
    expires_at  INTEGER NOT NULL,
    redeemed_at INTEGER
) STRICT;

-- Every certificate issued to a cluster or a user.
CREATE TABLE certificates (
    serial       TEXT PRIMARY KEY,
    kind         TEXT NOT NULL,
    name         TEXT NOT NULL,
    fingerprint  BLOB NOT NULL,
    not_before   INTEGER NOT NULL,
    not_after    INTEGER NOT NULL,
    issued_at    INTEGER NOT NULL,
    enrolled_at  INTEGER NOT NULL, -- of the token at the head of the chain of renewals
    renewed_from TEXT REFERENCES certificates (serial)
) STRICT;

CREATE INDEX certificates_by_name ON certificates (kind, name);

CREATE TABLE clusters (
    name               TEXT PRIMARY KEY,
    created_at         INTEGER NOT NULL,
    enrolled_at        INTEGER,
    last_connected_at  INTEGER,
    last_seen_at       INTEGER,
    kubernetes_version TEXT,
    agent_version      TEXT
) STRICT;
