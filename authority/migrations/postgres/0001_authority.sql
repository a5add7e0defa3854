-- What the authority keeps. Times are milliseconds since 1970, UTC, by the relays' clocks. The CA's
-- key is never here.
--
-- Up to version 3 these files and those of the relay were one set, with the same numbers.

CREATE TABLE settings (
    key   TEXT PRIMARY KEY,
    value TEXT NOT NULL
);

-- An enrolment token; only the hash of its secret is kept.
CREATE TABLE tokens (
    secret_hash BYTEA PRIMARY KEY,
    kind        TEXT NOT NULL CHECK (kind IN ('cluster', 'user')),
    name        TEXT NOT NULL,
    groups      TEXT NOT NULL, -- JSON array of strings
    created_at  BIGINT NOT NULL,
    expires_at  BIGINT NOT NULL,
    redeemed_at BIGINT
);

-- Every certificate issued to a cluster or a user.
CREATE TABLE certificates (
    serial       TEXT PRIMARY KEY,
    kind         TEXT NOT NULL,
    name         TEXT NOT NULL,
    fingerprint  BYTEA NOT NULL,
    not_before   BIGINT NOT NULL,
    not_after    BIGINT NOT NULL,
    issued_at    BIGINT NOT NULL,
    enrolled_at  BIGINT NOT NULL, -- of the token at the head of the chain of renewals
    renewed_from TEXT REFERENCES certificates (serial)
);

CREATE INDEX certificates_by_name ON certificates (kind, name);

CREATE TABLE clusters (
    name               TEXT PRIMARY KEY,
    created_at         BIGINT NOT NULL,
    enrolled_at        BIGINT,
    last_connected_at  BIGINT,
    last_seen_at       BIGINT,
    kubernetes_version TEXT,
    agent_version      TEXT
);
